"""The Triton kernel: numbers on Triton's interpreter, machine code compiled for GPUs that are not here.

TRITON_INTERPRET is read when triton is imported, and other tests import triton too: so this file runs itself twice as a
script, `interpret` (numbers) and `compile` (PTX and resource usage), side by side, and the tests judge the two reports.
"""
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels"))
pytest.importorskip("triton")

from foem_kernels.problem import Problem  # noqa: E402
from foem_kernels.triton_w4a16 import Configuration, TritonW4A16, chunk_of, configuration, shuffle  # noqa: E402

# m, n, k, group_size, dtype, asymmetric, act-order, bias. Every M tile, every way to scale, both N tiles, odd N, tails of M.
CASES = [(m, n, k, g, dtype, asym, order, bias)
         for m, n, k, g, asym, order, bias in (
             (1, 75, 1024, 128, 0, 0, 1), (3, 75, 512, 64, 1, 0, 0), (16, 129, 256, 32, 1, 1, 1), (33, 200, 256, 128, 1, 0, 1),
             (130, 200, 256, 128, 1, 1, 1), (130, 75, 256, 32, 0, 0, 0), (1, 75, 352, 352, 1, 0, 0), (33, 75, 512, 512, 0, 0, 1),
             (130, 33, 256, 256, 1, 0, 1), (16, 1, 128, 64, 0, 1, 0), (33, 75, 256, 32, 0, 0, 0), (20, 128, 128, 64, 1, 0, 1),
             (1, 129, 1024, 64, 1, 1, 1), (3, 75, 48, 16, 1, 1, 0), (130, 256, 128, 64, 0, 0, 1), (1, 75, 48, 48, 0, 0, 0),
             (3, 75, 1024, 1024, 1, 1, 1))
         for dtype in ("float16", "bfloat16")]
# M -> the launch of sm_90 uses wgmma; the other chips are compiled for correctness and spills alone.
COMPILED = [(capability, m, g, dtype, asym)
            for capability, ms in ((90, (1, 16, 32, 64, 256, 4096)), (80, (1, 64, 256)), (100, (1, 64, 256)))
            for m in ms
            for g, dtype, asym in ((128, "bfloat16", True), (128, "float16", False))] + [
    (90, 1, 4096, "bfloat16", True), (90, 256, 4096, "bfloat16", True), (90, 64, 32, "float16", True),
    (90, 256, 32, "float16", True)]


def name(case):
    return "-".join(map(str, case))


def data(m, n, k, g, dtype, asym, order, bias, exact, seed=0):
    """x, codes, scales, zeros, g_idx, bias. With `exact` every product and sum is exact in fp32, whatever the order."""
    r = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, dtype)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=r)
    zeros = torch.randint(0, 16, (n, k // g), dtype=torch.uint8, generator=r) if asym else None
    g_idx = (torch.arange(k) // g)[torch.randperm(k, generator=r)].int() if order else None
    if exact:  # |x| <= 4 and scales down to 1/8: multiples of 1/8 below 2**21 need no more than 24 bits
        x = torch.randint(-4, 5, (m, k), generator=r).to(dtype)
        scales = 2.0 ** -torch.randint(0, 4, (n, k // g), generator=r).float()
        b = torch.randint(-4, 5, (n,), generator=r).to(dtype) if bias else None
    else:
        x = torch.randn(m, k, generator=r).to(dtype)
        scales = (torch.rand(n, k // g, generator=r) * 0.02 + 0.001).half().float()
        b = torch.randn(n, generator=r).to(dtype) if bias else None
    return x, codes, scales, zeros, g_idx, b


def expected(x, codes, scales, zeros, g_idx, bias):
    """float64: y [m, n], and sum |w||x| + |bias| [m, n], which rounding errors of the sum are proportional to."""
    n, k = codes.shape
    groups = scales.shape[1]
    w = torch.empty(n, k, dtype=torch.float64)
    for column in range(k):
        g = column * groups // k if g_idx is None else int(g_idx[column])
        zero = 8.0 if zeros is None else zeros[:, g].double()
        w[:, column] = scales[:, g].double() * (codes[:, column].double() - zero)
    b = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
    return x.double() @ w.T + b, x.double().abs() @ w.abs().T + b.abs()


def bound(y, magnitude, k, dtype, weights_rounded):
    """What theory allows: k fp32 additions, the rounded weight where the scale goes onto it, the rounded output.

    Unit roundoff: 2**-24 fp32 (doubled, tensor cores may truncate), 2**-11 fp16, 2**-8 bf16. The second bf16 term of the
    scale leaves 2**-16 of it, hence 1.01. 2**-24: half the smallest fp16, for outputs that underflow.
    """
    u = 2.0 ** (-11 if dtype == "float16" else -8)
    error = ((k + 16) * 2.0 ** -23 + (1.01 * u if weights_rounded else 0)) * magnitude
    return error + u * (y.abs() + error) + 2.0 ** -24


def interpret():
    import foem_kernels
    from foem_kernels.triton_w4a16 import launch
    report = {}
    for case in CASES:
        m, n, k, g, dtype, *_ = case
        c = configuration(m, n, k, g)
        for exact in (True, False):
            x, codes, scales, zeros, g_idx, bias = values = data(*case, exact)
            p = foem_kernels.prepare(codes, scales, zeros, g_idx, bits=4, group_size=g, dtype=x.dtype, device="cpu",
                                     kernel="triton_w4a16")
            y = foem_kernels.gemm(x, p, bias)
            wanted, magnitude = expected(*values)
            if exact:
                report[name(case)] = {"config": c._asdict(), "wrong": int((y != wanted.to(y.dtype)).sum())}
            else:
                allowed = bound(wanted, magnitude, k, dtype, c.scale == "before")
                report[name(case)]["error"] = float(((y.double() - wanted).abs() / allowed).max())
    x, codes, scales, *_ = data(130, 200, 256, 128, "bfloat16", 0, 0, 0, False)
    lone = torch.full_like(codes, 8)
    rows = torch.arange(200)
    lone[rows, rows] = codes[rows, rows] | 1
    p = foem_kernels.prepare(lone, scales, bits=4, group_size=128, dtype=x.dtype, device="cpu", kernel="triton_w4a16")
    wanted, magnitude = expected(x, lone, scales, None, None, None)
    error = (foem_kernels.gemm(x, p).double() - wanted).abs()
    report["lone"] = float((error / bound(wanted, magnitude, 1, "bfloat16", True)).max())
    values = data(3, 75, 640, 64, "float16", 1, 0, 1, True)
    x, codes, scales, zeros, _, bias = values
    p = foem_kernels.prepare(codes, scales, zeros, bits=4, group_size=64, dtype=x.dtype, device="cpu", kernel="triton_w4a16")
    w = p.weights
    wanted = expected(*values)[0].to(x.dtype)
    for splits, scale in ((1, "after"), (3, "after"), (4, "before"), (10, "before")):  # 10 tiles: 3, 4 do not divide them
        splits = -(-10 // -(-10 // splits))
        y = launch(x, w["w"], w["scales"], w["zeros"], bias, 75, 64, Configuration(16, 128, 64, splits, 4, 2, scale))
        report[f"split-{splits}-{scale}"] = int((y != wanted).sum())
    bad = x.clone()
    bad[1, 5], bad[1, 70] = float("inf"), float("nan")
    y, clean = foem_kernels.gemm(bad, p, bias), foem_kernels.gemm(x, p, bias)
    report["nan_row"] = {"row_is_nan": bool(y[1].isnan().all()), "others": torch.equal(y[[0, 2]], clean[[0, 2]])}
    op = torch.ops.foem.triton_w4a16.default
    args = (x, w["w"], w["scales"], w["zeros"], torch.arange(640), bias, 75, 64)
    report["opcheck"] = torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x: foem_kernels.gemm(x + 1, p, bias) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    report["torch.compile"] = all(torch.equal(compiled(x[:m]), foem_kernels.gemm(x[:m] + 1, p, bias) * 2) for m in (2, 3))
    odd = (torch.arange(640) // 64).int()
    odd[0] = 1
    try:
        foem_kernels.prepare(codes, scales, zeros, odd, bits=4, group_size=64, dtype=x.dtype, device="cpu", kernel="triton_w4a16")
    except ValueError as error:
        report["uneven_groups"] = str(error)
    wide = foem_kernels.prepare(codes, scales / 3, zeros, bits=4, group_size=64, dtype=x.dtype, device="cpu",
                                kernel="triton_w4a16")
    report["scale_dtypes"] = [str(w["scales"].dtype), str(wide.weights["scales"].dtype)]
    return report


def loop_of(ptx):
    """The PTX instructions of the main loop: between the last label that is branched back to and its branch."""
    labels, found, lines = {}, [], ptx.splitlines()
    for i, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = i
        elif (branch := re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)) and branch[1] in labels:
            found.append(lines[labels[branch[1]]:i + 1])
    return max(found, key=len)


def stored_bytes(loop, threads):
    """Bytes that a thread block writes to shared memory by st.shared or stmatrix in one round of the loop (cp.async excepted)."""
    total = 0
    for line in loop:
        if store := re.search(r"\bst\.shared(?:::\w+)?(?:\.v(\d))?\.[a-z](\d+)", line):
            total += int(store[1] or 1) * int(store[2]) // 8
        elif store := re.search(r"\bstmatrix\S*\.x(\d)", line):
            total += int(store[1]) * 4
    return total * threads


def compile_all():
    import triton
    from foem_kernels import triton_w4a16_device as device
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    names, report, n, k = device.w4a16.arg_names, {}, 6144, 4096
    for case in COMPILED:
        capability, m, g, dtype, asym = case
        c = configuration(m, n, k, g, (capability // 10, capability % 10))
        short = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
        constants = dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, CHUNK=chunk_of(k, g), GROUP=0 if g == k else g,
                         SCALE=c.scale, HAS_ZEROS=asym, HAS_BIAS=True, SPLIT=c.splits > 1, PLAIN=False)
        pointers = dict(x=f"*{short}", w="*u8", scales="*fp16", zeros="*u8", bias=f"*{short}",
                        y="*fp32" if c.splits > 1 else f"*{short}")
        if not asym:
            del pointers["zeros"]
            constants["zeros"] = None
        signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in names}
        aligned = [*pointers, "n_padded", "k_size", "n_size"]
        kernel = triton.compile(ASTSource(device.w4a16, signature, {(names.index(a),): v for a, v in constants.items()},
                                          {(names.index(a),): [["tt.divisibility", 16]] for a in aligned}),
                                target=GPUTarget("cuda", capability, 32),
                                options={"num_warps": c.num_warps, "num_stages": c.num_stages})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
        loop = loop_of(kernel.asm["ptx"])
        products = [line for line in loop if "wgmma.mma_async" in line]
        report[name(case)] = {
            "config": c._asdict(), "registers": int(found[1]), "spilled": int(found[2]) + int(found[3]),
            "shared": kernel.metadata.shared, "wgmma": len(products),
            # operands: {sums}, then A, either {registers} or one 64-bit descriptor of shared memory
            "wgmma_from_registers": sum(bool(re.search(r"\},\s*\{", line)) for line in products),
            "stored_per_round": stored_bytes(loop, 32 * c.num_warps), "tile_bytes": c.block_n * c.block_k * 2,
            "exchanged": sum("shfl.sync" in line for line in loop),
            "integer_conversions": sum(bool(re.search(r"cvt\.rn\.(b?f16|f32)\.[us]", line)) for line in loop)}
    return report


@pytest.fixture(scope="module")
def reports():
    runs = {}
    for mode, extra in (("interpret", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}), ("compile", {})):
        environment = {key: v for key, v in os.environ.items() if key not in ("TRITON_INTERPRET", "FOEM_KERNEL")} | extra
        runs[mode] = subprocess.Popen([sys.executable, "-W", "ignore", __file__, mode], env=environment, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    result = {}
    for mode, run in runs.items():
        out, err = run.communicate(timeout=900)
        assert run.returncode == 0, f"{mode}: {err[-3000:]}"
        result[mode] = json.loads(out.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", CASES, ids=name)
def test_numbers(reports, case):
    found = reports["interpret"][name(case)]
    assert found["wrong"] == 0, "integers and powers of two must come out exact"
    assert found["error"] <= 1


def test_the_cases_reach_every_form(reports):
    configs = [reports["interpret"][name(case)]["config"] for case in CASES]
    for field, values in (("block_m", {16, 32, 64, 128}), ("block_n", {128, 256}), ("scale", {"after", "before", "end"})):
        assert {c[field] for c in configs} == values
    assert max(c["splits"] for c in configs) > 1


def test_a_weight_is_rounded_once(reports):
    """One weight per row: no sum hides that a scale were rounded to bf16 before the product is."""
    assert 0 < reports["interpret"]["lone"] <= 1


def test_any_split_of_k_gives_the_same(reports):
    splits = {key: wrong for key, wrong in reports["interpret"].items() if key.startswith("split-")}
    assert len(splits) == 4 and not any(splits.values())


def test_a_bad_row_stays_alone(reports):
    assert reports["interpret"]["nan_row"] == {"row_is_nan": True, "others": True}


def test_op_is_safe_to_compile(reports):
    assert set(reports["interpret"]["opcheck"].values()) == {"SUCCESS"}
    assert reports["interpret"]["torch.compile"]


def test_prepare(reports):
    assert "g_idx gives groups 63 to 65 columns" in reports["interpret"]["uneven_groups"]
    assert reports["interpret"]["scale_dtypes"] == ["torch.float16", "torch.float32"]


@pytest.mark.parametrize("case", COMPILED, ids=name)
def test_compiled(reports, case):
    found = reports["compile"][name(case)]
    assert found["spilled"] == 0
    assert found["shared"] <= (227 if case[0] >= 90 else 99) * 1024  # 99 KiB: sm_86 and sm_89 run sm_80's configurations
    if case[0] == 90:
        assert found["wgmma"] == found["wgmma_from_registers"] > 0
        # Per round at most the scales' two terms and the zeros change layout through shared memory, never the weights.
        assert found["stored_per_round"] <= 3 * 4 * found["config"]["block_n"] < found["tile_bytes"]
        assert found["exchanged"] == 0, "weights move between lanes"
        assert case[4] or found["integer_conversions"] == 0


def test_stores_to_shared_memory_are_seen():
    lines = ["st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};", "@%p1 st.shared.b16 [%r1], %rs1;",
             "st.shared::cta.v2.b32 [%r1], {%r2, %r3};", "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3, %r4, %r5};",
             "cp.async.cg.shared.global [%r1], [%rd1], 0x10;"]
    assert [stored_bytes([line], 1) for line in lines] == [16, 2, 8, 16, 0]


def run_ptx(text, word):
    """The unpacking asm on one 32-bit word: its four output words. Only the instructions that it uses are known here."""
    register = {"$4": word}
    value = lambda a: register[a] if a in register else int(a, 0)  # noqa: E731
    for line in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if not line.strip():
            continue
        op, *operands = line.replace(",", " ").split()
        a, b = value(operands[1]), value(operands[2])
        if op == "prmt.b32":
            pool, select = (a | b << 32).to_bytes(8, "little"), value(operands[3])
            r = int.from_bytes(bytes(pool[select >> 4 * i & 7] for i in range(4)), "little")
        else:
            r = {"and.b32": int.__and__, "shl.b32": int.__lshift__, "shr.b32": int.__rshift__}[op](a, b) & 0xFFFFFFFF
        register[operands[0]] = r
    return [register[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype, magic", [(torch.bfloat16, 128), (torch.float16, 64)], ids=str)
def test_unpacking_asm_agrees_with_its_plain_form(dtype, magic):
    """The interpreter cannot run PTX: check here that a byte's two codes come out, at its own place, as magic + code."""
    source = (ROOT / "kernels" / "foem_kernels" / "triton_w4a16_device.py").read_text("utf-8")
    asm = re.search(rf'_{"BF16" if dtype == torch.bfloat16 else "FP16"}_BITS = tl.constexpr\("""(.*?)"""\)', source, re.S)[1]
    for first in range(256):
        four = [first, 255 - first, first * 7 % 256, first * 29 % 256]
        words = run_ptx(asm, int.from_bytes(bytes(four), "little"))
        halves = [w >> shift & 0xFFFF for w in words for shift in (0, 16)]
        if dtype == torch.bfloat16:
            values = [struct.unpack("<f", struct.pack("<I", h << 16))[0] for h in halves]
        else:
            values = [struct.unpack("<e", struct.pack("<H", h))[0] for h in halves]
        assert values == [magic + (c & 15) for c in four] + [magic + (c >> 4) for c in four]


def test_shuffle_keeps_every_code_once():
    codes = torch.randint(0, 16, (128, 96), dtype=torch.uint8)
    w = shuffle(codes, 32)
    assert w.shape == (2, 3, 128, 8)
    thread = w[1, 2, 37]  # warp 1, lane 5: rows 64 + 16 + 1 (+ 8), columns 64 + 2 (+ 1, + 8 in the high half, + 16)
    row, column = 64 + 16 + 1, 64 + 2
    wanted = [codes[row + 8 * h, column + 16 * b + p] | codes[row + 8 * h, column + 16 * b + p + 8] << 4
              for b in (0, 1) for h in (0, 1) for p in (0, 1)]
    assert thread.tolist() == [int(v) for v in wanted]


@pytest.mark.parametrize("change, reason", [
    ({"bits": 8}, "4-bit"), ({"dtype": torch.float32}, "float16 or bfloat16"), ({"group_size": 48}, "groups of 16"),
    ({"k": 100, "group_size": 100}, "divisible by 16"), ({"k": 96, "group_size": 64}, "divisible"),
    ({"device": "cpu"}, "CUDA device")])
def test_refuses_with_a_reason(monkeypatch, change, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values = {"n": 64, "k": 128, "bits": 4, "group_size": 64, "symmetric": True, "dtype": torch.float16, "device": "cuda"}
    assert reason in TritonW4A16().supports(Problem(**(values | change)))


def test_configurations_cover_k_and_fit_the_rules():
    for m in (1, 2, 16, 17, 33, 65, 256, 4096):
        for n, k, g in ((64, 128, 32), (6144, 4096, 128), (8192, 8192, 8192), (1024, 3072, 64), (4096, 14336, 16), (129, 48, 48)):
            for capability in ((8, 0), (9, 0), (10, 0)):
                c = configuration(m, n, k, g, capability)
                tiles, per_split = k // c.block_k, -(-(k // c.block_k) // c.splits)
                assert k % c.block_k == 0 and (c.splits - 1) * per_split < tiles <= c.splits * per_split, "an empty part of K"
                assert c.block_k % chunk_of(k, g) == 0


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
