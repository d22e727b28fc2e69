"""The pipeline: original model in, checkpoint out, one block at a time.

For every block, in order: load it, group its linears into stages that share an input, and for every stage collect the input's
moments with all earlier stages already quantized (true-sequential), solve, put the dequantized weights in place; then carry the
activations on to the next block. Where the recipe corrects for drift, a second stream runs through the untouched blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch

from foem_vllm import distributed, endtoend, memory, models, selection
from foem_vllm.block import BlockSolver
from foem_vllm.checkpoint import read_report
from foem_vllm.clock import Clock
from foem_vllm.errors import FoemError
from foem_vllm.format import dequantize, read_config
from foem_vllm.head import quantize_head
from foem_vllm.job import Job, prepare
from foem_vllm.recipe import QuantizeConfig
from foem_vllm.redo import Kept, keep, recipe_of
from foem_vllm.report import REPORT_FILE, LayerResult, Report, source_name
from foem_vllm.sensitivity import choose_bits
from foem_vllm.spec import Quantized
from foem_vllm.store import Batches, Store, available_memory, held_at_most
from foem_vllm.stream import BlockInputs, record_inputs
from foem_vllm.writer import Silent, Writer, check_output, differences

TOKENS_PER_BATCH = 4096
SMALLER = "smaller_batches"  # in the recipe: how many times, where memory was short
HEAD = "head"  # in place of a block's number


def quantize(
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    config: QuantizeConfig | None = None,
    progress: bool = False,
    resume: bool = False,
    redo: str | None = None,
) -> Report:
    """Quantize the causal LM `model` (folder or hub name) into the new folder `out`.

    resume: go on where an interrupted run with the same settings stopped, if there is one; the weights are then the same, byte
    for byte, as those of a run that was not interrupted. redo: a regular expression; `out` is a finished checkpoint, of which the
    linears that it finds are quantized again, and which is replaced when that is done.

    Where memory runs out before the first block is finished, the text is run in smaller batches, which the report's recipe says.

    Returns the report that is also stored there. Raises FoemError on bad input, before anything is written where possible; on any
    error `out` is not created, or stays as it is. The global random state is left as found.
    """
    out = pathlib.Path(out)
    return memory.with_smaller_batches(lambda n: attempt(model, out, config, progress, resume, redo, n), Writer(out).partial)


def attempt(
    model: str | pathlib.Path,
    out: pathlib.Path,
    config: QuantizeConfig | None,
    progress: bool,
    resume: bool,
    redo: str | None,
    smaller: int,
) -> Report:
    """`quantize` with batches `smaller` times smaller than usual, or as the run had them that is resumed."""
    started, clock = time.perf_counter(), Clock()
    job = prepare(model, config or QuantizeConfig())
    distributed.start(job.device)
    if distributed.size() > 1 and job.recipe.bits_per_weight is not None:
        raise FoemError("--bits-per-weight chooses in one process; run it without torchrun")
    if redo is not None and (job.recipe.finetune_scales or job.recipe.bits_per_weight is not None):
        raise FoemError(
            "--redo changes some linears; tuned scales and --bits-per-weight are of the whole model: quantize it anew"
        )
    writer = Writer(out) if distributed.rank() == 0 else Silent()
    writer.tidy()
    smaller = distributed.agreed(writer.earlier().get(SMALLER, smaller) if resume else smaller)
    kept = keep(job, out, redo) if redo is not None else None
    if kept is None and resume and (out / REPORT_FILE).is_file():
        return finished_before(job, out, source_name(model))
    if kept is None and distributed.rank() == 0:
        check_output(out)
    report = Report(job.recipe.stated, skipped=job.plan.skipped, model=source_name(model))
    if smaller > 1:
        report.recipe[SMALLER] = smaller
    with writer, torch.no_grad(), progress_bar(progress and distributed.rank() == 0, len(job.blocks)) as step:
        tokens = job.tokens() if job.recipe.solver else None
        if tokens is not None:
            report.recipe["calibration_sha256"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
        streams = Streams() if tokens is None else start_streams(job, tokens, activation_store(job, out), smaller)
        if job.recipe.bits_per_weight is not None:
            step("choosing bits")
            begun = time.perf_counter()
            report.chosen_bits = choose_bits(job, streams.inputs)
            report.seconds["choosing bits"] = time.perf_counter() - begun
        writer.open(identity(job, report, redo, kept), job.tensors(), resume)
        guidance = None
        if job.recipe.guided:
            step("gradients")
            with clock("gradients"):
                guidance = endtoend.guide(job.empty, job.blocks, job.blocks_name, job.weights, streams.start, job.dtype)
        solver = BlockSolver(job.recipe, job.scale_dtypes, streams.inputs, streams.original, guidance, clock)
        codes: dict[str, Quantized] = {}  # of the whole model, where its scales are tuned in the end
        report.seconds["prepare"] = time.perf_counter() - started
        finished = {entry["block"]: entry for entry in writer.entries}
        for index in range(len(job.blocks)):
            step(f"block {index + 1}/{len(job.blocks)}")
            found = (
                pass_block(job, solver, writer, index, finished[index])
                if index in finished
                else solve_block(job, solver, writer, index, kept)
            )
            report.layers += [result for result, _ in found.values()]
            if job.recipe.finetune_scales:
                codes |= {name: q for name, (_, q) in found.items()}
        if job.plan.head:
            step("output head")
            report.layers.append(take_head(job, streams, writer, finished.get(HEAD), kept))
        if codes:
            with clock("tune"):
                report.tuning = tune(job, streams, codes, writer, step)
        with clock("write"):
            for name in job.untouched():
                writer.add(job.weights.stored_name(name), job.weights.read(name))
        job.weights.unchanged()
        step("verifying")
        report.seconds |= {**clock.seconds, "total": time.perf_counter() - started}
        report.memory = peak_memory(job.device)
        if kept is not None:
            report.recipe = recipe_of(kept, report.recipe, redo)
        meta = {"quantizer": ["foem-vllm:" + version()], "foem": dict(report.recipe)}
        writer.finish(job.folder, job.original_config(), job.format_config(meta), report.to_json())
    return report


def identity(job: Job, report: Report, redo: str | None = None, kept: Kept | None = None) -> dict:
    """What decides the bytes of the checkpoint: an interrupted run is resumed only where all of it is the same."""
    versions = {"foem_vllm": version(), "torch": torch.__version__}
    return {
        **report.recipe,
        "format": job.recipe.checkpoint_format,
        "device": str(job.device),
        "model": {path.name: stamp for path, stamp in sorted(job.weights.stamps.items())},
        "versions": versions,
        **({"redo": redo, "checkpoint": kept.sha256} if kept else {}),
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at most: of this process in host memory since it began, and of its tensors on the GPU."""
    peak = {"host": held_at_most()}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def finished_before(job: Job, out: pathlib.Path, model: str) -> Report:
    """The report of a run that needs no resuming. Raises FoemError when it was made of another model or with other settings."""
    report = Report.from_json(read_report(out))
    of_itself = {key: report.recipe[key] for key in ("calibration_sha256", SMALLER, "redone") if key in report.recipe}
    there = {**report.recipe, "model": report.model, "format": read_config(out).checkpoint_format}
    asked = {**job.recipe.stated, **of_itself, "model": model, "format": job.recipe.checkpoint_format}
    if differing := differences(there, json.loads(json.dumps(asked))):
        raise FoemError(f"{out}: finished, but with other settings: {differing}; choose another output folder")
    return report


Found = dict[str, tuple[LayerResult, Quantized]]  # by full name of the linear


def solve_block(job: Job, solver: BlockSolver, writer: Writer, index: int, kept: Kept | None) -> Found:
    """Quantize a block, or what is not kept of it, and write it down."""
    prefix = job.prefix(index)
    with solver.clock("load"):
        block = job.load(index)
        untouched = job.load(index) if solver.original else None
    specs = {name: spec for name, spec in job.plan.specs.items() if name.startswith(prefix)}
    found = {name: kept.read(job, name) for name in specs if name in kept.names} if kept else {}
    weights = {name.removeprefix(prefix): dequantize(q, specs[name]) for name, (_, q) in found.items()}
    if len(found) < len(specs):
        linears = models.find_linears(block)
        for name, weight in weights.items():
            linears[name].weight.data.copy_(weight)
        again = {name: spec for name, spec in specs.items() if name not in found}
        for result, q in solver.solve(index, block, untouched, prefix, again):
            name, result.name = result.name, job.weights.stored_name(result.name)
            found[name] = result, q
            write_linear(job, solver, writer, name, q)
    else:
        solver.advance(index, block, untouched, weights)
    for name in weights:
        write_linear(job, solver, writer, prefix + name, found[prefix + name][1])
    results = [result for result, _ in found.values()]
    with solver.clock("write"):
        job.weights.unchanged()
        writer.done({"block": index, "layers": [asdict(result) for result in results]}, [result.name for result in results])
    return found


def write_linear(job: Job, solver: BlockSolver, writer: Writer, name: str, q: Quantized) -> None:
    with solver.clock("write"):
        writer.add_linear(job.weights.stored_name(name), q, job.plan.specs[name], job.recipe.checkpoint_format)


def pass_block(job: Job, solver: BlockSolver, writer: Writer, index: int, entry: dict) -> Found:
    """Past a block that an interrupted run has quantized."""
    block, prefix = job.load(index), job.prefix(index)
    results = {layer["name"]: LayerResult(**layer) for layer in entry["layers"]}
    found: Found = {}
    for name in (prefix + n for n in models.find_linears(block)):
        if (result := results.get(job.weights.stored_name(name))) is not None:
            spec = job.plan.specs[name]
            found[name] = result, writer.read_linear(result.name, spec, job.recipe.checkpoint_format)
    order = {result.name: i for i, result in enumerate(results.values())}
    found = dict(sorted(found.items(), key=lambda item: order[item[1][0].name]))
    weights = {name.removeprefix(prefix): dequantize(q, job.plan.specs[name]) for name, (_, q) in found.items()}
    solver.advance(index, block, job.load(index) if solver.original else None, weights)
    return found


def take_head(job: Job, streams: Streams, writer: Writer, entry: dict | None, kept: Kept | None) -> LayerResult:
    """Quantize the output head and write it down, unless an interrupted run has."""
    if entry is not None:
        return LayerResult(**entry["layers"][0])
    if kept and job.plan.head in kept.names:
        result, q = kept.read(job, job.plan.head)
    else:
        result, q = quantize_head(job, streams.inputs, streams.original)
    writer.add_linear(result.name, q, job.plan.specs[job.plan.head], job.recipe.checkpoint_format)
    writer.done({"block": HEAD, "layers": [asdict(result)]}, [result.name])
    return result


class Streams(NamedTuple):
    """Hidden states of the calibration text, batch by batch: in the quantized model, in the original one, and as they enter the
    first block. None where the recipe has no use for them."""

    inputs: BlockInputs | None = None
    original: BlockInputs | None = None
    start: BlockInputs | None = None


def activation_store(job: Job, out: pathlib.Path) -> Store:
    """Half of the memory that is there may hold activations, of all processes, unless the user says how much each of them may;
    what has no room goes to a file."""
    asked = job.config.activation_memory
    host = available_memory() // (2 * distributed.local_size()) if asked is None else int(asked * 1e9)
    device = torch.cuda.mem_get_info(job.device)[0] // 2 if job.device.type == "cuda" else 0
    return Store(out.absolute().parent, host, device)


def batch_size(samples: int, length: int) -> int:
    """Sequences a batch: few enough that the text falls into folds even when there is little of it."""
    return max(1, min(TOKENS_PER_BATCH // length, samples // selection.FOLDS))


def start_streams(job: Job, tokens: torch.Tensor, store: Store, smaller: int = 1) -> Streams:
    """All streams before the first block. tokens: [samples, seq_len]. smaller: how many times smaller batches are than usual."""
    samples, batch = len(tokens), max(1, batch_size(*tokens.shape) // smaller)
    if -(-samples // batch) < distributed.size():
        raise FoemError(
            f"{distributed.size()} processes share {-(-samples // batch)} batches of calibration text; use fewer processes or "
            "more --samples"
        )
    inputs = record_inputs(job.empty, job.blocks_name, job.blocks, job.weights, tokens, batch, job.dtype, job.device, store)
    recipe = job.recipe
    return Streams(
        inputs,
        inputs.fork() if recipe.needs_original else None,
        inputs.fork() if recipe.guided or recipe.finetune_scales else None,
    )


def collected(stream: BlockInputs) -> BlockInputs:
    """The first process gets the batches of all."""
    if distributed.size() == 1:
        return stream
    shapes = distributed.gathered([tuple(h.shape) for h in stream.hidden])
    found, first = Batches(stream.hidden.store), stream.hidden[0]
    for batch in range(len(shapes[0])):
        for process, of in enumerate(shapes):
            if batch < len(of):
                mine = stream.hidden[batch] if process == distributed.rank() else None
                got = distributed.sent(mine, process, lambda shape=of[batch]: first.new_empty(shape))
                found.append(got) if got is not None else None
    return BlockInputs(found, stream.calls)


def tune(
    job: Job, streams: Streams, codes: dict[str, Quantized], writer: Writer, step: Callable[[str], None]
) -> dict[str, float]:
    """Tune the scales of the whole model end to end and write them down; returns Report.tuning. The first process does it alone,
    on the text of all."""
    start, original = (collected(stream) for stream in (streams.start, streams.original))
    if distributed.rank() != 0:
        return {}
    tuned = endtoend.tune_scales(
        job.empty,
        job.blocks,
        job.blocks_name,
        job.weights,
        start,
        original.hidden,
        codes,
        job.plan.specs,
        job.dtype,
        job.scale_dtypes,
        step_done=step,
    )
    writer.set_aside(map(job.weights.stored_name, codes))
    for name, q in codes.items():
        q = q._replace(scales=tuned.scales[name])
        writer.add_linear(job.weights.stored_name(name), q, job.plan.specs[name], job.recipe.checkpoint_format)
    return {"held_out_kl_before": tuned.before, "held_out_kl_after": tuned.after}


def version() -> str:
    from foem_vllm import __version__

    return __version__


@contextlib.contextmanager
def progress_bar(show: bool, total: int):
    """A callable that announces the next step; a rich bar with the time left when `show`."""
    if not show:
        yield lambda text: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("preparing", total=total)
        count = 0

        def step(text: str) -> None:
            nonlocal count
            bar.update(task, description=text, completed=min(count, total))
            count += 1

        yield step
