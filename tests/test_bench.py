"""kernels/bench.py without a GPU: the layouts it hands to peers, its judgement of errors, its files, whole runs on the CPU."""
from __future__ import annotations

import csv
import json
import os
import pathlib
import subprocess
import sys
import zipfile
from unittest import mock

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "kernels")]

import bench  # noqa: E402
import bench_contenders as contenders  # noqa: E402
import bench_peers as peers  # noqa: E402
import bench_report as report  # noqa: E402
from bench_contenders import Contender, random_layer  # noqa: E402


@pytest.fixture
def layer():
    return random_layer(64, 256, "cpu", seed=3)


def signed(layer) -> torch.Tensor:
    """[n, k] code - 8, from the stored codes alone."""
    return layer.codes.to(torch.int64) - 8


def weight(layer) -> torch.Tensor:
    """float64 [n, k], column by column."""
    columns = [signed(layer)[:, k].double() * layer.scales[:, k // layer.group_size].double() for k in range(layer.k)]
    return torch.stack(columns, 1)


# --- layouts ----------------------------------------------------------------------------------------------------------------

def test_layer_is_scale_times_code(layer):
    assert torch.equal(layer.weight(torch.float64), weight(layer))
    assert torch.equal(layer.weight(torch.float32, slice(8, 16)).double(), weight(layer)[8:16])
    for dtype in (torch.bfloat16, torch.float16):  # so that peers that round scales to their dtype lose nothing
        assert torch.equal(layer.scales.to(dtype).float(), layer.scales)
    assert layer.codes.unique().tolist() == list(range(16))


def test_gptq_words_hold_eight_codes_of_a_column(layer):
    words = contenders.gptq_words(layer)
    assert words.shape == (32, 64) and words.dtype == torch.int32
    codes = torch.stack([words.long() >> 4 * i & 15 for i in range(8)], 1).reshape(256, 64)
    assert torch.equal(codes.T - 8, signed(layer))


def test_marlin_scales_follow_the_documented_permutation():
    """Marlin reads s.reshape(-1, 64)[:, perm] with perm = [i + 8 j for i for j]."""
    scales = torch.arange(3 * 128.0).view(3, 128)
    perm = [i + 8 * j for i in range(8) for j in range(8)]
    assert torch.equal(peers.marlin_scales(scales), scales.reshape(-1, 64)[:, perm].reshape(3, 128))


def test_fbgemm_pairs_are_signed_and_start_low(layer):
    pairs = peers.signed_pairs(layer.codes)
    assert pairs.dtype == torch.int8 and pairs.shape == (64, 128)
    low, high = (pairs << 4) >> 4, pairs >> 4  # arithmetic shifts of int8 extend the sign
    assert torch.equal(torch.stack([low, high], 2).view(64, 256).long(), signed(layer))


def test_tinygemm_pairs_start_high(layer):
    pairs = contenders.byte_pairs(layer.codes, first_high=True)
    assert pairs.dtype == torch.uint8
    assert torch.equal(torch.stack([pairs >> 4, pairs & 15], 2).view(64, 256).long() - 8, signed(layer))


def test_vllm_cpu_words_are_blocks_of_sixteen_outputs(layer):
    w = contenders.vllm_cpu().prepare(layer)["w"].view(4, 256, 2)  # block, column, half of the block
    codes = torch.stack([w.long() >> 4 * i & 15 for i in range(8)], 3)  # block, column, half, output
    assert torch.equal(codes.permute(0, 2, 3, 1).reshape(64, 256) - 8, signed(layer))


def test_every_cpu_contender_computes_the_product(layer):
    contenders.load_vllm_cpu()
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = x.double() @ weight(layer).T
    checked = []
    for entry in contenders.contenders("cpu"):
        if entry.supports(layer.problem(entry.dtype)) is None:
            y = entry.call(x.to(entry.dtype), contenders.clone(entry.prepare(layer)))
            # fp32 and the few roundings of bf16, each at most 2**-9 of an element's size; int8: see the next test
            limit = 0.02 if entry.activations != "as given" else 1e-6 if entry.dtype == torch.float32 else 2 ** -8
            assert float((y.double() - wanted).norm() / wanted.norm()) < limit
            checked.append(entry.name)
    assert {"dense bf16", "dense fp32"} <= set(checked)


def test_clones_are_equal_and_elsewhere(layer):
    ready = contenders.ours(next(k for k in contenders.KERNELS if k.name == "reference")).prepare(layer)
    for weights in (ready, {"a": [torch.ones(3)], "b": (torch.zeros(2), 7)}, torch.nn.Linear(3, 2)):
        before, after = contenders.tensors(weights), contenders.tensors(contenders.clone(weights))
        assert before and all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(before, after, strict=True))
    assert contenders.stored_bytes({"a": torch.zeros(3), "b": (torch.zeros(2, dtype=torch.uint8), 7)}) == 14


# --- errors -----------------------------------------------------------------------------------------------------------------

def test_reference_is_the_product_in_float64(layer):
    x = torch.randn(4, 256).bfloat16()
    y, norms = contenders.reference(x, layer)
    torch.testing.assert_close(y, x.double() @ weight(layer).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norms, (weight(layer) ** 2).sum(1).sqrt())


@pytest.mark.parametrize("damage", ["one element", "one scale", "another group", "nan", "shape"])
def test_damage_is_seen_among_many_right_elements(damage):
    layer = random_layer(512, 256, "cpu")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted, norms = contenders.reference(x, layer)
    w = weight(layer)
    y = wanted.bfloat16()
    assert contenders.errors(y, wanted, norms)[2] is None
    if damage == "one element":
        y[7, 300] += norms[300]
    elif damage == "one scale":
        w[5, :128] *= 2
    elif damage == "another group":
        w[:, :128], w[:, 128:] = w[:, 128:].clone(), w[:, :128].clone()
    elif damage == "nan":
        y[0, 0] = float("nan")
    elif damage == "shape":
        y = y[:, :-1]
    if damage in ("one scale", "another group"):
        y = (x.double() @ w.T).bfloat16()
    assert contenders.errors(y, wanted, norms)[2].startswith("wrong")


# --- runs on the CPU --------------------------------------------------------------------------------------------------------

def entry(name: str, call, kind: str = "peer", **more) -> Contender:
    return Contender(name, kind, lambda p: None, lambda layer: layer.weight(torch.bfloat16), call, **more)


def multiply(x, w):
    return torch.nn.functional.linear(x, w)


@pytest.fixture
def ceilings(monkeypatch):
    """Given instead of measured, which takes longer than all else in these tests."""
    monkeypatch.setattr(bench, "ceilings", lambda device, rounds: {"GB/s": 20.0, "TFLOP/s": 0.1})


def test_a_broken_kernel_is_marked_and_has_no_time(ceilings):
    seen = []

    def watched(x, w):
        seen.append((x, w))
        return multiply(x, w)

    def fails(x, w):
        raise RuntimeError("no such instruction")
    entries = [entry("dense bf16", watched, "dense"), entry("broken", lambda x, w: multiply(x, w.roll(1, 0))),
               entry("fails", fails), Contender("absent", "peer", lambda p: "not today", None, None)]
    run = bench.Bench("cpu", entries, rounds=2, budget=60)
    run.run_shape("small", 48, 256, (1, 20))
    rows = {(row["kernel"], row["m"]): row for row in run.rows}
    assert len(rows) == 6 and run.skipped == {"absent at 48x256": "not today"}
    for m in (1, 20):
        assert rows["broken", m]["note"].startswith("wrong: relative error") and "us" not in rows["broken", m]
        assert rows["broken", m]["error"] > 0.5
        assert rows["fails", m]["note"] == "failed: RuntimeError: no such instruction" and "us" not in rows["fails", m]
        row = rows["dense bf16", m]
        assert row["note"] is None and row["us_min"] <= row["us"] <= row["us_max"] and row["x_dense"] == 1
        # the error, anew: products of the very tensors that the kernel was given, with weights from the codes
        x, _ = next(pair for pair in seen if pair[0].shape[0] == m)
        w = weight(random_layer(48, 256, "cpu", seed=48 + 256))
        wanted, y = x.double() @ w.T, multiply(x, w.bfloat16())
        assert row["error"] == pytest.approx(float((y.double() - wanted).norm() / wanted.norm()), rel=1e-6)
        assert row["bytes"] == 2 * 48 * 256 + 2 * m * (48 + 256)
        assert row["TFLOP/s"] == pytest.approx(2 * m * 48 * 256 / row["us"] / 1e6)
        assert row["GB/s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)


def test_floor_is_bytes_then_operations():
    run = bench.Bench.__new__(bench.Bench)
    run.ceilings = {"GB/s": 4300.0, "TFLOP/s": 790.0}
    # the figures of an H200 for 8192 x 8192: 8 microseconds of memory, 696 of arithmetic
    assert run.floor(8192, 8192, 1, 128) == pytest.approx((8192 * 8192 * (0.5 + 2 / 128) + 2 * 16384) / 4.3e6)
    assert run.floor(8192, 8192, 4096, 128) == pytest.approx(695.9, rel=1e-3)


def test_nothing_starts_when_time_is_over_and_slow_setup_costs_only_its_own(ceilings):
    run = bench.Bench("cpu", [entry("dense bf16", multiply, "dense"), entry("slow", multiply)], rounds=1, budget=60)
    run.setup["slow"] = 16.0
    run.run_shape("small", 16, 128, (1,))
    assert [row["note"] for row in run.rows] == [None, "setting up took more than 15 s"]
    run.budget = 0
    run.run_shape("small", 16, 128, (4,))
    assert len(run.rows) == 2 and run.skipped == {"small M=4": "out of time (0 s)"}


def test_kernels_take_turns():
    log = []

    class Timer:
        def __init__(self, name, values):
            self.name, self.values = name, iter(values)

        def sample(self):
            log.append(self.name)
            return next(self.values)
    found = bench.interleave({"a": Timer("a", [1, 2, 3]), "b": Timer("b", [4, 5, 6])}, 3)
    assert found == {"a": [1, 2, 3], "b": [4, 5, 6]} and "".join(log) == "abbaab"


def test_weight_sets_fill_three_caches():
    assert bench.set_count(size=10, cache=60) == 18 and bench.set_count(size=1000, cache=60) == 2


def test_cuda_timer_replays_every_set_equally_often():
    """With torch.cuda replaced: how often calls are captured, what is divided by what."""
    calls = [mock.Mock() for _ in range(7)]
    with mock.patch.multiple(torch.cuda, synchronize=mock.DEFAULT, Stream=mock.DEFAULT, current_stream=mock.DEFAULT,
                             stream=mock.MagicMock(), graph=mock.MagicMock(), CUDAGraph=mock.DEFAULT, Event=mock.DEFAULT) as fake:
        fake["Event"].return_value.elapsed_time.return_value = 3.0
        timer = bench.CudaTimer(calls)
        assert timer.sample() == pytest.approx(3000 / len(timer.calls))
        assert fake["CUDAGraph"].return_value.replay.call_count == 2
    assert len(timer.calls) >= 10 and len({timer.calls.count(call) for call in calls}) == 1


def test_a_run_writes_its_files(tmp_path, capsys):
    assert bench.main(["--device", "cpu", "--shapes", "64x256,128x128", "--m", "1,3", "--kernels", "dense", "--rounds",
                       "1", "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("bench_*.json")
    result = json.loads(written.read_text())
    assert [(row["shape"], row["m"], row["kernel"]) for row in result["rows"]] == [
        (shape, m, kernel) for shape in ("64x256", "128x128") for m in (1, 3)
        for kernel in ("dense bf16", "dense fp32")]
    assert all(row["us"] > 0 and row["note"] is None for row in result["rows"])
    assert {"command", "commit", "machine", "versions", "ceilings", "cache_bytes"} <= set(result)
    assert len(list(csv.DictReader(written.with_suffix(".csv").open()))) == 8
    out = capsys.readouterr().out
    assert "64x256: 64 x 256, microseconds" in out and "dense fp32" in out


def test_a_run_is_resumed_shape_by_shape(tmp_path, ceilings, capsys):
    def run(shapes, *more):
        return bench.main(["--device", "cpu", "--shapes", shapes, "--m", "1", "--kernels", "dense fp32", "--rounds", "1", "--out",
                           str(tmp_path), *more])
    assert run("64x256") == 0
    (written,) = tmp_path.glob("bench_*.json")
    before = json.loads(written.read_text())["rows"]
    assert run("64x256,128x128", "--resume") == 0
    after = json.loads(written.read_text())
    assert after["rows"][:1] == before and [row["shape"] for row in after["rows"]] == ["64x256", "128x128"]
    assert "64x256: kept from the earlier run" in capsys.readouterr().out
    written.write_text(json.dumps({**after, "commit": "other"}))
    assert run("32x128", "--resume") == 2 and "has commit other" in capsys.readouterr().err
    assert run("32x128") == 0 and [row["shape"] for row in json.loads(written.read_text())["rows"]] == ["32x128"]


# --- reports ----------------------------------------------------------------------------------------------------------------

def row(kernel, us, kind="peer", m=1, note=None, best_of=None, activations="as given") -> dict:
    made = {"shape": "s", "n": 8, "k": 128, "m": m, "kernel": kernel, "kind": kind, "best_of": best_of, "note": note,
            "activations": activations}
    return made if us is None else {**made, "us": us, "us_min": us, "us_max": us, "GB/s": 1.0, "TFLOP/s": 1.0, "of_floor": 0.5,
                                    "error": 0.00234567, "worst": 0.01, "bytes": 5}


def made_up() -> list[dict]:
    return report.compare([row("dense bf16", 40.0, "dense"), row("ours", 10.0, "ours"), row("Marlin", 20.0),
                           row("broken", None, note="wrong: relative error 1.0e+00"),
                           row("Machete a", 16.0, best_of="Machete best"), row("Machete b", 15.0, best_of="Machete best"),
                           row("Machete c", None, note="failed: x", best_of="Machete best")])


def test_variants_become_their_best_and_ratios_say_who_is_faster():
    rows = {r["kernel"]: r for r in made_up()}
    assert list(rows) == ["dense bf16", "ours", "Marlin", "broken", "Machete best"]
    assert rows["Machete best"]["us"] == 15 and rows["Machete best"]["note"] == "of 3: Machete b"
    assert rows["ours"]["x_dense"] == 4 and rows["ours"]["x_best_peer"] == 1.5
    assert rows["Marlin"]["x_best_peer"] == 0.75 and "x_dense" not in rows["broken"]


def test_peers_that_round_activations_compete_only_with_their_like():
    found = report.compare([row("ours", 10.0, "ours"), row("ours int8", 5.0, "ours", activations="int8"), row("exact", 20.0),
                            row("rounds", 4.0, activations="int8")])
    assert {r["kernel"]: r["x_best_peer"] for r in found} == {"ours": 2, "ours int8": 0.8, "exact": 1, "rounds": 1}


def test_variants_without_any_time_keep_the_reason():
    (only,) = report.compare([row("a", None, note="failed: x", best_of="b"), row("c", None, note="failed: y", best_of="b")])
    assert only["kernel"] == "b" and only["note"] == "failed: x"


def test_tables_and_files_of_made_up_measurements(tmp_path, capsys):
    rows = made_up() + report.compare([row("dense bf16", 50.0, "dense", 16), row("ours", 25.0, "ours", 16)])
    report.table("s", 8, 128, rows)
    out = capsys.readouterr().out
    assert "10.0 (4.00) *" in out and "wrong" in out and "25.0 (2.00) *" in out and "broken: wrong: relative error" in out
    result = {"device": "X 1", "commit": "abc", "rows": rows}
    report.write(tmp_path / "bench_x", result)
    assert json.loads((tmp_path / "bench_x.json").read_text()) == result
    read = list(csv.DictReader((tmp_path / "bench_x.csv").open()))
    assert len(read) == 7 and set(read[0]) == set(report.COLUMNS)
    assert [read[1][key] for key in ("device", "kernel", "us", "error")] == ["X 1", "ours", "10", "0.0023457"]
    assert read[3]["us"] == "" and read[3]["note"].startswith("wrong")
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "bench_x", result)
    assert (tmp_path / "bench_x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- command line and peers -------------------------------------------------------------------------------------------------

def test_filters():
    args = bench.arguments(["--shapes", "0.6b o,down,256x384", "--m", "1,7"])
    assert args.shapes == {"Qwen3-0.6B o": (1024, 2048), "Qwen3-8B down": (4096, 12288), "Llama-3-8B down": (4096, 14336),
                           "Qwen3-0.6B down": (1024, 3072), "256x384": (256, 384)} and args.m == (1, 7)
    assert bench.arguments([]).shapes == bench.SHAPES and bench.arguments(["--quick"]).m == bench.QUICK_MS["cuda"]
    entries = [entry("Marlin", None), entry("Machete", None), entry("Machete x", None)]
    assert [e.name for e in bench.choose_kernels("mach", entries)] == ["Machete", "Machete x"]
    with pytest.raises(ValueError, match="no kernel here is called 'z'; there are Marlin, Machete"):
        bench.choose_kernels("z", entries)


@pytest.mark.parametrize("argv, said", [(["--shapes", "13B"], "no shape is called '13B'"), (["--m", "0"], "M must be positive"),
                                        (["--shapes", "64x100"], "K a multiple of the group"), (["--m", "x"], "invalid literal")])
def test_bad_arguments_are_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def run_hidden(*arguments):
    """The script without PYTHONPATH and from elsewhere, because it must find the repository by itself; with any GPU hidden."""
    environment = {key: v for key, v in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, ROOT / "kernels" / "bench.py", *arguments], cwd="/", env=environment,
                          capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(bool(torch.version.hip), reason="CUDA_VISIBLE_DEVICES hides no AMD GPU")
def test_dry_run_names_every_step_that_needs_a_gpu(tmp_path):
    done = run_hidden("--dry-run", "--peers", str(tmp_path), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped")]
    for shape in ("ceilings", *bench.SHAPES):
        assert any(line.startswith(f"skipped {shape} ") and "needs a GPU" in line for line in skipped), shape
    for peer in peers.PEERS:
        assert f"skipped {peer}: needs a GPU" in skipped
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(bool(torch.version.hip), reason="CUDA_VISIBLE_DEVICES hides no AMD GPU")
def test_without_a_gpu_it_refuses():
    done = run_hidden()
    assert done.returncode == 2 and "no NVIDIA GPU is visible" in done.stderr and not done.stdout


def test_peers_that_are_not_there_say_what_is_missing(tmp_path):
    found, missing = peers.collect(tmp_path)
    assert not found and list(missing) == list(peers.PEERS)
    assert missing["Marlin"] == f"FileNotFoundError: no vllm_C_sm90.so or vllm_C_sm90.so.xz in {tmp_path}"
    assert missing["humming"].startswith("FileNotFoundError: no humming_kernels-*.whl")
    assert set(peers.collect(None)[1].values()) == {"no --peers folder"}


def test_wheels_are_unpacked_with_their_modes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    with zipfile.ZipFile(tmp_path / "benchpeer_kernels-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("benchpeer/__init__.py", "answer = 42")
        info = zipfile.ZipInfo("benchpeer/compile")
        info.external_attr = 0o755 << 16
        wheel.writestr(info, "#!/bin/sh")
    peers.add_wheel(tmp_path, "benchpeer_kernels-*.whl")
    import benchpeer
    assert benchpeer.answer == 42
    assert os.access(pathlib.Path(benchpeer.__file__).with_name("compile"), os.X_OK)


def test_peers_take_only_shapes_they_document(layer):
    supports = peers.needs(64, 128, (128,))
    assert supports(layer.problem(torch.bfloat16)) == "needs a CUDA device, not cpu"
    problem = contenders.Problem(4096, 4096, 4, 128, True, torch.bfloat16, "cuda")
    assert supports(problem) is None
    assert "N % 64 == 0" in supports(contenders.Problem(4000, 4096, 4, 128, True, torch.bfloat16, "cuda"))
