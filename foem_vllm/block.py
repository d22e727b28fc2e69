"""One block of the model: its linears quantized in place, stage by stage, on inputs that earlier ones have already moved.

Where the recipe corrects for that drift, the original block is run once beside it and what it shows is kept until the stage's
turn comes. A linear that adds to the residual stream is aimed at the original stream, and so makes up for what earlier layers did
to it; any other at its own original output.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from foem_vllm import capture, distributed, experts, models, selection
from foem_vllm.clock import Clock
from foem_vllm.errors import FoemError
from foem_vllm.format import Quantized, QuantSpec, dequantize
from foem_vllm.grid import round_to_nearest
from foem_vllm.recipe import Recipe
from foem_vllm.report import LayerResult
from foem_vllm.rows import Settled, power, settle, solve_shared
from foem_vllm.store import Batches, Held
from foem_vllm.stream import BlockInputs


class BlockSolver:
    """inputs: the hidden states before the block in the quantized model, original: in the original one; both are advanced to the
    next block. None for recipes that read no text, or need no second stream. guidance: see endtoend.guide."""

    def __init__(
        self,
        recipe: Recipe,
        scale_dtypes: tuple[torch.dtype, ...],
        inputs: BlockInputs | None,
        original: BlockInputs | None,
        guidance: list[dict[str, list[torch.Tensor]]] | None = None,
        clock: Clock | None = None,
    ):
        self.clock = clock or Clock()
        self.recipe, self.scale_dtypes, self.inputs, self.original = recipe, scale_dtypes, inputs, original
        self.guidance = guidance
        self.specs: dict[str, QuantSpec] = {}  # of the current block's linears, by their names in it
        self._found: dict[tuple, object] = {}  # what trials showed

    def solve(
        self, index: int, block: nn.Module, untouched: nn.Module | None, prefix: str, specs: dict[str, QuantSpec]
    ) -> Iterator[tuple[LayerResult, Quantized]]:
        """Quantize the linears of block number `index` that `specs` has by full name (prefix + name); both blocks are filled."""
        linears = {n: m for n, m in models.find_linears(block).items() if prefix + n in specs}
        self.specs = {n: specs[prefix + n] for n in linears}
        if self.inputs is None:
            for n, linear in linears.items():
                yield self._nearest(linear, prefix + n, self.specs[n], [])
            return
        known, store = capture.Known(block), self.inputs.hidden.store

        def run(b: int) -> torch.Tensor:
            with self.clock("forward"), known.of(b):
                return self.inputs.call(index, block, b)

        separate = experts.find(block)
        plain = {n: m for n, m in linears.items() if not any(n.startswith(f"{name}.") for name in separate)}
        stages, places, parts = self._examine(index, block, plain)
        shown = self._record(index, untouched, stages, places, set(separate)) if self.original else None
        reached: set[str] = set()
        for stage in stages:
            part = parts.get(stage[0])
            moments, fed = self._collect(index, block, prefix, stage, places.get(stage[0]), shown, run, part is not None)
            if moments.tokens:
                yield from self._solve_stage({n: linears[n] for n in stage}, prefix, moments)
                reached |= set(stage)
            if part is not None and all(x is not None for x in fed):
                with self.clock("forward"):
                    known.add(part, Batches(store, (linears[stage[0]](x.get()) for x in fed)))
            del fed
        for name in separate:
            yield from self._solve_experts(block, untouched, prefix, name, linears, shown, run)
        for n, linear in plain.items():
            if n not in reached:
                yield self._nearest(linear, prefix + n, self.specs[n], ["no calibration token reached it: rounded to nearest"])
        for b in range(len(self.inputs.hidden)):
            self.inputs.hidden[b] = run(b)

    def advance(self, index: int, block: nn.Module, untouched: nn.Module | None, weights: dict[str, torch.Tensor]) -> None:
        """Both streams past a block that was quantized before; weights: name in the block -> what its linear dequantizes to."""
        linears = models.find_linears(block)
        if self.inputs is not None:
            # As `solve` did: what one block shows is remembered for those that are built alike.
            separate = experts.find(block)
            self._examine(index, block, {n: linears[n] for n in weights if not any(n.startswith(f"{e}.") for e in separate)})
        for name, weight in weights.items():
            linears[name].weight.data.copy_(weight)
        for stream, passed in ((self.inputs, block), (self.original, untouched)):
            for b in range(len(stream.hidden) if stream else 0):
                stream.hidden[b] = stream.call(index, passed, b)

    def _examine(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear]
    ) -> tuple[list[list[str]], dict[str, str | None], dict[str, capture.Part | None]]:
        """How the block is put together: (stages of linears that share an input; of those with one linear, where its output joins
        the residual stream, and the part of the block that it is the output of)."""
        stages = self._find_stages(block, linears, functools.partial(self.inputs.call, index, block))
        # Several sequences, of different batches where there are some: routed experts then show that they do not see all tokens.
        hidden = self.inputs.hidden
        several = min(4, len(hidden[0]))
        several = torch.cat([h[:1] for h in hidden[:several]]) if len(hidden) >= several else hidden[0]
        trial = functools.partial(self.inputs.run, index, block, several)
        alone = [s[0] for s in stages if len(s) == 1]
        places = {n: self._trial(capture.find_sum, block, n, trial) for n in alone if self.recipe.correct != 0}
        parts = {n: self._trial(capture.find_part, block, n, trial) for n in alone}
        if distributed.size() > 1 and sum(map(len, stages)) < len(linears):
            raise FoemError(
                "the first batch does not reach all linears of a block (routed experts that are modules of their own); quantize "
                "this model with one process"
            )
        return distributed.agreed((stages, places, parts))

    def _solve_experts(
        self, block: nn.Module, untouched: nn.Module | None, prefix: str, name: str, linears: dict[str, nn.Linear], shown, run
    ) -> Iterator[tuple[LayerResult, Quantized]]:
        """Quantize separate experts, one after the other, on the tokens that the router gives each: what reaches the router is
        known once, because no expert feeds another. With `shown` they are aimed at their own outputs in the original model."""
        module = block.get_submodule(name)
        calls = experts.recorded_calls(module, run, len(self.inputs.hidden))
        drift = (untouched.get_submodule(name), [s[name].get().flatten(0, -2) for s in shown]) if shown else ()
        for expert, stage in module.stages():
            members = {f"{name}.{n}": linears[f"{name}.{n}"] for n in stage if f"{name}.{n}" in linears}
            if not members:
                continue
            moments, tokens = experts.moments_of(module, expert, stage[0], calls, selection.FOLDS, *drift)
            for result, q in self._solve_stage(members, prefix, moments):
                result.tokens = tokens
                if tokens < result.k:
                    result.notes.append(f"{tokens} tokens for {result.k} inputs: Hessian shrunk towards that of all tokens")
                yield result, q

    def _solve_stage(
        self, linears: dict[str, nn.Linear], prefix: str, moments: capture.Moments
    ) -> Iterator[tuple[LayerResult, Quantized]]:
        """Linears with the same input: as one matrix where they are quantized alike."""
        means = moments.means(name=", ".join(prefix + n for n in linears))
        folds = moments.folds() if self.recipe.judged else moments.forget()
        alike: dict[QuantSpec, dict[str, nn.Linear]] = {}
        for n, linear in linears.items():
            alike.setdefault(self.specs[n], {})[n] = linear
        with self.clock("solve"):
            settled = {s: settle(_stacked(of), folds, s, self.recipe, self.scale_dtypes) for s, of in alike.items()}
        del folds
        for spec, of in alike.items():
            yield from self._solve_alike(of, spec, prefix, means, settled[spec])

    def _solve_alike(
        self, linears: dict[str, nn.Linear], spec: QuantSpec, prefix: str, means: capture.Means, settled: Settled
    ) -> Iterator[tuple[LayerResult, Quantized]]:
        stacked = _stacked(linears)
        with self.clock("solve"):
            solved, after, losses = solve_shared(stacked, means, spec, settled)
        row = 0
        for name, linear in linears.items():
            rows = slice(row, row + linear.out_features)
            row = rows.stop
            result = self._result(linear, prefix + name, spec, list(solved.notes))
            result.loss = float(losses[rows].mean())
            result.relative = result.loss / max(power(stacked[rows], means), 1e-30)
            settled.describe(result, solved.damping, means.tokens)
            linear.weight.data.copy_(after[rows])
            yield result, Quantized(*(t[rows] if t is not None and t.ndim == 2 else t for t in solved.quantized))

    def _nearest(self, linear: nn.Linear, name: str, spec: QuantSpec, notes: list[str]) -> tuple[LayerResult, Quantized]:
        q = round_to_nearest(linear.weight.float(), spec, self.scale_dtypes, self.recipe.grid == "search")
        linear.weight.data.copy_(dequantize(q, spec))
        return self._result(linear, name, spec, notes), q

    def _result(self, linear: nn.Linear, name: str, spec: QuantSpec, notes: list[str]) -> LayerResult:
        n, k = linear.weight.shape
        return LayerResult(name, n, k, spec.bits, spec.group_size, notes=notes)

    def _trial(self, find: Callable, block: nn.Module, name: str, run: Callable):
        """find(block, name, run), once for all blocks built alike."""
        key = find, type(block), name, tuple(n for n, _ in block.named_modules())
        if key not in self._found:
            self._found[key] = find(block, name, run)
        return self._found[key]

    def _find_stages(self, block: nn.Module, linears: dict[str, nn.Linear], run: Callable) -> list[list[str]]:
        """capture.find_stages, once for all blocks built alike if the first batch reaches all their linears; else (routed experts
        that are modules of their own) of every batch, until all are reached."""
        key = type(block), tuple(linears)
        if key in self._found:
            return self._found[key]
        stages = capture.find_stages(linears, functools.partial(run, 0))
        if sum(map(len, stages)) == len(linears):
            self._found[key] = stages
        for b in range(1, len(self.inputs.hidden)):
            missing = linears.keys() - {n for stage in stages for n in stage}
            if not missing:
                break
            stages = stages + capture.find_stages({n: linears[n] for n in linears if n in missing}, functools.partial(run, b))
        return stages

    def _record(
        self, index: int, untouched: nn.Module, stages: list[list[str]], places: dict[str, str | None], others: set[str]
    ) -> list[dict[str, Held]]:
        """What the original block shows, batch by batch, where the quantized one will be compared with it; advances its stream.

        Three more hidden states a token for the usual block: the price of running it only once.
        """
        names = {"", *others, *(s[0] if places.get(s[0]) is None else places[s[0]] for s in stages)}
        shown, store = [], self.original.hidden.store
        for b in range(len(self.original.hidden)):
            with self.clock("forward"):
                found = capture.observe(untouched, names, functools.partial(self.original.call, index, untouched, b))
            shown.append({name: store.put(tensor) for name, tensor in found.items()})
            self.original.hidden[b] = shown[b][""]
        return shown

    def _collect(
        self,
        index: int,
        block: nn.Module,
        prefix: str,
        stage: list[str],
        place: str | None,
        shown: list[dict[str, Held]] | None,
        run: Callable,
        keep: bool,
    ) -> tuple[capture.Moments, list[Held | None]]:
        """(moments, over the calibration text, of what feeds the stage, and of its drift from what the original block
        showed; with `keep` also what feeds it, batch by batch)."""
        first = stage[0]
        linear = block.get_submodule(first)
        token_weights = self._token_weights(index, {n: block.get_submodule(n).out_features for n in stage})
        n, k = linear.weight.shape
        joins = shown is not None and place is not None
        cross = shown is not None and place is None
        moments = capture.Moments(k, linear.weight.device, selection.FOLDS, cross, n if joins else None)
        kept = []
        at = first if place is None else place
        for b in range(len(self.inputs.hidden)):
            with capture.silent(linear) if joins else contextlib.nullcontext():
                now = capture.observe(block, {first, at}, functools.partial(run, b))
            then = shown[b][at].get() if shown and at in shown[b] else None
            if shown and getattr(then, "shape", None) != getattr(now.get(at), "shape", None):
                raise FoemError(
                    f"{prefix}{first}: other tokens reach it than in the original model (routed experts); use --preset fast, "
                    "or --exclude it"
                )
            if first in now:  # else none of the batch's tokens is routed to it
                with self.clock("moments"):
                    moments.add(
                        distributed.number(b) % selection.FOLDS,
                        now[first],
                        now[at],
                        then,
                        token_weights[b] if token_weights else None,
                    )
            if keep:
                kept.append(self.inputs.hidden.store.put(now[first]) if first in now else None)
        return moments.gather(), kept

    def _token_weights(self, index: int, stage: dict[str, int]) -> list[torch.Tensor] | None:
        """[tokens] a batch, mean 1 over the text: the root of the mean squared gradient over the stage's outputs.

        The square itself lets few tokens decide: with it the quantized model is farther from the original on held-out text.
        """
        if self.guidance is None or any(n not in self.guidance[index] for n in stage):
            return None
        batches = [sum(w * self.guidance[index][n][b] for n, w in stage.items()) for b in range(len(self.inputs.hidden))]
        batches = [b.sqrt() for b in batches]
        mean = torch.cat(batches).mean()
        if distributed.size() > 1:
            mean = distributed.total(float(torch.cat(batches).sum())) / distributed.total(sum(map(len, batches)))
        return [b / mean for b in batches] if mean > 0 else None


def _stacked(linears: dict[str, nn.Linear]) -> torch.Tensor:
    """[N, K] float32: their weights, one below the other."""
    return torch.cat([m.weight.float() for m in linears.values()])
