"""Quantize a model with AutoRound on given token sequences. Runs in AutoRound's own environment; needs nothing of ours.

    python autoround_quantize.py MODEL OUT TOKENS.safetensors [--bits 4] [--group-size 128] [--asym] [--iters 200] [--seed 0]

TOKENS holds `input_ids` [sequences, length] int64. Prints one JSON line: seconds to load, and to quantize and save.

The sequences are handed over as ready batches, so AutoRound neither tokenizes, shuffles, filters nor truncates: it sees these
tokens, all of them, in this order. Its loss leaves out the last position and tokens equal to the padding's, as with any data.
Linears of the blocks are quantized, lm_head is not; the format is GPTQ's first one (auto_gptq).
"""
from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE = 8  # AutoRound's default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("tokens")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--iters", type=int, default=200, help="steps of tuning a block; 200 is AutoRound's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    ids = load_file(args.tokens)["input_ids"]
    # With a mask of its own a batch is used as it is; without one, AutoRound would mask every end-of-text token whose id is
    # also the padding's.
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH_SIZE)]
    times = [time.perf_counter()]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", trust_remote_code=args.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    times.append(time.perf_counter())
    rounder = AutoRound(model, tokenizer, bits=args.bits, group_size=args.group_size, sym=not args.asym, iters=args.iters,
                        dataset=batches, nsamples=len(ids), seqlen=ids.shape[1], batch_size=BATCH_SIZE, seed=args.seed,
                        device_map=args.device)
    # Packs each block as soon as it is tuned, into a folder of a name of its own inside the one given.
    with tempfile.TemporaryDirectory(dir=pathlib.Path(args.out).absolute().parent) as folder:
        rounder.quantize_and_save(folder, format="auto_gptq")
        config, = pathlib.Path(folder).rglob("config.json")
        config.parent.rename(args.out)
    times.append(time.perf_counter())
    load, quantize = (round(b - a, 2) for a, b in zip(times, times[1:]))
    print(json.dumps({"method": "autoround", "load_s": load, "quantize_s": quantize}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
