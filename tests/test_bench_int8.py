"""Contenders of kernels/bench.py that round activations: llama.cpp (FOEM_LLAMA_CPP: its folder, see bench_llama.py), our int8."""
from __future__ import annotations

import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "kernels")]

import bench  # noqa: E402
import bench_contenders as contenders  # noqa: E402
import bench_llama  # noqa: E402


@pytest.fixture
def layer():
    return contenders.random_layer(64, 256, "cpu", seed=3)


def weight(layer) -> torch.Tensor:
    """float64 [n, k], column by column."""
    columns = [(layer.codes[:, k].double() - 8) * layer.scales[:, k // layer.group_size].double() for k in range(layer.k)]
    return torch.stack(columns, 1)


def test_q4_0_blocks_are_what_ggml_documents(layer):
    """A float16 scale, then 16 bytes: byte i holds element i in its low half, element i + 16 in its high one; minus 8."""
    blocks = bench_llama.q4_0_blocks(layer)
    assert blocks.shape == (64, 8, 18) and blocks.dtype == torch.uint8
    scale = blocks[..., :2].contiguous().view(torch.float16).double()
    low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
    assert torch.equal(((torch.cat([low, high], -1).double() - 8) * scale).view(64, 256), weight(layer))


def test_missing_llama_cpp_is_said(tmp_path, capsys):
    assert bench.main(["--device", "cpu", "--llama-cpp", str(tmp_path)]) == 2
    assert f"no libggml-base.so in {tmp_path}; how to build it: bench_llama.py" in capsys.readouterr().err


@pytest.mark.skipif("FOEM_LLAMA_CPP" not in os.environ, reason="FOEM_LLAMA_CPP names no folder with libggml*.so (bench_llama.py)")
def test_llama_cpp_computes_the_product(layer):
    """As far as int8 in blocks of 32 allows; another x with as many rows, and clones, each with their own memory."""
    entry = bench_llama.llama_cpp(pathlib.Path(os.environ["FOEM_LLAMA_CPP"]))
    weights = entry.prepare(layer)
    for w in (weights, contenders.clone(weights)):
        for seed, m in ((0, 5), (1, 5), (2, 1)):
            x = torch.randn(m, 256, generator=torch.Generator().manual_seed(seed))
            blocks = x.double().view(m, 8, 32)
            step = blocks.abs().amax(-1, keepdim=True) / 127
            wanted = ((blocks / step).round() * step).view(m, 256) @ weight(layer).T
            assert float((entry.call(x, w).double() - wanted).norm() / wanted.norm()) < 2 ** -11  # steps are stored as float16
    assert contenders.stored_bytes(weights) == 64 * 256 * 18 // 32


@pytest.mark.skipif(contenders.native.library() is None, reason="the CPU kernels were not compiled (no C compiler?)")
def test_int8_contender_rounds_activations_and_leaves_the_environment(layer, monkeypatch):
    """Against activations rounded to 255 steps a token right here: then only roundings of bf16 are left."""
    entry = contenders.ours_int8(contenders.CpuW4A16())
    if reason := entry.supports(layer.problem(torch.bfloat16)):
        pytest.skip(reason)
    monkeypatch.setenv("FOEM_CPU_ACT", "exact")
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    step = x.double().abs().amax(1, keepdim=True) / 127
    rounded = (x.double() / step).round() * step
    y = entry.call(x, entry.prepare(layer)).double()
    wanted, exact = rounded @ weight(layer).T, x.double() @ weight(layer).T
    assert (y - wanted).norm() / wanted.norm() < 2 ** -8 < 2 * (y - exact).norm() / exact.norm()
    assert os.environ["FOEM_CPU_ACT"] == "exact"
    # the bound that the bench allows: what rounding does when it is half a step wrong everywhere
    worst = x.double() + step / 2
    assert contenders.int8_rounding(x) == pytest.approx(float((worst - x.double()).norm() / x.double().norm()), rel=1e-6)
