"""The commands that time the CPU beside kernels/bench.py, made small: solver, loading, serving; and the check in the demo."""
from __future__ import annotations

import http.server
import json
import pathlib
import sys
import threading
import types

import pytest
import torch
from foem_kernels import native

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "eval")]

import bench_load  # noqa: E402
import bench_solver  # noqa: E402
import cpu_serve  # noqa: E402
import demo  # noqa: E402

from foem_vllm.errors import FoemError  # noqa: E402

compiled = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not compiled (no C compiler?)")


@compiled
def test_solver_rows_compare_equal_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FOEM_SOLVER", "torch")
    out = tmp_path / "solver.json"
    assert bench_solver.main(["--size", "256", "--rounds", "1", "--out", str(out)]) == 0
    rows, grid = (json.loads(out.read_text())[name] for name in ("rows", "grid"))
    assert grid["equal"] > 0.999 and grid["ratio"] == pytest.approx(grid["torch_s"] / grid["cpu_s"])
    assert [row["method"] for row in rows] == ["gptq", "foem", "foem+gptaq"] and "256" not in capsys.readouterr().err
    for row in rows:
        assert row["equal"] > 0.999 and row["loss_ratio"] == pytest.approx(1, abs=1e-3)
        assert row["loop_ratio"] == pytest.approx(row["loop_torch_s"] / row["loop_cpu_s"])
    assert bench_solver.os.environ["FOEM_SOLVER"] == "torch"  # left as it was


@compiled
def test_the_timed_loops_round_the_same_columns(monkeypatch):
    """Both functions are handed the same blocks, terms and all: with the results kept, their points are equal."""
    W, _, _ = bench_solver.random_layer(256)
    for config in bench_solver.METHODS.values():
        kept = {}
        for name, function in bench_solver.FUNCTIONS.items():
            def keep(w, V, points, errors, *rest, kept=kept, name=name, function=function, **terms):
                function(w, V, points, errors, *rest, **terms)
                kept.setdefault(name, []).append(points.clone())
            assert bench_solver.loop(keep, W, config)() > 0
        torch_points, cpu_points = (torch.cat(kept[name]) for name in ("torch", "cpu"))
        assert torch_points.shape == (256, 256) and (torch_points != cpu_points).double().mean() < 1e-3


def test_loading_is_timed_on_tensors_of_a_checkpoint():
    (row,) = bench_load.measure({"small": (96, 256)}, 1)
    assert row["seconds"] == row["unpack_s"] + row["prepare_s"] > 0
    shapes = {name: tuple(t.shape) for name, t in bench_load.stored(96, 256).items()}
    assert shapes == {"qweight": (32, 96), "qzeros": (2, 12), "scales": (2, 96), "g_idx": (256,)}


class Server(http.server.BaseHTTPRequestHandler):
    """Answers completions as vLLM does; `short`: one token too few."""

    short, asked = 0, []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        answer = json.dumps({"usage": {"completion_tokens": body["max_tokens"] - self.short}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_requests_of_a_batch_differ_and_short_answers_are_an_error(url, monkeypatch):
    monkeypatch.setattr(Server, "asked", [])
    assert cpu_serve.seconds(url, 3, 5, 2) > 0
    assert len({tuple(body["prompt"]) for body in Server.asked}) == 3
    assert all(len(body["prompt"]) == 5 and body["ignore_eos"] and body["temperature"] == 0 for body in Server.asked)
    monkeypatch.setattr(Server, "short", 1)
    with pytest.raises(FoemError, match="asked for 2 tokens from each of 3 requests, got"):
        cpu_serve.seconds(url, 3, 5, 2)


def test_rates_leave_out_the_prompt(monkeypatch):
    """A second for the prompt, a tenth for every token after the first."""
    monkeypatch.setattr(cpu_serve, "seconds", lambda url, batch, length, tokens: 1 + 0.1 * (tokens - 1))
    assert cpu_serve.decode("", 4) == pytest.approx(40) and cpu_serve.prefill("") == pytest.approx(cpu_serve.LONG)
    found = cpu_serve.measure({"foem": "", "gptq": "", "bf16": ""}, (1, 4), 3)
    assert found["bf16"]["decode, batch 1"] == pytest.approx([10] * 3)


def test_ratios_are_of_medians():
    found = {"foem": {"prefill": [9, 30, 20]}, "gptq": {"prefill": [10, 5, 100]}, "bf16": {"prefill": [40, 40, 1]}}
    (row,) = cpu_serve.summarize(found)
    assert (row["foem"], row["foem over gptq"], row["foem over bf16"]) == (20, 2, 0.5)


def test_servers_are_described_by_their_logs(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("foem kernel cpu_w4a16 for 4-bit\nfoem kernel cpu_w4a16 for 4-bit\n\tlocal_rank=0, core ids=[0, 1]\n")
    assert cpu_serve.described(log) == {"kernels": ["cpu_w4a16"], "cores": ["[0, 1]"]}


def logprobs(tokens, *top):
    return types.SimpleNamespace(tokens=list(tokens), top_logprobs=list(top))


def test_demo_compares_greedy_answers():
    wanted = logprobs("abc", {"a": -0.1}, {"b": -0.5, "x": -0.6, "y": -0.9}, {"c": -0.2})
    assert demo.check_same(logprobs("abc"), wanted) == "all 3 tokens are the reference path's"
    assert demo.check_same(logprobs("axz"), wanted).startswith("the same 1 tokens as the reference path, then a tie: 'x' or 'b'")
    for wrong in ("ayc", "aqc"):
        with pytest.raises(FoemError, match="token 1 of the greedy answer is '[yq]', the reference path's is 'b'"):
            demo.check_same(logprobs(wrong), wanted)


def test_demo_leaves_the_choice_of_kernel_as_it_was(monkeypatch):
    for before in (None, "cpu_w4a16"):
        monkeypatch.delenv("FOEM_KERNEL", raising=False)
        if before:
            monkeypatch.setenv("FOEM_KERNEL", before)
        with demo.reference_kernel():
            assert demo.os.environ["FOEM_KERNEL"] == "reference"
        assert demo.os.environ.get("FOEM_KERNEL") == before
