"""Run a model block by block: weights from safetensors when a block's turn comes, activations carried from block to block."""

from __future__ import annotations

import contextlib
import copy
import pathlib
from collections.abc import Callable

import torch
from safetensors import safe_open
from torch import nn

from foem_vllm import distributed, fp8
from foem_vllm.errors import FoemError
from foem_vllm.integrity import read_header, weight_files
from foem_vllm.solver import is_finite
from foem_vllm.store import Batches, Store


class Weights:
    """The tensors of a folder of safetensors files, read one at a time by name. stored: what those are called in the files that
    go by another name here. headers: (safetensors dtype, shape) of each by the name that it is written under. transposed: weights
    that are stored [K, N], and are filled in as those of linears. scales: (file, name) of the scales of weights in 8 bits, by
    the weights' names in the files. stamps: of the files, as they were when their headers were read."""

    def __init__(self, folder: pathlib.Path):
        self.stamps = {path: stamp(path) for path in weight_files(folder)}
        found = {path: read_header(path) for path in self.stamps}
        self.headers = {name: header for headers in found.values() for name, header in headers.items()}
        self.files = {name: path for path, headers in found.items() for name in headers}
        self.stored: dict[str, str] = {}
        self.renamed: set[str] = set()
        self.transposed: set[str] = set()
        self.scales: dict[str, tuple[pathlib.Path, str]] = {}
        self.block: tuple[int, int] | None = None

    def rename(self, old: str, new: str) -> None:
        """Let names that begin with `old` begin with `new`."""
        for name in [name for name in self.files if old != new and name.startswith(old)]:
            self.call(name, new + name.removeprefix(old))

    def call(self, name: str, new: str, written: bool = False) -> None:
        """Let `new` be the name of tensor `name`, also in what is written of it if `written`."""
        self.files[new] = self.files.pop(name)
        self.stored[new] = self.stored.pop(name, name)
        if written:
            self.renamed.add(new)
            self.headers[new] = self.headers.pop(name)

    def stored_name(self, name: str) -> str:
        """What a tensor, or a module whose weight is one, is called in the files, and in what is written of them."""
        if name in self.renamed or f"{name}.weight" in self.renamed:
            return name
        if f"{name}.weight" in self.stored:
            return self.stored[f"{name}.weight"].removesuffix(".weight")
        return self.stored.get(name, name)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise FoemError(f"{name}: not among the model's weights; the files and config.json belong to different models")
        self.unchanged(self.files[name])
        stored = self.stored.get(name, name)
        value = _tensor(self.files[name], stored)
        if stored not in self.scales:
            return value
        return fp8.dequantized(name, value, _tensor(*self.scales[stored]), self.block)

    def unchanged(self, *paths: pathlib.Path) -> None:
        """Raises FoemError when one of these files, or of all, is gone or another one than its header was read from."""
        for path in paths or self.stamps:
            now = stamp(path) if path.is_file() else None
            if now != self.stamps[path]:
                raise FoemError(
                    f"{path} was {'deleted' if now is None else 'changed'} while it was read; an interrupted run goes on "
                    "(--resume) only with the file as it was, its time of change included; else start again"
                )

    def read_8_bits(self, config: dict) -> None:
        """From now on weights in 8-bit floating point are what they stand for, in bfloat16, and their scales are no tensors.

        config: the quantization_config of the files, whose names must not have been changed. Raises FoemError on other kinds.
        """
        where = str(next(iter(self.files.values())).parent)
        self.block = fp8.block_size(config, where)
        for name, scale in fp8.find_scales(self.headers, where).items():
            self.scales[name] = self.files[scale], scale
            self.headers[name] = "BF16", self.headers[name][1]
        for name in [n for n in self.files if n.rpartition(".")[2] in (*fp8.SCALES, *fp8.OTHERS)]:
            del self.files[name], self.headers[name]


def stamp(path: pathlib.Path) -> list[int]:
    """Size and time of a file: other ones when its content is."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _tensor(path: pathlib.Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as f:
        return f.get_tensor(name)


def fill(
    module: nn.Module, prefix: str, weights: Weights, dtype: torch.dtype, device: torch.device, names: set[str] | None = None
) -> None:
    """Give the parameters of `module` (those in `names`, or all) their values, from tensors called prefix + name.

    Raises FoemError naming the tensor when it is missing, has another shape, or holds NaN or Inf.
    """
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if names is not None and name not in names:
            continue
        value = weights.read(prefix + name)
        value = value.T if prefix + name in weights.transposed else value
        if value.shape != parameter.shape:
            raise FoemError(
                f"{prefix}{name} is {list(value.shape)} in {weights.files[prefix + name].name}, but config.json "
                f"makes it {list(parameter.shape)}; the files and the config belong to different models"
            )
        if not is_finite(value):
            raise FoemError(
                f"{prefix}{name}: NaN or Inf in the weights of {weights.files[prefix + name].name}; "
                "the model is damaged, download it again"
            )
        owner = module.get_submodule(name.rpartition(".")[0])
        owner.register_parameter(name.rpartition(".")[2], nn.Parameter(value.to(device, dtype), requires_grad=False))
    for name, buffer in list(module.named_buffers()):
        stored = weights.read(prefix + name) if prefix + name in weights.files else buffer
        owner = module.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = stored.to(device, buffer.dtype)


class StopForward(Exception):
    """Raised by a hook that has what it came for."""


class BlockInputs:
    """Hidden states before the current block, batch by batch, and the other arguments that each block is called with. in_tuple:
    whether blocks return their output in a tuple, known when one was run."""

    in_tuple = False

    def __init__(self, hidden: list[torch.Tensor] | Batches, calls: list[dict[int, tuple[tuple, dict]]]):
        self.hidden, self.calls = hidden if isinstance(hidden, Batches) else Batches(Store(), hidden), calls

    def fork(self) -> BlockInputs:
        """A second stream from the same start (the list is copied, the tensors are shared and never written to)."""
        return BlockInputs(self.hidden.fork(), self.calls)

    def call(self, index: int, block: nn.Module, batch: int) -> torch.Tensor:
        """The output of `block`, as block number `index`, on a batch."""
        return self.run(index, block, self.hidden[batch])

    def run(self, index: int, block: Callable, hidden: torch.Tensor) -> torch.Tensor:
        """The same on any hidden states [S, T, width], for S up to the batches' size."""
        size, calls = hidden.shape[0], self.calls[index]
        recorded = size if size in calls else max(calls)
        args, kwargs = calls[recorded]
        if size != recorded:
            args, kwargs = _first(args, size, recorded), _first(kwargs, size, recorded)
        out = block(hidden, *args, **kwargs)
        self.in_tuple = isinstance(out, tuple)
        return out[0] if self.in_tuple else out


def _first(value, size: int, recorded: int):
    """What blocks are called with (masks, positions) for `size` sequences, from a call with `recorded` of them."""
    if isinstance(value, torch.Tensor):
        return value[:size] if value.ndim and value.shape[0] == recorded else value
    if isinstance(value, dict):
        return {k: _first(v, size, recorded) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_first(v, size, recorded) for v in value)
    return value


@torch.no_grad()
def record_inputs(
    model: nn.Module,
    blocks_name: str,
    blocks: nn.ModuleList,
    weights: Weights,
    tokens: torch.Tensor,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    store: Store | None = None,
) -> BlockInputs:
    """Run what comes before the blocks (embeddings, positions, masks) on tokens [S, T], or this process's share of them, and note
    how every block is called.

    The blocks themselves are replaced by recorders that hand the hidden states on, so none is loaded; masks and positions may
    differ from block to block (sliding windows) but not with the content, since all sequences are equally long.
    """
    outer = {n for n, _ in model.named_parameters(remove_duplicate=False) if not n.startswith(blocks_name + ".")}
    head = model.get_output_embeddings()
    outer -= {
        n
        for n, m in model.named_parameters(remove_duplicate=False)
        if head is not None and m is head.weight and n not in weights.files
    }
    fill_outer(model, blocks_name, weights, outer, dtype, device)
    calls: list[dict[int, tuple[tuple, dict]]] = [{} for _ in blocks]
    hidden = Batches(store or Store())
    shape, in_tuple = None, False  # of the hidden states; whether the model takes them out of a tuple that blocks return

    def recorder(index: int) -> Callable:
        def forward(hidden_states, *args, **kwargs):
            nonlocal shape, in_tuple
            shape = hidden_states.shape if index == 0 else shape
            if hidden_states.shape != shape:
                if in_tuple:
                    raise FoemError(
                        f"{blocks_name}.{index} is fed {list(hidden_states.shape)}, the first {list(shape)}; such blocks are "
                        "not supported"
                    )
                in_tuple = True
                raise StopForward
            calls[index][hidden_states.shape[0]] = args, kwargs
            if index == len(blocks) - 1:
                hidden.append(hidden_states)
                raise StopForward
            return (hidden_states,) if in_tuple else hidden_states

        return forward

    for i, block in enumerate(blocks):
        block.forward = recorder(i)
    try:
        for number, batch in enumerate(tokens.split(batch_size)[distributed.rank() :: distributed.size()]):
            while len(hidden) == number:  # twice where in_tuple had to be learned
                with contextlib.suppress(StopForward):
                    model(input_ids=batch.to(device), use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return BlockInputs(hidden, calls)


def fill_outer(
    model: nn.Module, blocks_name: str, weights: Weights, names: set[str], dtype: torch.dtype, device: torch.device
) -> None:
    """`fill` for everything outside the blocks: their buffers are left alone."""
    held = model.get_submodule(blocks_name)
    parent = model.get_submodule(blocks_name.rpartition(".")[0])
    key = blocks_name.rpartition(".")[2]
    parent._modules[key] = nn.ModuleList()
    try:
        fill(model, "", weights, dtype, device, names)
    finally:
        parent._modules[key] = held


def load_block(template: nn.Module, prefix: str, weights: Weights, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A filled copy of an empty block; dropping it frees its memory."""
    block = copy.deepcopy(template)
    fill(block, prefix, weights, dtype, device)
    return block
