"""Compile every form of the dense Triton kernel that the layer shapes ask for, on any machine, and write what came out.

    python kernels/compile_table.py [--out kernels/results/compiled.json] [--only 90,100] [--limit N]

For sm_80, 89, 90 and 100: registers, spilled bytes, shared memory, matrix instructions, and what a round of the main loop
writes to shared memory. Needs Triton (whose wheel brings ptxas and cuobjdump) and no GPU. Rows of an earlier run with the
same Triton and the same device code are kept, so a run that was stopped goes on; all rows take a few minutes of CPU.
Of the splits of K only "one" and "several" are different kernels; 3 bits are 4 bits with another constant.
"""
from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels")]

from foem_kernels.cost import SHAPES, Configuration  # noqa: E402
from foem_kernels.triton_w4a16 import bucket, candidates, chunk_of, configuration, most_registers  # noqa: E402

RESULT = ROOT / "kernels" / "results" / "compiled.json"
CAPABILITIES = (90, 80, 100, 89)
SMS = {80: 108, 89: 128, 90: 132, 100: 148}
GROUP = 128


class Form(NamedTuple):
    """One kernel: what the compiler sees of a configuration, the weights and the activations."""
    capability: int
    bits: int
    dtype: str
    asymmetric: bool
    group_size: int
    split: bool
    k: int
    c: Configuration

    def name(self) -> str:
        c = self.c
        return (f"sm_{self.capability} {self.bits}-bit {self.dtype} {'asym' if self.asymmetric else 'sym'} g{self.group_size} "
                f"{c.block_m}x{c.block_n}x{c.block_k} {c.scale} warps{c.num_warps} stages{c.num_stages}{' split' * self.split}"
                f"{' persistent' * (c.programs > 0)}{' tma' * c.tma}")


def forms(capabilities=CAPABILITIES, ms=range(1, 4097)):
    """Every form that `configuration` picks for the layer shapes and any of `ms`, 4 bits first, and those that walk over tiles
    or load x through descriptors, which the tuner may pick; each once."""
    found = {}
    for bits, capability in itertools.product((4, 8, 2), capabilities):
        target = divmod(capability, 10)
        chosen = [configuration(m, n, k, GROUP, target, SMS[capability], bits)
                  for (n, k), m in itertools.product(SHAPES.values(), sorted({bucket(m) for m in ms}))]
        tried = [c for c in candidates(4096, 8192, 8192, GROUP, target, bits, SMS[capability]) if c.programs or c.tma]
        for c, (dtype, asymmetric) in itertools.product(chosen + tried, (("bfloat16", True), ("float16", False))):
            form = Form(capability, bits, dtype, asymmetric, GROUP, c.splits > 1, 4096,
                        c._replace(splits=1, programs=min(c.programs, 1)))
            found[form] = None
    return list(found)


def loop_of(ptx: str) -> list[str]:
    """The PTX instructions of the main loop: between the last label that is branched back to and its branch."""
    labels, found, lines = {}, [], ptx.splitlines()
    for i, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = i
        elif (branch := re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)) and branch[1] in labels:
            found.append(lines[labels[branch[1]]:i + 1])
    return max(found, key=len)


def stored_bytes(loop: list[str], threads: int) -> int:
    """Bytes that a thread block writes to shared memory by st.shared or stmatrix in one round of the loop (cp.async excepted)."""
    total = 0
    for line in loop:
        if store := re.search(r"\bst\.shared(?:::\w+)?(?:\.v(\d))?\.[a-z](\d+)", line):
            total += int(store[1] or 1) * int(store[2]) // 8
        elif store := re.search(r"\bstmatrix\S*\.x(\d)", line):
            total += int(store[1]) * 4
    return total * threads


def compiled(form: Form) -> dict:
    """What the compiler makes of `form`: one row of the table."""
    import triton
    from foem_kernels import triton_w4a16_device as device
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    names, c, g = device.w4a16.arg_names, form.c, form.group_size
    short = {"float16": "fp16", "bfloat16": "bf16"}[form.dtype]
    constants = dict(BITS=form.bits, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
                     CHUNK=chunk_of(form.k, g, form.bits), GROUP=0 if g == form.k else g, SCALE=c.scale,
                     HAS_ZEROS=form.asymmetric, HAS_BIAS=True, TAIL=False, SPLIT=form.split, TMA=c.tma,
                     PERSISTENT=c.programs > 0, PLAIN=False)
    types = dict(x=f"tensordesc<{short}[{c.block_m}, {c.block_k}]>" if c.tma else f"*{short}", w="*u8", scales="*fp16",
                 zeros="*u8", bias=f"*{short}", y="*fp32" if form.split else f"*{short}")
    if not form.asymmetric:
        del types["zeros"]
        constants["zeros"] = None
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in names}
    aligned = [*(a for a in types if types[a].startswith("*")), "n_padded", "k_size", "k_padded", "n_size"]
    kernel = triton.compile(ASTSource(device.w4a16, signature, {(names.index(a),): v for a, v in constants.items()},
                                      {(names.index(a),): [["tt.divisibility", 16]] for a in aligned}),
                            target=GPUTarget("cuda", form.capability, 32),
                            options={"num_warps": c.num_warps, "num_stages": c.num_stages,
                                     "maxnreg": most_registers(divmod(form.capability, 10))})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    ptx = kernel.asm["ptx"]
    loop = loop_of(ptx)
    products = [line for line in loop if "wgmma.mma_async" in line]
    return {
        "registers": int(found[1]), "spilled": int(found[2]) + int(found[3]), "shared": kernel.metadata.shared,
        "wgmma": len(products),
        # operands: {sums}, then A, either {registers} or one 64-bit descriptor of shared memory
        "wgmma_from_registers": sum(bool(re.search(r"\},\s*\{", line)) for line in products),
        # ptxas, where it cannot keep several wgmma under way (its remark C7515), adds an arrival and a wait to each
        "serialized": max(0, sass.count("WARPGROUP.ARRIVE") - ptx.count("wgmma.fence")),
        "mma": sum("mma.sync" in line for line in loop), "tcgen05": sum("tcgen05.mma" in line for line in ptx.splitlines()),
        "stored_per_round": stored_bytes(loop, 32 * c.num_warps), "tile_bytes": c.block_n * c.block_k * 2,
        "exchanged": sum("shfl.sync" in line for line in loop),
        "integer_conversions": sum(bool(re.search(r"cvt\.rn\.(b?f16|f32)\.[us]", line)) for line in loop)}


def digest() -> str:
    """Of what the rows depend on: the device code, the asm and the limit that the host side gives it, Triton's version."""
    import triton
    from foem_kernels import triton_w4a16, triton_w4a16_device
    text = pathlib.Path(triton_w4a16_device.__file__).read_text("utf-8") + inspect.getsource(triton_w4a16.unpack_asm)
    text += inspect.getsource(triton_w4a16.most_registers) + inspect.getsource(compiled) + triton.__version__
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> int:
    import triton
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    parser.add_argument("--only", default=",".join(map(str, CAPABILITIES)), help="compute capabilities (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=None, help="compile at most so many rows that are missing")
    args = parser.parse_args()
    old = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    known = old.get("rows", {}) if old.get("digest") == digest() else {}
    wanted, done = {form.name(): form for form in forms()}, 0
    rows = {name: known[name] for name in wanted if name in known}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, form in wanted.items():
        if name not in rows and str(form.capability) in args.only.split(",") and done != args.limit:
            rows[name] = compiled(form)
            done += 1
            print(f"{name}: {rows[name]}", flush=True)
        lines = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in wanted if key in rows)
        args.out.write_text(f'{{"command": "python kernels/compile_table.py", "triton": "{triton.__version__}", '
                            f'"digest": "{digest()}",\n "rows": {{\n  {lines}}}}}\n', "utf-8")
    print(f"{len(rows)} of {len(wanted)} rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
