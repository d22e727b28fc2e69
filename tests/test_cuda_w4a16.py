"""The CUDA C++ kernel: its own code, run on the CPU by tests/cuda_emulation.h; compiled for GPUs that are not here; run on one.

The emulation executes the whole kernel (copies, barriers, fragments, shared tiles), so a wrong index gives a wrong number.
"""
import ctypes
import itertools
import pathlib
import re
import shutil
import struct
import subprocess

import pytest
import torch
from foem_kernels import nvrtc
from foem_kernels.cuda_w4a16 import SOURCE, Arguments, CudaW4A16, Device, Plan, definitions, launch, plan
from foem_kernels.problem import Problem

UNIT = {torch.float16: 2.0 ** -11, torch.bfloat16: 2.0 ** -8}
# Shared memory by NVIDIA's table of compute capabilities; multiprocessors of A100, RTX 3090, RTX 4090, H200, B200, RTX 5090.
DEVICES = {80: Device((8, 0), 108, 163 << 10, 164 << 10), 86: Device((8, 6), 82, 99 << 10, 100 << 10),
           89: Device((8, 9), 128, 99 << 10, 100 << 10), 90: Device((9, 0), 132, 227 << 10, 228 << 10),
           100: Device((10, 0), 148, 227 << 10, 228 << 10), 120: Device((12, 0), 170, 99 << 10, 100 << 10)}
# m, n, k, group size, dtype, zeros, act-order, bias, fp32 scales, GPU, multiprocessors. Every number of column tiles, tails of
# N and K, tiles with one owner and with many, more steps than stages, both kinds of asynchronous copy.
CASES = [(1, 128, 512, 128, torch.bfloat16, 0, 0, 1, 0, 90, 1), (1, 75, 1344, 64, torch.float16, 1, 1, 0, 0, 90, 3),
         (8, 129, 256, 32, torch.bfloat16, 1, 1, 1, 0, 80, 1), (9, 200, 704, 704, torch.bfloat16, 1, 0, 1, 1, 80, 3),
         (16, 256, 1536, 128, torch.float16, 1, 0, 1, 0, 90, 7), (17, 300, 384, 128, torch.bfloat16, 1, 0, 1, 0, 90, 2),
         (24, 130, 320, 64, torch.float16, 0, 0, 0, 1, 80, 3), (31, 128, 192, 32, torch.bfloat16, 1, 1, 1, 0, 90, 1),
         (33, 385, 256, 64, torch.float16, 1, 0, 1, 0, 89, 4), (32, 1, 64, 64, torch.bfloat16, 0, 0, 1, 0, 90, 132),
         (3, 128, 4096, 128, torch.float16, 0, 0, 0, 0, 90, 1), (5, 640, 256, 256, torch.float16, 0, 0, 1, 0, 80, 1)]
HOST_CODE = """
#include "{header}"
#include "{source}"
template <class Kernel> bool run(const Arguments& a, int grid, int late, int backwards) {{
  const long long elements = (long long)a.n_padded * a.k;
  const long long scales = Kernel::GROUP_SIZE ? elements / Kernel::GROUP_SIZE : a.n_padded;
  emulation::readable = {{{{a.x, 2LL * a.m * a.k}}, {{a.w, elements / 2}}, {{a.scales, scales * Kernel::SCALE_BYTES}},
                         {{a.zeros, scales}}}};
  return emulation::launch(grid, Kernel::SHARED, late, backwards, [&] {{ Kernel(a).run(); }});
}}
extern "C" {{
void dequantize_1(unsigned codes, const unsigned* zero, unsigned* a) {{
  const unsigned offset[2] = {{offset_of<true>(zero[0]), offset_of<true>(zero[1])}};
  dequantize<true>(codes, offset, (unsigned(&)[4])*a);
}}
void dequantize_0(unsigned codes, const unsigned* zero, unsigned* a) {{
  const unsigned offset[2] = {{offset_of<false>(zero[0]), offset_of<false>(zero[1])}};
  dequantize<false>(codes, offset, (unsigned(&)[4])*a);
}}
{kernels}
}}
"""


def tiles_of(m):
    return sorted({-(-min(rows, 32) // 8) for rows in range(m, 0, -32)})


def data(m, n, k, g, dtype, zeros, order, bias, wide, exact, seed=0):
    """x, codes, scales, zeros, g_idx, bias. With `exact` every product and sum is exact in fp32, whatever the order."""
    r = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=r)
    z = torch.randint(0, 16, (n, k // g), dtype=torch.uint8, generator=r) if zeros else None
    g_idx = (torch.arange(k) // g)[torch.randperm(k, generator=r)].int() if order else None
    tiny = 2.0 ** -23 if wide else 1  # below every fp16 number
    if exact:  # multiples of tiny / 8, below 2**20 of them
        scales = tiny * 2.0 ** -torch.randint(0, 4, (n, k // g), generator=r).float()
        b = (tiny * torch.randint(-4, 5, (n,), generator=r)).to(dtype) if bias else None
        x = torch.randint(-4, 5, (m, k), generator=r).to(dtype)
    else:
        scales = torch.rand(n, k // g, generator=r) * 0.02 + 0.001
        scales = scales if wide else scales.half().float()
        b = torch.randn(n, generator=r).to(dtype) if bias else None
        x = torch.randn(m, k, generator=r).to(dtype)  # last: weights do not depend on m
    return x, codes, scales, z, g_idx, b


def expected(x, codes, scales, zeros, g_idx, bias):
    """float64: y [m, n], and sum |w||x| + |bias|, which the rounding errors of the sum are proportional to."""
    n, k = codes.shape
    group = torch.arange(k) // (k // scales.shape[1]) if g_idx is None else g_idx.long()
    w = scales.double()[:, group] * (codes.double() - (8.0 if zeros is None else zeros.double()[:, group]))
    b = torch.zeros(n).double() if bias is None else bias.double()
    return x.double() @ w.T + b, x.double().abs() @ w.abs().T + b.abs()


def worst(y, wanted, magnitude, k):
    """Largest error over what k fp32 additions (doubled: tensor cores may truncate) and one rounding of the result allow."""
    error, u = (k + 16) * 2.0 ** -23 * magnitude, UNIT[y.dtype]
    return float(((y.double() - wanted).abs() / (error + u * (wanted.abs() + error) + 2.0 ** -24)).max())


class Emulated:
    """Takes the place of nvrtc.Function: the same arguments, run on the CPU."""

    def __init__(self, function, late, backwards):
        self.function, self.how = function, (late, backwards)

    def launch(self, grid, arguments, stream):
        assert self.function(ctypes.byref(arguments), grid, *self.how), \
            "threads wait for each other, or a copy is misaligned or out of bounds"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """(dequantize functions, kernels of a case): the .cu compiled by the host's compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    wanted = {}
    for m, _, k, g, dtype, zeros, _, _, wide, gpu, _ in CASES:
        for tiles in tiles_of(m) if m <= 32 else range(1, 5):
            group = 0 if g == k else g
            c = plan(tiles, group, zeros, wide, DEVICES[gpu])
            wanted[(dtype == torch.bfloat16, tiles, group, zeros, wide, c.stages, gpu >= 90)] = c.shared
    kernels = ""
    for i, key in enumerate(wanted):
        name = f"W4A16<{', '.join(str(int(v)) for v in key)}>"
        kernels += f"bool run_{i}(const Arguments* a, int grid, int late, int backwards) " \
                   f"{{ return run<{name}>(*a, grid, late, backwards); }}\nint shared_{i}() {{ return {name}::SHARED; }}\n"
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST_CODE.format(
        header=pathlib.Path(__file__).with_name("cuda_emulation.h"), source=SOURCE, kernels=kernels), "utf-8")
    subprocess.run([compiler, "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-w", "-o", folder / "host.so",
                    folder / "host.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "host.so"))
    for i, shared in enumerate(wanted.values()):
        assert getattr(library, f"shared_{i}")() == shared, "plan() and the .cu disagree about shared memory"
        getattr(library, f"run_{i}").restype = ctypes.c_bool
    index = {key: i for i, key in enumerate(wanted)}

    def kernels_of(case, late, backwards):
        m, _, k, g, dtype, zeros, _, _, wide, gpu, _ = case
        group, found = 0 if g == k else g, []
        for tiles in range(1, 5 if m > 32 else tiles_of(m)[-1] + 1):
            c = plan(tiles, group, zeros, wide, DEVICES[gpu])
            i = index.get((dtype == torch.bfloat16, tiles, group, zeros, wide, c.stages, gpu >= 90))
            found.append((c, None if i is None else Emulated(getattr(library, f"run_{i}"), late, backwards)))
        return tuple(found)
    return library, kernels_of


def name(case):
    return "-".join(str(v).removeprefix("torch.") for v in case)


def product(host, case, values, late, backwards):
    """y by the host code that a GPU would be launched with, and the counters afterwards."""
    m, n, k, g, dtype, zeros, order, *_, sms = case
    x, codes, scales, z, g_idx, bias = values
    p = Problem(n, k, 4, g, not zeros, dtype, "cpu", bool(order))
    w = CudaW4A16().prepare(codes, scales, z, g_idx, p)
    assert w["scales"].dtype == (torch.float32 if case[8] else torch.float16)
    x = x if w["perm"] is None else x.index_select(1, w["perm"])
    kernels = host[1](case, late, backwards)
    return launch(x, w["w"], w["scales"], w["zeros"], bias, w["counters"], n, g, kernels, sms, 0), w["counters"]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_emulated(host, case):
    """Integers come out exact; random numbers within the bound of fp32 sums; the same bits in any order of execution."""
    values = data(*case[:9], exact=True)
    wanted = expected(*values)[0].to(case[4])
    for late, backwards in ((0, 1), (1, 0)):
        y, counters = product(host, case, values, late, backwards)
        assert torch.equal(y, wanted)
        assert not counters.any(), "the next launch needs counters of zero"
    values = data(*case[:9], exact=False)
    first, _ = product(host, case, values, 0, 0)
    assert worst(first, *expected(*values), case[2]) <= 1
    assert torch.equal(product(host, case, values, 1, 1)[0], first)


def test_the_cases_reach_every_form():
    plans = [(plan(t, 0 if c[3] == c[2] else c[3], c[5], c[8], DEVICES[c[9]]), c) for c in CASES for t in tiles_of(c[0])]
    assert {p.column_tiles for p, _ in plans} == {1, 2, 3, 4}
    rows = {(c[1] + 127) // 128 * 128 % p.tile_n for p, c in plans}
    assert rows == {0, 128} and {c[2] % p.tile_k != 0 for p, c in plans} == {True, False}
    shared = [p.grid(-(-c[1] // 128) * 128, c[2], c[10]) / -(-c[1] // p.tile_n) for p, c in plans]
    assert min(shared) < 1 and max(shared) > 4, "blocks per tile: less than one, and several"


def test_a_bad_row_stays_alone(host):
    case = CASES[4]
    values = data(*case[:9], exact=True)
    values[0][1, 5], values[0][3, 70] = float("inf"), float("nan")
    y, _ = product(host, case, values, 0, 0)
    others = [i for i in range(case[0]) if i not in (1, 3)]
    assert torch.equal(y[others], expected(*values)[0].to(y.dtype)[others])
    assert not y[1].isfinite().any() and y[3].isnan().all()


@pytest.mark.parametrize("bf16", [0, 1])
def test_every_code_with_every_zero(host, bf16):
    """Register r, half h of operand A: row r % 2 (of two, 8 apart), column h + 8 (r // 2); see the PTX ISA, mma.m16n8k16."""
    function = getattr(host[0], f"dequantize_{bf16}")
    for zero_pair, byte in itertools.product([*((z, 15 - z) for z in range(16)), (16, 63)], range(256)):
        four = [byte, 255 - byte, byte * 7 % 256, byte * 29 % 256]
        a = (ctypes.c_uint * 4)()
        function(ctypes.c_uint(int.from_bytes(bytes(four), "little")), (ctypes.c_uint * 2)(*zero_pair), a)
        for r, h in itertools.product(range(4), range(2)):
            code = four[2 * (r % 2) + h] >> 4 * (r // 2) & 15
            bits = a[r] >> 16 * h & 0xFFFF
            packed, kind = (struct.pack("<I", bits << 16), "<f") if bf16 else (struct.pack("<H", bits), "<e")
            assert struct.unpack(kind, packed)[0] == code - zero_pair[r % 2]


@pytest.mark.parametrize("gpu", DEVICES)
def test_plans_fit_and_fill(gpu):
    device = DEVICES[gpu]
    for tiles, group, zeros, wide in itertools.product((1, 2, 3, 4), (0, 32, 64, 128), (0, 1), (0, 1)):
        c = plan(tiles, group, zeros, wide, device)
        if c is None:
            assert tiles > 2, "decoding must run everywhere"
            continue
        assert c.shared <= device.shared_block and c.blocks_per_sm * (c.shared + 1024) <= device.shared_sm and c.stages >= 2
        if gpu in (90, 100):
            assert c.blocks_per_sm * (c.stages - 1) * c.tile_n * c.tile_k // 2 >= 64 << 10, "bytes of weights in flight"
        for n, k in ((128, 64), (4096, 4096), (28672, 4096), (4096, 14336)):
            grid = c.grid(n, k, device.sms)
            assert 1 <= grid <= c.steps(n, k) and c.steps(n, k) * c.tile_n * c.tile_k >= n * k


def compiled(arch, c, *specialization):
    """(registers, spilled bytes, SASS) of the kernel for `arch`."""
    triton = pytest.importorskip("triton")
    if nvrtc.compiler() is None:
        pytest.skip("neither libnvrtc (nvidia-cuda-nvrtc) nor nvcc is installed")
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = nvrtc.compile(SOURCE.read_text("utf-8"), f"sm_{arch}", definitions(c, *specialization))
    file = nvrtc.cache_folder() / "test.cubin"
    file.write_bytes(cubin)
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    sass = subprocess.run([tools / "cuobjdump", "-sass", file], capture_output=True, text=True, check=True).stdout
    return int(found[1]), int(found[2]) + int(found[3]), sass


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("tiles, bf16, group, zeros, wide", [(1, 1, 128, 1, 0), (2, 0, 32, 1, 1), (4, 1, 32, 1, 0)])
def test_compiles_without_spills(monkeypatch, tmp_path, arch, tiles, bf16, group, zeros, wide):
    monkeypatch.setenv("FOEM_KERNEL_CACHE", str(tmp_path))
    gpu = int(arch.rstrip("a"))
    c = plan(tiles, group, zeros, wide, DEVICES[gpu])
    registers, spilled, sass = compiled(arch, c, bf16, group, zeros, wide)
    assert spilled == 0 and registers * 256 * c.blocks_per_sm <= 65536
    assert not re.search(r"\b(LDL|STL)\b", sass)
    # ... .RP is the reciprocal of an integer division
    assert all(i.endswith(".RP") for i in re.findall(r"\bI2FP?\S*", sass)), "codes must not be converted by I2F"
    assert sass.count("HMMA.16816.F32") == 16 * tiles and sass.count("LDSM.16.M88.4") == 2 * tiles
    assert "LDGSTS.E.BYPASS.128" in sass and ("UBLKCP" in sass) == (gpu >= 90)


def test_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FOEM_KERNEL_CACHE", str(tmp_path / "new"))
    calls = []

    def count(source, options):
        calls.append(options)
        return b"code"
    monkeypatch.setattr(nvrtc, "compiler", lambda: "nvrtc 1.0")
    monkeypatch.setattr(nvrtc, "nvrtc", lambda: object())
    monkeypatch.setattr(nvrtc, "_by_nvrtc", count)
    for _ in range(2):
        assert nvrtc.compile("a", "sm_90", {"N": 1}) == b"code"
    assert len(calls) == 1 and "-DN=1" in calls[0] and "-arch=sm_90" in calls[0]
    for source, target, value in (("b", "sm_90", 1), ("a", "sm_80", 1), ("a", "sm_90", 2)):
        nvrtc.compile(source, target, {"N": value})
    monkeypatch.setattr(nvrtc, "compiler", lambda: "nvrtc 2.0")
    nvrtc.compile("a", "sm_90", {"N": 1})
    assert len(calls) == 5
    monkeypatch.setattr(nvrtc, "compiler", lambda: None)
    with pytest.raises(nvrtc.CompileError, match="nvidia-cuda-nvrtc"):
        nvrtc.compile("c", "sm_90", {})


def test_a_mistake_is_reported_with_the_log(monkeypatch, tmp_path):
    monkeypatch.setenv("FOEM_KERNEL_CACHE", str(tmp_path))
    if nvrtc.compiler() is None:
        pytest.skip("neither libnvrtc (nvidia-cuda-nvrtc) nor nvcc is installed")
    with pytest.raises(nvrtc.CompileError, match="nonsense"):
        nvrtc.compile("nonsense;", "sm_80", {})
    assert not list(tmp_path.iterdir())


def test_what_the_driver_is_handed(monkeypatch):
    """The offsets are those of CUlaunchConfig and CUlaunchAttribute in cuda.h on 64-bit machines."""
    assert [getattr(nvrtc._Launch, f).offset for f, _ in nvrtc._Launch._fields_] == [0, 12, 24, 32, 40, 48]
    assert nvrtc._Attribute.value.offset == 8 and ctypes.sizeof(nvrtc._Attribute) == 72
    calls = []

    class Driver:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, arguments)) or 0
    monkeypatch.setattr(nvrtc, "_driver", Driver)
    function = nvrtc.Function(b"code", "w4a16", 1000, 256, dependent=True)
    assert calls[2][1][1:] == (8, 1000)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    function.launch(7, Arguments(x=1, m=5, k=64), 1234)
    name, (config, _, parameters, _) = calls[3]
    c = config._obj
    assert name == "cuLaunchKernelEx" and (*c.grid, *c.block) == (7, 1, 1, 256, 1, 1) and (c.shared, c.stream) == (1000, 1234)
    assert c.count == 1 and (c.attributes[0].id, c.attributes[0].value) == (6, 1)  # programmatic stream serialization
    assert parameters[0] is not None


@pytest.mark.parametrize("change, reason", [
    ({"bits": 8}, "4-bit"), ({"dtype": torch.float32}, "float16 or bfloat16"), ({"group_size": 16}, "groups of 32"),
    ({"k": 96, "group_size": 96}, "divisible by 64"), ({"k": 192, "group_size": 128}, "divisible"),
    ({"device": "cpu"}, "CUDA device")])
def test_refuses_with_a_reason(change, reason):
    values = {"n": 64, "k": 128, "bits": 4, "group_size": 64, "symmetric": True, "dtype": torch.float16, "device": "cuda"}
    assert reason in CudaW4A16().supports(Problem(**(values | change)))


def test_refuses_without_a_gpu_or_an_old_one(monkeypatch):
    p = Problem(64, 128, 4, 64, True, torch.float16, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in CudaW4A16().supports(p)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0, found 7.5" in CudaW4A16().supports(p)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(nvrtc, "compiler", lambda: None)
    assert "libnvrtc" in CudaW4A16().supports(p)
    monkeypatch.setattr(nvrtc, "compiler", lambda: "nvrtc 13.0")
    assert CudaW4A16().supports(p) is None


def test_zeros_that_do_not_fit_are_refused():
    p = Problem(64, 64, 4, 64, False, torch.float16, "cuda")
    for largest in (63, 64):
        given = torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 1), torch.full((64, 1), largest), None, p
        if largest == 63:
            assert int(CudaW4A16().prepare(*given)["zeros"].max()) == 63
        else:
            with pytest.raises(ValueError, match="below 64, found 64"):
                CudaW4A16().prepare(*given)


def test_the_op_has_a_shape_without_running():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        w, scales = torch.empty(2, 4, 128, 16, dtype=torch.uint8), torch.empty(2, 128, dtype=torch.float16)
        y = torch.ops.foem.cuda_w4a16(torch.empty(5, 256, dtype=torch.float16), w, scales, None, None, None,
                                      torch.empty(1, dtype=torch.int32), 75, 128)
    assert y.shape == (5, 75) and y.dtype == torch.float16


def test_the_structures_match_the_source():
    fields = re.search(r"struct Arguments \{.*?\n(.*?)\};", SOURCE.read_text("utf-8"), re.S)[1]
    names = [n for line in fields.splitlines() for n in re.findall(r"[*\s](\w+)(?=[;,])", line.split("//")[0])]
    assert names == [n for n, _ in Arguments._fields_]
    assert isinstance(plan(1, 128, False, False, DEVICES[90]), Plan)


@pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("n, k, g, zeros, order", [(4096, 4096, 128, 1, 0), (200, 1344, 64, 1, 1), (129, 704, 704, 0, 0),
                                                   (1024, 2048, 32, 1, 0)])
def test_on_a_gpu(dtype, n, k, g, zeros, order):
    kernel = CudaW4A16()
    p = Problem(n, k, 4, g, not zeros, dtype, "cuda", bool(order))
    if reason := kernel.supports(p):
        pytest.skip(reason)
    for exact, m in itertools.product((True, False), range(1, 34)):
        values = data(m, n, k, g, dtype, zeros, order, 1, 0, exact, seed=1)
        if m == 1:
            w = kernel.prepare(*(None if t is None else t.cuda() for t in values[1:5]), p)
        x, bias = values[0].cuda(), values[5].cuda()
        y = kernel.gemm(x, w, p, bias)
        assert torch.equal(kernel.gemm(x, w, p, bias), y)
        wanted, magnitude = expected(*values)
        assert torch.equal(y.cpu(), wanted.to(dtype)) if exact else worst(y.cpu(), wanted, magnitude, k) <= 1
        assert not w["counters"].any()
