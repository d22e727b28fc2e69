"""Time and memory of `foem quantize` for models from 8B to 1T parameters on one and on eight H200, on paper.

    python eval/scale.py              # the table, from eval/results/scale_cpu.json -> eval/results/scale.{json,md}
    python eval/scale.py --measure    # first measure this machine (minutes) -> eval/results/scale_cpu.json

scale_model counts what every stage does. On this machine the rates of those counts are fitted on one small model and then predict
others, which are measured too: that is the error to expect from the counts. Seconds here are the processor's, on one thread. The
rates of an H200 are its data sheet's times an efficiency, both written out: assumptions, until a GPU is measured. What the host
does is taken from this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from scale_model import MODELS, UNITS, Cost, Model, Text, cost, dense, memory  # noqa: E402

RESULTS = ROOT / "eval/results"
MEASURED = RESULTS / "scale_cpu.json"


@dataclass(frozen=True)
class Assumed:
    """A rate that nobody has measured: peak of the data sheet times efficiency, in units a second."""

    peak: float
    efficiency: float
    why: str

    @property
    def rate(self) -> float:
        return self.peak * self.efficiency


H200_BYTES = 141e9
H200 = {
    "load": Assumed(7e9, 0.7, "one NVMe disk, read once; the second stream's copy from the page cache is not counted"),
    "forward": Assumed(989e12, 0.5, "bf16 tensor cores, dense"),
    "moments": Assumed(67e12, 0.7, "float32, as capture.Moments computes on GPUs"),
    "merge": Assumed(4.8e12, 0.5, "HBM3e"),
    "factor": Assumed(67e12, 0.25, "float32; factorizations keep a GPU less busy than products"),
    "rows": Assumed(67e12, 0.7, "float32"),
    "descent": Assumed(4.8e12, 0.4, "HBM3e, gathers"),
    "round": Assumed(4.8e12 / 1100, 0.5, "HBM3e, 1100 bytes a weight: 26 ranges, ten passes each"),
}
STEP = Assumed(1 / 5e-6, 1.0, "5 microseconds from one small kernel to the next")
LINK = Assumed(450e9, 0.7, "NVLink, one direction")


# (what is run, how it is counted). The first one sets the rates, the others are predicted.
WIDE = dict(
    num_hidden_layers=1, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128
)
CASES = {
    "Qwen3-0.6B-shaped, 1 layer": (WIDE, Text(16, 256)),
    "the same, four times the text": (WIDE, Text(64, 256)),
    "half as wide again": (WIDE | {"hidden_size": 1536}, Text(16, 256)),
    "256 wide, 6 layers (tinylm's shape)": (
        {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64},
        Text(64, 256),
    ),
}  # fmt: skip


def counted(config: dict) -> Model:
    """The cost model's view of a Qwen3 config."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return dense("", *(config[name] for name in names), vocab=4096, tables=1)


def seconds(found: Cost, rates: dict[str, float], ranks: int = 1) -> dict[str, float]:
    """By stage. rates: of one rank, stage -> units a second; also of `steps`, and between ranks of the `link`."""
    times = {}
    for stage in UNITS:
        amount, steps = found.of_rank(stage, ranks)
        times[stage] = amount / rates[stage] + steps / rates["steps"]
    if ranks > 1:
        times["reduce"] = 2 * found.reduced * (ranks - 1) / ranks / rates["link"]
    return times


# ---------------------------------------------------------------- this machine
def measure(names: list[str]) -> None:
    """Run cases, each in a process of its own, and note them beside what MEASURED holds."""
    from foem_eval.provenance import provenance

    content = json.loads(MEASURED.read_text("utf-8")) if MEASURED.is_file() else {"runs": {}}
    for name in names:
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(
                [sys.executable, __file__, "--run", name, "--scratch", scratch],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            content["runs"][name] = json.loads(pathlib.Path(scratch, "run.json").read_text("utf-8"))
        runs = {case: content["runs"][case] for case in CASES if case in content["runs"]}
        content = {**provenance(), "runs": runs}
        MEASURED.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def run(name: str, scratch: pathlib.Path) -> None:
    """Quantize one case on one thread with its stages timed; notes seconds and bytes in scratch/run.json."""
    import resource
    import time

    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from scale_stages import Stopwatch, one_step
    from tiny_models import CALIBRATION, write_model

    from foem_vllm import QuantizeConfig, quantize

    config, text = CASES[name]
    torch.set_num_threads(1)
    write_model(scratch / "model", "qwen3", torch.bfloat16, max_position_embeddings=text.length, **config)
    how = QuantizeConfig(calibration=str(CALIBRATION), samples=text.samples, seq_len=text.length, device="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with Stopwatch() as watch:
        started = time.process_time()
        layers = quantize(scratch / "model", scratch / "out", how).layers
        total = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    descended = sum(x.n * x.k**2 for x in layers if x.descent) / sum(x.n * x.k**2 for x in layers)
    found = {
        "seconds": watch.seconds,
        "total": total,
        "descended": descended,
        "rss_before": before,
        "rss_peak": peak,
        "step": one_step(),
    }
    (scratch / "run.json").write_text(json.dumps(found), "utf-8")


def rates_of(measured: dict) -> dict[str, float]:
    """Units a second, from the first run."""
    name, found = next(iter(measured["runs"].items()))
    config, text = CASES[name]
    counts = cost(counted(config), text, descended=found["descended"])
    rates = {"steps": 1 / found["step"]}
    for stage in UNITS:
        amount, steps = counts.of_rank(stage)
        rates[stage] = amount / max(found["seconds"][stage] - steps * found["step"], 1e-9)
    return rates


# ---------------------------------------------------------------- the tables
def check(measured: dict) -> list[dict]:
    """What the rates of the first run say about every run, beside what was measured."""
    rates, rows = rates_of(measured), []
    for name, found in measured["runs"].items():
        config, text = CASES[name]
        model = counted(config)
        times = seconds(cost(model, text, descended=found["descended"]), rates)
        size = memory(model, text)
        known = sum(found["seconds"].values())
        rows.append(
            {
                "case": name,
                "predicted_s": sum(times.values()),
                "measured_s": known,
                "total_s": found["total"],
                "stages": {stage: [times[stage], found["seconds"][stage]] for stage in UNITS},
                "predicted_bytes": sum(size.values()),
                "measured_bytes": found["rss_peak"] - found["rss_before"],
            }
        )
    return rows


def estimate(measured: dict) -> list[dict]:
    """Every model on one and eight H200."""
    host = rates_of(measured)
    rates = {stage: H200[stage].rate if stage in H200 else host[stage] for stage in UNITS}
    rates |= {"steps": STEP.rate, "link": LINK.rate}
    rows = []
    for model in MODELS:
        for preset in ("fast", "balanced"):
            counts = cost(model, Text(), preset == "balanced")
            for ranks in (1, 8):
                held = memory(model, Text(), preset == "balanced", ranks)
                times = seconds(counts, rates, ranks)
                rows.append({"model": model.name, "preset": preset, "ranks": ranks, "seconds": times, "bytes": held})
    return rows


def duration(value: float) -> str:
    if value < 100:
        return f"{value:.0f} s" if value >= 1 else f"{value:.1g} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def table(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page(measured: dict) -> str:
    """Markdown of everything: the estimate, what it is made of, how far the counts are off on this machine."""
    rows = estimate(measured)
    times = [
        [r["model"], r["preset"], r["ranks"], f"**{duration(sum(r['seconds'].values()))}**",
         *(duration(r["seconds"].get(stage, 0.0)) for stage in (*UNITS, "reduce"))]
        for r in rows
    ]  # fmt: skip
    sizes = [
        [r["model"], r["preset"], r["ranks"], *placed(r["bytes"]), *(f"{value / 1e9:.1f}" for value in r["bytes"].values())]
        for r in rows
    ]
    assumed = [[name, f"{a.peak:.3g}", a.efficiency, a.why] for name, a in {**H200, "steps": STEP, "link": LINK}.items()]
    host = rates_of(measured)
    units = [[stage, UNITS[stage], f"{host[stage]:.3g}"] for stage in UNITS]
    checks = check(measured)
    against = [
        [c["case"], f"{c['total_s']:.1f}", f"{c['measured_s']:.1f}", f"{c['predicted_s']:.1f}",
         f"{c['predicted_s'] / c['measured_s']:.2f}", f"{c['measured_bytes'] / 1e9:.2f}", f"{c['predicted_bytes'] / 1e9:.2f}"]
        for c in checks
    ]  # fmt: skip
    stages = [[c["case"], *(f"{p:.2f} / {m:.2f}" for p, m in c["stages"].values())] for c in checks]
    text = Text()
    return PAGE.format(
        samples=text.samples,
        length=text.length,
        times=table(["model", "preset", "H200", "time", *UNITS, "reduce"], times),
        sizes=table(["model", "preset", "H200", "without activations", "to the host", *rows[0]["bytes"]], sizes),
        assumed=table(["stage", "peak, units a second", "efficiency", "of what"], assumed),
        host=", ".join(stage for stage in UNITS if stage not in H200),
        units=table(["stage", "unit", "units a second on this machine"], units),
        against=table(["run", "seconds in all", "in these stages", "predicted", "ratio", "GB above start", "predicted"], against),
        stages=table(["run, predicted / measured seconds", *UNITS], stages),
        machine=measured["machine"],
        commit=measured["commit"],
    )


def placed(held: dict[str, float]) -> tuple[str, str]:
    """(what must be on the device, in words; GB of activations that go to the host: half of the device may hold them)."""
    fixed = sum(held.values()) - held["activations"]
    room = max(0.0, min(H200_BYTES / 2, H200_BYTES - fixed))
    elsewhere = max(0.0, held["activations"] - room)
    return f"{fixed / 1e9:.0f}" if fixed <= H200_BYTES else f"**{fixed / 1e9:.0f}: does not fit**", f"{elsewhere / 1e9:.0f}"


PAGE = """\
# Time and memory at scale, on paper

`python eval/scale.py` (`--measure` for the second half). {samples} x {length} tokens, 4 bits, groups of 128.

**No GPU has been measured.** The counts follow the code; the rates of an H200 are its data sheet's times an efficiency that is a
guess. Read the first table as "which stage will hurt, and by what factor", not as minutes.

## On H200 (assumed rates)

Eight of them share calibration text, rows and experts; factors of a linear are made by each, and one host writes.

{times}

Memory of one device at its worst moment, in GB (an H200 has 141). Activations that have no room go to the host, and from there to
a file; the time of that is not counted:

{sizes}

Assumed ({host}: as measured below, on one thread of {machine}):

{assumed}

## The counts on this machine

{machine}, commit {commit}, preset balanced, processor seconds on one thread. Rates are fitted on the first run, the others are
predicted: the ratio is how far the counts are off when shapes change. "In these stages" leaves out what is not counted (start,
tokens, trial runs, hooks). Which linears descend in the end is taken from each run; for H200 it is all of them.

{against}

{stages}

{units}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", choices=CASES, metavar="CASE", help="measure this machine first")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return run(arguments.run, arguments.scratch)
    if arguments.measure is not None:
        measure(arguments.measure or list(CASES))
    if not MEASURED.is_file():
        parser.error(f"{MEASURED} is missing; run with --measure")
    measured = json.loads(MEASURED.read_text("utf-8"))
    text = page(measured)
    (RESULTS / "scale.md").write_text(text, "utf-8")
    content = {"machine": measured["machine"], "commit": measured["commit"], "check": check(measured), "h200": estimate(measured)}
    (RESULTS / "scale.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
