"""Timing quantizers: a measured command is measured, runs that are there are not repeated, tables say what was measured."""
from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys

import pytest
from foem_eval.peers import environments, quantize_time
from foem_eval.peers.quantize_time import CASES, OURS, TOOLS

from foem_vllm.job import calibration_tokens
from foem_vllm.models import load_config
from foem_vllm.recipe import QuantizeConfig

MEASURED = environments.HERE / "measured.py"
MIB = 2**20


def measured(tmp_path: pathlib.Path, code: str) -> tuple[int, dict, str]:
    """(exit code, what measured.py notes, output) of a Python program."""
    result, log = tmp_path / "result.json", tmp_path / "log"
    done = subprocess.run([sys.executable, MEASURED, result, log, sys.executable, "-S", "-c", code])
    return done.returncode, json.loads(result.read_text()), log.read_text()


def test_memory_and_time_are_the_commands_own(tmp_path):
    ballast = bytearray(300 * MIB)  # of the process that asks: it must not count
    code, small, _ = measured(tmp_path, "import time; time.sleep(0.3)")
    assert code == 0 and small["wall_s"] > 0.3 and small["user_s"] < 0.3
    assert small["peak_rss"] < 100 * MIB, "a Python that does nothing"
    del ballast
    busy = "import time; x = bytearray(200 << 20); print('made')\nwhile time.process_time() < .3: 1"
    code, large, said = measured(tmp_path, busy)
    assert (code, said) == (0, "made\n")
    assert 200 * MIB < large["peak_rss"] < 300 * MIB and large["user_s"] + large["system_s"] >= 0.3


def test_memory_of_a_grandchild_counts(tmp_path):
    inner = "x = bytearray(150 << 20)"
    _, found, _ = measured(tmp_path, f"import subprocess, sys; subprocess.check_call([sys.executable, '-S', '-c', {inner!r}])")
    assert found["peak_rss"] > 150 * MIB


@pytest.mark.parametrize("end, code", [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_failures_are_handed_on(tmp_path, end, code):
    assert measured(tmp_path, f"import os, sys; {end}")[0] == code


def a_run(case: str, tool: str, number: int, wall: float, rss: int) -> dict:
    ours = {"prepare": 1.0, "forward": 2.0, "solve": wall / 4, "total": wall - 2}
    parts = ours if tool in OURS else {"load_s": 1, "quantize_s": wall - 3}
    return {"case": case, "tool": tool, "round": number, "wall_s": wall, "user_s": 2 * wall, "system_s": 0.5, "peak_rss": rss,
            "parts": parts}


def test_what_is_there_is_not_run_again_and_rounds_alternate():
    asked = quantize_time.missing([], 2, "^tinylm")
    assert [tool for _, tool, _ in asked] == [*TOOLS, *TOOLS[::-1]]
    runs = [a_run("tinylm", "foem fast", 0, 8.0, 1)]
    assert quantize_time.missing(runs, 2, "^tinylm") == asked[1:]
    large = next(name for name, case in CASES.items() if case.rounds == 1)
    assert {(name, number) for name, _, number in quantize_time.missing([], 3, "24 layers")} == {(large, 0)}
    assert quantize_time.missing([], 1, "tinylm: GPTQModel") == [("tinylm", "GPTQModel", 0)]


def test_medians_shares_and_targets():
    runs = [a_run("tinylm", tool, i, wall + i, 10**9 * (2 + i)) for tool, wall in
            (("foem fast", 8.0), ("foem balanced", 16.0), ("GPTQModel", 47.0), ("llm-compressor", 30.0)) for i in range(3)]
    table = quantize_time.summary(runs)["tinylm"]
    assert table["foem fast"] == {"wall_s": 9, "wall_range": [8, 10], "rounds": 3, "quantizing_s": 7, "cpu_s": 18.5,
                                  "peak_rss": 4e9}
    assert table["GPTQModel"]["quantizing_s"] == 45
    stages = quantize_time.stages(runs, "tinylm", "foem fast")
    assert stages == {"solve": 2.25, "forward": 2, "imports, verifying": 2, "other": 1.75, "prepare": 1}
    assert list(stages)[0] == "solve" and sum(stages.values()) == 9
    fast, balanced, *_ = quantize_time.verdicts(table)
    assert fast == "| GPTQModel / foem fast | 5.3 | 5.2 | 1.00 | 5 x at no more memory: met |"
    assert balanced == "| GPTQModel / foem balanced | 2.8 | 2.8 | 1.00 | 5 x at no more memory: **not met** |"
    table["foem fast"]["cpu_s"] *= 2
    assert "**not met**" in quantize_time.verdicts(table, "cpu_s")[0] and "**not met**" not in quantize_time.verdicts(table)[0]
    table["foem fast"]["peak_rss"] += 1
    assert "**not met**" in quantize_time.verdicts(table)[0], "more memory than the peer"


def test_the_page_has_a_row_for_every_tool_and_stage():
    runs = [a_run(name, tool, 0, 10.0, 10**9) for name, case in CASES.items() for tool in case.tools]
    content = {"command": "x", "commit": "y", "machine": "z", "versions": {"torch": "1"}, "busy": False, **environments.VERSIONS,
               "summary": quantize_time.summary(runs), "runs": runs}
    page = quantize_time.markdown(content)
    for name, case in CASES.items():
        part = page.split(f"## {name}, ")[1].split("\n## ")[0]
        assert all(f"| {tool} | 10.0 (10.0 - 10.0) |" in part for tool in case.tools)
        assert "| forward (matrix products) | 2.00 (20%)" in part and "| imports, verifying |" in part


def test_tokens_are_those_of_foem_quantize(tinylm, tmp_path):
    case = CASES["tinylm"]
    quantize_time.prepare("tinylm", tmp_path)
    config = QuantizeConfig(calibration=str(quantize_time.TEXT), samples=case.samples, seq_len=case.length)
    expected = calibration_tokens(config, tinylm, load_config(tinylm))
    assert expected.shape == (case.samples, case.length)
    assert quantize_time.tokens_sha256(tmp_path / "tokens.safetensors") == \
        hashlib.sha256(expected.numpy().tobytes()).hexdigest()[:16]
