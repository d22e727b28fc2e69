"""Mixtral- and Qwen3-MoE-shaped small models, trained for a minute: foem quantize, vllm serve, an OpenAI request, lm-eval.

    make moe                          # eval/results/moe.{json,md}; five minutes of one core
    python eval/moe.py --documents 155    # lm-eval on all of the text

lm-eval (task tinylm: rolling perplexity of held-out text) runs on vLLM with the original and with the quantized model, and on
transformers with the dequantized weights, all in float32, so that the last two are one number computed twice: SAME. The greedy
answer of `vllm serve` is compared with transformers' too. What bfloat16 does to routing stands in families.md. The models are
trained from nothing by TRAINING steps, enough for quantization to have something to lose; their perplexity means nothing else.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time

import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from foem_eval import processes  # noqa: E402
from foem_eval.dequantized import load_dequantized  # noqa: E402
from foem_eval.divergence import read_sequences  # noqa: E402
from foem_eval.evaluate import evaluate  # noqa: E402
from foem_eval.provenance import provenance  # noqa: E402
from tiny_models import CALIBRATION, write_model  # noqa: E402

from foem_vllm.checkpoint import storage  # noqa: E402

CONTEXT, BATCH, TRAINING, DOCUMENTS = 256, 8, 100, 40
COMMON = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": CONTEXT}
SHAPES = {
    "mixtral": ("Mixtral", {**COMMON, "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3-MoE",
        {**COMMON, "moe_intermediate_size": 128, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True},
    ),
}
OPTIONS = ("--preset", "balanced", "--samples", "64", "--seq-len", str(CONTEXT), "--quiet")
PROMPT, NEW_TOKENS = "The `Vec` type in Rust is", 32
SAME = 1e-5  # bits a byte
SPARE = 2  # tokens of max_model_len that lm-eval leaves free in vLLM: with so many fewer, transformers gets the same windows


def train(name: str, folder: pathlib.Path) -> pathlib.Path:
    """A model in bfloat16, after TRAINING steps of AdamW on the calibration text; seeded."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(write_model(folder, name, **SHAPES[name][1]))
    windows = read_sequences(AutoTokenizer.from_pretrained(folder), CALIBRATION, CONTEXT)
    windows = windows[torch.randperm(len(windows))[: TRAINING * BATCH]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, TRAINING)
    for batch in windows.split(BATCH):
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), falling.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def ask(checkpoint: pathlib.Path, log: pathlib.Path) -> str:
    """What `vllm serve --quantization foem` answers to an OpenAI client, greedily."""
    options = ("--quantization", "foem", "--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager")
    with processes.vllm_server(str(checkpoint), log, *options, "--served-model-name", checkpoint.name) as base_url:
        client = OpenAI(base_url=base_url, api_key="none", timeout=120)
        answer = client.completions.create(model=checkpoint.name, prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0)
    return answer.choices[0].text


@torch.inference_mode()
def expected(checkpoint: pathlib.Path) -> str:
    """What transformers answers with the dequantized weights."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load_dequantized(checkpoint)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)


def measure(model: pathlib.Path, backend: str, documents: int, log: pathlib.Path) -> dict:
    context = CONTEXT if backend == "vllm" else CONTEXT - SPARE
    (row,) = evaluate([model], "tinylm", max_model_len=context, backend=backend, limit=documents, dtype="float32", log=log)
    return {key: row[f"tinylm/{key}"] for key in ("byte_perplexity", "bits_per_byte", "sample_len")} | {"seconds": row["seconds"]}


def run(name: str, work: pathlib.Path, documents: int) -> dict:
    """From nothing to one row."""
    log, start = work / f"{name}.log", time.monotonic()
    model, out = train(name, work / f"{name}-model"), work / name
    seconds = {"train": time.monotonic() - start}
    start = time.monotonic()
    processes.run([processes.tool("foem"), "quantize", str(model), str(out), "--calibration", str(CALIBRATION), *OPTIONS], log)
    seconds["quantize"] = time.monotonic() - start
    start = time.monotonic()
    answer = ask(out, log)
    seconds["serve and ask"] = time.monotonic() - start
    wanted = expected(out)
    row = {"answer": answer, "answer_equal": answer == wanted} | ({} if answer == wanted else {"transformers_answer": wanted})
    row |= storage(out) | {"experts": SHAPES[name][1], "seconds": seconds}
    for label, folder, backend in (("original", model, "vllm"), ("quantized", out, "vllm"), ("transformers", out, "hf")):
        row[label] = measure(folder, backend, documents, log)
    row["difference"] = abs(row["quantized"]["bits_per_byte"] - row["transformers"]["bits_per_byte"])
    row["equal"] = row["answer_equal"] and row["difference"] <= SAME
    return row


def table(results: dict) -> str:
    lines = [
        "| model | bits/weight | original | quantized | transformers, dequantized | differ by | | greedy answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        perplexity = " | ".join(f"{row[label]['byte_perplexity']:.5f}" for label in ("original", "quantized", "transformers"))
        equal, answer = ("equal" if row[key] else "**different**" for key in ("equal", "answer_equal"))
        size, far = f"{row['bits_per_weight']:.2f}", f"{row['difference']:.1e} bits/byte"
        lines.append(f"| {SHAPES[name][0]} | {size} | {perplexity} | {far} | {equal} | {answer} |")
    documents = next(iter(results["rows"].values()))["quantized"]["sample_len"]
    versions = ", ".join(map(" ".join, results["versions"].items()))
    lines += [
        "",
        f"Perplexity a byte by lm-eval, task tinylm, {documents} held-out documents, context {CONTEXT}, float32: `--model vllm`",
        "twice, then `--model hf`. The greedy answer is that of `vllm serve --quantization foem` to an OpenAI client beside",
        f"transformers' with the dequantized weights, {NEW_TOKENS} tokens. Quantized by `foem quantize {' '.join(OPTIONS)}`",
        f"after {TRAINING} training steps.",
        "",
        f"`{results['command']}`, commit {results['commit']}, {results['date']}; {results['machine']}; {versions}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=SHAPES, action="append", help="this model; may be given twice")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of held-out text, for lm-eval")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "eval/results/moe.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="foem-moe-") as work:
        rows = {name: run(name, pathlib.Path(work), arguments.documents) for name in arguments.only or SHAPES}
    results = provenance() | {"command": "make moe", "rows": rows}
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    arguments.results.with_suffix(".md").write_text(text)
    print(text)
    sys.exit(not all(row["equal"] for row in rows.values()))


if __name__ == "__main__":
    main()
