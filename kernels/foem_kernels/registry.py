"""Which kernel computes a problem: one ordered list, asked from the fastest down."""

from __future__ import annotations

import logging
import os

from foem_kernels.cpu_w4a16 import CpuW4A16
from foem_kernels.cuda_w4a16 import CudaW4A16
from foem_kernels.problem import Kernel, Problem
from foem_kernels.reference import Reference
from foem_kernels.triton_w4a16 import TritonW4A16

logger = logging.getLogger("foem_kernels")

KERNELS: tuple[Kernel, ...] = (TritonW4A16(), CudaW4A16(), CpuW4A16(), Reference())
_logged: set[tuple] = set()


def choose(p: Problem, force: str | None = None) -> Kernel:
    """The first kernel of KERNELS that supports `p`; with `force` (or FOEM_KERNEL) that one or a ValueError.

    The choice is logged once for every kind of problem, with the reasons of the kernels passed over.
    """
    force = force or os.environ.get("FOEM_KERNEL") or None
    names = [kernel.name for kernel in KERNELS]
    if force is not None and force not in names:
        raise ValueError(f"kernel {force!r} does not exist; choose one of {', '.join(names)}")
    reasons = []
    for kernel in KERNELS:
        if force not in (None, kernel.name):
            continue
        reason = kernel.supports(p)
        if reason is None:
            key = (kernel.name, p.bits, p.group_size, p.symmetric, p.dtype, p.device, p.act_order)
            if key not in _logged:
                _logged.add(key)
                level = logging.WARNING if kernel.name == "reference" and force is None else logging.INFO
                logger.log(
                    level,
                    "foem kernel %s for %d-bit group %d %s%s on %s %s%s",
                    kernel.name,
                    p.bits,
                    p.group_size,
                    "symmetric" if p.symmetric else "asymmetric",
                    " act-order" if p.act_order else "",
                    p.device,
                    p.dtype,
                    f" (slow; {'; '.join(reasons)})" if level == logging.WARNING else "",
                )
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise ValueError(f"kernel {force!r} cannot run {p}: {'; '.join(reasons)}; unset FOEM_KERNEL to let one be chosen")
