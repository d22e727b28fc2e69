"""Which kernel computes the experts of a mixture-of-experts layer, as `registry` says it for linears."""

from __future__ import annotations

import logging
import os
from types import ModuleType

from foem_kernels import cpu_moe, triton_moe
from foem_kernels.problem import Problem

logger = logging.getLogger("foem_kernels")

KERNELS = {"triton_w4a16": triton_moe, "cpu_w4a16": cpu_moe}  # by the name of the kernel for linears that they are made of
_logged: set[tuple] = set()


def choose(up: Problem, down: Problem, force: str | None = None) -> ModuleType:
    """The first module of KERNELS that computes both products; with `force` (or FOEM_KERNEL) that one.

    up: of the gate and up rows together, down: of the down rows. The choice is logged once for every kind of experts.
    Raises ValueError with every kernel's reason when none can.
    """
    force = force or os.environ.get("FOEM_KERNEL") or None
    if force is not None and force not in KERNELS:
        raise ValueError(f"kernel {force!r} does not compute experts; unset FOEM_KERNEL or choose one of {', '.join(KERNELS)}")
    reasons = []
    for name, module in KERNELS.items():
        if force not in (None, name):
            continue
        reason = module.supports(up) or module.supports(down)
        if reason is None:
            key = (name, *((p.bits, p.group_size, p.symmetric, p.dtype, p.device) for p in (up, down)))
            if key not in _logged:
                _logged.add(key)
                logger.info(
                    "foem experts on %s: %d-bit group %d and %d-bit group %d %s%s on %s %s",
                    name, up.bits, up.group_size, down.bits, down.group_size, "symmetric" if up.symmetric else "asymmetric",
                    " act-order" if up.act_order or down.act_order else "", up.device, up.dtype,
                )  # fmt: skip
            return module
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no kernel computes experts of {up} and {down}: {'; '.join(reasons)}")
