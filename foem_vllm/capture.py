"""What linears are fed, collected by hooks, and its second moments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from foem_kernels import cpu_moments
from torch import nn

from foem_vllm import distributed
from foem_vllm.errors import FoemError
from foem_vllm.solver import is_finite
from foem_vllm.store import Batches
from foem_vllm.stream import StopForward

GRAM_STEP = 128  # rows of a second moment that are computed together
MIRROR_STEP = 512  # and that are copied to below the diagonal together
SUM_SHARE = 0.9  # of the elements must show a perturbation unchanged where a linear's output is found again


class Means(NamedTuple):
    """Moments per token. h: X_q^T X_q [K, K]. d: (X_fp - X_q)^T X_q [K, K]. g: (Y_fp - Y_q)^T X_q [N, K], where Y_fp is the
    residual stream that the linear's output has joined, and Y_q the same in the quantized model without that output. tokens: how
    many."""

    h: torch.Tensor
    d: torch.Tensor | None
    g: torch.Tensor | None
    tokens: int


class Moments:
    """Sums behind `Means`, in float32, kept apart for `folds` parts of the text: one can judge what another made.

    cross: with d. outputs: N of the linear, with g.
    """

    def __init__(self, k: int, device: torch.device, folds: int = 1, cross: bool = False, outputs: int | None = None):
        self.counts = [0] * folds
        self._h = torch.zeros(folds, k, k, device=device)
        self._d = torch.zeros(folds, k, k, device=device) if cross else None
        self._g = None if outputs is None else torch.zeros(folds, outputs, k, device=device)

    def add(
        self,
        fold: int,
        x: torch.Tensor,
        now: torch.Tensor | None = None,
        then: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """x: [..., K] inputs in the quantized model. now, then: the same tokens in the quantized and in the original model:
        inputs [..., K] for d; for g the residual stream [..., N], `now` without the linear's output. weights:
        [tokens], how much each counts."""
        x = x.reshape(-1, x.shape[-1])
        self.counts[fold] += len(x)
        sums = self._d if self._g is None else self._g
        cross = None if sums is None else sums[fold]
        now, then = (None if cross is None else a.reshape(len(x), -1) for a in (now, then))
        if {a.dtype for a in (x, now, then) if a is not None} == {torch.bfloat16} and not cpu_moments.supports(x.device, x.dtype):
            return cpu_moments.add(self._h[fold], x, cross, then, now, weights)
        with tensor_cores(x.dtype):
            x = x.float()
            heavy = x if weights is None else x * weights[:, None]
            add_gram(self._h[fold], heavy, x)
            if cross is not None:
                cross.addmm_((then.float() - now.float()).T, heavy)

    def gather(self) -> Moments:
        """The same over the text of all processes."""
        self.counts = [round(distributed.total(count)) for count in self.counts] if distributed.size() > 1 else self.counts
        for sums in (self._h, self._d, self._g):
            if sums is not None:
                distributed.total_(sums)
        return self

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    def forget(self) -> list[Means]:
        """Let the sums go; the counts stay. Returns no folds."""
        self._h = self._d = self._g = None
        return []

    def folds(self) -> list[Means]:
        """The parts that saw tokens, in the memory of the sums: only the counts can be asked for afterwards."""
        found = []
        for i, count in enumerate(self.counts):
            if count:
                h, d, g = (None if s is None else s[i].div_(count) for s in (self._h, self._d, self._g))
                mirror(h)
                found.append(Means(h, d, g, count))
        self.forget()
        return found

    def means(self, parts: list[int] | None = None, name: str = "linear") -> Means:
        """Over all tokens, or those of some parts; FoemError naming the layer when an activation was not finite."""
        parts = list(range(len(self.counts))) if parts is None else parts
        tokens = sum(self.counts[i] for i in parts)
        found = [None if s is None else self._mean(s, parts, max(tokens, 1)) for s in (self._h, self._d, self._g)]
        mirror(found[0])
        if not all(t is None or is_finite(t) for t in found):
            raise FoemError(
                f"{name}: NaN or Inf in its input activations during calibration; the model overflows on this text "
                "(is it run in the dtype it was trained in?)"
            )
        return Means(*found, tokens)

    @staticmethod
    def _mean(sums: torch.Tensor, parts: list[int], tokens: int) -> torch.Tensor:
        found = sums[parts[0]] / tokens
        for i in parts[1:]:
            found.add_(sums[i], alpha=1 / tokens)
        return found


def mirror(h: torch.Tensor) -> None:
    """Copy what lies above the diagonal of h [K, K] to below it."""
    k = len(h)
    for i in range(0, k, MIRROR_STEP):
        end = min(k, i + MIRROR_STEP)
        square = h[i:end, i:end]
        square.copy_(square.triu() + square.triu(1).T)
        h[end:, i:end] = h[i:end, end:].T


@contextlib.contextmanager
def tensor_cores(dtype: torch.dtype):
    """A context in which GPUs multiply float32 copies of half-precision numbers as TF32, at several times the rate: it has as
    many digits as float16, so products of inputs stay exact, and sums are float32; weighted inputs and differences lose 1e-3."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = before or dtype in (torch.bfloat16, torch.float16)
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def add_gram(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """sums [K, K] += a^T b where that is symmetric, a and b [T, K]: what lies above the diagonal, and some below it."""
    step = max(GRAM_STEP, -(-a.shape[1] // 8))
    for i in range(0, a.shape[1], step):
        sums[i : i + step, i:].addmm_(a[:, i : i + step].T, b[:, i:])


def find_stages(linears: dict[str, nn.Linear], run: Callable[[], object]) -> list[list[str]]:
    """Names of linears grouped by the tensor that feeds them, in the order in which `run()` calls them.

    A group is a stage: its members share one Hessian and are quantized together. Linears that `run` never reaches are absent.
    """
    inputs: list[torch.Tensor] = []  # kept alive so that no storage is reused while grouping
    stages: list[list[str]] = []

    def hook(name):
        def before(module, args):
            for i, seen in enumerate(inputs):
                if seen is args[0] or (
                    seen.data_ptr() == args[0].data_ptr() and seen.shape == args[0].shape and seen._version == args[0]._version
                ):
                    stages[i].append(name)
                    return
            inputs.append(args[0])
            stages.append([name])

        return before

    with hooks(m.register_forward_pre_hook(hook(name)) for name, m in linears.items()):
        run()
    return stages


class hooks:
    """A context in which the given hooks (their handles) are in place."""

    def __init__(self, handles):
        self.handles = list(handles)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def find_sum(block: nn.Module, name: str, run: Callable[[], torch.Tensor]) -> str | None:
    """Where the output of linear `name` joins the residual stream: "" for the block's output, a module's name for its input.

    Found by trial: a random tensor added to the linear's output must come out there unchanged. None where no such place is seen
    (query projections, for instance). Places later in the block come first, since more has been added up there.
    """
    linear = block.get_submodule(name)
    seen: dict[str, torch.Tensor] = {}
    extra: list[torch.Tensor] = []

    def before(other: str):
        def hook(module, args):
            if args and isinstance(args[0], torch.Tensor):
                seen.pop(other, None)  # in the order of the last call
                seen[other] = args[0]

        return hook

    def add(module, args, out):
        # As large as what it may be added to: in half precision a small tensor would drown in a large stream.
        size = torch.stack([t.float().std() for t in (out, *seen.values()) if t.is_floating_point()]).max()
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        extra.append(size.to(out) * noise)
        return out + extra[0]

    inner = {n: m for n, m in block.named_modules() if n and not n.startswith(name)}
    with hooks(m.register_forward_pre_hook(before(n)) for n, m in inner.items()):
        plain = {"": run(), **seen}
        seen.clear()
        with hooks([linear.register_forward_hook(add)]):
            moved = {"": run(), **seen}
    if not extra:
        return None  # an expert that no token of this text is routed to
    for place in ["", *reversed(list(seen))]:
        a, b = plain.get(place), moved[place]
        # Some models flatten batch and sequence on the way (OPT).
        if a is None or a.shape != b.shape or b.numel() != extra[0].numel() or b.shape[-1] != extra[0].shape[-1]:
            continue
        wrong = ((b.float() - a.float()).reshape(extra[0].shape) - extra[0].float()).abs()
        if (wrong <= 0.1 * extra[0].float().abs()).float().mean() > SUM_SHARE:
            return place
    return None


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable):
    """A context in which this is what the module does when it is called."""
    before = module.__dict__.get("forward")  # some libraries give single modules a forward of their own
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextlib.contextmanager
def silent(linear: nn.Linear):
    """A context in which the linear does not compute: only its bias leaves it."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(()) if linear.bias is None else linear.bias
        return out.expand(*x.shape[:-1], linear.out_features).clone()  # may be added to in place

    with replaced(linear, forward):
        yield


def observe(block: nn.Module, names: Iterable[str], run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> what `run()` feeds that module of the block; "" -> the block's output. The run is cut short when all are known."""
    wanted, seen = set(names), {}

    def reached(name: str):
        def hook(module, args):
            seen[name] = args[0]
            if len(seen) == len(wanted):
                raise StopForward

        return hook

    with hooks(block.get_submodule(n).register_forward_pre_hook(reached(n)) for n in wanted - {""}):
        try:
            seen[""] = run()
        except StopForward:
            pass
    return seen


class Part(NamedTuple):
    """name: a module whose output is nothing but that of one linear. items: how many values it returns, the others None; 0 where
    it returns the tensor itself."""

    name: str
    items: int


def find_part(block: nn.Module, name: str, run: Callable[[], object]) -> Part | None:
    """The largest part of the block whose output is that of linear `name`: most models' attention for its o_proj.

    None where there is no such part beyond the linear itself.
    """
    made: list[torch.Tensor] = []
    found: list[Part] = []

    def keep(module, args, out):
        made.append(out)

    def compare(part: str):
        def hook(module, args, out):
            first, *rest = out if isinstance(out, tuple) else (out,)
            same = made and isinstance(first, torch.Tensor) and first.data_ptr() == made[-1].data_ptr()
            if same and first.shape == made[-1].shape and all(r is None for r in rest):
                found.append(Part(part, len(out) if isinstance(out, tuple) else 0))

        return hook

    parts = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
    with hooks(
        [block.get_submodule(name).register_forward_hook(keep)]
        + [block.get_submodule(p).register_forward_hook(compare(p)) for p in parts]
    ):
        run()
    return min(found, key=lambda part: len(part.name), default=None)


class Known:
    """Parts of a block that need not run again while the rest of it is quantized: their outputs, batch by batch."""

    def __init__(self, block: nn.Module):
        self._block = block
        self._parts: dict[Part, Batches] = {}

    def add(self, part: Part, outputs: Batches) -> None:
        """outputs: what the part's linear returns, now that it is quantized."""
        self._parts[part] = outputs

    @contextlib.contextmanager
    def of(self, batch: int):
        """A context in which the block, run on this batch, takes those outputs as they are."""

        def stored(out: torch.Tensor, items: int) -> Callable:
            return lambda *_, **__: (out, *[None] * (items - 1)) if items else out

        with contextlib.ExitStack() as stack:
            for part, outputs in self._parts.items():
                stack.enter_context(replaced(self._block.get_submodule(part.name), stored(outputs[batch], part.items)))
            yield
