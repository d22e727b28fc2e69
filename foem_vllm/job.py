"""A model that is about to be quantized: what is known of it before its weights are read."""

from __future__ import annotations

import contextlib
import gc
import json
import pathlib
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from foem_vllm import budget, calibration, distributed, experts, models, plan
from foem_vllm.errors import FoemError
from foem_vllm.format import FormatConfig
from foem_vllm.recipe import QuantizeConfig, Recipe, resolve
from foem_vllm.serving import rearranged
from foem_vllm.stream import Weights, load_block
from foem_vllm.writer import Header, headers_of


@dataclass
class Job:
    """empty: the model with parameters on the meta device; blocks: its decoder blocks, called blocks_name.0 and so on.
    dtype: what it is run in. scale_dtypes: dtypes that hold every scale exactly."""

    config: QuantizeConfig
    recipe: Recipe
    folder: pathlib.Path
    hf_config: object
    weights: Weights
    empty: nn.Module
    blocks_name: str
    blocks: nn.ModuleList
    plan: plan.Plan
    device: torch.device
    dtype: torch.dtype
    scale_dtypes: tuple[torch.dtype, ...]

    def prefix(self, index: int) -> str:
        """What the names of parameters of a block begin with."""
        return f"{self.blocks_name}.{index}."

    def load(self, index: int) -> nn.Module:
        """A filled copy of a block; dropping it frees its memory."""
        return load_block(self.blocks[index], self.prefix(index), self.weights, self.dtype, self.device)

    def untouched(self) -> list[str]:
        """Names of the tensors that go into the checkpoint as they are."""
        return [n for n in self.weights.files if not (n.endswith(".weight") and n.removesuffix(".weight") in self.plan.specs)]

    def tensors(self) -> dict[str, Header]:
        """Everything that the checkpoint will hold, block by block, under the names of the files."""
        found: dict[str, Header] = {}
        for name, spec in self.plan.specs.items():
            n, k = self.empty.get_submodule(name).weight.shape
            found |= headers_of(self.weights.stored_name(name), spec, k, n)
        stored = map(self.weights.stored_name, self.untouched())
        return found | {name: self.weights.headers[name] for name in stored}

    def original_config(self) -> dict:
        """config.json, without what the checkpoint makes untrue."""
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        for part in (config, config.get("text_config")) if self.plan.head else ():
            if part is not None:
                part["tie_word_embeddings"] = False
        return config

    def format_config(self, meta: dict) -> FormatConfig:
        """The quantization config of the checkpoint: how most linears are quantized, with rules for the others."""
        linears = set(map(self.weights.stored_name, plan.linear_names(self.blocks_name, self.blocks)))
        usual = Counter(self.plan.specs.values()).most_common(1)[0][0]
        dynamic = experts.exclusion_rules(self.plan.excluded(linears)) | plan.tower_rules(self.plan)
        dynamic |= budget.rules({self.weights.stored_name(name): spec for name, spec in self.plan.specs.items()}, usual)
        return FormatConfig(usual, self.recipe.checkpoint_format, self.plan.head is not None, dynamic or None, meta)

    def tokens(self) -> torch.Tensor:
        """[samples, seq_len] tokens of the configured text, checked against the model's context and vocabulary."""
        return calibration_tokens(self.config, self.folder, self.hf_config)


@contextlib.contextmanager
def without_collector():
    """Libraries that are imported and modules that are built are many objects and no garbage: looking for some takes a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()  # and back: all that is there now counts as old, and is looked at when old things are
                gc.unfreeze()
            gc.enable()


@without_collector()
def prepare(model: str | pathlib.Path, config: QuantizeConfig) -> Job:
    """Look at everything that can be wrong before the work begins. Raises FoemError."""
    recipe = resolve(config)
    folder = models.resolve(model)
    hf_config = models.load_config(folder, config.trust_remote_code)
    device = pick_device(config.device)
    weights = Weights(folder)
    if stored_as := json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config"):
        weights.read_8_bits(stored_as)
    stored = stored_dtype(weights)
    dtype = compute_dtype(device, stored)
    empty = models.build_empty(hf_config, dtype, config.trust_remote_code)
    towers = models.drop_towers(empty)
    models.adapt_names(empty, weights)
    models.straighten(empty, weights)
    experts.separate(empty, weights)
    blocks_name, blocks = models.find_blocks(empty)
    dense = rearranged(hf_config.architectures or ())
    planned = plan.make(blocks_name, blocks, recipe.spec, config.exclude, weights, dense)
    plan.leave_towers(planned, towers)
    if config.lm_head:
        plan.add_head(planned, empty, recipe.spec, config.exclude)
    if recipe.bits_per_weight is not None:
        linears = {name: (spec, *empty.get_submodule(name).weight.shape) for name, spec in planned.specs.items()}
        fixed = [linears.pop(planned.head)] if planned.head else []
        budget.check(linears.values(), fixed, recipe.bits_per_weight)
    scale_dtypes = (torch.float16, torch.bfloat16) if stored == torch.bfloat16 else (torch.float16,)
    return Job(config, recipe, folder, hf_config, weights, empty, blocks_name, blocks, planned, device, dtype, scale_dtypes)


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
        return torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device("cuda", distributed.local_rank()) if name == "cuda" else torch.device(name)
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
