"""The whole path on a small trained model: quantize, serve with vLLM, ask through the OpenAI API, measure with lm-eval.

    make demo        # or: python eval/demo.py [--model DIR] [--out DIR] [--limit N]

Writes checkpoints, logs and table.json below --out. Every process it starts is stopped when it ends, however it ends.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import track

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "eval/tinylm/data"
# Plain rounding is the baseline; the papers' methods with what costs nothing in serving: group-aware order and a searched grid;
# and what `foem quantize` does by itself.
FREE = ("--act-order", "group", "--grid", "search")
METHODS = {"rtn": ("--method", "rtn"), "gptq": ("--method", "gptq", *FREE), "foem": ("--method", "foem", *FREE),
           "balanced": ("--preset", "balanced")}
CONTEXT = 512  # tinylm's; perplexities of different contexts do not compare
SEQUENCES = 64  # of CONTEXT tokens, for the KL: its standard error is then about 1 % of it
NAME = "tinylm-foem"
COMPLETION = "The `Vec` type in Rust is"
CHAT = "Tell me about the Python json module."
TIE = 0.125  # nats: two steps of bfloat16 at logits of 8 to 16, in which both kernels' answers are rounded
console = Console(highlight=False)
START = time.monotonic()


def step(number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}/5[/] [bold]{text}[/]  [dim]{time.monotonic() - START:.0f} s[/]", soft_wrap=True)


def quantize(model: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    """One checkpoint a method, through the command line; seconds of each, everything included."""
    from foem_eval import processes
    seconds = {}
    for method, options in METHODS.items():
        shutil.rmtree(out / method, ignore_errors=True)
        command = [processes.tool("foem"), "quantize", str(model), str(out / method), "--calibration",
                   str(DATA / "calibration.jsonl"), "--samples", "128", "--seq-len", "256", "--seed", "0", "--quiet", *options]
        start = time.monotonic()
        with console.status(f"foem quantize {' '.join(options)}"):
            processes.run(command, out / "quantize.log")
        seconds[method] = time.monotonic() - start
        console.print(f"  {method:8} {seconds[method]:5.1f} s  {out / method}")
    return seconds


def ask(base_url: str) -> dict[str, str]:
    """A completion, a chat and a streamed completion, with OpenAI's own client."""
    from openai import OpenAI
    client = OpenAI(base_url=base_url, api_key="none", timeout=120)
    answers = {}
    completion = client.completions.create(model=NAME, prompt=COMPLETION, max_tokens=40, temperature=0)
    answers["completion"] = completion.choices[0].text
    show("completion", COMPLETION, answers["completion"])
    chat = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": CHAT}], max_tokens=60, temperature=0)
    answers["chat"] = chat.choices[0].message.content
    show("chat", CHAT, answers["chat"])
    pieces = client.completions.create(model=NAME, prompt=COMPLETION, max_tokens=40, temperature=0, stream=True)
    texts = [piece.choices[0].text for piece in pieces if piece.choices]
    answers["streamed"] = "".join(texts)
    show(f"streamed, {len(texts)} pieces", COMPLETION, answers["streamed"])
    if answers["streamed"] != answers["completion"]:
        console.print("[yellow]  the streamed answer differs from the other one[/]")
    return answers


@contextlib.contextmanager
def reference_kernel() -> Iterator[None]:
    """Servers started here multiply with the reference path."""
    before = os.environ.get("FOEM_KERNEL")
    os.environ["FOEM_KERNEL"] = "reference"
    try:
        yield
    finally:
        os.environ.pop("FOEM_KERNEL")
        if before is not None:
            os.environ["FOEM_KERNEL"] = before


def greedy(base_url: str):
    """Logprobs of the greedy completion: `tokens`, and in `top_logprobs` the five most probable ones at each place."""
    from openai import OpenAI
    client = OpenAI(base_url=base_url, api_key="none", timeout=120)
    return client.completions.create(model=NAME, prompt=COMPLETION, max_tokens=40, temperature=0, logprobs=5).choices[0].logprobs


def check_same(found, wanted) -> str:
    """How the kernel's greedy answer compares with the reference path's, which may part at a tie. Raises FoemError if not so."""
    from foem_vllm.errors import FoemError
    for i, (token, best) in enumerate(zip(found.tokens, wanted.tokens, strict=True)):
        if token != best:
            chances = wanted.top_logprobs[i]
            gap = chances[best] - chances.get(token, float("-inf"))
            if gap < TIE:
                return f"the same {i} tokens as the reference path, then a tie: {token!r} or {best!r}, {gap:.3f} nats apart"
            raise FoemError(f"token {i} of the greedy answer is {token!r}, the reference path's is {best!r}, more probable by "
                            f"{gap:.3f} nats: the kernel is wrong; see where with `make test ARGS=tests/test_kernels.py`")
    return f"all {len(wanted.tokens)} tokens are the reference path's"


def show(kind: str, prompt: str, answer: str) -> None:
    console.print(f"  [dim]{kind}[/]  {prompt}")
    console.print("    " + answer.strip().replace("\n", "\n    "), style="green", markup=False)


def divergences(model: pathlib.Path, out: pathlib.Path) -> dict[str, dict[str, float]]:
    """KL, loss and agreement of every checkpoint, and of the original itself, on the evaluation text."""
    import torch
    from foem_eval.dequantized import load_dequantized
    from foem_eval.divergence import measure, read_sequences
    from transformers import AutoTokenizer
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sequences = read_sequences(AutoTokenizer.from_pretrained(model), DATA / "evaluation.jsonl", CONTEXT, limit=SEQUENCES)
    original = load_dequantized(model, device=device)
    models = {method: load_dequantized(out / method, device=device) for method in METHODS}
    bar = track(range(len(sequences)), description="  sequences of 512 tokens", console=console, transient=True)
    return {name: d.summary() for name, d in measure(original, models, sequences, bar).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "eval/tinylm/qwen3")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out/demo")
    parser.add_argument("--limit", type=int, help="only so many documents in lm-eval")
    args = parser.parse_args()
    # A polite kill takes the same way out as Ctrl-C, so that `finally` stops the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    from foem_eval import processes
    from foem_eval.evaluate import evaluate, print_table
    from foem_eval.provenance import provenance

    from foem_vllm.checkpoint import storage
    from foem_vllm.errors import FoemError
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    for log in out.glob("*.log"):
        log.unlink()
    try:
        step(1, f"Quantize {args.model.name} to INT4: round to nearest; GPTQ and FOEM with {' '.join(FREE)}; preset balanced")
        seconds = quantize(args.model, out)

        step(2, "Serve the last checkpoint: vllm serve --quantization foem")
        arguments = ["--quantization", "foem", "--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--enforce-eager",
                     "--served-model-name", NAME]
        with contextlib.ExitStack() as stack:
            with console.status("starting vLLM (up to a minute)"):
                base_url = stack.enter_context(processes.vllm_server(str(out / "balanced"), out / "serve.log", *arguments))
            step(3, f"Ask it at {base_url} with the openai client")
            answers, found = ask(base_url), greedy(base_url)
        with reference_kernel(), contextlib.ExitStack() as stack:
            with console.status("starting vLLM again, with FOEM_KERNEL=reference"):
                base_url = stack.enter_context(processes.vllm_server(str(out / "balanced"), out / "reference.log", *arguments))
            answers["kernel"] = check_same(found, greedy(base_url))
        show("greedy", COMPLETION, answers["kernel"])

        step(4, "Measure with lm-eval on vLLM: bf16 and the four checkpoints")
        rows = []
        for label, folder in (("bf16", args.model), *((m, out / m) for m in METHODS)):
            with console.status(f"lm-eval --model vllm --tasks tinylm: {label}"):
                row, = evaluate([folder], "tinylm", max_model_len=CONTEXT, limit=args.limit, log=out / f"lm-eval-{label}.log",
                                storage=lambda m: storage(pathlib.Path(m)))
            rows.append({"label": label.upper() if label != "bf16" else label, **row, "quantize_seconds": seconds.get(label)})
            console.print(f"  {label:8} {row['seconds']:5.1f} s  word perplexity {row['tinylm/word_perplexity']:.3f}")

        step(5, "Divergence from the original, with transformers and dequantized weights")
        for row, values in zip(rows, divergences(args.model, out).values()):
            row |= values
    except FoemError as error:
        console.print(f"demo: error: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("\nstopped; nothing is left running")
        sys.exit(130)

    console.print()
    print_table(rows, f"{args.model.name} on its held-out text, W4 g128, context {CONTEXT}")
    table = {**provenance(), "total_seconds": time.monotonic() - START, "answers": answers, "rows": rows}
    (out / "table.json").write_text(json.dumps(table, indent=1, default=str) + "\n")
    console.print(f"[dim]{table['total_seconds']:.0f} s in all; numbers in {out / 'table.json'}[/]", soft_wrap=True)


if __name__ == "__main__":
    main()
