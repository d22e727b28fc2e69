"""What every switch of the quantizer is worth: with it and without, KL, next-token loss and seconds, on both small models.

    make ablation                      # eval/results/ablation; an hour on two cores, goes on where it stopped
    python eval/ablation.py --table    # of what is measured so far

Runs `foem compare` on tinylm and the Llama-style model, one process each at the same time with half of the cores, W3 and W4,
three calibration seeds, and again with an eighth of the calibration text for what is meant for little text. Then writes table.md.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

import torch
from foem_eval.compare import RESULTS_FILE, Comparison, compare
from foem_eval.divergence import ratio_of_all

HERE = pathlib.Path(__file__).parent
MODELS = {"qwen3": "tinylm", "llama": "Llama-style"}
BITS = (4, 3)
LEFT_OUT = {  # of a preset: what --methods calls it, what the command line does
    "balanced": {"correct=0": "corrected target (`--correct 0`)", "grid=minmax": "searched ranges (`--grid minmax`)",
                 "descent=false": "descent on codes (`--no-descent`)",
                 "act_order=none": "order by importance (`--act-order none`)", "refit=false": "refit of scales (`--no-refit`)"},
    "fast": {"grid=minmax": "searched ranges (`--grid minmax`)",
             "act_order=none": "order by importance (`--act-order none`)", "refit=false": "refit of scales (`--no-refit`)"},
    "best": {"guided=false": "weights of tokens (`--no-guided`)",
             "finetune_scales=false": "tuned scales (`--no-finetune-scales`)"}}
ADDED = {"gptq:alpha=auto": "`--alpha auto`", "gptq:beta=auto": "`--beta auto`", "gptq:damping=auto": "`--damp auto`",
         "gptq:grid=search": "`--grid search`", "gptq:refit=true": "`--refit`", "gptq:descent=true": "`--descent`",
         "gptq:act_order=group": "`--act-order group`", "gptq:act_order=static": "`--act-order static`",
         "gptq:act_order=full": "`--act-order full` (desc_act)",
         "gptaq": "GPTAQ's term, alpha 0.25", "foem": "FOEM's term, beta 0.2", "foem+gptaq": "both",
         "foem:form=consistent": "FOEM's term, `--form consistent`"}
FEW = {"gptq:beta=auto": "`--beta auto`", "gptq:damping=auto": "`--damp auto`"}
METHODS = ["rtn", "gptq", *ADDED, *(m for p, switches in LEFT_OUT.items() for m in (p, *(f"{p}:{s}" for s in switches)))]
TEXTS = {"": (METHODS, 128), "_few_tokens": (["gptq", *FEW], 16)}  # name of the folder after the model's -> methods, samples


def measure(model: str, out: pathlib.Path, resume: bool) -> None:
    data = HERE / "tinylm/data"
    for name, (methods, samples) in TEXTS.items():
        compare(Comparison(
            model=str(HERE / "tinylm" / model), evaluation=str(data / "evaluation.jsonl"), split="test", sequences=64,
            calibration=str(data / "calibration.jsonl"), samples=samples, seq_len=256, methods=methods, bits=BITS,
            seeds=(0, 1, 2), out=out / f"{model}{name}", resume=resume))


def row(found: dict[str, dict], method: str, base: str) -> list[str]:
    """Of `method` over `base`: a cell for every model and bits, all of them together, seconds more than base's."""
    cells, pairs = [], []
    for results in found.values():
        for bits in BITS:
            own, other = ({run["seed"]: run for run in results["runs"] if (run["method"], run["bits"]) == (name, bits)}
                          for name in (method, base))
            seeds = sorted(own.keys() & other.keys())
            kl, loss = ([torch.tensor([runs[s][key] for s in seeds], dtype=torch.float64) for runs in (own, other)]
                        for key in ("kl", "loss"))
            pairs.append(tuple(kl))
            same = all(own[s]["kl"] == other[s]["kl"] for s in seeds)
            cells.append("the same" if same else f"{kl[0].mean() / kl[1].mean():.3f} ({loss[0].mean() - loss[1].mean():+.4f})")
    ratio, (low, high) = ratio_of_all(pairs)
    seconds = [least_seconds(found["qwen3"], name) for name in (method, base)]
    return [*cells, f"{ratio:.3f} [{low:.3f}, {high:.3f}]", f"{seconds[0] - seconds[1]:+.1f}"]


def least_seconds(results: dict, method: str) -> float:
    return min(run["quantize_seconds"] for run in results["runs"] if (run["method"], run["bits"]) == (method, 3))


def write(out: pathlib.Path) -> None:
    found = {name: {model: json.loads((out / f"{model}{name}" / RESULTS_FILE).read_text("utf-8")) for model in MODELS}
             for name in TEXTS}
    heads = [f"{model} W{bits}" for model in MODELS.values() for bits in BITS] + ["all", "seconds"]

    def table(first: list[str], rows: list[list[str]]) -> list[str]:
        head = [*first, *heads]
        return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows), ""]

    usual, few = found.values()
    settings = usual["qwen3"]["settings"]
    seconds = {name: least_seconds(usual["qwen3"], name) for name in ("gptq", *LEFT_OUT)}
    seconds[f"gptq with {few['qwen3']['settings']['samples']} x {settings['seq_len']}"] = least_seconds(few["qwen3"], "gptq")
    losses = [f"{MODELS[model]} {statistics.fmean(results['original']['loss']):.4f}" for model, results in usual.items()]
    commits = sorted({run["commit"] for text in found.values() for results in text.values() for run in results["runs"]})
    left_out = [[preset, text, *row(usual, f"{preset}:{switch}", preset)]
                for preset, switches in LEFT_OUT.items() for switch, text in switches.items()]
    lines = [
        "# What every switch is worth", "",
        "KL(original || quantized) over that of the other; in brackets next-token loss less the other's, nats a token. All: the",
        "geometric mean of the four, with 95 % of a bootstrap over seeds and sequences. Seconds: of quantize(), more than the",
        f"other's, W3 on tinylm, least of three seeds, OMP_NUM_THREADS={threads()}, the other model's runs beside it.", "",
        "Without a switch of a preset, over the preset (above 1: the switch helps):", "",
        *table(["preset", "without"], left_out),
        "With something added to plain GPTQ, over plain GPTQ (below 1: it helps):", "",
        *table(["added"], [[text, *row(usual, method, "gptq")] for method, text in ADDED.items()]),
        f"The same with {few['qwen3']['settings']['samples']} x {settings['seq_len']} calibration tokens:", "",
        *table(["added"], [[text, *row(few, method, "gptq")] for method, text in FEW.items()]),
        f"Seconds of the others: {', '.join(f'{name} {value:.1f}' for name, value in seconds.items())}.", "",
        f"`make ablation`; {settings['measured']} x {settings['sequence_length']} held-out tokens (split {settings['split']}),",
        f"g{settings['group_size']} symmetric, {settings['samples']} x {settings['seq_len']} calibration tokens, seeds 0, 1, 2.",
        f"Loss of the originals: {', '.join(losses)}.", "",
        f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}; {usual['qwen3']['machine']}."]
    (out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")


def threads() -> int:
    return max(1, (os.cpu_count() or 1) // len(MODELS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results/ablation")
    parser.add_argument("--model", choices=MODELS, help="measure this one only, here, with all cores; no table")
    parser.add_argument("--resume", action="store_true", help="keep what other commits measured")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table of what is there")
    given = parser.parse_args()
    if given.model:
        measure(given.model, given.out, given.resume)
        return
    if not given.table:
        own = {**os.environ, "OMP_NUM_THREADS": str(threads())}
        runs = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--model", model], env=own) for model in MODELS]
        if any([run.wait() for run in runs]):
            sys.exit("a run ended with an error, see above; no table is written")
    write(given.out)


if __name__ == "__main__":
    main()
