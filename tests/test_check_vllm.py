"""tools/check_vllm.py: releases of vLLM that are at hand fit the plugin, and a change that would break it is seen."""
from __future__ import annotations

import importlib.util
import pathlib
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check_vllm  # noqa: E402

LAYERS = "vllm/model_executor/layers"


@pytest.fixture(scope="module")
def installed() -> check_vllm.Source:
    found = importlib.util.find_spec("vllm")
    if found is None:
        pytest.skip("vLLM is not installed")
    return check_vllm.Source(pathlib.Path(found.origin).parents[1])


def test_the_installed_release_fits(installed):
    assert check_vllm.problems(installed) == []


def test_the_gpu_release_fits():
    wheel = next((ROOT / "out/wheels").glob("vllm-0.33.*.whl"), None)
    if wheel is None:
        pytest.skip("no wheel of vLLM 0.33 in out/wheels: `make versions` downloads it")
    assert check_vllm.problems(check_vllm.Source(wheel)) == []


class Edited(check_vllm.Source):
    """A vLLM in which one file reads otherwise."""

    def __init__(self, other: check_vllm.Source, file: str, old: str, new: str):
        self.archive, self.where = other.archive, other.where
        self.file, self.old, self.new = file, old, new
        assert old in other.text(file)

    def text(self, path: str) -> str:
        text = super().text(path)
        return text.replace(self.old, self.new) if path == self.file else text


@pytest.mark.parametrize("file, old, new, said", [
    (f"{LAYERS}/linear.py", "class UnquantizedLinearMethod(", "class PlainLinearMethod(", "compat.py imports UnquantizedLinear"),
    (f"{LAYERS}/quantization/base_config.py", "        revision: str | None = None,\n    ):",
     "        revision: str | None = None,\n        shards: int = 1,\n    ):", "maybe_update_config does not take shards"),
    (f"{LAYERS}/quantization/base_config.py", "    @staticmethod\n    def get_cache_scale_mapper(",
     "    @abstractmethod\n    def get_cache_scale_mapper(", "FoemConfig lacks get_cache_scale_mapper, which is abstract"),
    (f"{LAYERS}/fused_moe/fused_moe_method_base.py", "def __init__(self, moe:", "def __init__(self, layer, moe:",
     "FusedMoEMethodBase takes other arguments now"),
    (f"{LAYERS}/fused_moe/routed_experts.py", "ckpt_down_proj_name", "down_name", "moe.py reads ckpt_down_proj_name of layer"),
    (f"{LAYERS}/fused_moe/config.py", "is_lora_enabled", "with_lora", "moe.py reads is_lora_enabled of config"),
    ("vllm/model_executor/models/utils.py", "def apply_dict(self, values", "def apply_dict(self, model, values",
     "WeightsMapper.apply_dict takes other arguments now"),
    ("vllm/transformers_utils/config.py", "def get_safetensors_params_metadata(", "def safetensors_params_metadata(",
     "has no get_safetensors_params_metadata"),
])  # fmt: skip
def test_what_would_break_the_plugin_is_seen(installed, file, old, new, said):
    found = check_vllm.problems(Edited(installed, file, old, new))
    assert any(said in line for line in found), found


def test_a_wheel_is_read_and_anything_else_refused_in_one_line(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "vllm-9-py3-none-any.whl", "w") as archive:
        archive.writestr("vllm/__init__.py", "")
    (tmp_path / "empty").mkdir()
    assert check_vllm.main([str(tmp_path / "vllm-9-py3-none-any.whl")]) == 1
    assert check_vllm.main([str(tmp_path / "empty")]) == 1
    wheel, empty = (part.splitlines() for part in capsys.readouterr().out.split("empty: "))
    assert len(wheel) == 14 and all(line.startswith("vllm-9-py3-none-any.whl: compat.py imports ") for line in wheel)
    assert len(empty) == 1 and "give a wheel" in empty[0]
