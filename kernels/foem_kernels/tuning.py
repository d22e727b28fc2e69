"""Launches of triton_w4a16 that were timed on a GPU: `python -m foem_kernels tune` writes them, the kernel looks them up.

One file for each device, tuned/<device>.json beside this module; without a file, or for a product that is not in it,
`triton_w4a16.configuration` predicts. Nothing is timed while serving. No file is shipped yet: no GPU was at hand.
"""
from __future__ import annotations

import argparse
import functools
import json
import pathlib
import re
import statistics
import sys

import torch

from foem_kernels.cost import SHAPES, Configuration, weight_bytes

FOLDER = pathlib.Path(__file__).parent / "tuned"
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CACHE_BYTES = 60 << 20  # the L2 of an H200; weight sets rotate through three times as much
KEY = ("m", "n", "k", "group_size", "bits")


def path_of(device: str, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """The file of a device by the name that torch gives it: "NVIDIA H200" -> nvidia_h200.json."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


@functools.cache
def table(device: str, folder: pathlib.Path = FOLDER) -> dict[tuple, Configuration]:
    """(bucket of M, n, k, group_size, bits) -> the fastest launch found on that device; empty where none was timed."""
    path = path_of(device, folder)
    if not path.exists():
        return {}
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {tuple(row[field] for field in KEY): Configuration(**row["configuration"]) for row in rows}


def write(rows: list[dict], device: str, folder: pathlib.Path) -> pathlib.Path:
    """Rows of `table`'s file; those of the same product replace what was there."""
    path = path_of(device, folder)
    old = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    merged = {tuple(row[field] for field in KEY): row for row in [*old, *rows]}
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(merged[key]) for key in sorted(merged))
    path.write_text(f'{{"device": {json.dumps(device)}, "torch": "{torch.__version__}",\n "rows": [\n  {lines}]}}\n', "utf-8")
    return path


def microseconds(calls: list) -> float:
    """Median time of one of `calls`: a CUDA graph that makes each in turn, replayed 20 times between events."""
    calls = calls * -(-20 // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile before the capture
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def tune(n: int, k: int, group_size: int, bits: int, buckets: list[int]) -> list[dict]:
    """A row for each bucket: every candidate timed on bf16, weights read from memory in every call.

    The data are small integers and powers of two, on which every right launch gives the same bits; one that does not is
    an error.
    """
    from foem_kernels.problem import Problem
    from foem_kernels.triton_w4a16 import TritonW4A16, _gpu, candidates, configuration, launch
    r = torch.Generator("cuda").manual_seed(0)
    p = Problem(n, k, bits, group_size, True, torch.bfloat16, "cuda")
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device="cuda", generator=r)
    scales = 2.0 ** -torch.randint(0, 4, (n, p.groups), device="cuda", generator=r).float()
    ready = TritonW4A16().prepare(codes, scales, None, None, p)
    copies = max(2, min(256, -(-3 * CACHE_BYTES // weight_bytes(n, k, group_size, bits))))
    sets = [(ready["w"].clone(), ready["scales"].clone()) for _ in range(copies)]
    capability, sms = _gpu(torch.cuda.current_device())
    rows = []
    for m in buckets:
        x = torch.randint(-2, 3, (m, k), device="cuda", generator=r).to(torch.bfloat16)
        default, times, wanted = configuration(m, n, k, group_size, capability, sms, bits), {}, None
        for c in dict.fromkeys([default, *candidates(m, n, k, group_size, capability, bits, sms)]):
            y = launch(x, *sets[0], None, None, n, group_size, c, bits)
            wanted = y if wanted is None else wanted
            if not torch.equal(y, wanted):
                raise RuntimeError(f"{c} and {default} differ on m={m}, n={n}, k={k}, group_size={group_size}, bits={bits}")
            times[c] = microseconds([lambda s=s, c=c: launch(x, *s, None, None, n, group_size, c, bits) for s in sets])  # noqa: B023
        best = min(times, key=times.get)
        rows.append({**dict(zip(KEY, (m, n, k, group_size, bits))), "us": round(times[best], 3),
                     "default_us": round(times[default], 3), "timed": len(times), "configuration": best._asdict()})
        print(f"  M {m:5d}: {times[best]:8.2f} us, predicted choice {times[default]:8.2f} us, {best}", flush=True)
    return rows


def shape(text: str) -> tuple[int, int]:
    """A name of SHAPES, or N x K as in 6144x4096."""
    if text in SHAPES:
        return SHAPES[text]
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        return int(found[1]), int(found[2])
    raise argparse.ArgumentTypeError(f"{text!r} is neither NxK nor one of {', '.join(SHAPES)}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m foem_kernels tune", description=main.__doc__ or __doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=shape, default=list(SHAPES.values()), metavar="NxK",
                        help="layers by name or as NxK (default: those of Qwen3-8B, Llama-3-8B, Qwen3-0.6B and 8192x8192)")
    parser.add_argument("--m", nargs="+", type=int, default=list(BUCKETS), help="rows of x (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=128, help="columns to a scale, -1 for the whole row (default: 128)")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder of the JSON (default: the package's own)")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates for sm_90, time nothing; needs no GPU")
    args = parser.parse_args(arguments)
    from foem_kernels.triton_w4a16 import bucket, candidates
    buckets = sorted({bucket(m) for m in args.m})
    work = [(n, k, k if args.group_size == -1 else args.group_size) for n, k in args.shapes]
    if args.dry_run:
        for n, k, g in work:
            for m in buckets:
                found = candidates(m, n, k, g, bits=args.bits)
                print(f"{n}x{k} group {g} M {m}: {len(found)} candidates", *found, sep="\n  ")
        return 0
    if not torch.cuda.is_available() or torch.version.hip:
        print("tune needs an NVIDIA GPU that torch can see; --dry-run lists what it would time", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    for n, k, g in work:
        print(f"{n}x{k} group {g}, {args.bits} bits", flush=True)
        path = write(tune(n, k, g, args.bits, buckets), device, args.out)  # after each shape: a lost machine keeps the rest
    print(f"wrote {path}")
    return 0
