"""The compiled part of the CPU kernels: plain C in a shared library, called with data pointers through ctypes.

It is built by setup.py where there is a C compiler, for every instruction set at once; which of them runs is decided here, at
run time, so that a wheel built on one machine works on another. Its OpenMP runtime is the one that torch has loaded (same
soname): the same threads, the same OMP_NUM_THREADS, the same binding to cores.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import os
import pathlib
import platform

import torch  # first, so that the library finds torch's OpenMP runtime loaded

logger = logging.getLogger("foem_kernels")

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")  # in the order of the C enumeration
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "foem_cpu_isa": [],
    "foem_cpu_has_int8": [],
    "foem_cpu_has_amx": [],
    # x, m, k, dtype, weight, n, bits, group_size, scales, zeros, zero, order, bias, y, isa, int8, threads
    "foem_cpu_w4a16": [_POINTER, _LONG, _LONG, _INT, _POINTER, _LONG, _INT, _LONG, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER,
                       _POINTER, _INT, _INT, _INT],
    # w, V, V_stride, points, errors, scales, zeros, groups, mid, beta, target, first, unpulled, P, P_stride, alpha, seen,
    # columns, rows, threads
    "foem_cpu_quantize_block": [_POINTER, _POINTER, _LONG, *[_POINTER] * 5, _FLOAT, _POINTER, _POINTER, _LONG, _LONG, _POINTER,
                                _LONG, _POINTER, _POINTER, _LONG, _LONG, _INT],
    # x, x_stride, tokens, k, weights, gram, then, then_stride, now, now_stride, n, cross, tiles, threads
    "foem_cpu_add_moments": [_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER,
                             _INT, _INT],
    # w, next_row, next_group, next_column, importance, scales, zeros, mid, levels, rows, groups, columns, best, isa, threads
    "foem_cpu_search_grid": [_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _FLOAT, _LONG, _LONG, _LONG, _LONG,
                             _POINTER, _INT, _INT],
    # codes, slope, size, cost, H, rows, columns, top, steps, taken, isa, threads
    "foem_cpu_descend": [*[_POINTER] * 5, _LONG, _LONG, _INT, _LONG, _POINTER, _INT, _INT],
}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built."""
    folder = pathlib.Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (folder / f"_native{suffix}").is_file():
            found = ctypes.CDLL(str(folder / f"_native{suffix}"))
            for name, arguments in _SIGNATURES.items():
                getattr(found, name).argtypes, getattr(found, name).restype = arguments, _INT
            return found
    return None


@functools.cache
def _best() -> int:
    found = library().foem_cpu_isa()
    if found == 0 and platform.machine() in ("x86_64", "AMD64"):
        logger.warning("foem: this CPU has no AVX2; its 4-bit kernels run on portable code, many times slower")
    return found


def instruction_set() -> int:
    """Index into INSTRUCTION_SETS of the best one here, or of FOEM_CPU_ISA; ValueError when that is unknown or not to be had."""
    best, asked = _best(), os.environ.get("FOEM_CPU_ISA")
    if not asked:
        return best
    if asked not in INSTRUCTION_SETS[: best + 1]:
        raise ValueError(f"FOEM_CPU_ISA={asked}: choose one of {', '.join(INSTRUCTION_SETS[: best + 1])} on this machine")
    return INSTRUCTION_SETS.index(asked)


@functools.cache
def _has_amx() -> bool:
    return bool(library().foem_cpu_has_amx())


def tiles() -> bool:
    """Whether AMX is used, where it helps: the CPU has it, and no instruction set was asked for by name."""
    return not os.environ.get("FOEM_CPU_ISA") and _has_amx()


def pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def lacking(device: torch.device | str, dtype: torch.dtype, takes: torch.dtype) -> str | None:
    """Why a compiled kernel that takes one dtype does not run there, in one line; None when it does."""
    if torch.device(device).type != "cpu":
        return f"runs on cpu, not {torch.device(device).type}"
    if dtype != takes:
        return f"takes {str(takes).removeprefix('torch.')}, not {dtype}"
    if library() is None:
        return "was not compiled when foem-vllm was installed (no C compiler?); install one and reinstall"
    return None
