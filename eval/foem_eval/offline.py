"""What one process of vLLM says of checkpoints: starts peers/vllm_offline.py and reads what it wrote."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

SERVER = pathlib.Path(__file__).parent / "peers/vllm_offline.py"
STRICT = {"model_loader_extra_config": {"enable_weights_track": True}}  # vLLM refuses where a weight was not loaded


def serve(names: list[str], folder: pathlib.Path, out: pathlib.Path, env: dict | None = None, **options) -> dict[str, dict]:
    """{checkpoint in `folder`: answer}, see SERVER, which writes to `out`; "refused" has the process's last line where it died.

    folder also holds tokens.safetensors. env: of the process, beside this one's. options: for SERVER.
    """
    for name in names:
        (out / f"{name}.json").write_text("{}")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **(env or {})}
    command = [sys.executable, str(SERVER), str(folder), str(out), json.dumps({"quantization": "foem", **options}), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    died = {"refused": f"vLLM died: {''.join(done.stderr.strip().splitlines()[-1:])}"}
    return {name: json.loads((out / f"{name}.json").read_text()) or died for name in names}
