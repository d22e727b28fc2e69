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
import re
import time

import torch
from torch import nn

from foem_vllm import calibration, endtoend, experts, models, selection
from foem_vllm.block import BlockSolver
from foem_vllm.checkpoint import Writer, check_output, check_space, tensor_sizes
from foem_vllm.errors import FoemError
from foem_vllm.format import FormatConfig, Quantized, QuantSpec
from foem_vllm.recipe import QuantizeConfig, resolve
from foem_vllm.report import Report, model_card
from foem_vllm.stream import Weights, load_block, record_inputs

TOKENS_PER_BATCH = 4096


def quantize(
    model: str | pathlib.Path, out: str | pathlib.Path, config: QuantizeConfig | None = None, progress: bool = False
) -> Report:
    """Quantize the causal LM `model` (folder or hub name) into the new folder `out`.

    Returns the report that is also stored there. Raises FoemError on bad input, before anything is written where possible;
    on any error `out` is not created. The global random state is left as found.
    """
    config = config or QuantizeConfig()
    started = time.perf_counter()
    recipe = resolve(config)
    spec = recipe.spec
    out = pathlib.Path(out)
    check_output(out)
    folder = models.resolve(model)
    hf_config = models.load_config(folder, config.trust_remote_code)
    device = pick_device(config.device)
    weights = Weights(folder)
    dtype = compute_dtype(device, stored_dtype(weights))
    empty = models.build_empty(hf_config, dtype, config.trust_remote_code)
    experts.separate(empty, weights)
    blocks_name, blocks = models.find_blocks(empty)
    chosen, skipped = choose_linears(blocks_name, blocks, spec, config.exclude, weights)
    stored = sum(size for _, size in tensor_sizes(folder).values())
    check_space(out, int(stored * (0.1 + spec.bits / 16)))
    grid_dtypes = (torch.float16, torch.bfloat16) if stored_dtype(weights) == torch.bfloat16 else (torch.float16,)
    report = Report(recipe.stated, skipped=skipped)
    with Writer(out) as writer, torch.no_grad(), progress_bar(progress, len(blocks)) as step:
        inputs = original = None
        if recipe.solver:
            tokens = calibration_tokens(config, folder, hf_config)
            report.recipe["calibration_sha256"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
            # Small enough that the text falls into folds even when there is little of it.
            batch = max(1, min(TOKENS_PER_BATCH // config.seq_len, config.samples // selection.FOLDS))
            inputs = record_inputs(empty, blocks_name, blocks, weights, tokens, batch, dtype, device)
            original = inputs.fork() if recipe.needs_original else None
            start = inputs.fork() if recipe.guided or recipe.finetune_scales else None
        guidance = None
        if recipe.guided:
            step("gradients")
            guidance = endtoend.guide(empty, blocks, blocks_name, weights, start, dtype)
        solver = BlockSolver(recipe, grid_dtypes, inputs, original, guidance)
        untuned: dict[str, Quantized] = {}
        done: set[str] = set()
        report.seconds["prepare"] = time.perf_counter() - started
        for index, template in enumerate(blocks):
            prefix = f"{blocks_name}.{index}."
            step(f"block {index + 1}/{len(blocks)}")
            block = load_block(template, prefix, weights, dtype, device)
            untouched = load_block(template, prefix, weights, dtype, device) if original else None
            for result, q in solver.solve(index, block, untouched, prefix, chosen):
                done.add(result.name)
                if recipe.finetune_scales:
                    untuned[result.name] = q
                else:
                    writer.add_linear(weights.stored_name(result.name), q, spec, recipe.checkpoint_format)
                result.name = weights.stored_name(result.name)
                report.layers.append(result)
        if untuned:
            tuned = endtoend.tune_scales(
                empty, blocks, blocks_name, weights, start, original.hidden, untuned, spec, dtype, grid_dtypes, step_done=step
            )
            report.tuning = {"held_out_kl_before": tuned.before, "held_out_kl_after": tuned.after}
            for name, q in untuned.items():
                q = q._replace(scales=tuned.scales[name])
                writer.add_linear(weights.stored_name(name), q, spec, recipe.checkpoint_format)
        for name in weights.files:
            if not (name.endswith(".weight") and name.removesuffix(".weight") in done):
                writer.add(weights.stored_name(name), weights.read(name))
        step("verifying")
        report.seconds["total"] = time.perf_counter() - started
        meta = {"quantizer": ["foem-vllm:" + version()], "foem": dict(report.recipe)}
        linears = set(map(weights.stored_name, linear_names(blocks_name, blocks)))
        left = [name.removesuffix(".weight") for name in skipped if name in linears or name.endswith(".weight")]
        dynamic = experts.exclusion_rules(left) or None
        quantization = FormatConfig(spec, recipe.checkpoint_format, False, dynamic, meta)
        original_config = json.loads((folder / "config.json").read_text("utf-8"))
        writer.finish(
            folder,
            original_config,
            quantization,
            model_card(str(model), report.recipe, f"{writer.total / 1e6:.1f} MB"),
            report.to_json(),
        )
    return report


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
            if any(re.search(pattern, weights.stored_name(full)) for pattern in exclude):
                skipped[weights.stored_name(full)] = "excluded by --exclude"
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
        skipped.update({weights.stored_name(prefix + n): "not a plain linear" for n in models.find_unquantizable(block)})
    experts.check_whole(blocks_name, blocks, chosen)
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


def compute_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What the model runs in while it is calibrated: as stored, but float32 on CPUs that compute faster in it."""
    if device.type != "cpu" or (stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return stored
    return torch.float32


def stored_dtype(weights: Weights) -> torch.dtype:
    """Of the first two-dimensional floating-point tensor."""
    for name in weights.files:
        tensor = weights.read(name)
        if tensor.ndim == 2 and tensor.is_floating_point():
            return tensor.dtype
    raise FoemError("the model has no floating-point matrices; it is quantized already or not a language model")


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
