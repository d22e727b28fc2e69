"""The part of a stored linear that one rank computes: cut out of the stored tensors, and brought into groups that kernels take.

Everything is cut by codes, not by words or groups, so a cut may fall anywhere: into a packed word, into a group, or across an
activation order, whose groups every rank then holds a few columns of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from foem_vllm.bits import slice_bits, unpack_bits
from foem_vllm.format import check_g_idx, check_scales, check_shape
from foem_vllm.serving import kernel_groups
from foem_vllm.spec import Quantized, QuantSpec, group_index
from foem_vllm.zeros import check_convention, stored_zeros, zero_points


class Share(NamedTuple):
    """Which part of a stored linear [n, k]. outputs: [N] int64, any of them in any order. inputs: start .. stop."""

    n: int
    k: int
    outputs: torch.Tensor
    inputs: tuple[int, int]


def take(
    key: str, stored: torch.Tensor, spec: QuantSpec, share: Share, name: str, checkpoint_format: str = "gptq"
) -> torch.Tensor:
    """This share of the stored tensor `key` of a linear, in memory of its own. Raises FoemError naming a tensor that is wrong.

    qweight: int32 [ceil(K*bits/32), N], K the share's inputs; qzeros: uint8 [G, N], as `stored_zeros`, of all groups; scales:
    [G, N]; g_idx: int32 [K], groups numbered as in the whole linear.
    """
    check_shape(key, stored, spec, name, share.k, share.n)
    if key == "g_idx":
        check_g_idx(stored, spec, name)
        return stored[slice(*share.inputs)].clone()
    if key == "qzeros":
        return stored_zeros(stored, spec, checkpoint_format, share.n)[share.outputs].T.contiguous()
    if key == "qweight":
        return slice_bits(stored, spec.bits, *share.inputs).index_select(1, share.outputs)
    check_scales(stored, name)
    return stored.index_select(1, share.outputs)


def assemble(taken: dict[str, torch.Tensor], spec: QuantSpec, checkpoint_format: str, share: Share, name: str) -> Quantized:
    """Codes and grid of a share from what `take` gave; a g_idx in order comes back as None when the share has all inputs.

    Otherwise g_idx [K] numbers groups as in the whole linear, and scales and zeros are those of all its groups. Raises
    FoemError naming the tensor that is wrong.
    """
    start, stop = share.inputs
    codes = unpack_bits(taken["qweight"], spec.bits, stop - start).T.contiguous()
    zeros = zero_points(taken["qzeros"].T, spec, checkpoint_format, name)
    in_order = group_index(share.k, spec)[start:stop].to(codes.device)
    g_idx = taken.get("g_idx", in_order)
    if zeros is not None and spec.bits <= 4:
        check_convention(codes, zeros, g_idx, spec, checkpoint_format, name)
    if stop - start == share.k and torch.equal(g_idx, in_order):
        g_idx = None
    return Quantized(codes, taken["scales"].T.contiguous(), None if zeros is None else zeros.contiguous(), g_idx)


def joined(parts: list[Quantized]) -> Quantized:
    """Linears of the same inputs, groups and g_idx as one: their outputs one after the other."""
    zeros = None if parts[0].zeros is None else torch.cat([p.zeros for p in parts])
    return Quantized(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), zeros, parts[0].g_idx)


class Regrouped(NamedTuple):
    """A linear as kernels take it. order: [K'] int64, the input of every column of `q`; None: the inputs as they are."""

    q: Quantized
    group_size: int
    order: torch.Tensor | None


def group_counts(g_idx: torch.Tensor) -> list[int]:
    """How many columns of a share each group has that has any, in the order of groups. g_idx: int32 [K]."""
    return torch.unique(g_idx, return_counts=True)[1].tolist()


def regroup(q: Quantized, spec: QuantSpec) -> Regrouped:
    """Bring the columns of a share into groups of one size (see `kernel_groups`), whatever part of every group it holds.

    q: as `assemble` gives it.
    """
    if q.zeros is not None and bool((q.zeros == spec.mid).all()):
        q = q._replace(zeros=None)  # symmetric in all but name: kernels need not read zero points
    g_idx = group_index(q.codes.shape[1], spec) if q.g_idx is None else q.g_idx
    return arrange(q, spec, *kernel_groups(group_counts(g_idx)))


def arrange(q: Quantized, spec: QuantSpec, size: int, columns: int) -> Regrouped:
    """Lay a share out in groups of `size`, its own ones cut into pieces and filled up; `columns` in all, which are at least as
    many as that takes.

    Columns that are added to fill a group have the zero point as their code, hence the weight 0, and read some input of that
    group. Where none are, an order of whole groups is left to the kernel, as g_idx.
    """
    k, device = q.codes.shape[1], q.codes.device
    g_idx = group_index(k, spec).to(device) if q.g_idx is None else q.g_idx
    order = torch.argsort(g_idx, stable=True)
    groups, counts = torch.unique_consecutive(g_idx[order], return_counts=True)
    pieces = -(-counts // size)
    pieces[-1] += -(-columns // size) - pieces.sum()
    grid = groups.long().repeat_interleave(pieces)
    scales, zeros = q.scales[:, grid], None if q.zeros is None else q.zeros[:, grid]
    if columns == k:
        if torch.equal(order, torch.arange(k, device=device)):
            return Regrouped(Quantized(q.codes, scales, zeros), size, None)
        if k % size:
            return Regrouped(Quantized(q.codes[:, order], scales, zeros), size, order)
        g_idx = torch.empty_like(order).index_copy_(0, order, torch.arange(k, device=device) // size)
        return Regrouped(Quantized(q.codes, scales, zeros, g_idx.int()), size, None)
    room = pieces * size
    begins = counts.cumsum(0) - counts  # where a group begins in `order`; in the result, where the room before it ends
    place = torch.arange(k, device=device) + (room.cumsum(0) - room - begins).repeat_interleave(counts)
    inputs = order[begins].repeat_interleave(room).index_copy_(0, place, order)
    codes = torch.full((len(q.codes), columns), spec.mid, dtype=torch.uint8, device=device)
    if zeros is not None:
        codes.copy_(zeros.repeat_interleave(size, 1))
    return Regrouped(Quantized(codes.index_copy_(1, place, q.codes[:, order]), scales, zeros), size, inputs)
