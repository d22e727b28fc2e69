"""Tokens per second of `vllm serve` on a CPU: our plugin beside vLLM's own GPTQ and bf16, on a model shaped like Qwen3-0.6B.

    python kernels/cpu_serve.py [--bind 0-1] [--rounds 3] [--batches 1,4,8] [--lm-head] [--work FOLDER] [--out FILE]

The model is random, made once below --work and quantized by `foem quantize --method rtn` (W4, groups of 128); both servers of
quantized weights read the same checkpoint. --lm-head adds a server of ours whose checkpoint has the output head quantized too
(`foem quantize --lm-head`); the embedding that it was tied to stays bf16. All run at once, idle but for the one that is asked,
and take turns in every round; medians. decode: tokens after the first of so many requests together; prefill: prompt tokens until
the first answer.

By default vLLM keeps one core for itself and computes with the others; --bind (VLLM_CPU_OMP_THREADS_BIND) says which to use.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

from foem_eval import processes  # noqa: E402
from foem_eval.provenance import provenance  # noqa: E402

from foem_vllm.errors import FoemError  # noqa: E402

QWEN3_06B = dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                 intermediate_size=3072, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=True)
SERVERS = {"foem": ("w4", "foem"), "gptq": ("w4", "gptq"), "bf16": ("bf16", None)}  # folder, --quantization
PROMPT, OUTPUT = 32, 48  # tokens, decoding
LONG = 512  # tokens, prefill
OURS, NAME = "foem", "model"
HEAD = {"foem_head": ("w4-head", "foem")}
QUANTIZED = {"w4": [], "w4-head": ["--lm-head"]}  # folder: options of `foem quantize`


def make_models(work: pathlib.Path, shape: dict, servers: dict[str, tuple]) -> None:
    """The folders of the servers below `work`, unless they are there."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    if not (work / "bf16" / "config.json").exists():
        torch.manual_seed(0)
        config = Qwen3Config(**shape, dtype="bfloat16", bos_token_id=None, eos_token_id=0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(work / "bf16")
    for folder in {folder for folder, _ in servers.values()} & set(QUANTIZED):
        if not (work / folder / "config.json").exists():
            processes.run([processes.tool("foem"), "quantize", str(work / "bf16"), str(work / folder), "--method", "rtn",
                           "--quiet", *QUANTIZED[folder]], work / "quantize.log")


def seconds(url: str, batch: int, length: int, tokens: int) -> float:
    """Until the last of `batch` requests, posted together, each of `length` prompt tokens, has its `tokens` answered.

    Raises FoemError when a request gets another number of tokens.
    """
    def ask(i: int) -> int:
        body = {"model": NAME, "prompt": [(7 * i + 13 * j) % 256 for j in range(length)], "max_tokens": tokens, "temperature": 0,
                "ignore_eos": True}
        request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())["usage"]["completion_tokens"]
    with ThreadPoolExecutor(batch) as pool:
        started = time.perf_counter()
        counts = list(pool.map(ask, range(batch)))
        took = time.perf_counter() - started
    if counts != [tokens] * batch:
        raise FoemError(f"{url}: asked for {tokens} tokens from each of {batch} requests, got {counts}")
    return took


def decode(url: str, batch: int) -> float:
    """Tokens per second. The first token comes with the prompt: what is left of the time belongs to the others."""
    return batch * (OUTPUT - 1) / (seconds(url, batch, PROMPT, OUTPUT) - seconds(url, batch, PROMPT, 1))


def prefill(url: str) -> float:
    return LONG / seconds(url, 1, LONG, 1)


def measure(urls: dict[str, str], batches: tuple[int, ...], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{server: {measurement: tokens per second in every round}}; every other round in the opposite order."""
    found = {server: {} for server in urls}
    for url in urls.values():  # warms up: not counted
        for batch in batches:
            decode(url, batch)
        prefill(url)
    for i in range(rounds):
        for server in list(urls)[::-1 if i % 2 else 1]:
            for batch in batches:
                found[server].setdefault(f"decode, batch {batch}", []).append(decode(urls[server], batch))
            found[server].setdefault("prefill", []).append(prefill(urls[server]))
    return found


def summarize(found: dict[str, dict[str, list[float]]]) -> list[dict]:
    """A row a measurement: medians of the servers, their samples, ours over theirs."""
    rows = []
    for what in found[OURS]:
        medians = {server: statistics.median(samples[what]) for server, samples in found.items()}
        rows.append({"what": what, **medians, "samples": {server: samples[what] for server, samples in found.items()},
                     **{f"{OURS} over {other}": medians[OURS] / rate for other, rate in medians.items() if other != OURS}})
    return rows


def described(log: pathlib.Path) -> dict:
    """What a server's log says of its kernel and its cores."""
    said = log.read_text("utf-8", "replace")
    return {"kernels": sorted(set(re.findall(r"foem kernel (\w+) for", said))),
            "cores": re.findall(r"core ids=(\[[\d, ]*\])", said)[-1:]}


def serve_all(stack: contextlib.ExitStack, servers: dict[str, tuple], work: pathlib.Path, extra: list[str]) -> dict[str, str]:
    """URLs of all servers; they stop with `stack`. One after the other, because starting takes memory and both cores."""
    urls = {}
    for server, (folder, quantization) in servers.items():
        (work / f"{server}.log").unlink(missing_ok=True)
        arguments = ["--skip-tokenizer-init", "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "16",
                     "--no-enable-prefix-caching", "--served-model-name", NAME, *extra]
        arguments += ["--quantization", quantization] if quantization else []
        urls[server] = stack.enter_context(processes.vllm_server(str(work / folder), work / f"{server}.log", *arguments,
                                                                 deadline=600))
        print(f"{server}: {described(work / f'{server}.log')}", flush=True)
    return urls


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bind", default="auto", help="cores that compute, such as 0-1, or auto: all but one (default)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,4,8", help="numbers of requests together")
    parser.add_argument("--layers", type=int, default=QWEN3_06B["num_hidden_layers"], help="fewer, to try it out")
    parser.add_argument("--eager", action="store_true", help="no torch.compile: starts sooner, decodes slower")
    parser.add_argument("--lm-head", action="store_true", help="a server with a quantized output head too")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "out" / "serve", help="models (2 GB) and logs")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "eval" / "results" / "serve_cpu.json")
    args = parser.parse_args(argv)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = args.bind
    work, servers = args.work / f"{args.layers}-layers", SERVERS | (HEAD if args.lm_head else {})
    try:
        make_models(work, {**QWEN3_06B, "num_hidden_layers": args.layers}, servers)
        with contextlib.ExitStack() as stack:
            urls = serve_all(stack, servers, work, ["--enforce-eager"] if args.eager else [])
            rows = summarize(measure(urls, tuple(map(int, args.batches.split(","))), args.rounds))
    except FoemError as error:
        print(f"cpu_serve: {error}", file=sys.stderr)
        return 1
    for row in rows:
        print(f"{row['what']:16} " + "  ".join(f"{server} {row[server]:7.1f}" for server in servers) + " tokens/s;  " +
              ", ".join(f"{key} {row[key]:.2f}" for key in row if " over " in key))
    result = {**provenance(), "bind": args.bind, "rounds": args.rounds, "layers": args.layers, "eager": args.eager,
              "servers": {server: described(work / f"{server}.log") for server in servers}, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
