"""The pipeline: original model in, checkpoint out, one block at a time.

For every block, in order: load it, group its linears into stages that share an input, and for every stage collect the input's
moments with all earlier stages already quantized (true-sequential), solve, put the dequantized weights in place; then carry the
activations on to the next block. With alpha > 0 a second stream runs through the untouched blocks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

from foem_vllm import calibration, capture, models
from foem_vllm.checkpoint import Writer, check_output, check_space, storage, tensor_sizes
from foem_vllm.errors import FoemError
from foem_vllm.format import CHECKPOINT_FORMATS, FormatConfig, Quantized, QuantSpec, dequantize
from foem_vllm.grid import GRIDS, round_to_nearest
from foem_vllm.report import LayerResult, Report, model_card
from foem_vllm.solver import Solved, SolverConfig, layer_loss, solve
from foem_vllm.stream import BlockInputs, Weights, load_block, record_inputs

# Name -> default (alpha, beta). RTN is the same grid without the loop.
METHODS = {"rtn": None, "gptq": (0.0, 0.0), "gptaq": (0.25, 0.0), "foem": (0.0, 0.2), "foem+gptaq": (0.25, 0.2)}
TOKENS_PER_BATCH = 4096


@dataclass
class QuantizeConfig:
    """Everything that decides the result. alpha, beta: None for the method's default. form: of the first-order term; grid: minmax
    or search; see solver.

    calibration: hub data set or file; samples sequences of seq_len tokens, chosen by seed. device: None for CUDA where present.
    checkpoint_format: None for "gptq" when symmetric and "gptq_v2" when not. exclude: regexes of modules left as they are.
    """

    method: str = "foem"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: str = "none"
    alpha: float | None = None
    beta: float | None = None
    damping: float = 0.05
    form: str = "published"
    grid: str = "minmax"
    calibration: str = calibration.DEFAULT
    split: str = "train"
    text_column: str = "text"
    chat_template: bool = False
    samples: int = 256
    seq_len: int = 2048
    seed: int = 0
    device: str | None = None
    checkpoint_format: str | None = None
    exclude: list[str] = field(default_factory=list)
    trust_remote_code: bool = False

    def resolve(self) -> tuple[QuantSpec, SolverConfig | None, str]:
        """(spec, solver config or None for RTN, checkpoint format); FoemError on combinations that make no sense."""
        if self.method not in METHODS:
            raise FoemError(f"--method {self.method} is unknown; choose one of {', '.join(METHODS)}")
        defaults = METHODS[self.method]
        for name, index in (("alpha", 0), ("beta", 1)):
            value = getattr(self, name)
            if value is not None and (defaults is None or not defaults[index]) and value != 0:
                users = [m for m, d in METHODS.items() if d and d[index]]
                raise FoemError(f"--{name} {value} has no meaning for --method {self.method}; use --method {' or '.join(users)}")
        if self.grid not in GRIDS:
            raise FoemError(f"--grid {self.grid} is unknown; choose one of {', '.join(GRIDS)}")
        if self.samples < 1 or self.seq_len < 2:
            raise FoemError(f"--samples {self.samples} and --seq-len {self.seq_len} must be at least 1 and 2")
        if defaults is None and self.act_order != "none":
            raise FoemError("--act-order has no meaning for --method rtn, which rounds every weight by itself; leave it away")
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise FoemError(f"--exclude {pattern}: not a regular expression ({error})") from None
        spec = QuantSpec(self.bits, self.group_size, self.symmetric, self.act_order)
        chosen = self.checkpoint_format or ("gptq" if self.symmetric else "gptq_v2")
        if chosen not in CHECKPOINT_FORMATS:
            raise FoemError(f"--format {chosen} is unknown; choose one of {', '.join(CHECKPOINT_FORMATS)}")
        if chosen == "gptq" and not self.symmetric:
            raise FoemError("--format gptq cannot hold every asymmetric zero point; use gptq_v2")
        if defaults is None:
            return spec, None, chosen
        alpha, beta = (d if v is None else v for d, v in zip(defaults, (self.alpha, self.beta)))
        return spec, SolverConfig(alpha, beta, self.damping, self.form, self.grid), chosen


def quantize(
    model: str | pathlib.Path, out: str | pathlib.Path, config: QuantizeConfig | None = None, progress: bool = False
) -> Report:
    """Quantize the causal LM `model` (folder or hub name) into the new folder `out`.

    Returns the report that is also stored there. Raises FoemError on bad input, before anything is written where possible;
    on any error `out` is not created. The global random state is left as found.
    """
    config = config or QuantizeConfig()
    started = time.perf_counter()
    spec, solver, checkpoint_format = config.resolve()
    out = pathlib.Path(out)
    check_output(out)
    folder = models.resolve(model)
    hf_config = models.load_config(folder, config.trust_remote_code)
    device = pick_device(config.device)
    weights = Weights(folder)
    # float32 on a CPU: exact, and faster there than half precision.
    dtype = torch.float32 if device.type == "cpu" else stored_dtype(weights)
    empty = models.build_empty(hf_config, dtype, config.trust_remote_code)
    blocks_name, blocks = models.find_blocks(empty)
    chosen, skipped = choose_linears(blocks_name, blocks, spec, config.exclude, weights)
    stored = sum(size for _, size in tensor_sizes(folder).values())
    check_space(out, int(stored * (0.1 + spec.bits / 16)))
    grid_dtypes = (torch.float16, torch.bfloat16) if stored_dtype(weights) == torch.bfloat16 else (torch.float16,)
    nearest = functools.partial(round_to_nearest, spec=spec, dtypes=grid_dtypes, search=config.grid == "search")
    if solver:
        solver = replace(solver, scale_dtypes=grid_dtypes)

    report = Report(recipe_of(config, solver), skipped=skipped)
    with Writer(out) as writer, torch.no_grad(), progress_bar(progress, len(blocks)) as step:
        inputs = original = None
        if solver:
            tokens = calibration_tokens(config, folder, hf_config)
            report.recipe["calibration_sha256"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
            batch = max(1, TOKENS_PER_BATCH // config.seq_len)
            inputs = record_inputs(empty, blocks_name, blocks, weights, tokens, batch, dtype, device)
            original = inputs.fork() if solver.alpha else None
        report.seconds["prepare"] = time.perf_counter() - started
        for index, template in enumerate(blocks):
            prefix = f"{blocks_name}.{index}."
            step(f"block {index + 1}/{len(blocks)}")
            block = load_block(template, prefix, weights, dtype, device)
            untouched = load_block(template, prefix, weights, dtype, device) if original else None
            for result, name, q in solve_block(
                block, untouched, prefix, index, chosen, spec, solver, nearest, inputs, original
            ):
                writer.add_linear(name, q, spec, checkpoint_format)
                report.layers.append(result)
            if inputs:
                inputs.advance(index, block)
            if original:
                original.advance(index, untouched)
        done = {layer.name for layer in report.layers}
        for name in weights.files:
            if not (name.endswith(".weight") and name.removesuffix(".weight") in done):
                writer.add(name, weights.read(name))
        step("verifying")
        report.seconds["total"] = time.perf_counter() - started
        meta = {"quantizer": ["foem-vllm:" + version()], "foem": dict(report.recipe)}
        dynamic = {f"-:{re.escape(name)}$": {} for name in skipped if name in linear_names(blocks_name, blocks)} or None
        quantization = FormatConfig(spec, checkpoint_format, False, dynamic, meta)
        original_config = json.loads((folder / "config.json").read_text("utf-8"))
        writer.finish(
            folder,
            original_config,
            quantization,
            model_card(str(model), report.recipe, f"{writer.total / 1e6:.1f} MB"),
            report.to_json(),
        )
    return report


def solve_block(
    block: nn.Module,
    untouched: nn.Module | None,
    prefix: str,
    index: int,
    chosen: set[str],
    spec: QuantSpec,
    solver: SolverConfig | None,
    nearest: Callable[[torch.Tensor], Quantized],
    inputs: BlockInputs | None,
    original: BlockInputs | None,
) -> Iterator[tuple[LayerResult, str, Quantized]]:
    """Quantize the chosen linears of one block in place, stage by stage; yields (result, full name, codes)."""
    linears = {n: m for n, m in models.find_linears(block).items() if prefix + n in chosen}
    stages = capture.find_stages(linears, lambda: inputs.call(index, block, 0)) if solver else []
    reached = {n for stage in stages for n in stage}
    for stage in stages:
        names = ", ".join(prefix + n for n in stage)
        first = linears[stage[0]]
        moments = capture.Moments(first.in_features, first.weight.device, cross=original is not None)
        for b in range(len(inputs.hidden)):
            x = capture.input_of(first, lambda b=b: inputs.call(index, block, b))
            moments.add(
                x,
                capture.input_of(untouched.get_submodule(stage[0]), lambda b=b: original.call(index, untouched, b))
                if original
                else None,
            )
        h, d = moments.means(names)
        stacked = torch.cat([linears[n].weight.float() for n in stage])
        solved = solve(stacked, h, spec, solver, d)
        row = 0
        for n in stage:
            rows = slice(row, row + linears[n].out_features)
            row = rows.stop
            q = Quantized(*(t[rows] if t is not None and t.ndim == 2 else t for t in solved.quantized))
            yield apply(linears[n], q, spec, prefix + n, h, moments.tokens, solved)
    for n, linear in linears.items():
        if n not in reached:
            q = nearest(linear.weight.float())
            notes = () if solver is None else ("no calibration token reached it: rounded to nearest",)
            yield apply(linear, q, spec, prefix + n, None, 0, Solved(q, 0, 0, 0, notes))


def apply(
    linear: nn.Linear, q: Quantized, spec: QuantSpec, name: str, h: torch.Tensor | None, tokens: int, solved: Solved
) -> tuple[LayerResult, str, Quantized]:
    """Put the dequantized weight in place and measure what it costs."""
    after = dequantize(q, spec)
    loss = relative = None
    if h is not None:
        before = linear.weight.float()
        loss = layer_loss(after - before, h)
        relative = loss / max(layer_loss(before, h), 1e-30)
    linear.weight.data.copy_(after)
    n, k = linear.weight.shape
    result = LayerResult(
        name,
        n,
        k,
        spec.bits,
        spec.group_size,
        loss,
        relative,
        solved.damping if h is not None else None,
        tokens,
        list(solved.notes),
    )
    return result, name, q


def choose_linears(
    blocks_name: str, blocks: nn.ModuleList, spec: QuantSpec, exclude: list[str], weights: Weights
) -> tuple[set[str], dict[str, str]]:
    """(full names of linears to quantize, name -> reason of two-dimensional parameters that stay).

    Raises FoemError when nothing is left, when K is not a multiple of the group size, or when the files use other names.
    """
    chosen, skipped = set(), {}
    for index, block in enumerate(blocks):
        prefix = f"{blocks_name}.{index}."
        for name, linear in models.find_linears(block).items():
            full = prefix + name
            if any(re.search(pattern, full) for pattern in exclude):
                skipped[full] = "excluded by --exclude"
                continue
            if f"{full}.weight" not in weights.files:
                near = next(
                    (n for n in weights.files if n.endswith(f"{index}.{name}.weight")), next(iter(weights.files), "nothing")
                )
                raise FoemError(
                    f"{full}.weight: not among the model's weights (found for example {near}); load and save the model once "
                    "with transformers"
                )
            k = linear.in_features
            if spec.group_size != -1 and k % spec.group_size:
                fitting = [g for g in (256, 128, 64, 32, 16) if k % g == 0]
                raise FoemError(
                    f"{full} has {k} input columns, not a multiple of --group-size {spec.group_size}; choose "
                    f"{' or '.join(map(str, [*fitting, -1]))}, or leave it out with --exclude"
                )
            chosen.add(full)
        skipped.update({prefix + name: "not a plain linear" for name in models.find_unquantizable(block)})
    if not chosen:
        raise FoemError("no linear is left to quantize; check --exclude and the architecture")
    return chosen, skipped


def linear_names(blocks_name: str, blocks: nn.ModuleList) -> set[str]:
    return {f"{blocks_name}.{i}.{name}" for i, block in enumerate(blocks) for name in models.find_linears(block)}


def calibration_tokens(config: QuantizeConfig, folder: pathlib.Path, hf_config) -> torch.Tensor:
    """[samples, seq_len] tokens of the configured text, checked against the model's context and vocabulary."""
    text_config = hf_config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit and config.seq_len > limit:
        raise FoemError(f"--seq-len {config.seq_len} is longer than this model's context of {limit}; use --seq-len {limit}")
    tokenizer = models.load_tokenizer(folder, config.trust_remote_code)
    texts = calibration.read_texts(config.calibration, config.split, config.text_column)
    tokens = calibration.sample_tokens(
        texts, tokenizer, config.samples, config.seq_len, config.seed, config.calibration, config.chat_template
    )
    if int(tokens.max()) >= text_config.vocab_size:
        raise FoemError(
            f"{folder}: the tokenizer gives token {int(tokens.max())}, but the model has {text_config.vocab_size}; "
            "its files belong to different models"
        )
    return tokens


def pick_device(name: str | None) -> torch.device:
    """The device to compute on; FoemError when the one asked for is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FoemError(f"--device {name} is unknown; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise FoemError(
            f"--device {name}: torch {torch.__version__} sees no such GPU; use --device cpu or install a CUDA build of torch"
        )
    if device.type not in ("cpu", "cuda"):
        raise FoemError(f"--device {name} is not supported; use cpu or cuda")
    return device


def stored_dtype(weights: Weights) -> torch.dtype:
    """Of the first two-dimensional floating-point tensor."""
    for name in weights.files:
        tensor = weights.read(name)
        if tensor.ndim == 2 and tensor.is_floating_point():
            return tensor.dtype
    raise FoemError("the model has no floating-point matrices; it is quantized already or not a language model")


def recipe_of(config: QuantizeConfig, solver: SolverConfig | None) -> dict:
    """What decides the result, for the report, the model card and meta.foem."""
    recipe = asdict(config)
    for name in ("device", "trust_remote_code", "checkpoint_format"):
        recipe.pop(name)
    recipe.update(
        {"alpha": solver.alpha, "beta": solver.beta}
        if solver
        else dict.fromkeys(("alpha", "beta", "damping", "form", "calibration", "samples", "seq_len", "seed"))
    )
    if recipe["calibration"] and pathlib.Path(recipe["calibration"]).exists():
        recipe["calibration"] = pathlib.Path(recipe["calibration"]).name  # a local path says nothing elsewhere
    return {key: value for key, value in recipe.items() if value not in (None, [])}


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


__all__ = ["METHODS", "QuantizeConfig", "quantize", "storage"]
