"""Quantize a model with GPTQModel on given token sequences. Runs in GPTQModel's own environment; needs nothing of ours.

    python gptqmodel_quantize.py MODEL OUT TOKENS.safetensors --method gptq|gptaq|foem|foem+gptaq [--reorder default|on|off]

TOKENS holds `input_ids` [sequences, length] int64. Prints one JSON line: seconds to load, quantize and save. Each sequence is
fed as it is (no concatenation, no sorting by length), one at a time, GPTQModel's default. Everything that is not named here has
GPTQModel's defaults: damping, and group-aware reordering, which it does for every one of these methods.
"""
from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig
from safetensors.torch import load_file

METHODS = {"gptq": {}, "gptaq": {"gptaq": GPTAQConfig(alpha=0.25)}, "foem": {"foem": FOEMConfig(alpha=0.0, beta=0.2)},
           "foem+gptaq": {"foem": FOEMConfig(alpha=0.25, beta=0.2)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("tokens")
    parser.add_argument("--method", choices=METHODS, default="foem")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--reorder", choices=("default", "on", "off"), default="default", help="group-aware reordering")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    ids = load_file(args.tokens)["input_ids"]
    calibration = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    reorder = {} if args.reorder == "default" else {"act_group_aware": args.reorder == "on"}
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=True, desc_act=False, **reorder,
                            **METHODS[args.method])
    times = [time.perf_counter()]
    model = GPTQModel.load(args.model, config, device=args.device, trust_remote_code=args.trust_remote_code)
    times.append(time.perf_counter())
    model.quantize(calibration, batch_size=1, calibration_sort=None)
    times.append(time.perf_counter())
    model.save(args.out)
    times.append(time.perf_counter())
    load, quantize, save = (round(b - a, 2) for a, b in zip(times, times[1:]))
    print(json.dumps({"method": args.method, "load_s": load, "quantize_s": quantize, "save_s": save}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
