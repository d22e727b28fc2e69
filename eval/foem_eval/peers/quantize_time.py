"""Time and memory of `foem quantize`, GPTQModel and llm-compressor: same machine, same model, same tokens, taking turns.

    python -m foem_eval.peers.quantize_time [--peers-folder DIR] [--work DIR] [--rounds 3] [--only REGEX] [--minutes M] [--busy]

Every tool is a process of its own, timed from start to end: imports, reading, quantizing at W4 g128 symmetric, writing; `foem`
also reads its text, tokenizes and verifies what it wrote, the others are handed its tokens. Peak memory is the largest resident
set. Runs are kept below --work: a call does those that are missing, for about M minutes, and writes what is there to
eval/results/quantize_time.{json,md}. --only: of "case: tool".

--busy: for a machine that is not idle. Every tool computes in one thread, whose processor time other work hardly changes; targets
are then judged by that and not by wall time.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from foem_eval import processes
from foem_eval.peers import environments
from foem_eval.provenance import provenance
from foem_vllm import calibration
from foem_vllm.errors import FoemError

ROOT = pathlib.Path(__file__).resolve().parents[3]
TINYLM, TEXT = ROOT / "eval/tinylm/qwen3", ROOT / "eval/tinylm/data/calibration.jsonl"
OURS = {"foem fast": ("--preset", "fast"), "foem balanced": ("--preset", "balanced"), "foem gptq": ("--method", "gptq")}
PEERS = {"GPTQModel": "gptqmodel", "llm-compressor": "llmcompressor"}
TOOLS = (*OURS, *PEERS)
TARGETS = {"GPTQModel": 5, "llm-compressor": 3}  # times our time
BUSY = ("The machine was busy with other work: every tool computed in one thread, wall times say little, and targets are judged "
        "by processor time.")
PRODUCTS = ("forward", "moments")  # stages of ours that are matrix products and little else


class Case(NamedTuple):
    """layers: of a random model of Qwen3-0.6B's shape; None for tinylm. samples sequences of `length` tokens."""

    layers: int | None
    samples: int
    length: int
    tools: tuple[str, ...] = TOOLS
    rounds: int = 99  # at most


CASES = {"tinylm": Case(None, 128, 256), "Qwen3-0.6B's shape, 4 layers": Case(4, 32, 512),
         "Qwen3-0.6B's shape, 24 layers": Case(24, 32, 512, ("foem balanced",), 1)}


def write_model(folder: pathlib.Path, layers: int) -> None:
    """Random bfloat16 weights in Qwen3-0.6B's shape, with tinylm's tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                         intermediate_size=3072, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=True,
                         dtype="bfloat16", bos_token_id=None, eos_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in TINYLM.glob("*token*"):
        shutil.copy(path, folder)


def write_tokens(model: pathlib.Path, case: Case, file: pathlib.Path) -> None:
    """What `foem quantize` draws from TEXT: `input_ids` [samples, length]."""
    tokens = calibration.sample_tokens(calibration.read_texts(str(TEXT)), AutoTokenizer.from_pretrained(model), case.samples,
                                       case.length, 0)
    save_file({"input_ids": tokens.contiguous()}, file)


def folder_of(name: str, work: pathlib.Path) -> pathlib.Path:
    return work / re.sub(r"\W+", "-", name)


def prepare(name: str, folder: pathlib.Path) -> None:
    """`model` (but for tinylm) and `tokens.safetensors` of a case in its folder, unless they are there."""
    case = CASES[name]
    if (folder / "tokens.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if case.layers is not None:
        write_model(folder / "model", case.layers)
    write_tokens(model_of(name, folder), case, folder / "tokens.safetensors")


def model_of(name: str, folder: pathlib.Path) -> pathlib.Path:
    return TINYLM if CASES[name].layers is None else folder / "model"


def command_of(name: str, tool: str, folder: pathlib.Path, out: pathlib.Path, peers: pathlib.Path) -> list[str]:
    """The command line of `tool` on a case."""
    case, model = CASES[name], model_of(name, folder)
    if tool in OURS:
        words = [processes.tool("foem"), "quantize", model, out, *OURS[tool], "--quiet", "--calibration", TEXT,
                 "--samples", case.samples, "--seq-len", case.length, "--seed", 0]
    else:
        script = environments.HERE / f"{PEERS[tool]}_quantize.py"
        method = ["--method", "gptq"] if PEERS[tool] == "gptqmodel" else []
        words = [environments.ensure(PEERS[tool], peers), script, model, out, folder / "tokens.safetensors", *method]
    return [str(word) for word in words]


def run(name: str, tool: str, folder: pathlib.Path, peers: pathlib.Path, busy: bool) -> dict:
    """One measured run: see measured.py; `parts`, seconds that the tool itself reports. Its checkpoint is removed."""
    env = environments.environment() | ({"OMP_NUM_THREADS": "1"} if busy else {})
    out, log, result = folder / "out", folder / "log", folder / "measured.json"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(environments.HERE / "measured.py"), str(result), str(log),
               *command_of(name, tool, folder, out, peers)]
    if (code := subprocess.run(command, env=env).returncode) or not (out / "config.json").is_file():
        raise FoemError(f"{tool} on {name} ended with exit code {code}; the last lines of {log}:\n{processes.tail(log)}")
    found = json.loads(result.read_text())
    if tool in OURS:
        report = json.loads((out / "foem_report.json").read_text())
        tokens = folder / "tokens.safetensors"
        if report["recipe"]["calibration_sha256"] != tokens_sha256(tokens):
            raise FoemError(f"{tokens}: not the tokens that foem quantize used; remove {folder} and start again")
        found["parts"] = report["seconds"]
    else:
        printed = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith('{"method"')]
        found["parts"] = {key: value for key, value in json.loads(printed[-1]).items() if key != "method"}
    shutil.rmtree(out)
    return found


def tokens_sha256(file: pathlib.Path) -> str:
    """As foem_report.json has it."""
    return hashlib.sha256(load_file(file)["input_ids"].numpy().tobytes()).hexdigest()[:16]


def missing(runs: list[dict], rounds: int, only: str) -> list[tuple[str, str, int]]:
    """(case, tool, round) still to run, round by round; every other round in the opposite order."""
    done = {(r["case"], r["tool"], r["round"]) for r in runs}
    wanted = []
    for name, case in CASES.items():
        for number in range(min(rounds, case.rounds)):
            wanted += [(name, tool, number) for tool in case.tools[::-1 if number % 2 else 1]]
    return [w for w in wanted if w not in done and re.search(only, f"{w[0]}: {w[1]}")]


def quantizing(tool: str, parts: dict[str, float]) -> float:
    """Seconds of a run without imports: ours without verifying, the peers' own step without loading and saving."""
    return parts["total"] if tool in OURS else parts["quantize_s"]


def summary(runs: list[dict]) -> dict[str, dict[str, dict]]:
    """{case: {tool: medians, `peak_rss` the largest, `wall_range`, `rounds`}}, as far as there are runs."""
    found: dict[str, dict[str, dict]] = {}
    for name, case in CASES.items():
        for tool in case.tools:
            mine = [r for r in runs if (r["case"], r["tool"]) == (name, tool)]
            if mine:
                walls = [r["wall_s"] for r in mine]
                found.setdefault(name, {})[tool] = {
                    "wall_s": statistics.median(walls), "wall_range": [min(walls), max(walls)], "rounds": len(mine),
                    "quantizing_s": statistics.median(quantizing(tool, r["parts"]) for r in mine),
                    "cpu_s": statistics.median(r["user_s"] + r["system_s"] for r in mine),
                    "peak_rss": max(r["peak_rss"] for r in mine)}
    return found


def stages(runs: list[dict], name: str, tool: str) -> dict[str, float]:
    """Medians of the seconds of each stage of ours, the largest first. `other`: within the run, but in no stage;
    `imports, verifying`: of the process, but before and after the run."""
    mine = [r for r in runs if (r["case"], r["tool"]) == (name, tool)]
    rows = []
    for r in mine:
        row = {key: value for key, value in r["parts"].items() if key != "total"}
        row["other"] = r["parts"]["total"] - sum(row.values())
        row["imports, verifying"] = r["wall_s"] - r["parts"]["total"]
        rows.append(row)
    medians = {key: statistics.median(row.get(key, 0.0) for row in rows) for key in dict.fromkeys(k for row in rows for k in row)}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def verdicts(table: dict[str, dict], judge: str = "wall_s") -> list[str]:
    """Of one case: how many times our time and memory each peer takes, for each of ours, beside the target. judge: what is meant
    by time, "wall_s" or "cpu_s"."""
    lines = []
    for peer, target in TARGETS.items():
        for tool in OURS:
            if peer in table and tool in table:
                times = {key: table[peer][key] / table[tool][key] for key in ("wall_s", "cpu_s", "peak_rss")}
                met = "met" if times[judge] >= target and times["peak_rss"] >= 1 else "**not met**"
                lines.append(f"| {peer} / {tool} | {times['wall_s']:.1f} | {times['cpu_s']:.1f} | {times['peak_rss']:.2f} | "
                             f"{target} x at no more memory: {met} |")
    return lines


def markdown(content: dict) -> str:
    runs, tables = content["runs"], content["summary"]
    lines = [f"`{content['command']}`, commit {content['commit']}, {content['machine']}, torch {content['versions']['torch']}, "
             f"GPTQModel {content['gptqmodel']}, llm-compressor {content['llmcompressor']}. W4, groups of 128, symmetric.", "",
             BUSY if content["busy"] else "The machine was idle but for this, and every tool used all cores.", "",
             "Wall time of whole processes, medians, in brackets the fastest and slowest; quantizing: what the tool itself says, "
             "without imports (the peers' also without loading and saving); memory: largest resident set."]
    for name, table in tables.items():
        case = CASES[name]
        lines += ["", f"## {name}, {case.samples} x {case.length} tokens", "",
                  "| tool | wall, s | quantizing, s | processor, s | peak memory, GB | rounds |", "|---|---|---|---|---|---|"]
        for tool, row in table.items():
            low, high = row["wall_range"]
            lines.append(f"| {tool} | {row['wall_s']:.1f} ({low:.1f} - {high:.1f}) | {row['quantizing_s']:.1f} | "
                         f"{row['cpu_s']:.1f} | {row['peak_rss'] / 1e9:.2f} | {row['rounds']} |")
        if compared := verdicts(table, "cpu_s" if content["busy"] else "wall_s"):
            lines += ["", "| | times our wall time | processor time | memory | target |", "|---|---|---|---|---|", *compared]
        ours = [tool for tool in OURS if tool in table]
        shares = {tool: stages(runs, name, tool) for tool in ours}
        names = dict.fromkeys(stage for found in shares.values() for stage in found)
        lines += ["", "Where our time goes, seconds and share of the whole process:", "",
                  "| stage | " + " | ".join(ours) + " |", "|---" * (len(ours) + 1) + "|"]
        for stage in names:
            cells = [f"{shares[t].get(stage, 0):.2f} ({shares[t].get(stage, 0) / table[t]['wall_s']:.0%})" for t in ours]
            lines.append(f"| {stage}{' (matrix products)' if stage in PRODUCTS else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-folder", type=pathlib.Path, default=environments.FOLDER, help="where peers are, or go")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "out/quantize_time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="regular expression of case and tool")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--busy", action="store_true", help="one thread each, judged by processor time")
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "eval/results/quantize_time.json")
    args = parser.parse_args()
    started, kept = time.monotonic(), args.work / ("runs-busy.jsonl" if args.busy else "runs.jsonl")
    args.work.mkdir(parents=True, exist_ok=True)
    runs = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    for name, tool, number in missing(runs, args.rounds, args.only):
        if time.monotonic() - started > 60 * args.minutes:
            break
        folder = folder_of(name, args.work)
        prepare(name, folder)
        runs.append({"case": name, "tool": tool, "round": number, **run(name, tool, folder, args.peers_folder, args.busy)})
        print(f"{name}, round {number + 1}, {tool}: {runs[-1]['wall_s']:.1f} s, {runs[-1]['peak_rss'] / 1e9:.2f} GB", flush=True)
        with kept.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    versions = {peer: environments.VERSIONS[peer] for peer in PEERS.values()}
    content = {**provenance(), **versions, "busy": args.busy, "summary": summary(runs), "runs": runs}
    args.json.write_text(json.dumps(content, indent=1) + "\n")
    args.json.with_suffix(".md").write_text(markdown(content))


if __name__ == "__main__":
    main()
