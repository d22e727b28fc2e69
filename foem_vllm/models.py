"""What this project knows about transformers models: how to build an empty one, and where its blocks and linears are.

The only module that names transformers classes. Nothing here is a table of architectures: blocks are the module list with as
many entries as the config has layers, linears are the `nn.Linear`s inside (of experts: see `experts.separate`).
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator

import torch
from torch import nn

from foem_vllm import fp8
from foem_vllm.errors import FoemError
from foem_vllm.stream import Weights

HEAD = "lm_head"
DENSE_HEADS = ("bloom", "cohere", "cohere2", "gemma2", "gemma3n_text", "opt")  # vLLM gives their heads no quantization config
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "tokenizer*", "*.py"]


def resolve(model: str | pathlib.Path) -> pathlib.Path:
    """The local folder of `model`: itself, or a download of that hub repository (safetensors and text files only).

    Raises FoemError when the folder is missing, has no config.json or no safetensors, or when the hub cannot be reached.
    """
    folder = pathlib.Path(model)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
            raise FoemError(f"{model}: no such folder; give a model folder or a hub name such as Qwen/Qwen3-0.6B")
        from huggingface_hub import snapshot_download

        try:
            folder = pathlib.Path(snapshot_download(str(model), allow_patterns=MODEL_FILES))
        except Exception as error:  # the hub client raises many unrelated types
            raise FoemError(
                f"{model}: no such folder, and the hub did not deliver it ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}); check the name, the network and `hf auth login`"
            ) from None
    if not (folder / "config.json").is_file():
        raise FoemError(f"{folder}: no config.json; this is not a model folder, or the download is incomplete")
    if not any(folder.glob("*.safetensors")):
        others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")]
        raise FoemError(
            f"{folder}: no .safetensors weights{' but ' + others[0] if others else ''}; convert the model with "
            "transformers' save_pretrained (pickled files are not opened)"
        )
    return folder


def load_config(folder: pathlib.Path, trust_remote_code: bool = False):
    """The transformers config of a causal LM, or image-text model with one, in 8 bits or more; FoemError when it is none."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise FoemError(f"{folder / 'config.json'}: not valid JSON ({error}); download it again") from None
    if raw.get("quantization_config"):
        fp8.block_size(raw["quantization_config"], str(folder))  # refuses what is not read here
    if raw.get("auto_map") and not trust_remote_code:
        raise FoemError(f"{folder}: the model brings its own Python code; read it, then pass --trust-remote-code")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise FoemError(
            f"{folder / 'config.json'}: {str(error).splitlines()[0]}; a newer transformers may know this model"
        ) from None
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = config.architectures or []
    if not (raw.get("auto_map") or not architectures or causal & set(architectures) or sees_images(config)):
        raise FoemError(
            f"{folder}: {architectures[0]} is not a causal language model, nor an image-text one; only those can be quantized"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def sees_images(config) -> bool:
    """Whether transformers counts the architecture among its image-text models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return bool(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()) & set(config.architectures or []))


def auto_class(config) -> type:
    """Of transformers, that builds and loads such a model."""
    import transformers

    return transformers.AutoModelForImageTextToText if sees_images(config) else transformers.AutoModelForCausalLM


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage; buffers, such as rotary frequencies, are real."""
    original = nn.Module.register_parameter

    def register(module, name, parameter):
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def build_empty(config, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model with parameters on the meta device, in evaluation mode. The global random state is left as found."""
    with torch.random.fork_rng(devices=[]), _parameters_on_meta():
        try:
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise FoemError(f"{config.model_type}: not a causal language model ({str(error).splitlines()[0]})") from None
    return model.eval().requires_grad_(False)


def adapt_names(model: nn.Module, weights: Weights) -> None:
    """Let `weights` answer to the model's names where transformers renames what the files hold: GPT-NeoX's embed_out is its
    lm_head, the files of many image-text models have older prefixes. Names without the model's prefix (GPT-2's) get it for good:
    no engine knows quantized modules by such names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    own = model.state_dict()
    for name in [name for name in weights.files if name not in own]:
        new, _ = rename_source_key(name, renamings, [], model.base_model_prefix, own)
        if new in own and new not in weights.files:
            weights.call(name, new, written=new == f"{model.base_model_prefix}.{name}")


def drop_towers(model: nn.Module) -> list[str]:
    """Take everything but the language model out of an image-text model, which then takes text only; names of what it was."""
    if not sees_images(model.config):
        return []
    outer, decoder = getattr(model, model.base_model_prefix), model.get_decoder()
    towers = [name for name, child in outer.named_children() if decoder not in child.modules()]
    for name in towers if decoder is not outer else ():
        setattr(outer, name, None)
    return towers if decoder is not outer else []


def find_transposed(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of the linears whose weight is [K, N]: transformers' Conv1D, of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}


def straighten(model: nn.Module, weights: Weights) -> None:
    """Put linears in the place of modules that compute the same with a transposed weight; `weights` is told which those are."""
    for path, module in find_transposed(model).items():
        linear = nn.Linear(*module.weight.shape, device="meta")
        linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous(), requires_grad=False), module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, linear)
        weights.transposed.add(f"{path}.weight")


def untie(model: nn.Module, weights: Weights) -> None:
    """Let `weights` answer to the name of an output head that is stored as the embedding only."""
    modules = {module: name for name, module in model.named_modules()}
    head, embedding = (f"{modules.get(m)}.weight" for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    if model.get_output_embeddings() is not None and head not in weights.files:
        weights.files[head], weights.headers[head] = weights.files[embedding], weights.headers[weights.stored_name(embedding)]
        weights.stored[head] = weights.stored.get(embedding, embedding)


def load_eager(folder: pathlib.Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The whole model in memory, in evaluation mode, with eager attention (the kind that can be differentiated twice).

    FoemError when the files do not fit config.json or lack a weight. The global random state is left as found.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except (RuntimeError, ValueError) as error:
        raise FoemError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); download the model again") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        raise FoemError(f"{folder}: {sorted(info['missing_keys'])[0]} is not among its weights; download the model again")
    return model.eval().requires_grad_(False)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder blocks: the biggest ModuleList with as many entries as the text config has layers."""
    layers = model.config.get_text_config().num_hidden_layers
    found = [
        (sum(p.numel() for p in m.parameters()), name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == layers
    ]
    if not found:
        raise FoemError(f"{type(model).__name__}: no list of {layers} decoder blocks found; this architecture is not supported")
    _, name, blocks = max(found, key=lambda f: f[0])
    return name, blocks


def find_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Name in the block -> linear, of every linear that can be quantized: all but routers, which stand beside their experts."""
    routers = {id(child) for m in block.modules() if hasattr(m, "experts") for child in m.children()}
    return {name: m for name, m in block.named_modules() if _is_plain(m) and id(m) not in routers}


def _is_plain(module: nn.Module) -> bool:
    """Subclasses of nn.Linear may compute anything (routers do); Falcon's computes what nn.Linear does."""
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear" and isinstance(module, nn.Linear)


def find_head(model: nn.Module) -> str:
    """Name of the output head. Raises FoemError where no plain linear is one, or vLLM could not serve it quantized."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    kind = model.config.get_text_config().model_type
    if name is None or not _is_plain(head):
        raise FoemError(f"--lm-head: {type(model).__name__} has no output head that is a linear; leave --lm-head away")
    if kind in DENSE_HEADS:
        raise FoemError(f"--lm-head: vLLM computes the head of {kind} models only unquantized; leave --lm-head away")
    if name.rpartition(".")[2] != HEAD:
        raise FoemError(f"--lm-head: vLLM takes a quantized head only by the name {HEAD}, not {name}; leave --lm-head away")
    return name


def find_unquantizable(block: nn.Module) -> list[str]:
    """Parameters with two or more dimensions that are not weights of a linear: they stay as they are, and the report says so."""
    linear = {f"{name}.weight" for name in find_linears(block)}
    return [name for name, p in block.named_parameters() if p.ndim >= 2 and name not in linear]


def load_tokenizer(folder: pathlib.Path, trust_remote_code: bool = False):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer back ends raise their own types
        raise FoemError(
            f"{folder}: no tokenizer could be loaded ({str(error).splitlines()[0]}); "
            "copy the tokenizer files of the original model there"
        ) from None
