"""Second moments of what linears are fed, collected by hooks. Linears fed by the same tensor share one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from foem_vllm.errors import FoemError
from foem_vllm.stream import StopForward


class Moments:
    """H = X_q^T X_q / T and, with a full-precision stream, D = (X_fp - X_q)^T X_q / T; per token, in float32."""

    def __init__(self, k: int, device: torch.device, cross: bool):
        self.tokens = 0
        self._h = torch.zeros(k, k, device=device)
        self._d = torch.zeros(k, k, device=device) if cross else None

    def add(self, quantized: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """quantized, original: [..., K] inputs of the same tokens in the two models."""
        x = quantized.reshape(-1, quantized.shape[-1]).float()
        self._h.addmm_(x.T, x)
        if self._d is not None:
            self._d.addmm_((original.reshape(x.shape).float() - x).T, x)
        self.tokens += x.shape[0]

    def means(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(H, D); FoemError naming the layer when an activation was not finite."""
        h = self._h / max(self.tokens, 1)
        d = None if self._d is None else self._d / max(self.tokens, 1)
        if not torch.isfinite(h).all() or (d is not None and not torch.isfinite(d).all()):
            raise FoemError(
                f"{name}: NaN or Inf in its input activations during calibration; the model overflows on this text "
                "(is it run in the dtype it was trained in?)"
            )
        return h, d


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

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return stages


def input_of(linear: nn.Linear, run: Callable[[], object]) -> torch.Tensor:
    """What `run()` feeds `linear`; the run is cut short there."""
    found: list[torch.Tensor] = []

    def before(module, args):
        found.append(args[0])
        raise StopForward

    handle = linear.register_forward_pre_hook(before)
    try:
        run()
    except StopForward:
        pass
    finally:
        handle.remove()
    return found[0]
