"""What a run will do and need, before it begins: `foem quantize --dry-run`.

What is quantized, sizes on disk and memory follow from shapes. Time is measured: the block with the most weights is quantized on
a few batches, and stands for all others in proportion to their weights.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import resource
import time
from dataclasses import asdict, dataclass

import torch

from foem_vllm import budget, endtoend, models, selection
from foem_vllm.block import BlockSolver
from foem_vllm.clock import Clock
from foem_vllm.integrity import tensor_bytes
from foem_vllm.job import Job, prepare
from foem_vllm.pipeline import Streams, activation_store, batch_size, start_streams
from foem_vllm.recipe import QuantizeConfig
from foem_vllm.store import held_at_most
from foem_vllm.writer import check_output, check_space

WORKING_COPIES = 7  # of the largest matrix of weights, in float32, while it is solved
KEPT_STATES = 5  # hidden states a token that `BlockSolver` keeps while it aims at the original model, the original's own included


@dataclass
class Needs:
    """Bytes. host, device: at most, in memory; on a CPU there is no device. activations: of all that wait between their uses, and
    spilled: how many of them in a file for lack of memory. disk: what is written, `spilled` beside it. seconds: by stage."""

    disk: int
    host: int
    device: int | None
    activations: int
    spilled: int
    tokens: int
    seconds: dict[str, float]


def examine(model: str | pathlib.Path, out: str | pathlib.Path, config: QuantizeConfig | None = None) -> dict:
    """What `pipeline.quantize` would do: {linears: [rows by kind], skipped: {reason: names}, needs: `Needs`}.

    Reads the calibration text and one block; writes nothing. Raises FoemError on everything that quantize refuses beforehand.
    """
    out = pathlib.Path(out)
    job = prepare(model, config or QuantizeConfig())
    check_output(out)
    disk = stored(job)
    check_space(out, disk)
    forget_peak()
    seconds, graphs = timed(job, out)
    needs = memory(job, out, disk, seconds, graphs, held_at_most())
    skipped: dict[str, list[str]] = {}
    for name, reason in job.plan.skipped.items():
        skipped.setdefault(reason, []).append(name)
    return {"linears": kinds(job), "skipped": skipped, "needs": asdict(needs)}


def stored(job: Job) -> int:
    """Bytes of all tensors of the checkpoint; with bits that are yet to be chosen, at most."""
    found = sum(tensor_bytes(*header) for header in job.tensors().values())
    if job.recipe.bits_per_weight is None:
        return found
    shapes = {name: job.empty.get_submodule(name).weight.shape for name in job.plan.specs}
    usual = sum(budget.stored_bits(spec, *shapes[name]) for name, spec in job.plan.specs.items())
    return found + int(job.recipe.bits_per_weight * sum(n * k for n, k in shapes.values()) - usual) // 8


def kinds(job: Job) -> list[dict]:
    """Linears that are quantized, by the last two parts of their names (experts without their number) and shape. bits: None where
    they are yet to be chosen."""
    rows: dict[tuple, dict] = {}
    for name, spec in job.plan.specs.items():
        module = job.empty.get_submodule(name)
        n, k = module.weight.shape
        kind = ".".join([part for part in job.weights.stored_name(name).split(".") if not part.isdecimal()][-2:])
        row = rows.setdefault((kind, n, k, spec), {"kind": kind, "linears": 0, "n": n, "k": k})
        bits = spec.bits if job.recipe.bits_per_weight is None or name == job.plan.head else None
        row |= {"linears": row["linears"] + 1, "bits": bits, "group_size": spec.group_size, "symmetric": spec.symmetric}
    return list(rows.values())


def weights_of(job: Job, index: int) -> int:
    return sum(p.numel() for p in job.blocks[index].parameters())


def heaviest(job: Job) -> int:
    return max(range(len(job.blocks)), key=lambda index: weights_of(job, index))


def timed(job: Job, out: pathlib.Path) -> tuple[dict[str, float], int]:
    """Seconds by stage of the whole run, and what gradients keep at most, in bytes."""
    index, clock = heaviest(job), Clock()
    share = sum(weights_of(job, i) for i in range(len(job.blocks))) / max(weights_of(job, index), 1)
    streams, batches, used = Streams(), 1, 1
    if job.recipe.solver:
        with clock("text"):
            tokens = job.tokens()
        size = batch_size(*tokens.shape)
        batches = -(-len(tokens) // size)
        used = min(batches, selection.FOLDS)
        with clock("prepare"), torch.no_grad():
            streams = start_streams(job, tokens[: used * size], activation_store(job, out))
    solver = BlockSolver(job.recipe, job.scale_dtypes, streams.inputs, streams.original, clock=clock)
    with torch.no_grad():
        with clock("load"):
            block = job.load(index)
            untouched = job.load(index) if streams.original else None
        with clock("solve"):
            for _ in solver.solve(index, block, untouched, job.prefix(index), job.plan.specs):
                pass
    found = dict(clock.seconds)
    for stage in ("prepare", "forward", "moments"):
        if stage in found:
            found[stage] *= batches / used
    found = {stage: value * (1 if stage in ("text", "prepare") else share) for stage, value in found.items()}
    gradients, graphs = end_to_end(job, streams, index, batches, share)
    return found | gradients, graphs


def end_to_end(job: Job, streams: Streams, index: int, batches: int, share: float) -> tuple[dict[str, float], int]:
    """(seconds, bytes) of what needs gradients, from a piece of the text through one block and the head, and back."""
    if not (job.recipe.guided or job.recipe.finetune_scales):
        return {}, 0
    block, (_, piece) = job.load(index), next(endtoend.pieces_of(streams.start))
    run = functools.partial(streams.start.run, index, block)
    begun = time.perf_counter()
    segment = endtoend.Segment(run, piece, True)
    segment.backward(torch.ones_like(segment.out), None)
    between = time.perf_counter()
    draw = torch.full((piece.shape[:-1].numel(), 1), 0.5, device=piece.device)
    endtoend.label_gradient(endtoend.Head(job.empty, job.blocks, streams.start), piece, draw)
    one = ((between - begun) * share + time.perf_counter() - between) / len(piece)  # a sequence
    sequences = min(batches * len(streams.start.hidden[0]), job.config.samples)
    state, size = len(job.blocks) * piece[0].nbytes, endtoend.graph_bytes(run, piece)  # before all blocks a sequence; of a block

    def most(size: int, waiting: int) -> int:
        every = len(job.blocks) * size
        return every if every <= endtoend.GRAPH_BYTES else size + waiting

    found, graphs = {}, [0]
    if job.recipe.guided:
        found["gradients"] = one * sequences
        graphs.append(most(size, max(state * len(piece), min(endtoend.GRAPH_BYTES, state * sequences))))
    if job.recipe.finetune_scales:
        at_once = min(endtoend.SEQUENCES_A_STEP, sequences)
        found["tune"] = one * (min(endtoend.STEPS * at_once, sequences) + sequences / endtoend.HELD_OUT)
        graphs.append(most(size * at_once // len(piece), state * at_once))
    return found, max(graphs)


def resident_now() -> int:
    """Bytes of host memory that this process holds."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    """Let the peak of this process's memory begin again."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def memory(job: Job, out: pathlib.Path, disk: int, seconds: dict[str, float], graphs: int, seen: int) -> Needs:
    """graphs: see `timed`. seen: the peak while one block was quantized on a few batches. What shapes ask for, or that and the
    other batches' activations, whichever is more: libraries take working memory too."""
    before = resident_now()  # libraries, tokenizer, and what the allocator keeps of the block that was timed
    recipe, width = job.recipe, job.dtype.itemsize
    block = max(sum(p.numel() * width for p in b.parameters()) for b in job.blocks)
    inside = {id(p) for b in job.blocks for p in b.parameters()}
    outer = sum(p.numel() for p in {id(p): p for p in job.empty.parameters()}.values() if id(p) not in inside) * width
    tokens = job.config.samples * job.config.seq_len if recipe.solver else 0
    shapes = [job.empty.get_submodule(name).weight.shape for name in job.plan.specs if name != job.plan.head]
    state = tokens * job.hf_config.get_text_config().hidden_size * width
    states = 1 + (KEPT_STATES if recipe.needs_original else 1) + bool(recipe.guided or recipe.finetune_scales)
    widest = max(k for _, k in shapes)  # what feeds the last linear of a block is kept until it is quantized
    activations = states * state + tokens * widest * width
    store = activation_store(job, out)
    resident = min(activations, sum(store.room.values()))
    moments = max((1 + selection.FOLDS) * 4 * (k * k + (n * k if recipe.needs_original else 0)) for n, k in shapes)
    solving = max(WORKING_COPIES * 4 * n * k + 3 * 4 * k * k for n, k in stacked(job)) if recipe.solver else 0
    codes = sum(n * k for n, k in shapes) * (1 + 14 / 128) if recipe.finetune_scales else 0
    if recipe.guided or recipe.finetune_scales:
        vocabulary, text = job.hf_config.get_text_config().vocab_size, batch_size(job.config.samples, job.config.seq_len)
        at_once = min(text * job.config.seq_len, endtoend.tokens_at_once(job.hf_config))
        graphs += endtoend.LOGIT_COPIES * 4 * at_once * vocabulary
    compute = block * (2 if recipe.needs_original else 1) + outer + (moments if recipe.solver else 0) + solving + graphs
    on_gpu = job.device.type != "cpu"
    held = min(resident, int(store.room["device"])) if on_gpu else 0
    host = before + resident - held + int(codes) + (block if on_gpu else compute)
    if recipe.solver:
        batches = -(-job.config.samples // batch_size(job.config.samples, job.config.seq_len))
        others = max(0.0, 1 - selection.FOLDS / batches)
        host = max(host, seen + (resident - held) * others + codes)
    device = compute + held if on_gpu else None
    return Needs(disk, int(host), device and int(device), activations, activations - resident, tokens, seconds)


def stacked(job: Job) -> list[tuple[int, int]]:
    """[N, K] of matrices that are solved together: linears of one module with as many inputs."""
    found: dict[tuple, int] = {}
    for index, block in enumerate(job.blocks):
        for name, linear in models.find_linears(block).items():
            if job.prefix(index) + name in job.plan.specs:
                n, k = linear.weight.shape
                key = index, name.rpartition(".")[0], k
                found[key] = found.get(key, 0) + n
    return [(n, k) for (_, _, k), n in found.items()]


def print_plan(found: dict) -> None:
    """Tables of `examine`."""
    from rich.console import Console
    from rich.table import Table

    console, needs = Console(), found["needs"]
    table = Table(title="what will be quantized", title_justify="left")
    for column in ("kind", "linears", "N x K", "bits", "group", "grid"):
        table.add_column(column, justify="left" if column == "kind" else "right", overflow="fold")
    for row in found["linears"]:
        grid = "symmetric" if row["symmetric"] else "asymmetric"
        values = row["linears"], f"{row['n']} x {row['k']}", row["bits"] or "chosen", row["group_size"], grid
        table.add_row(row["kind"], *map(str, values))
    console.print(table)
    for reason, names in found["skipped"].items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(f"stays as it is ({reason}): {', '.join(names[:3])}{more}", soft_wrap=True, highlight=False)
    total = sum(needs["seconds"].values())
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in sorted(needs["seconds"].items(), key=lambda i: -i[1]))
    spilled = f", {needs['spilled'] / 1e9:.2f} GB of them in a file" if needs["spilled"] else ""
    console.print(f"disk: {(needs['disk'] + needs['spilled']) / 1e9:.2f} GB", highlight=False)
    console.print(
        f"memory: {needs['host'] / 1e9:.2f} GB"
        + (f", on the GPU {needs['device'] / 1e9:.2f} GB" if needs["device"] else "")
        + f"; activations of {needs['tokens']} tokens {needs['activations'] / 1e9:.2f} GB{spilled}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"time: about {total:.0f} s ({stages})", highlight=False, soft_wrap=True)
