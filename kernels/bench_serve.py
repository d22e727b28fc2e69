"""`vllm bench serve` against our CPU server: a model shaped like Qwen3-0.6B under 1, 8 and 32 requests at a time, beside bf16.

    python kernels/bench_serve.py [--servers foem,bf16] [--work FOLDER] [--out FILE]

The models are those of cpu_serve.py, made once below --work: random weights, so requests ignore the end of text and all get as
many tokens as they ask for. One server runs at a time. What is kept of vLLM's report: requests, failures, tokens per second, and
times to the first token and between tokens in milliseconds (median, 99th percentile).
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

from cpu_serve import NAME, QWEN3_06B, SERVERS, described, make_models  # noqa: E402
from foem_eval import processes  # noqa: E402
from foem_eval.provenance import provenance  # noqa: E402

from foem_vllm.errors import FoemError  # noqa: E402

TOKENIZER = ROOT / "eval/tinylm/qwen3"
LOADS = {1: 4, 8: 16, 32: 64}  # {requests at a time: requests}
PROMPT, OUTPUT = 64, 32  # tokens
KEPT = ("completed", "failed", "duration", "total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput",
        "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms")


def bench(url: str, model: str, together: int, requests: int, folder: pathlib.Path, prompt: int = PROMPT,
          output: int = OUTPUT) -> dict:
    """What `vllm bench serve` reports of `requests` random prompts, so many `together`; its log and report go into `folder`.

    url: with /v1. Raises FoemError when it fails, or when a request was not answered in full.
    """
    file = folder / f"{together}.json"
    command = [processes.tool("vllm"), "bench", "serve", "--backend", "openai", "--base-url", url.removesuffix("/v1"),
               "--model", model, "--tokenizer", str(TOKENIZER), "--dataset-name", "random", "--random-input-len", str(prompt),
               "--random-output-len", str(output), "--num-prompts", str(requests), "--max-concurrency", str(together),
               "--ignore-eos", "--seed", "0", "--temperature", "0", "--disable-tqdm", "--save-result",
               "--result-dir", str(folder), "--result-filename", file.name]
    processes.run(command, folder / f"{together}.log")
    report = json.loads(file.read_text("utf-8"))
    if (report["completed"], report["total_output_tokens"]) != (requests, requests * output):
        raise FoemError(f"{url}: {report['completed']} of {requests} requests were answered, with "
                        f"{report['total_output_tokens']} tokens instead of {requests * output}; the last lines of vLLM's log:\n"
                        f"{processes.tail(folder / f'{together}.log')}")
    return {"together": together, **{key: report[key] for key in KEPT if key in report}}


def measure(server: str, work: pathlib.Path) -> dict:
    """Every load on one server: {"kernels", "cores", "loads": a row each}."""
    folder, quantization = SERVERS[server]
    logs = work / f"bench-{server}"
    log = logs / "server.log"
    log.unlink(missing_ok=True)
    arguments = ["--tokenizer", str(TOKENIZER), "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "32",
                 "--no-enable-prefix-caching", "--served-model-name", NAME]
    arguments += ["--quantization", quantization] if quantization else []
    with processes.vllm_server(str(work / folder), log, *arguments, deadline=600) as url:
        bench(url, NAME, 8, 8, logs / "warm-up")
        rows = [bench(url, NAME, together, requests, logs) for together, requests in LOADS.items()]
    for row in rows:
        print(f"{server:5} {row['together']:3} at a time: {row['output_throughput']:7.1f} tokens/s, first token after "
              f"{row['median_ttft_ms']:7.0f} ms, {row['median_tpot_ms']:6.1f} ms a token", flush=True)
    return {**described(log), "loads": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--servers", default="foem,bf16", help=f"of {', '.join(SERVERS)}")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "out" / "serve" / f"{QWEN3_06B['num_hidden_layers']}-layers")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "eval" / "results" / "bench_serve.json")
    args = parser.parse_args(argv)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        make_models(args.work, QWEN3_06B)
        found = {server: measure(server, args.work) for server in args.servers.split(",")}
    except FoemError as error:
        print(f"bench_serve: {error}", file=sys.stderr)
        return 1
    result = {**provenance(), "prompt": PROMPT, "output": OUTPUT, "servers": found}
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
