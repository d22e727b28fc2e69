"""Which kernel computes a problem: one ordered list, asked from the fastest down."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from foem_kernels.cpu_w4a16 import CpuW4A16
from foem_kernels.cuda_w4a16 import CudaW4A16
from foem_kernels.problem import Kernel, Problem
from foem_kernels.reference import Reference
from foem_kernels.triton_w4a16 import TritonW4A16

logger = logging.getLogger("foem_kernels")

KERNELS: tuple[Kernel, ...] = (TritonW4A16(), CudaW4A16(), CpuW4A16(), Reference())
_logged: set[tuple] = set()


def survey(p: Problem, force: str | None = None) -> Iterator[tuple[Kernel, str | None]]:
    """Kernels in the order in which they are asked, each with its reason against `p`; ends with the first that has none.

    With `force` (or FOEM_KERNEL) only that one is asked; ValueError when there is none of that name.
    """
    force = force or os.environ.get("FOEM_KERNEL") or None
    names = [kernel.name for kernel in KERNELS]
    if force is not None and force not in names:
        raise ValueError(f"kernel {force!r} does not exist; choose one of {', '.join(names)}")
    for kernel in KERNELS:
        if force in (None, kernel.name):
            reason = kernel.supports(p)
            yield kernel, reason
            if reason is None:
                return


def choose(p: Problem, force: str | None = None) -> Kernel:
    """The first kernel of KERNELS that supports `p`; with `force` (or FOEM_KERNEL) that one or a ValueError.

    The choice is logged once for every kind of problem, with the reasons of the kernels passed over.
    """
    *passed_over, (kernel, refused) = survey(p, force)
    reasons = "; ".join(f"{k.name}: {reason}" for k, reason in passed_over)
    if refused:
        unset = "unset FOEM_KERNEL to let one be chosen"
        raise ValueError(f"kernel {kernel.name!r} cannot run {p}: {kernel.name}: {refused}; {unset}")
    key = (kernel.name, p.bits, p.group_size, p.symmetric, p.dtype, p.device, p.act_order)
    if key not in _logged:
        _logged.add(key)
        slow = kernel.name == "reference" and bool(reasons)
        logger.log(
            logging.WARNING if slow else logging.INFO,
            "foem kernel %s for %d-bit group %d %s%s on %s %s%s",
            kernel.name,
            p.bits,
            p.group_size,
            "symmetric" if p.symmetric else "asymmetric",
            " act-order" if p.act_order else "",
            p.device,
            p.dtype,
            f" (slow; {reasons})" if slow else "",
        )
    return kernel
