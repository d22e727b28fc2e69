"""Unquantized layers of a quantized model, refused where the checkpoint has not filled them.

vLLM looks whether every weight was loaded only in models without quantization. In others a linear or an embedding that the
checkpoint lacks stays what its memory happened to hold, and is served. Here it starts as NaN, which must be gone when everything
is loaded: that needs no knowledge of how a model names, fuses or cuts its weights. Left out: experts, whose weights vLLM may pad;
norms and biases, which have no method to ask.
"""

from __future__ import annotations

import torch

from foem_vllm.errors import FoemError

AT_ONCE = 1 << 24  # numbers that are looked at together: large embeddings find a GPU nearly full


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
        made[:] = [key for key, p in layer._parameters.items() if key not in there and p is not None and p.is_floating_point()]
        for key in made:
            layer._parameters[key].data.fill_(float("nan"))

    def process_weights_after_loading(layer: torch.nn.Module) -> None:
        for key in made:
            if any(bool(part.isnan().any()) for part in getattr(layer, key).data.flatten().split(AT_ONCE)):
                raise FoemError(
                    f"{name or type(layer).__name__}.{key} was not loaded, or only a part of it: tensors of it are missing from "
                    "the checkpoint, or have another name or NaN there; download or quantize the checkpoint again"
                )
        process(layer)

    method.create_weights, method.process_weights_after_loading = create_weights, process_weights_after_loading
    return method
