"""Activations that have no room in memory: what comes back, what is counted, what the file costs."""

import gc
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CALIBRATION, write_model

from foem_vllm import QuantizeConfig, distributed, pipeline, quantize, store
from foem_vllm.errors import FoemError
from foem_vllm.store import Batches, Store


def tensors(count: int, dtype=torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, 16, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("room", [0, 1000, 10_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_put_away_comes_back(tmp_path, room, dtype):
    kept = tensors(5, dtype)
    batches = Batches(Store(tmp_path / "sub", room), kept)
    other = batches.fork()
    new = kept[0] + 1
    batches[2] = new
    assert [torch.equal(a, b) for a, b in zip(other, kept, strict=True)] == [True] * 5
    assert torch.equal(batches[2], new) and torch.equal(torch.cat(batches[3:]), torch.cat(kept[3:]))
    assert not list(tmp_path.glob("**/*.*")), "the file has no name, so that nothing is left of a killed run"


def test_room_is_counted_and_given_back(tmp_path):
    size = 3 * 5 * 16 * 2
    space = Store(tmp_path, 2 * size)
    batches = Batches(space, tensors(5))
    assert space.room["host"] == 0 and space.spilled == 3 * size
    other = batches.fork()
    for i in range(5):
        batches[i] = batches[i] * 2
    assert space.spilled == 8 * size, "both lists are alive"
    del other
    gc.collect()
    for _ in range(3):
        for i in range(5):
            batches[i] = batches[i] * 2
    assert space._end == 8 * size, "holes are used again"
    del batches
    gc.collect()
    assert space.room["host"] == 2 * size and space.spilled == 0


def test_memory_is_what_a_control_group_allows_beside_files_that_were_read(tmp_path):
    def group(limit: str) -> int:
        for name, content in (("max", limit), ("current", "90"), ("stat", "anon 20\nactive_file 30\ninactive_file 40\nslab 1")):
            (tmp_path / f"memory.{name}").write_text(f"{content}\n")
        return store.available_memory(tmp_path)

    assert group("100") == 80 and group("max") > 1 << 20
    assert store.available_memory(tmp_path / "absent") > 1 << 20


def test_processes_of_one_machine_share_its_memory(tmp_path, monkeypatch):
    job = SimpleNamespace(config=QuantizeConfig(), device=torch.device("cpu"))
    monkeypatch.setattr(pipeline, "available_memory", lambda: 1000)
    assert pipeline.activation_store(job, tmp_path).room["host"] == 500
    monkeypatch.setattr(distributed, "started", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert pipeline.activation_store(job, tmp_path).room["host"] == 125


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "pwrite", full)
    with pytest.raises(FoemError, match="No space left.*lower --samples"):
        Store(tmp_path, 0).put(torch.zeros(4))


@pytest.mark.parametrize("arch, preset", [("llama", "best"), ("qwen3_moe", "balanced")])
def test_bytes_do_not_depend_on_where_activations_wait(arch, preset, tmp_path):
    source = write_model(tmp_path / "model", arch)
    settings = dict(preset=preset, calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")
    for name, room in (("memory", None), ("file", 0.0)):
        quantize(source, tmp_path / name, QuantizeConfig(**settings, activation_memory=room))
    memory, file = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "file"))
    assert memory == file
