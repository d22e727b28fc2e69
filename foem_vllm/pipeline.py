"""The pipeline: original model in, checkpoint out, one block at a time.

For every block, in order: load it, group its linears into stages that share an input, and for every stage collect the input's
moments with all earlier stages already quantized (true-sequential), solve, put the dequantized weights in place; then carry the
activations on to the next block. Where the recipe corrects for drift, a second stream runs through the untouched blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from foem_vllm import endtoend, selection
from foem_vllm.block import BlockSolver
from foem_vllm.checkpoint import Writer, check_output, check_space
from foem_vllm.job import Job, prepare
from foem_vllm.recipe import QuantizeConfig
from foem_vllm.report import Report, source_name
from foem_vllm.spec import Quantized
from foem_vllm.stream import BlockInputs, record_inputs

TOKENS_PER_BATCH = 4096


def quantize(
    model: str | pathlib.Path, out: str | pathlib.Path, config: QuantizeConfig | None = None, progress: bool = False
) -> Report:
    """Quantize the causal LM `model` (folder or hub name) into the new folder `out`.

    Returns the report that is also stored there. Raises FoemError on bad input, before anything is written where possible;
    on any error `out` is not created. The global random state is left as found.
    """
    started = time.perf_counter()
    out = pathlib.Path(out)
    check_output(out)
    job = prepare(model, config or QuantizeConfig())
    check_space(out, job.bytes_written())
    recipe, weights = job.recipe, job.weights
    report = Report(recipe.stated, skipped=job.plan.skipped, model=source_name(model))
    with Writer(out) as writer, torch.no_grad(), progress_bar(progress, len(job.blocks)) as step:
        streams = Streams()
        if recipe.solver:
            tokens = job.tokens()
            report.recipe["calibration_sha256"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
            streams = start_streams(job, tokens)
        guidance = None
        if recipe.guided:
            step("gradients")
            guidance = endtoend.guide(job.empty, job.blocks, job.blocks_name, weights, streams.start, job.dtype)
        solver = BlockSolver(recipe, job.scale_dtypes, streams.inputs, streams.original, guidance)
        untuned: dict[str, Quantized] = {}
        report.seconds["prepare"] = time.perf_counter() - started
        for index in range(len(job.blocks)):
            step(f"block {index + 1}/{len(job.blocks)}")
            block = job.load(index)
            untouched = job.load(index) if streams.original else None
            for result, q in solver.solve(index, block, untouched, job.prefix(index), job.plan.specs):
                if recipe.finetune_scales:
                    untuned[result.name] = q
                else:
                    writer.add_linear(weights.stored_name(result.name), q, job.plan.specs[result.name], recipe.checkpoint_format)
                result.name = weights.stored_name(result.name)
                report.layers.append(result)
        if untuned:
            tuned = tune(job, streams, untuned, step)
            report.tuning = {"held_out_kl_before": tuned.before, "held_out_kl_after": tuned.after}
            for name, q in untuned.items():
                q = q._replace(scales=tuned.scales[name])
                writer.add_linear(weights.stored_name(name), q, job.plan.specs[name], recipe.checkpoint_format)
        for name in job.untouched():
            writer.add(weights.stored_name(name), weights.read(name))
        step("verifying")
        report.seconds["total"] = time.perf_counter() - started
        meta = {"quantizer": ["foem-vllm:" + version()], "foem": dict(report.recipe)}
        writer.finish(job.folder, job.original_config(), job.format_config(meta), report.to_json())
    return report


class Streams(NamedTuple):
    """Hidden states of the calibration text, batch by batch: in the quantized model, in the original one, and as they enter the
    first block. None where the recipe has no use for them."""

    inputs: BlockInputs | None = None
    original: BlockInputs | None = None
    start: BlockInputs | None = None


def start_streams(job: Job, tokens: torch.Tensor) -> Streams:
    """All streams before the first block. tokens: [samples, seq_len]."""
    samples, length = tokens.shape
    # Small enough that the text falls into folds even when there is little of it.
    batch = max(1, min(TOKENS_PER_BATCH // length, samples // selection.FOLDS))
    inputs = record_inputs(job.empty, job.blocks_name, job.blocks, job.weights, tokens, batch, job.dtype, job.device)
    recipe = job.recipe
    return Streams(
        inputs,
        inputs.fork() if recipe.needs_original else None,
        inputs.fork() if recipe.guided or recipe.finetune_scales else None,
    )


def tune(job: Job, streams: Streams, quantized: dict[str, Quantized], step: Callable[[str], None]) -> endtoend.Tuned:
    """Scales of the whole model, tuned end to end."""
    return endtoend.tune_scales(
        job.empty,
        job.blocks,
        job.blocks_name,
        job.weights,
        streams.start,
        streams.original.hidden,
        quantized,
        job.plan.specs,
        job.dtype,
        job.scale_dtypes,
        step_done=step,
    )


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
