"""Several models through the real lm-eval command line, one after the other, into one table."""
from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch

from foem_eval import processes
from foem_eval.dequantized import dequantized_folder, is_quantized
from foem_vllm.errors import FoemError

TASKS = pathlib.Path(__file__).parent / "tasks"  # our own tasks: always found, also in an installed wheel
# Keys of a row that are no lm-eval metric: heading, and how a value is written.
COLUMNS = {"kl": ("KL to original", "{:.5f}"), "kl_se": ("+-", "{:.5f}"), "agreement": ("same top 1", "{:.2%}"),
           "bytes": ("size, bytes", "{:,}"), "bits_per_weight": ("bits/weight", "{:.2f}"),
           "quantize_seconds": ("quantize, s", "{:.1f}"), "seconds": ("lm-eval, s", "{:.0f}")}


def command(model: str, tasks: str, output: str, include_path: pathlib.Path | None, max_model_len: int, backend: str,
            quantization: str | None, limit: int | None, dtype: str = "bfloat16") -> list[str]:
    """The lm-eval command line, as a user would type it."""
    if backend == "vllm":
        arguments = {"pretrained": model, "dtype": dtype, "max_model_len": max_model_len, "enforce_eager": True}
        if quantization:
            arguments["quantization"] = quantization
    elif backend == "hf":
        arguments = {"pretrained": model, "dtype": dtype, "max_length": max_model_len}
    else:
        raise FoemError(f"--backend {backend}: unknown; choose vllm or hf")
    line = [processes.tool("lm-eval"), "--model", backend,
            "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()), "--tasks", tasks,
            "--include_path", str(include_path or TASKS), "--output_path", output]
    # vLLM batches by itself; transformers on a CPU is fastest one by one, without padding.
    line += ["--batch_size", "auto" if backend == "vllm" else "1"]
    return line + (["--limit", str(limit)] if limit is not None else [])


def evaluate(models: Sequence[str | pathlib.Path], tasks: str = "tinylm", include_path: str | pathlib.Path | None = None,
             max_model_len: int = 2048, backend: str = "vllm", quantization: str = "foem", limit: int | None = None,
             storage: Callable[[str], dict] | None = None, log: pathlib.Path | None = None,
             dtype: str = "bfloat16") -> list[dict]:
    """One row a model: {"model", "backend", "max_model_len", "seconds", every "task/metric", what `storage(model)` gives}.

    models: folders or hub names. tasks: as for lm-eval, separated by commas. quantization: passed on for quantized folders only.
    backend "hf" runs quantized folders through transformers with dequantized weights. limit: documents a task. log: lm-eval's
    output is kept in this file. dtype: what either backend computes in, by torch's name. Raises FoemError with the end of
    lm-eval's output when it fails.
    """
    rows = []
    for model in map(str, models):
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            quantized = is_quantized(model)
            by_transformers = backend == "hf" and quantized
            run = stack.enter_context(dequantized_folder(model, getattr(torch, dtype))) if by_transformers else model
            output = stack.enter_context(tempfile.TemporaryDirectory(prefix="foem-eval-"))
            line = command(run, tasks, output, pathlib.Path(include_path) if include_path else None, max_model_len, backend,
                           quantization if quantized else None, limit, dtype)
            own_log = log or pathlib.Path(output) / "lm-eval.log"
            # vLLM 0.32 now and then aborts while it shuts down, after lm-eval has written its results.
            code = processes.run(line, own_log, survives_signal=True)
            results = sorted(pathlib.Path(output).rglob("results*.json"))
            if not results:
                last = processes.tail(own_log)
                raise FoemError(f"lm-eval wrote no result for {model} (exit code {code}); its last lines:\n{last}")
            if code:
                print(f"note: lm-eval wrote its results for {model}, then was killed by signal {-code} while shutting down",
                      file=sys.stderr)
            found = json.loads(results[-1].read_text("utf-8"))["results"]
        row = {"model": model, "backend": backend, "max_model_len": max_model_len, **(storage(model) if storage else {})}
        for task, metrics in found.items():
            row |= {f"{task}/{name.removesuffix(',none')}": value for name, value in metrics.items()
                    if isinstance(value, (int, float)) and math.isfinite(value) and "_stderr" not in name}
        row["seconds"] = time.monotonic() - start
        rows.append(row)
    return rows


def print_table(rows: list[dict], title: str | None = None) -> None:
    """The rows side by side; columns are the metrics that occur, then storage and time."""
    from rich.console import Console
    from rich.table import Table
    table = Table(title=title)
    table.add_column("model")
    metrics = [key for key in dict.fromkeys(key for row in rows for key in row)
               if "/" in key and not key.endswith(("/sample_len", "/sample_count"))]
    known = [key for key in COLUMNS if any(key in row for row in rows)]
    for name in (*(m.replace("/", "\n") for m in metrics), *(COLUMNS[key][0] for key in known)):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[m]:.4f}" if m in row else "-" for m in metrics]
        cells += [COLUMNS[key][1].format(row[key]) if row.get(key) is not None else "-" for key in known]
        table.add_row(row.get("label", row["model"]), *cells)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own, and 80 columns would cut the numbers
        console = Console(width=160)
    console.print(table)
