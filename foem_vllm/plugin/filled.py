"""Unquantized layers of a quantized model, and biases of all, refused where the checkpoint has not filled them.

vLLM looks whether every weight was loaded only in models without quantization. In others a linear or an embedding that the
checkpoint lacks stays what its memory happened to hold, and is served. Here it starts as NaN, which must be gone when everything
is loaded: that needs no knowledge of how a model names, fuses or cuts its weights. Left out: experts, whose weights vLLM may pad;
norms, which have no method to ask.
"""

from __future__ import annotations

import torch

from foem_vllm.errors import FoemError

NOT_LOADED = (
    "{} was not loaded, or only a part of it: tensors of it are missing from the checkpoint, or have another name or NaN there; "
    "download or quantize the checkpoint again"
)
AT_ONCE = 1 << 24  # numbers that are looked at together: large embeddings find a GPU nearly full


def watch_bias(layer: torch.nn.Module, name: str) -> None:
    """Have `check_bias` find out whether the checkpoint filled the bias, which vLLM makes after the weights of a linear.

    Where it makes none, it would pass over a bias in the checkpoint. Older writers store zero for those; others raise FoemError.
    """

    def absent(param, loaded: torch.Tensor, *shard, **kwargs) -> None:
        if loaded.any():
            raise FoemError(
                f"{name}.bias is in the checkpoint, but the model's config.json makes the layer one without bias; config.json "
                "and weights are of different models: download both again"
            )

    def register_parameter(key: str, param: torch.nn.Parameter | None) -> None:
        if key == "bias":
            del layer.register_parameter
            if param is None:
                param = torch.nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)
                param.weight_loader = absent
            else:
                param.data.fill_(float("nan"))
        type(layer).register_parameter(layer, key, param)

    layer.register_parameter = register_parameter


def check_bias(layer: torch.nn.Module, name: str) -> None:
    """Raises FoemError when `layer` has a bias that was not loaded; see `watch_bias`."""
    vars(layer).pop("register_parameter", None)
    bias = getattr(layer, "bias", None)
    if bias is not None and not bias.numel():
        layer.bias = None
    elif bias is not None and bool(bias.isnan().any()):
        raise FoemError(NOT_LOADED.format(f"{name}.bias"))


def filled(method, name: str):
    """vLLM's own `method` for an unquantized layer called `name`, made to raise FoemError on weights that were not loaded.

    Some models call their embedding nothing. The object is changed, not its class: vLLM chooses weight loaders by the name of
    that.
    """
    create, process = method.create_weights, method.process_weights_after_loading
    made: list[str] = []

    def create_weights(layer: torch.nn.Module, *args, **kwargs) -> None:
        there = set(layer._parameters)
        create(layer, *args, **kwargs)
        watch_bias(layer, name)
        made[:] = [key for key, p in layer._parameters.items() if key not in there and p is not None and p.is_floating_point()]
        for key in made:
            layer._parameters[key].data.fill_(float("nan"))

    def process_weights_after_loading(layer: torch.nn.Module) -> None:
        for key in made:
            if any(bool(part.isnan().any()) for part in getattr(layer, key).data.flatten().split(AT_ONCE)):
                raise FoemError(NOT_LOADED.format(f"{name or type(layer).__name__}.{key}"))
        check_bias(layer, name)
        process(layer)

    method.create_weights, method.process_weights_after_loading = create_weights, process_weights_after_loading
    return method
