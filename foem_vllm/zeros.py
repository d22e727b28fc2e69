"""How writers store zero points, and how to tell which way they did: version 1 stores zero - 1, version 2 zero.

The labels in config.json are often wrong and symmetric kernels never look, so the data is held against them.
"""

from __future__ import annotations

import torch

from foem_vllm.bits import pack_bits, unpack_bits
from foem_vllm.errors import FoemError
from foem_vllm.spec import QuantSpec, group_index

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
GPTQMODEL = "gptq of GPTQModel"  # version 1 by GPTQModel: see `stored_zeros`
EARLIER_GPTQMODEL = "gptq of an earlier GPTQModel"
SINCE = (7, 7)
OLD_3_BITS = (0x24924924, 0x92492492 - (1 << 32), 0x49249249)  # see `stored_zeros`


def symmetric_format(stored: torch.Tensor, spec: QuantSpec) -> str | None:
    """The `checkpoint_format` that stored zero points show when they are all the symmetric one, else None."""
    return next((kind for kind in CHECKPOINT_FORMATS if bool((stored == spec.mid - (kind == "gptq")).all())), None)


def stored_zeros(words: torch.Tensor, spec: QuantSpec, checkpoint_format: str, n: int) -> torch.Tensor:
    """uint8 [n, G] from qzeros [G, ceil(n*bits/32)]: as stored, but of GPTQMODEL the zero points themselves.

    GPTQModel writes version 1 by subtracting 1 from every code of a word at once, so that zero point 0 borrows from the next one;
    adding 1 to every code of the word gives them all back. Codes of 3 bits, which lie in two words, wrap one by one; before its
    pull request 2763 it took OLD_3_BITS from their words instead, which says nothing of single codes. Of those earlier releases
    (SINCE is the first known to be later) the zero points decide: they lie about the middle, unless they are read the wrong way.
    Other symmetric zero points need none of this.
    """
    stored = unpack_bits(words.T, spec.bits, n)
    if spec.bits == 3 and checkpoint_format != "gptq_v2":
        turns = torch.tensor([OLD_3_BITS[i % 3] for i in range(words.shape[1])], dtype=torch.int32, device=words.device)
        old = unpack_bits((words + turns).T, 3, n)
        if spec.symmetric:
            return old - 1 if bool((old == spec.mid).all()) else stored
        if checkpoint_format == EARLIER_GPTQMODEL:
            return min((stored + 1) & 7, old, key=lambda zeros: float((zeros.float() - 3.5).abs().mean()))
    if checkpoint_format not in (GPTQMODEL, EARLIER_GPTQMODEL) or spec.symmetric:
        return stored
    if 32 % spec.bits:
        return (stored + 1) & ((1 << spec.bits) - 1)
    one = pack_bits(torch.ones(32 // spec.bits, 1, dtype=torch.uint8, device=words.device), spec.bits)
    return unpack_bits(words.T + one, spec.bits, n)


def zero_points(stored: torch.Tensor, spec: QuantSpec, checkpoint_format: str, name: str) -> torch.Tensor | None:
    """Zero points uint8 from what `stored_zeros` gives, of the same shape; None when `spec` is symmetric.

    Raises FoemError when a symmetric spec has others than the symmetric one, and on what version 1 cannot say.
    """
    if spec.symmetric:
        expected = spec.mid - (checkpoint_format != "gptq_v2")
        if (stored != expected).any():
            raise FoemError(
                f"{name}.qzeros holds {int(stored[stored != expected][0])} where symmetric checkpoint_format "
                f"{checkpoint_format!r} stores {expected}; correct `sym` or `checkpoint_format` in config.json, or download the "
                "file again"
            )
        return None
    if checkpoint_format != "gptq":
        return stored
    top = (1 << spec.bits) - 1
    if (stored == top).any():
        raise FoemError(
            f"{name}.qzeros holds {top}, which checkpoint_format 'gptq' makes zero point {top + 1}, out of range for "
            f"{spec.bits} bits (some writers mean 0 by it); quantize again with checkpoint_format 'gptq_v2'"
        )
    return stored + 1


def check_convention(
    codes: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor | None, spec: QuantSpec, checkpoint_format: str, name: str
) -> None:
    """Refuse asymmetric zero points that were read by the wrong `checkpoint_format`, hence are all off by one.

    codes [N, K], zeros [N, G], g_idx [K] or None. Weights average to about nothing, so the mean of code - zero in a group is
    about 0; off by one it is 1 or -1, in all groups alike. Up to 4 bits a step of the grid is so coarse that no other cause is
    in sight; where groups differ widely (8 bits, made-up weights) nothing is concluded.
    """
    g = (group_index(codes.shape[1], spec) if g_idx is None else g_idx).long().to(codes.device)
    columns = torch.bincount(g, minlength=zeros.shape[1])
    held = columns > 0
    sums = torch.zeros(zeros.shape, dtype=torch.float32, device=codes.device).index_add_(1, g, codes.float())[:, held]
    offsets = sums / columns[held] - zeros[:, held].float()
    expected = 1.0 if checkpoint_format == "gptq_v2" else -1.0
    if offsets.numel() >= 64 and offsets.std() < 1.5 and abs(float(offsets.mean()) - expected) < 0.25:
        other = "gptq" if checkpoint_format == "gptq_v2" else "gptq_v2"
        raise FoemError(
            f"{name}.qzeros: zero points read as checkpoint_format {checkpoint_format!r} leave all weights off by one step "
            f"(their mean is {float(offsets.mean()):.2f} steps); they are stored as {other!r}: correct checkpoint_format in "
            "config.json"
        )
