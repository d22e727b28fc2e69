"""Integers of a few bits in a stream of 32-bit words: code i of a column begins at bit i * bits, low bits first.

The stream runs on across words, so 3-bit codes take 3 words for 32 codes. Codes lie along the first dimension.
"""

from __future__ import annotations

import torch


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [R, C] (integers below 2**bits) along the first dimension: int32 [ceil(R*bits/32), C].

    >>> pack_bits(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), 4).tolist()
    [[49, 66]]
    """
    rows, columns = codes.shape
    padded = torch.zeros(-(-rows // 32) * 32, columns, dtype=torch.int64, device=codes.device)
    padded[:rows] = codes
    padded = padded.view(-1, 32, columns)
    words = torch.zeros(padded.shape[0], bits, columns, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= padded[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= padded[:, i] >> (32 - shift)
    words = words.view(-1, columns)[: -(-rows * bits // 32)] & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def spread(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """A byte for each of the codes in every byte, low bits first: uint8 [C, B] -> [C, B * 8 / bits]; bits: 1, 2, 4 or 8.

    Halves of a byte become bytes of a 16-bit integer, all at once: nothing is gathered, so that loading a model is not slow.
    """
    width = 8
    while width > bits:
        width //= 2
        wide = codes.short()
        wide |= wide << (8 - width)
        codes = wide.bitwise_and_(((1 << width) - 1) * 0x0101).view(torch.uint8)
    return codes


def unpack_bits(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Inverse of `pack_bits`: uint8 [rows, C] from int32 [ceil(rows*bits/32), C]. Codes of a column may be next to each other."""
    if 8 % bits == 0:
        turned = words.T.clone(memory_format=torch.contiguous_format)
        return spread(turned.view(torch.uint8), bits)[:, :rows].T
    needed, columns = -(-rows // 32) * bits, words.shape[1]
    padded = torch.zeros(needed, columns, dtype=torch.int64, device=words.device)
    padded[: words.shape[0]] = words.long() & 0xFFFFFFFF
    padded = padded.view(-1, bits, columns)
    codes = torch.empty(padded.shape[0], 32, columns, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = padded[:, word] >> shift
        if shift + bits > 32:
            value = value | padded[:, word + 1] << (32 - shift)
        codes[:, i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(-1, columns)[:rows].contiguous()


def slice_bits(words: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """The words of codes start .. stop - 1 of a longer stream: int32 [ceil((stop - start)*bits/32), C].

    Bits of the last word beyond code stop - 1 are arbitrary; `unpack_bits` ignores them.

    >>> slice_bits(pack_bits(torch.arange(16)[:, None], 4), 4, 3, 5).tolist()
    [[67]]
    """
    end = -(-stop * bits // 32)
    if start * bits % 32 == 0:
        return words[start * bits // 32 : end]
    first = start // 32 * 32  # 32 codes fill whole words
    return pack_bits(unpack_bits(words[first * bits // 32 : end], bits, stop - first)[start - first :], bits)
