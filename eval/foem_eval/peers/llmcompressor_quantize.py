"""Quantize a model with llm-compressor on given token sequences. Runs in llm-compressor's own environment; needs nothing of ours.

    python llmcompressor_quantize.py MODEL OUT TOKENS.safetensors

TOKENS holds `input_ids` [sequences, length] int64. Prints one JSON line: seconds to load, quantize and save. GPTQ at
W4A16: 4 bits, groups of 128, symmetric; linears of the blocks are quantized, lm_head is not. Everything else has llm-compressor's
defaults: pipeline, damping, activation order, one sequence at a time.
"""
from __future__ import annotations

import argparse
import json
import sys
import time

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("tokens")
    args = parser.parse_args()
    ids = load_file(args.tokens)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)})
    times = [time.perf_counter()]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    times.append(time.perf_counter())
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    oneshot(model=model, tokenizer=tokenizer, dataset=data, recipe=recipe, max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids))
    times.append(time.perf_counter())
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    times.append(time.perf_counter())
    load, quantize, save = (round(b - a, 2) for a, b in zip(times, times[1:]))
    print(json.dumps({"method": "gptq", "load_s": load, "quantize_s": quantize, "save_s": save}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
