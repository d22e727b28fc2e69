"""The Triton kernel's numbers, on Triton's interpreter. Its machine code: test_compiled.

TRITON_INTERPRET is read when triton is imported, and other tests import triton too: so this file runs itself as a script
and the tests judge the report.
"""
import json
import os
import pathlib
import re
import struct
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels"))
pytest.importorskip("triton")

from foem_kernels.problem import Problem  # noqa: E402
from foem_kernels.triton_w4a16 import Configuration, TritonW4A16, candidates, chunk_of, configuration, shuffle  # noqa: E402

# m, n, k, group_size, dtype, asymmetric, act-order, bias, bits. Every width, M tile and way to scale, both N tiles, odd N,
# tails of M and K, groups that tiles have to divide.
CASES = [(m, n, k, g, dtype, asym, order, bias, (bits or [4])[0])
         for m, n, k, g, asym, order, bias, *bits in (
             (1, 75, 1024, 128, 0, 0, 1), (3, 75, 512, 64, 1, 0, 0), (16, 129, 256, 32, 1, 1, 1), (33, 200, 256, 128, 1, 0, 1),
             (130, 200, 256, 128, 1, 1, 1), (130, 75, 256, 32, 0, 0, 0), (1, 75, 352, 352, 1, 0, 0), (33, 75, 512, 512, 0, 0, 1),
             (130, 33, 256, 256, 1, 0, 1), (16, 1, 128, 64, 0, 1, 0), (33, 75, 256, 32, 0, 0, 0), (20, 128, 128, 64, 1, 0, 1),
             (1, 129, 1024, 64, 1, 1, 1), (3, 75, 48, 16, 1, 1, 0), (130, 256, 128, 64, 0, 0, 1), (1, 75, 48, 48, 0, 0, 0),
             (3, 75, 1024, 1024, 1, 1, 1), (3, 75, 96, 48, 1, 1, 1), (130, 75, 192, 96, 1, 0, 0), (3, 75, 512, 256, 0, 1, 0),
             (3, 75, 100, 64, 1, 0, 1), (130, 33, 200, 128, 0, 1, 0), (3, 33, 100, 100, 1, 0, 1),
             (3, 75, 256, 128, 1, 1, 1, 8), (130, 129, 256, 128, 1, 0, 0, 8), (33, 75, 100, 100, 0, 0, 1, 8),
             (130, 75, 64, 16, 0, 0, 0, 8), (3, 75, 512, 512, 0, 1, 0, 8), (3, 75, 256, 128, 1, 1, 1, 2),
             (130, 129, 256, 64, 1, 0, 0, 2), (33, 75, 512, 512, 0, 0, 1, 2), (3, 75, 64, 16, 0, 0, 0, 2),
             (3, 75, 256, 128, 1, 1, 1, 3), (130, 129, 256, 64, 0, 0, 0, 3))
         for dtype in ("float16", "bfloat16")]

# m, k, group_size, bits, dtype and a launch that blocks may walk through: M and K with tails, K split, each way to scale.
WALKS = [(1, 256, 128, 4, "bfloat16", Configuration(16, 128, 128, 1, 4, 2, "after")),
         (40, 200, 64, 2, "float16", Configuration(16, 64, 64, 2, 4, 2, "after")),
         (300, 200, 64, 3, "bfloat16", Configuration(128, 128, 64, 1, 8, 2, "before")),
         (300, 256, 256, 8, "float16", Configuration(128, 64, 64, 1, 4, 2, "end"))]


def name(case):
    return "-".join(map(str, case))


def data(m, n, k, g, dtype, asym, order, bias, bits, exact, seed=0):
    """x, codes, scales, zeros, g_idx, bias. With `exact` every product and sum is exact in fp32, whatever the order."""
    r = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, dtype)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=r)
    groups = -(-k // g)
    zeros = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8, generator=r) if asym else None
    g_idx = (torch.arange(k) // g)[torch.randperm(k, generator=r)].int() if order else None
    if exact:  # |x| <= 4, |w| <= 255 and scales 1 .. 1/8: multiples of 1/8 below 2**21 (K <= 1024) need 24 bits at most
        x = torch.randint(-4, 5, (m, k), generator=r).to(dtype)
        scales = 2.0 ** -torch.randint(0, 4, (n, groups), generator=r).float()
        b = torch.randint(-4, 5, (n,), generator=r).to(dtype) if bias else None
    else:
        x = torch.randn(m, k, generator=r).to(dtype)
        scales = (torch.rand(n, groups, generator=r) * 0.02 + 0.001).half().float()
        b = torch.randn(n, generator=r).to(dtype) if bias else None
    return x, codes, scales, zeros, g_idx, b


def expected(x, codes, scales, zeros, g_idx, bias, g, bits=4):
    """float64: y [m, n], and sum |w||x| + |bias| [m, n], which rounding errors of the sum are proportional to."""
    n, k = codes.shape
    w = torch.empty(n, k, dtype=torch.float64)
    for column in range(k):
        group = column // g if g_idx is None else int(g_idx[column])
        zero = 2.0 ** (bits - 1) if zeros is None else zeros[:, group].double()
        w[:, column] = scales[:, group].double() * (codes[:, column].double() - zero)
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
        m, n, k, g, dtype, *_, bits = case
        c = configuration(m, n, k, g, bits=bits)
        for exact in (True, False):
            x, codes, scales, zeros, g_idx, bias = values = data(*case, exact)
            p = foem_kernels.prepare(codes, scales, zeros, g_idx, bits=bits, group_size=g, dtype=x.dtype, device="cpu",
                                     kernel="triton_w4a16")
            y = foem_kernels.gemm(x, p, bias)
            wanted, magnitude = expected(*values, g, bits)
            if exact:
                report[name(case)] = {"config": c._asdict(), "wrong": int((y != wanted.to(y.dtype)).sum())}
            else:
                allowed = bound(wanted, magnitude, k, dtype, c.scale == "before")
                report[name(case)]["error"] = float(((y.double() - wanted).abs() / allowed).max())
    x, codes, scales, *_ = data(130, 200, 256, 128, "bfloat16", 0, 0, 0, 4, False)
    lone = torch.full_like(codes, 8)
    rows = torch.arange(200)
    lone[rows, rows] = codes[rows, rows] | 1
    p = foem_kernels.prepare(lone, scales, bits=4, group_size=128, dtype=x.dtype, device="cpu", kernel="triton_w4a16")
    wanted, magnitude = expected(x, lone, scales, None, None, None, 128)
    error = (foem_kernels.gemm(x, p).double() - wanted).abs()
    report["lone"] = float((error / bound(wanted, magnitude, 1, "bfloat16", True)).max())
    report["widths"] = {}
    for m, dtype, bits in ((3, "bfloat16", 4), (40, "bfloat16", 2), (130, "float16", 4), (130, "bfloat16", 8)):
        x, codes, scales, zeros, _, bias = values = data(m, 200, 128, 64, dtype, 1, 0, 1, bits, True)
        p = foem_kernels.prepare(codes, scales, zeros, bits=bits, group_size=64, dtype=x.dtype, device="cpu",
                                 kernel="triton_w4a16")
        w, wanted = p.weights, expected(*values, 64, bits)[0].to(x.dtype)
        for c in {c.block_n: c for c in candidates(m, 200, 128, 64, bits=bits)}.values():
            y = launch(x, w["w"], w["scales"], w["zeros"], bias, 200, 64, c, bits)
            report["widths"][f"{m}-{bits}-{c.block_n}"] = int((y != wanted).sum())
    report["walks"] = walk(foem_kernels, launch)
    values = data(3, 75, 640, 64, "float16", 1, 0, 1, 4, True)
    x, codes, scales, zeros, _, bias = values
    p = foem_kernels.prepare(codes, scales, zeros, bits=4, group_size=64, dtype=x.dtype, device="cpu", kernel="triton_w4a16")
    w = p.weights
    wanted = expected(*values, 64)[0].to(x.dtype)
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
    try:
        foem_kernels.prepare(codes, scales, zeros + 0.5, bits=4, group_size=64, dtype=x.dtype, device="cpu",
                             kernel="triton_w4a16")
    except ValueError as error:
        report["odd_zeros"] = str(error)
    empty = torch.ops.foem.triton_w4a16(x[:0], w["w"], w["scales"], w["zeros"], None, bias, 75, 64)
    report["no_rows"] = list(empty.shape)
    report["again"] = torch.equal(foem_kernels.gemm(x, p, bias), foem_kernels.gemm(x, p, bias))
    spread = torch.empty(3, 1280, dtype=x.dtype)[:, ::2].copy_(x)
    report["strides"] = torch.equal(foem_kernels.gemm(spread, p, bias), foem_kernels.gemm(x, p, bias))
    wide = foem_kernels.prepare(codes, scales / 3, zeros, bits=4, group_size=64, dtype=x.dtype, device="cpu",
                                kernel="triton_w4a16")
    report["scale_dtypes"] = [str(w["scales"].dtype), str(wide.weights["scales"].dtype)]
    return report


def walk(foem_kernels, launch):
    """Wrong results of each launch of WALKS, with blocks that walk over its tiles and with x through a descriptor; and
    whether rounded sums are those of a block to each tile, for x that does not lie at a multiple of 16 bytes too."""
    found = {}
    for m, k, g, bits, dtype, c in WALKS:
        p, same = None, True
        for exact in (True, False):
            x, codes, scales, zeros, _, bias = values = data(m, 200, k, g, dtype, 1, 0, 1, bits, exact)
            p = foem_kernels.prepare(codes, scales, zeros, bits=bits, group_size=g, dtype=x.dtype, device="cpu",
                                     kernel="triton_w4a16")
            w = p.weights["w"], p.weights["scales"], p.weights["zeros"], bias, 200, g
            wanted = expected(*values, g, bits)[0].to(x.dtype) if exact else launch(x, *w, c, bits)
            shifted = torch.empty(m * k + 1, dtype=x.dtype)[1:].view(m, k).copy_(x)
            for programs, tma in ((1, False), (3, False), (0, True), (3, True)):
                y = launch(shifted if tma else x, *w, c._replace(programs=programs, tma=tma), bits)
                if exact:
                    found[f"{m}-{bits}-{programs}-{tma}"] = int((y != wanted).sum())
                else:
                    same &= torch.equal(y, wanted)
        found[f"{m}-{bits}-bits differ"] = int(not same)
    bad = x.clone()
    bad[1, 5] = float("nan")
    y, clean = (launch(t, *w, c._replace(programs=3, tma=True), bits) for t in (bad, x))
    found["other rows"] = int(not torch.equal(y[2:], clean[2:]) or not y[1].isnan().all())
    return found


@pytest.fixture(scope="module")
def report():
    environment = {key: v for key, v in os.environ.items() if key != "FOEM_KERNEL"}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], text=True, capture_output=True, timeout=900,
                          env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_numbers(report, case):
    found = report[name(case)]
    assert found["wrong"] == 0, "integers and powers of two must come out exact"
    assert found["error"] <= 1


def test_the_cases_reach_every_form(report):
    configs = [report[name(case)]["config"] for case in CASES]
    for field, values in (("block_m", {16, 32, 64, 128}), ("scale", {"after", "before", "end"})):
        assert {c[field] for c in configs} == values
    assert max(c["splits"] for c in configs) > 1


def test_every_width_of_tile_is_exact(report):
    wrong = report["widths"]
    assert not any(wrong.values()) and {key.split("-")[2] for key in wrong} == {"64", "128", "256"}


def test_a_weight_is_rounded_once(report):
    """One weight per row: no sum hides that a scale were rounded to bf16 before the product is."""
    assert 0 < report["lone"] <= 1


def test_any_split_of_k_gives_the_same(report):
    splits = {key: wrong for key, wrong in report.items() if key.startswith("split-")}
    assert len(splits) == 4 and not any(splits.values())


def test_walking_over_tiles_and_descriptors_change_nothing(report):
    assert len(report["walks"]) == 5 * len(WALKS) + 1 and not any(report["walks"].values()), report["walks"]


def test_a_bad_row_stays_alone(report):
    assert report["nan_row"] == {"row_is_nan": True, "others": True}


def test_op_is_safe_to_compile(report):
    assert set(report["opcheck"].values()) == {"SUCCESS"}
    assert report["torch.compile"]


def test_prepare(report):
    assert "g_idx gives groups 63 to 65 columns" in report["uneven_groups"]
    assert "zeros must be integers" in report["odd_zeros"]
    assert report["scale_dtypes"] == ["torch.float16", "torch.float32"]


def test_edges(report):
    assert report["no_rows"] == [0, 75]
    assert report["strides"], "a non-contiguous x gives what its copy gives"
    assert report["again"], "the same call gives the same bits"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_cuda_graph_replays_on_other_inputs(bits):
    import foem_kernels
    codes = torch.randint(0, 1 << bits, (256, 512), dtype=torch.uint8)
    scales = torch.rand(256, 4).half() + 0.1
    p = foem_kernels.prepare(codes, scales, bits=bits, group_size=128, dtype=torch.bfloat16, device="cuda", kernel="triton_w4a16")
    for m in (1, 40, 300):
        x = torch.randn(m, 512, device="cuda").bfloat16()
        foem_kernels.gemm(x, p)  # compiles, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = foem_kernels.gemm(x, p)
        x.copy_(torch.randn(m, 512, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, foem_kernels.gemm(x, p))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
@pytest.mark.parametrize("tma", (False, True))
def test_cuda_graph_of_a_walk_replays_on_other_inputs(tma):
    import foem_kernels
    from foem_kernels.triton_w4a16 import launch
    if tma and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need sm_90")
    x, codes, scales, zeros, _, bias = data(300, 200, 512, 128, "bfloat16", 1, 0, 1, 4, True)
    x = x.cuda()
    w = foem_kernels.prepare(codes, scales, zeros, bits=4, group_size=128, dtype=x.dtype, device="cuda",
                             kernel="triton_w4a16").weights
    args = w["w"], w["scales"], w["zeros"], bias.cuda(), 200, 128
    each = Configuration(128, 128, 64, 1, 8, 3, "before")
    walk = each._replace(programs=2, tma=tma)
    launch(x, *args, walk)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch(x, *args, walk)
    x.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, launch(x, *args, each))


def run_ptx(text, word):
    """The unpacking asm on one 32-bit word: its output words. Only the instructions that it uses are known here."""
    outputs = max(int(i) for i in re.findall(r"\$(\d+)", text))
    register = {f"${outputs}": word}
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
    return [register[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("bits, dtype, magic", [(2, "BF16", 128), (2, "FP16", 64), (4, "BF16", 128), (4, "FP16", 64),
                                                (8, "FP16", 1024), (8, "FP32", 1 << 23)])
def test_unpacking_asm_agrees_with_its_plain_form(bits, dtype, magic):
    """The interpreter cannot run PTX: check here that a byte's codes come out, at its own place, as magic + code."""
    from foem_kernels import triton_w4a16_device as device
    asm = getattr(device, f"_{dtype}_{bits}").value
    for first in range(256):
        four = [first, 255 - first, first * 7 % 256, first * 29 % 256]
        words = run_ptx(asm, int.from_bytes(bytes(four), "little"))
        if dtype == "FP32":
            values = [struct.unpack("<f", struct.pack("<I", w))[0] for w in words]
        else:
            halves = [w >> shift & 0xFFFF for w in words for shift in (0, 16)]
            values = [struct.unpack("<f", struct.pack("<I", h << 16))[0] if dtype == "BF16" else
                      struct.unpack("<e", struct.pack("<H", h))[0] for h in halves]
        assert values == [magic + (c >> shift & (1 << bits) - 1) for shift in range(0, 8, bits) for c in four]


def test_shuffle_keeps_every_code_once():
    codes = torch.randint(0, 16, (128, 96), dtype=torch.uint8)
    w = shuffle(codes, 32)
    assert w.shape == (2, 3, 128, 8)
    thread = w[1, 2, 37]  # warp 1, lane 5: rows 64 + 16 + 1 (+ 8), columns 64 + 2 (+ 1, + 8 in the high half, + 16)
    row, column = 64 + 16 + 1, 64 + 2
    wanted = [codes[row + 8 * h, column + 16 * b + p] | codes[row + 8 * h, column + 16 * b + p + 8] << 4
              for b in (0, 1) for h in (0, 1) for p in (0, 1)]
    assert thread.tolist() == [int(v) for v in wanted]


@pytest.mark.parametrize("bits", (2, 8))
def test_shuffle_of_other_widths(bits):
    codes = torch.randint(0, 1 << bits, (128, 96), dtype=torch.uint8)
    w = shuffle(codes, 32, bits)
    assert w.shape == (2, 3, 128, 32 * bits // 16)
    thread = w[1, 2, 37].tolist()  # as below, in test_shuffle_keeps_every_code_once
    row, column = 64 + 16 + 1, 64 + 2
    code = lambda b, h, c, p: int(codes[row + 8 * h, column + 16 * b + 8 * c + p])  # noqa: E731
    if bits == 8:
        assert thread == [code(b, h, c, p) for b in (0, 1) for h in (0, 1) for c in (0, 1) for p in (0, 1)]
    else:
        assert thread == [sum(code(b, h, c, p) << 2 * c + 4 * h for h in (0, 1) for c in (0, 1)) for b in (0, 1) for p in (0, 1)]


@pytest.mark.parametrize("change, reason", [
    ({"bits": 5}, "2, 3, 4, 8 bits"), ({"dtype": torch.float32}, "float16 or bfloat16"), ({"group_size": 24}, "multiple of 16"),
    ({"device": "cpu"}, "CUDA device")])
def test_refuses_with_a_reason(monkeypatch, change, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values = {"n": 64, "k": 128, "bits": 4, "group_size": 64, "symmetric": True, "dtype": torch.float16, "device": "cuda"}
    assert reason in TritonW4A16().supports(Problem(**(values | change)))


def test_configurations_cover_k_and_fit_the_rules():
    for m in (1, 2, 16, 17, 33, 65, 256, 4096):
        for n, k, g in ((64, 128, 32), (6144, 4096, 128), (8192, 8192, 8192), (1024, 3072, 64), (4096, 14336, 16), (129, 48, 48),
                        (64, 100, 64), (64, 100, 100), (75, 192, 96), (75, 1024, 256)):
            for capability in ((8, 0), (9, 0), (10, 0)):
                c = configuration(m, n, k, g, capability)
                tiles = -(-k // c.block_k)
                per_split = -(-tiles // c.splits)
                assert (c.splits - 1) * per_split < tiles <= c.splits * per_split, "an empty part of K"
                assert c.block_k % chunk_of(k, g) == 0 and (g == k or g % c.block_k == 0)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_blocks_walk_only_where_there_are_more_tiles(bits):
    for m, n, k, capability, sms in ((128, 8192, 8192, (9, 0), 132), (4096, 4096, 4096, (9, 0), 132),
                                     (4096, 8192, 1024, (8, 0), 108), (16, 28672, 4096, (9, 0), 132),
                                     (4096, 8192, 100, (10, 0), 148)):
        found = candidates(m, n, k, k if k == 100 else 128, capability, bits, sms)
        walking = [c for c in found if c.programs]
        assert bool(walking) == (m == 4096)
        for c in walking:
            assert c.programs % sms == 0 and -(-m // c.block_m) * (n // c.block_n) > c.programs and c.splits == 1
        assert any(c.tma for c in found) == (m >= 128 and capability >= (9, 0) and k % 8 == 0)


if __name__ == "__main__":
    print(json.dumps(interpret()))
