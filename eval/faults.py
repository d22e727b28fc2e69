"""Everything that can go wrong with `foem quantize`, done to it for real, and how each run ends.

    make faults                                   # eval/results/faults.{json,md}; ten minutes on two cores; root, for small disks
    python eval/faults.py --only kills-MoE-best disk   # some rows again; the others stay

Every run must end in a right checkpoint or in a clear error and, where blocks are finished, the command that goes on; never in a
half-written folder that loads. Right: the bytes of a run that nothing was done to. Where the input is bad and the run goes
through, the quantized model's logits on the calibration text must be nearer to the original's than rounding to nearest's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # processes are forked
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from fault_inputs import numbers, texts  # noqa: E402
from fault_runs import (  # noqa: E402
    Done,
    at_operation,
    before_block,
    before_finish,
    content,
    fill,
    intact,
    left,
    run,
    small_device,
    small_disk,
)
from foem_eval.dequantized import write_dequantized  # noqa: E402
from foem_eval.provenance import provenance  # noqa: E402
from tiny_models import CALIBRATION, write_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from foem_vllm import QuantizeConfig  # noqa: E402
from foem_vllm.job import prepare  # noqa: E402

RESULTS = ROOT / "eval/results"
MODELS = {"dense": "llama", "MoE": "qwen3_moe"}
CRASH = "either the right checkpoint or nothing under its name; --resume ends with the bytes of an undisturbed run"
ERROR = "one clear line, exit code 1, no checkpoint"
GOES_ON = ERROR + "; once the cause is gone, --resume ends with the bytes of an undisturbed run"


class Bench:
    """A folder to work in: the models, and a new folder for every run."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.count, self.rows = folder, 0, []
        self.kills = 30
        for name, arch in MODELS.items():
            for file in write_model(folder / name, arch).iterdir():
                file.chmod(0o644)  # one row is another user's
            prepare(
                folder / name, QuantizeConfig(device="cpu", calibration=str(CALIBRATION), samples=2, seq_len=64, group_size=32)
            ).tokens()

    def new(self) -> pathlib.Path:
        self.count += 1
        path = self.folder / f"run{self.count}"
        path.mkdir()
        return path

    def words(self, model: pathlib.Path, parent: pathlib.Path, *options: str) -> list[str]:
        usual = ["--calibration", str(CALIBRATION), "--samples", "16", "--seq-len", "64", "--preset", "balanced"]
        left_away = {*options, *(["--preset"] if "--method" in options else [])}
        given = [w for i in range(0, len(usual), 2) if usual[i] not in left_away for w in usual[i : i + 2]]
        return ["quantize", str(model), str(parent / "out"), "-q", "--group-size", "32", "--device", "cpu", *given, *options]

    @functools.cache  # noqa: B019
    def whole(self, model: pathlib.Path, *options: str) -> dict[str, bytes]:
        """The bytes of a run that nothing is done to."""
        parent = self.new()
        done = run(self.words(model, parent, *options))
        assert done.code == 0, done.said
        return content(parent / "out")

    def add(self, fault: str, must: str, happened: str, ok: bool) -> None:
        happened = happened.replace(str(self.folder), "...").replace(f"{ROOT}/", "")
        self.rows.append({"fault": fault, "must": must, "happened": happened, "ok": bool(ok)})
        print(f"{'ok ' if ok else 'BAD'} {fault}: {happened}", flush=True)

    def goes_on(self, model: pathlib.Path, parent: pathlib.Path, *options: str) -> str:
        """Resume; in words whether that gave the right bytes."""
        done = run([*self.words(model, parent, *options), "--resume"])
        if done.code:
            return f"--resume: exit {done.code}, {done.message}"
        same = content(parent / "out") == self.whole(model, *options) and sorted(p.name for p in parent.iterdir()) == ["out"]
        return "--resume: same bytes" if same else "--resume: OTHER BYTES"

    def failing(
        self,
        fault: str,
        says: str,
        prepare: Callable[[], None] | None = None,
        repair: Callable[[pathlib.Path], None] | None = None,
        model: pathlib.Path | None = None,
        options: tuple[str, ...] = (),
        parent: pathlib.Path | None = None,
        code: int = 1,
    ) -> None:
        """A run that must end with a message that has `says` in it. repair: takes the cause away; then the run is resumed."""
        model, parent = model or self.folder / "dense", parent or self.new()
        done = run(self.words(model, parent, *options), prepare)
        remains = left(parent / "out")
        hint = "--resume" in done.said
        ok = done.code == code and says in done.said and "Traceback" not in done.said and "checkpoint" not in remains
        ok = ok and hint >= ("to resume" in remains)
        happened = f"exit {done.code}; {done.message}; left: {remains}"
        if repair:
            repair(parent)
            went = self.goes_on(model, parent, *options)
            happened, ok = f"{happened}; then {went}", ok and went.endswith("same bytes")
        self.add(fault, GOES_ON if repair else ERROR, happened, ok)

    def surviving(self, fault: str, model: pathlib.Path, *options: str) -> None:
        """A run on bad input that must make a right checkpoint all the same."""
        parent, nearest = self.new(), self.new()
        done = run(self.words(model, parent, *options))
        happened, ok = f"exit {done.code}; left: {left(parent / 'out')}", False
        if done.code:
            happened += f"; {done.message}"
        else:
            assert run(self.words(model, nearest, "--method", "rtn")).code == 0
            ours, rtn = (distance(self, model, folder / "out", options) for folder in (parent, nearest))
            happened += f"; squared error of the logits {ours:.4f}, rounded to nearest {rtn:.4f}"
            ok = intact(parent / "out") and ours <= rtn
        self.add(fault, "a right checkpoint, nearer to the original than rounding to nearest", happened, ok)


def kills(bench: Bench, name: str, preset: str) -> None:
    """kill -9 at moments spread over a whole run."""
    rng, model, options = random.Random(0), bench.folder / name, ("--preset", preset)
    bench.whole(model, *options)
    seconds = run(bench.words(model, bench.new(), *options)).seconds
    ends, states = [], Counter()
    for i in range(bench.kills):
        moment, done = (i + rng.random()) / bench.kills, None
        while done is None or done.code == 0:  # a run that was faster than its kill is no kill: again, a little earlier
            parent = bench.new()
            done = run(bench.words(model, parent, *options), after=seconds * moment)
            seconds = seconds if done.code else min(seconds, done.seconds) * 0.95
        ends.append(survived(bench, done, model, parent, options, states))
    bench.add(f"kill -9 at {bench.kills} random moments of {seconds:.1f} s, {name}, {preset}", CRASH, *summary(ends, states))


def kills_at_operations(bench: Bench) -> None:
    """kill -9 before everything that the run does to the output's files, so also between the last renames."""
    model, options = bench.folder / "dense", ("--preset", "fast")
    ends, states = [], Counter()
    while True:
        parent = bench.new()
        done = run(bench.words(model, parent, *options), at_operation(len(ends) + 1, parent))
        if done.code == 0:
            break
        ends.append(survived(bench, done, model, parent, options, states))
    bench.add("kill -9 before each operation on the output's files, one after the other", CRASH, *summary(ends, states))


def survived(bench: Bench, done: Done, model: pathlib.Path, parent: pathlib.Path, options: tuple, states: Counter) -> bool:
    """Whether a run that was killed left nothing half-written and ends with the right bytes when resumed."""
    state = left(parent / "out")
    states[state] += 1
    right = "HALF" not in state and done.code == -signal.SIGKILL
    right = right and bench.goes_on(model, parent, *options) == "--resume: same bytes"
    shutil.rmtree(parent)
    return right


def summary(ends: list[bool], states: Counter) -> tuple[str, bool]:
    found = ", ".join(f"{n} x {state}" for state, n in sorted(states.items()))
    return f"{sum(ends)} of {len(ends)} ended with the same bytes; left by the kill: {found}", all(ends)


def signals(bench: Bench) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and what they start with them
    for number, name, code in ((signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)):
        for index, when in ((0, "before the first block is finished"), (1, "after it")):
            action = before_block(index, lambda number=number: os.kill(os.getpid(), number))
            bench.failing(f"{name} {when}", "", action, lambda parent: None, code=code)


def disks(bench: Bench) -> None:
    with small_disk(bench.new(), "1m") as parent:
        bench.failing("disk too small for the checkpoint", "but the checkpoint needs about", parent=parent)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    bench.failing("disk refuses the size while files are laid out", "the disk is full", limit, lambda parent: None)
    spill = ("--activation-memory", "0", "--preset", "best")
    for what, when, options, says in (
        ("while activations are spilled", functools.partial(before_block, 0), spill, "activations that have no room"),
        ("while a block is noted in the journal", functools.partial(before_block, 1), (), "the disk is full"),
        ("while config and reports are written", before_finish, (), "the disk is full"),
    ):
        with small_disk(bench.new(), "16m") as parent:
            action = when(functools.partial(fill, parent))
            bench.failing(f"disk full {what}", says, action, lambda p: (p / "filler").unlink(), options=options, parent=parent)


def folders(bench: Bench) -> None:
    with small_disk(bench.new(), "16m", "ro") as parent:
        bench.failing("read-only file system", "not writable", parent=parent)
    parent = bench.new()
    bench.failing(
        "a folder that this user may not write to", "not writable", lambda: os.setresuid(65534, 65534, 65534), parent=parent
    )
    parent = bench.new()
    gone = before_block(1, lambda: shutil.rmtree(parent / ".out.partial"))
    bench.failing("the unfinished output is deleted during the run", "No such file", gone, lambda p: None, parent=parent)


def sources(bench: Bench) -> None:
    sharded = bench.folder / "sharded"
    AutoModelForCausalLM.from_pretrained(bench.folder / "dense").save_pretrained(sharded, max_shard_size="200KB")
    for file in bench.folder.glob("dense/tokenizer*"):
        shutil.copy(file, sharded)
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    aside = bench.folder / "aside"
    away = before_block(1, lambda: shard.rename(aside))
    bench.failing("a shard of the source is deleted during the run", "was deleted", away, lambda p: aside.rename(shard), sharded)
    other = write_model(bench.folder / "other", "llama", seed=1) / "model.safetensors"
    model = shutil.copytree(bench.folder / "dense", bench.folder / "replaced")
    target = model / "model.safetensors"
    kept = shutil.copy2(target, aside)
    for how, replace in (("by another file", lambda: os.replace(shutil.copy(other, model / "new"), target)),
                         ("in place", lambda: shutil.copyfile(other, target))):  # fmt: skip
        bench.failing(
            f"the source is replaced {how} during the run",
            "was changed",
            before_block(1, replace),
            lambda p: shutil.copy2(kept, target),
            model,
        )
    parent = bench.new()
    run(bench.words(model, parent), before_block(1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    target.touch()
    done = run([*bench.words(model, parent), "--resume"])
    ok = done.code == 1 and "model was" in done.said and "to resume" in left(parent / "out")
    bench.add(
        "the source is another one when the run is resumed",
        ERROR,
        f"exit {done.code}; {done.message}; left: {left(parent / 'out')}",
        ok,
    )


def workers(bench: Bench) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "foem_vllm"]
    options = ("--samples", "64", "--seq-len", "128")
    model, whole = bench.folder / "dense", bench.new()
    subprocess.run([*torchrun, *bench.words(model, whole, *options)], check=True, capture_output=True)
    for rank in ("1", "0"):
        parent = bench.new()
        command = [*torchrun, *bench.words(model, parent, *options)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        journal = parent / ".out.partial/journal.jsonl"
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
            time.sleep(0.01)
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(
            next(int(pid) for pid in found if f"\0RANK={rank}\0".encode() in pathlib.Path(f"/proc/{pid}/environ").read_bytes()), 9
        )
        _, said = process.communicate(timeout=120)
        remains = left(parent / "out")
        errors = [line for line in said.splitlines() if "foem: error: " in line]
        named = any(line.split() == ["rank", ":", rank, "(local_rank:", f"{rank})"] for line in said.splitlines())
        resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
        same = resumed.returncode == 0 and content(parent / "out") == content(whole / "out")
        ok = process.returncode and named and "--resume" in said and "checkpoint" not in remains and same
        happened = f"exit {process.returncode}; torchrun names rank {rank}: {'yes' if named else 'NO'}; the other: "
        happened += (
            f"{errors[0][errors[0].index('foem: error') :] if errors else 'ended by torchrun'}; left: {remains}; then --resume: "
        )
        must = (
            "the other ends, rank and resume command are named, no checkpoint; --resume ends with the bytes of an undisturbed run"
        )
        bench.add(f"process {rank} of 2 dies (kill -9) under torchrun", must, happened + ("same bytes" if same else "NO"), ok)


def memory(bench: Bench) -> None:
    parent = bench.new()
    done = run(bench.words(bench.folder / "dense", parent), small_device(1))
    recipe = json.loads((parent / "out/foem_report.json").read_text())["recipe"] if done.code == 0 else {}
    ok = done.code == 0 and intact(parent / "out") and recipe.get("smaller_batches") == 4
    happened = (
        f"exit {done.code}; {done.message}; report: smaller_batches={recipe.get('smaller_batches')}; left: {left(parent / 'out')}"
    )
    bench.add(
        "device memory for a quarter of a batch", "smaller batches, and a right checkpoint whose report says so", happened, ok
    )
    bench.failing("device memory for no batch", "out of device memory", small_device(0), lambda parent: None)
    bench.failing("device memory runs out after a block", "out of device memory", small_device(0, 1), lambda parent: None)

    def no_more() -> None:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)

    big = ("--samples", "256", "--seq-len", "128", "--preset", "best")
    bench.failing(
        "host memory: nothing more from block 1 on", "out of host memory", before_block(1, no_more), lambda p: None, options=big
    )


@torch.no_grad()
def distance(bench: Bench, model: pathlib.Path, quantized: pathlib.Path, options: tuple[str, ...]) -> float:
    """||logits - original's||^2 / ||original's||^2 on the calibration text of a run with these options."""
    text = dict(zip(options[::2], options[1::2])).get("--calibration", str(CALIBRATION))
    config = QuantizeConfig(device="cpu", calibration=text, samples=16, seq_len=64, group_size=32)
    tokens, plain = prepare(model, config).tokens(), bench.new() / "plain"
    write_dequantized(quantized, plain, torch.float32)
    ours, original = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32)(tokens).logits for m in (plain, model))
    return float((ours - original).square().sum() / original.square().sum())


PARTS = {
    "numbers": numbers,
    "texts": texts,
    **{f"kills-{m}-{p}": functools.partial(kills, name=m, preset=p) for m in MODELS for p in ("balanced", "best")},
    "operations": kills_at_operations,
    "signals": signals,
    "disk": disks,
    "folders": folders,
    "sources": sources,
    "workers": workers,
    "memory": memory,
}


def table(found: dict) -> str:
    rows = [(part, row) for part in PARTS if part in found for row in found[part]["rows"]]
    bad = sum(not row["ok"] for _, row in rows)
    lines = ["# Faults", "", f"{len(rows)} faults, {bad} that do not end as they must.", ""]
    lines += ["| what was done | what must happen | what happened | |", "|---|---|---|---|"]
    for _, row in rows:
        cells = [row[key].replace("|", "\\|") for key in ("fault", "must", "happened")]
        lines.append(f"| {' | '.join(cells)} | {'ok' if row['ok'] else '**not ok**'} |")
    lines += ["", "Made by:", ""]
    for part in (p for p in PARTS if p in found):
        of = found[part]["provenance"]
        lines.append(
            f"- {part}: `{of['command']}`, commit {of['commit']}, {of['date']}, {of['machine']}, torch {of['versions']['torch']}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts; the others stay as they are in the table")
    parser.add_argument("--kills", type=int, default=30, help="random moments of each model and preset")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of faults.json and faults.md")
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("small file systems are mounted: run it as root, or with `unshare -rm`")
    torch.set_num_threads(1)
    path = args.results / "faults.json"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for part in args.only or PARTS:
            work = pathlib.Path(folder) / part
            work.mkdir()
            bench = Bench(work)
            bench.kills = args.kills
            PARTS[part](bench)
            found = json.loads(path.read_text()) if path.exists() else {}
            found[part] = {"rows": bench.rows, "provenance": provenance()}
            path.write_text(json.dumps(found, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(found))
            shutil.rmtree(work)
    sys.exit(any(not row["ok"] for part in json.loads(path.read_text()).values() for row in part["rows"]))


if __name__ == "__main__":
    main()
