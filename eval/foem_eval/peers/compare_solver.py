"""Our solver and GPTQModel's on the same W, H and D: share of equal codes and layer loss, per method.

    python -m foem_eval.peers.compare_solver [--peers-folder DIR] [--json FILE]

The cases are seeded: correlated inputs with a few loud channels, more and fewer tokens than columns, heavy-tailed weights.
Our solver runs twice: with float32 scales, as theirs does, and with scales rounded to float16 before any code is chosen, as
shipped. With alpha > 0 theirs multiplies the drift term by unrounded columns inside a block of 128 and by rounded ones
across blocks, ours by unrounded ones everywhere: equal codes are expected up to 128 columns, near-equal loss beyond.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import tempfile

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from foem_eval.peers import environments
from foem_eval.provenance import provenance
from foem_vllm.format import Quantized, QuantSpec, dequantize
from foem_vllm.solver import SolverConfig, layer_loss, solve

METHODS = {"gptq": (0.0, 0.0), "gptaq": (0.25, 0.0), "foem": (0.0, 0.2), "foem+gptaq": (0.25, 0.2)}
SHAPES = {"small": (96, 128, 512), "layer": (192, 256, 2048), "few tokens": (128, 512, 384), "wide": (64, 768, 6144)}
DAMPING = 0.05  # GPTQModel's default


def layer(n: int, k: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """W [n, k] with heavy tails; H and D [k, k] per token, of inputs whose spectrum falls off and whose drift is 5 %."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, k, generator=g) * 0.03 * (1 + torch.randn(n, 1, generator=g).abs())
    W *= 1 + 3 * (torch.rand(n, k, generator=g) < 0.01)
    spectrum = torch.arange(1, k + 1).float().rsqrt()
    X = (torch.randn(tokens, k, generator=g) * spectrum) @ torch.linalg.qr(torch.randn(k, k, generator=g))[0]
    X[:, torch.randperm(k, generator=g)[: max(1, k // 64)]] *= 8
    Xq = X + 0.05 * X.std() * torch.randn(tokens, k, generator=g) + 0.02 * X.roll(1, 1)
    return {"W": W, "H": Xq.T @ Xq / tokens, "D": (X - Xq).T @ Xq / tokens}


def plan() -> list[dict]:
    """All runs: every method on every shape, W4 g128 symmetric; then other grids on one shape."""
    runs = [dict(case=case, method=method, bits=4, group_size=128, symmetric=True) for case in SHAPES for method in METHODS]
    for grid in (dict(bits=4, group_size=128, symmetric=False), dict(bits=3, group_size=128, symmetric=True),
                 dict(bits=4, group_size=-1, symmetric=True), dict(bits=8, group_size=128, symmetric=True)):
        runs += [dict(case="layer", method=method, **grid) for method in ("gptq", "foem")]
    for run in runs:
        run["alpha"], run["beta"] = METHODS[run["method"]]
        run.update(damping=DAMPING, gar=False)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-folder", type=pathlib.Path, default=environments.FOLDER, help="where peers are, or go")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows here")
    args = parser.parse_args()
    python = environments.ensure("gptqmodel", args.peers_folder)
    layers = {case: layer(*shape, seed) for seed, (case, shape) in enumerate(SHAPES.items())}
    runs = plan()
    with tempfile.TemporaryDirectory() as folder:
        source, result = pathlib.Path(folder) / "in.safetensors", pathlib.Path(folder) / "out.safetensors"
        save_file({f"{case}/{name}": t.contiguous() for case, tensors in layers.items() for name, t in tensors.items()},
                  source, {"runs": json.dumps(runs)})
        done = subprocess.run([python, environments.HERE / "gptqmodel_solver.py", source, result],
                              env=environments.environment(), capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise SystemExit(f"GPTQModel's solver failed:\n{done.stderr[-3000:]}")
        theirs = load_file(result)

    version = environments.VERSIONS["gptqmodel"]
    table = Table(title=f"GPTQModel {version} and this solver on the same W, H, D (loss: tr(E H E^T) / N)")
    for column in ("case", "method", "grid", "equal codes", "equal, fp16 scales", "loss theirs", "ours", "ours, fp16 scales"):
        table.add_column(column)
    rows = []
    for i, run in enumerate(runs):
        W, H, D = (layers[run["case"]][name] for name in "WHD")
        spec = QuantSpec(run["bits"], run["group_size"], run["symmetric"])
        q = Quantized(theirs[f"{i}/codes"], theirs[f"{i}/scales"], None if spec.symmetric else theirs[f"{i}/zeros"])
        row = {**run, "shape": list(W.shape), "loss_theirs": layer_loss(dequantize(q, spec) - W, H)}
        for name, dtypes in (("", ()), ("_fp16_scales", (torch.float16,))):
            config = SolverConfig(alpha=run["alpha"], beta=run["beta"], damping=DAMPING, form="published", scale_dtypes=dtypes)
            ours = solve(W, H, spec, config, D if run["alpha"] else None).quantized
            row[f"equal{name}"] = float((ours.codes == q.codes).float().mean())
            row[f"loss{name}"] = layer_loss(dequantize(ours, spec) - W, H)
        rows.append(row)
        grid = f"W{spec.bits} g{spec.group_size} {'sym' if spec.symmetric else 'asym'}"
        equal = [f"{row[key]:.2%}" for key in ("equal", "equal_fp16_scales")]
        table.add_row(f"{run['case']} {row['shape']}", run["method"], grid, *equal,
                      *(f"{row[key]:.5g}" for key in ("loss_theirs", "loss", "loss_fp16_scales")))
    Console(width=150).print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
