"""The grouped Triton kernel: numbers on Triton's interpreter, machine code compiled for GPUs that are not here.

As in test_triton_w4a16, this file runs itself twice as a script, `interpret` and `compile`, and the tests judge the reports.
"""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "kernels"))
pytest.importorskip("triton")

from compile_table import loop_of, stored_bytes  # noqa: E402
from foem_kernels.problem import Problem  # noqa: E402
from foem_kernels.triton_moe import experts, grouped_configuration, prepare  # noqa: E402
from foem_kernels.triton_w4a16 import chunk_of  # noqa: E402


class Case(NamedTuple):
    """group: 0 for the whole row. route: "any", "one" (all tokens to the same experts), "few" (most experts are empty).
    rank: expert parallelism, half of the experts are elsewhere and some ids are nobody's."""
    experts: int
    tokens: int
    top_k: int
    hidden: int
    inner: int
    group: int
    dtype: str
    asym: int = 0
    order: int = 0
    activation: str = "silu"
    route: str = "any"
    on_input: int = 0
    rank: int = 0


CASES = [Case(8, 1, 2, 128, 64, 32, "float16"), Case(8, 3, 1, 80, 48, 0, "bfloat16", 1), Case(128, 3, 8, 64, 32, 32, "bfloat16"),
         Case(8, 65, 2, 128, 96, 32, "float16", 1, 1), Case(8, 65, 8, 64, 128, 64, "bfloat16", 1, 0, "silu", "any"),
         Case(8, 65, 1, 128, 128, 128, "float16", 0, 0, "gelu", "one"), Case(64, 65, 2, 64, 64, 64, "float16", 1, 0, "gelu_tanh"),
         Case(32, 65, 3, 64, 64, 32, "bfloat16", 0, 1, "silu", "few", 0, 1), Case(8, 2, 4, 256, 256, 32, "float16", 1, 1, "gelu"),
         Case(8, 1, 1, 640, 64, 64, "bfloat16", 0, 0, "silu", "any", 1), Case(4, 65, 2, 64, 80, 16, "float16", 0, 0, "silu"),
         Case(8, 65, 3, 64, 64, 0, "float16", 1, 1, "gelu_tanh", "few", 1, 1),
         Case(4, 65, 4, 80, 32, 16, "float16", 0, 1, "gelu"), Case(128, 17, 6, 64, 32, 32, "float16", 0, 0, "silu", "any", 0, 1),
         Case(8, 0, 2, 64, 64, 32, "float16"), Case(8, 3, 2, 256, 64, 32, "float16", 0, 0, "silu", "one", 0, 1)]
# capability, tokens, asymmetric, which of the two products, hidden, inner; 128 experts, top-8 (Qwen3-30B-A3B), groups of 128
COMPILED = [(90, 1, 1, "up"), (90, 256, 0, "up"), (90, 256, 1, "down"), (90, 4096, 1, "up"), (90, 4096, 0, "down"),
            (80, 64, 1, "up"), (89, 4096, 1, "up"), (100, 4096, 1, "up"), (100, 16, 0, "down")]


def name(case):
    return "-".join(map(str, case))


def linear(r, e, n, k, group, asym, order):
    """codes [e, n, k], scales and zeros [e, n, groups] (zeros of 1 .. 8 or None), g_idx [e, k] or None."""
    groups = k // (group or k)
    codes = torch.randint(0, 16, (e, n, k), dtype=torch.uint8, generator=r)
    scales = (torch.rand(e, n, groups, generator=r) * 0.1 + 0.01).half().float()
    zeros = torch.randint(1, 9, (e, n, groups), dtype=torch.uint8, generator=r) if asym else None
    g_idx = torch.stack([(torch.arange(k) // (group or k))[torch.randperm(k, generator=r)] for _ in range(e)]) if order else None
    return codes, scales, zeros, g_idx


def expand(t, g_idx, k):
    """[e, n, groups] -> [e, n, k]: every column's own."""
    group = (torch.arange(k) * t.shape[2] // k).expand(t.shape[0], k) if g_idx is None else g_idx
    return torch.stack([t[e][:, group[e]] for e in range(t.shape[0])])


def dequantized(codes, scales, zeros, g_idx):
    """float64 [e, n, k]."""
    k = codes.shape[2]
    zero = 8.0 if zeros is None else expand(zeros.double(), g_idx, k)
    return expand(scales.double(), g_idx, k) * (codes.double() - zero)


def data(case, exact=False, seed=0):
    """x, w13, w2 (each codes, scales, zeros, g_idx), topk_ids, topk_weights, expert_map.

    With `exact` every number up to a pair's own result is exact: the gate is 32 or more, where each activation returns
    its argument; scales and router weights are powers of two; sums are short.
    """
    r = torch.Generator().manual_seed(seed)
    e, t, dtype = case.experts, case.tokens, getattr(torch, case.dtype)
    x = torch.randn(t, case.hidden, generator=r).to(dtype)
    local = e // 2 if case.rank else e
    w13 = linear(r, local, 2 * case.inner, case.hidden, case.group, case.asym, case.order)
    w2 = linear(r, local, case.hidden, case.inner, case.group, case.asym, case.order)
    open_to = {"any": e, "one": case.top_k, "few": case.top_k + 1}[case.route]
    ids = torch.stack([torch.randperm(open_to, generator=r)[:case.top_k] for _ in range(t)]) if t else torch.zeros(0, case.top_k)
    ids = ids.long() if case.asym else ids.int()
    weights = torch.rand(t, case.top_k, generator=r)
    expert_map = None
    if case.rank:
        expert_map = torch.full((e,), -1, dtype=torch.int32)
        expert_map[torch.randperm(e, generator=r)[:local]] = torch.arange(local, dtype=torch.int32)
        ids[0, 0], ids[-1, -1] = -1, e
    if exact:
        codes, scales, zeros, g_idx = w13
        half = case.inner
        scales[:, :half], scales[:, half:] = 1, 0.125  # no result leaves fp16's range
        zero = (torch.full(codes.shape, 8, dtype=torch.uint8) if zeros is None else expand(zeros, g_idx, case.hidden))
        codes[:, :half] = zero[:, :half]
        codes[:, :half, :8] += (2 ** (torch.arange(local) % 3)).to(torch.uint8)[:, None, None]  # x is 4 there: 32, 64, 128
        codes[:, half:, :8] = zero[:, half:, :8]
        x = (torch.rand(x.shape, generator=r) * 3).floor().sub(1)
        x[:, 64:] *= torch.rand(x[:, 64:].shape, generator=r) < 0.05
        x[:, :8] = 4
        x = x.to(dtype)
        w2[1].copy_(2.0 ** -torch.randint(7, 10, w2[1].shape, generator=r).float())
        weights = 2.0 ** torch.randint(0, 2, weights.shape, generator=r).float()
    return x, w13, w2, ids, weights, expert_map


ACTIVATION = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
              "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh")}


def expected(case, x, w13, w2, ids, weights, expert_map, up_config, down_config, round_pairs=False):
    """y [T, hidden] float64 and how far off theory allows each number to be.

    A product: k fp32 additions (2**-24 each, doubled because tensor cores may truncate) and, where the scale goes onto the
    weights, each rounded once (1.01: the second bf16 term of the scale). No activation here is steeper than 1.13; it adds
    a few fp32 roundings of its argument. Rounded to x's dtype: the gated result, each pair's result unless its K is split,
    and the sum. 2**-24: half the smallest fp16, for what underflows.
    """
    u = 2.0 ** (-11 if x.dtype == torch.float16 else -8)
    w13, w2 = dequantized(*w13), dequantized(*w2)
    y, error, size = (torch.zeros(x.shape, dtype=torch.float64) for _ in range(3))

    def product_error(x, w, c):
        return ((w.shape[1] + 16) * 2.0 ** -23 + (1.01 * u if c.scale == "before" else 0)) * (x.abs() @ w.abs().T)

    for (t, j), e in zip(((t, j) for t in range(case.tokens) for j in range(case.top_k)), ids.flatten().tolist()):
        if expert_map is not None:
            e = int(expert_map[e]) if 0 <= e < case.experts else -1
        if e < 0:
            continue
        weight = float(weights[t, j])
        before, after = (weight, 1.0) if case.on_input else (1.0, weight)
        row = x[t].double() * before
        both, both_error = row @ w13[e].T, product_error(row, w13[e], up_config) + 2.0 ** -23 * (row.abs() @ w13[e].abs().T)
        (gate, up), (gate_error, up_error) = both.chunk(2), both_error.chunk(2)
        a = ACTIVATION[case.activation](gate)
        a_error = 1.13 * gate_error + 2.0 ** -21 * gate.abs()
        h = a * up
        h_error = up.abs() * a_error + a.abs() * up_error + a_error * up_error
        h_error += u * (h.abs() + h_error) + 2.0 ** -24
        out = h @ w2[e].T
        out_error = product_error(h.abs() + h_error, w2[e], down_config) + h_error @ w2[e].abs().T
        if down_config.splits == 1:
            out_error += u * (out.abs() + out_error) + 2.0 ** -24
            out = out.to(x.dtype).double() if round_pairs else out
        y[t] += after * out
        error[t] += abs(after) * out_error
        size[t] += abs(after) * (out.abs() + out_error)
    error += (case.top_k + 2) * 2.0 ** -24 * size
    return y, error + u * (y.abs() + error) + 2.0 ** -24


def prepared(case, w13, w2):
    dtype = getattr(torch, case.dtype)
    return [prepare(*w, Problem(n, k, 4, case.group or k, w[2] is None, dtype, "cpu", w[3] is not None), gated=gated)
            for w, n, k, gated in ((w13, 2 * case.inner, case.hidden, True), (w2, case.hidden, case.inner, False))]


def gathered(codes, scales, zeros, g_idx):
    """What `prepare` takes of the same linears with their groups in another order, and one of no weight among them."""
    (e, n, k), groups = codes.shape, scales.shape[2]
    r, size = torch.Generator().manual_seed(7), k // groups
    group = torch.stack([torch.randperm(groups + 1, generator=r) for _ in range(e)])  # `groups` is the one that is added
    columns = (group[..., None] * size + torch.arange(size)).flatten(1)
    codes = torch.cat([codes, torch.full((e, n, size), 8, dtype=torch.uint8)], 2).gather(2, columns[:, None].expand(e, n, -1))
    scales = torch.cat([scales, scales[..., :1]], 2).gather(2, group[:, None].expand(e, n, -1))
    p = Problem(n, k + size, 4, size, True, torch.float16, "cpu", True)
    return dict(codes=codes, scales=scales, zeros=zeros, g_idx=g_idx, p=p, order=columns % k)


def configurations(case, w13, w2):
    local = w13["w"].shape[0]
    return [grouped_configuration(case.tokens * case.top_k, local, case.experts, w["w"].shape[1] * 64, k, case.group or k)
            for w, k in ((w13, case.hidden), (w2, case.inner))]


def sorted_wrongly(ids, expert_map, local, block_m):
    """Whether `sort_pairs` leaves the contract: each local pair once, in order, in blocks of its expert, the rest sentinels."""
    from foem_kernels.triton_moe import sort_pairs
    order, block_expert = sort_pairs(ids, expert_map, local, block_m)
    flat, wanted, owners = ids.flatten().tolist(), [], []
    place = flat if expert_map is None else [int(expert_map[e]) if 0 <= e < len(expert_map) else -1 for e in flat]
    for e in range(local):
        pairs = [i for i, p in enumerate(place) if p == e]
        pairs += [len(flat)] * (-len(pairs) % block_m)
        wanted += pairs
        owners += [e] * (len(pairs) // block_m)
    rest = len(block_expert) - len(owners)
    return rest < 0 or order[:len(wanted)].tolist() != wanted or block_expert.tolist() != owners + [local] * rest


def interpret():
    report = {}
    for case in CASES:
        for exact in (True, False):
            x, w13, w2, ids, weights, expert_map = values = data(case, exact)
            a, b = prepared(case, w13, w2)
            y = experts(x, a, b, ids, weights, case.activation, bool(case.on_input), expert_map)
            if not case.tokens:
                report[name(case)] = {"wrong": y.numel(), "error": 0.0, "configs": []}
                continue
            configs = configurations(case, a, b)
            wanted, allowed = expected(case, *values, *configs, round_pairs=exact)
            if exact:
                report[name(case)] = {"wrong": int((~y.isfinite() | (y != wanted.to(y.dtype))).sum()),
                                      "configs": [c._asdict() for c in configs], "largest": float(wanted.abs().max())}
            else:
                report[name(case)]["error"] = float(((y.double() - wanted).abs() / allowed).max())
    report["sorted wrongly"] = []
    r = torch.Generator().manual_seed(5)
    for e, t, k, block_m in ((8, 1, 1, 16), (16, 300, 8, 16), (5, 700, 2, 128), (128, 9, 8, 16), (1, 33, 1, 32)):
        ids = torch.randint(0, e, (t, k), generator=r)
        for expert_map in (None, torch.arange(e).roll(3).where(torch.arange(e) % 3 > 0, -1)):
            if sorted_wrongly(ids, expert_map, e, block_m):
                report["sorted wrongly"].append([e, t, k, expert_map is None])
    case = CASES[3]
    x, w13, w2, ids, weights, _ = data(case)
    a, b = prepared(case, w13, w2)
    clean = experts(x, a, b, ids, weights)
    bad = x.clone()
    bad[7, 5], bad[40, 70] = float("inf"), float("nan")
    y, others = experts(bad, a, b, ids, weights), [t for t in range(case.tokens) if t not in (7, 40)]
    wide = torch.empty(case.tokens, 2 * case.hidden, dtype=x.dtype)[:, ::2].copy_(x)
    report["nan_row"] = {"rows": not bool(y[[7, 40]].isfinite().any()), "others": torch.equal(y[others], clean[others]),
                         "strided x": torch.equal(experts(wide, a, b, ids.T.contiguous().T, weights), clean)}
    args = (x[:3], a["w"], a["scales"], a["zeros"], a["perm"], b["w"], b["scales"], b["zeros"], b["perm"], ids[:3], weights[:3],
            "silu", False, None)
    report["opcheck"] = torch.library.opcheck(torch.ops.foem.triton_moe.default, args,
                                              test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x, ids, weights: experts(x + 1, a, b, ids, weights) * 2, fullgraph=True,
                             backend="aot_eager", dynamic=True)
    report["torch.compile"] = all(torch.equal(compiled(x[:m], ids[:m], weights[:m]),
                                              experts(x[:m] + 1, a, b, ids[:m], weights[:m]) * 2) for m in (2, 3))
    finer = prepared(case, (w13[0], w13[1] / 3, *w13[2:]), w2)[0]
    report["scale_dtypes"] = [str(a["scales"].dtype), str(finer["scales"].dtype)]
    sorted_order = torch.arange(case.hidden).div(32, rounding_mode="floor").expand(case.experts, case.hidden)
    report["order dropped"] = prepared(case, (*w13[:3], sorted_order), w2)[0]["perm"] is None
    case = CASES[10]
    x, w13, w2, ids, weights, _ = data(case, exact=True)
    ordered = [prepare(**gathered(*w), gated=gated) for w, gated in ((w13, True), (w2, False))]
    report["gathered"] = torch.equal(experts(x, *ordered, ids, weights), experts(x, *prepared(case, w13, w2), ids, weights))
    return report


def compile_all():
    import triton
    from foem_kernels import triton_moe_device as device
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def build(function, capability, constants, pointers, aligned, warps=4, stages=3):
        names = function.arg_names
        signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in names}
        kernel = triton.compile(ASTSource(function, signature, {(names.index(a),): v for a, v in constants.items()},
                                          {(names.index(a),): [["tt.divisibility", 16]] for a in aligned if a in names}),
                                target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
            sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
        return kernel, {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3]), "shared": kernel.metadata.shared,
                        "serialized": max(0, sass.count("WARPGROUP.ARRIVE") - kernel.asm["ptx"].count("wgmma.fence"))}

    report, hidden, inner, g = {}, 2048, 768, 128
    for case in COMPILED:
        capability, tokens, asym, which = case
        n, k = (2 * inner, hidden) if which == "up" else (hidden, inner)
        c = grouped_configuration(8 * tokens, 128, 128, n, k, g, (capability // 10, capability % 10))
        constants = dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, CHUNK=chunk_of(k, g), GROUP=g, SCALE=c.scale,
                         HAS_ZEROS=bool(asym), WEIGHTED=capability == 100, PAIRS_PER_ROW=8 if which == "up" else 1,
                         ACTIVATION="silu" if which == "up" else "", SPLIT=c.splits > 1, PLAIN=False)
        pointers = dict(x="*bf16", w="*u8", scales="*fp16", zeros="*u8", order="*i32", block_expert="*i32", pair_weights="*fp32",
                        y="*fp32" if c.splits > 1 else "*bf16")
        for absent in ([] if asym else ["zeros"]) + ([] if constants["WEIGHTED"] else ["pair_weights"]):
            constants[absent] = None
            del pointers[absent]
        kernel, found = build(device.grouped, capability, constants, pointers, [*pointers, "n_size", "n_padded", "k_size"],
                              c.num_warps, c.num_stages)
        loop = loop_of(kernel.asm["ptx"])
        products = [line for line in loop if "wgmma.mma_async" in line]
        report[name(case)] = found | {
            "config": c._asdict(), "wgmma": len(products),
            "wgmma_from_registers": sum(bool(re.search(r"\},\s*\{", line)) for line in products),
            "stored_per_round": stored_bytes(loop, 32 * c.num_warps), "tile_bytes": c.block_n * c.block_k * 2,
            "exchanged": sum("shfl.sync" in line for line in loop)}
    routing = dict(topk_ids="*i32", expert_map="*i32")
    small = [(device.sort_pairs, dict(BINS=128, BLOCK_M=64, CHUNK=1024, HAS_MAP=True),
              routing | dict(order="*i32", block_expert="*i32")),
             (device.gather_columns, dict(PAIRS_PER_ROW=8, BLOCK=1024, HAS_MAP=True),
              routing | dict(x="*bf16", perm="*i32", y="*bf16")),
             (device.activate, dict(SPLITS=4, WEIGHTED=True, ACTIVATION="gelu", BLOCK=512, PLAIN=False),
              dict(partial="*fp32", pair_weights="*fp32", y="*bf16")),
             (device.combine, dict(TOP_K=8, SPLITS=1, WEIGHTED=True, HAS_MAP=True, BLOCK=512, PLAIN=False),
              routing | dict(partial="*bf16", pair_weights="*fp32", y="*bf16"))]
    for function, constants, pointers in small:
        aligned = [*pointers, "n_size", "n_padded", "k_size"]
        report[f"{function.__name__}-80"] = build(function, 80, constants, pointers, aligned)[1]
        if "HAS_MAP" in constants:
            constants = constants | {"HAS_MAP": False, "expert_map": None}
        report[f"{function.__name__}-90"] = build(function, 90, constants, pointers, aligned)[1]
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
    assert found["wrong"] == 0, "where nothing is rounded before a pair's result, the bits must be right"
    assert found["error"] <= 1


def test_the_cases_reach_every_form(reports):
    configs = [c for case in CASES for c in reports["interpret"][name(case)]["configs"]]
    for field, values in (("block_m", {16, 32, 64, 128}), ("block_n", {128, 256}), ("scale", {"after", "before", "end"})):
        assert {c[field] for c in configs} == values
    for place in (0, 1):
        assert {c["splits"] > 1 for c in configs[place::2]} == {True, False}
    assert all(reports["interpret"][name(case)].get("largest", 1) > 0 for case in CASES)


def test_columns_are_gathered_from_fewer_inputs(reports):
    """As a rank has to that gets some columns of every group: groups are filled up with columns of no weight."""
    assert reports["interpret"]["gathered"]


def test_sorting(reports):
    assert reports["interpret"]["sorted wrongly"] == []


def test_bad_rows_stay_alone_and_strides_do_not_matter(reports):
    assert reports["interpret"]["nan_row"] == {"rows": True, "others": True, "strided x": True}


def test_op_is_safe_to_compile(reports):
    assert set(reports["interpret"]["opcheck"].values()) == {"SUCCESS"}
    assert reports["interpret"]["torch.compile"]


def test_layout_of_scales_and_order(reports):
    assert reports["interpret"]["scale_dtypes"] == ["torch.float16", "torch.float32"]
    assert reports["interpret"]["order dropped"]


@pytest.mark.parametrize("case", COMPILED, ids=name)
def test_compiled(reports, case):
    found = reports["compile"][name(case)]
    assert found["spilled"] == 0
    assert found["shared"] <= (227 if case[0] >= 90 else 99) * 1024
    if case[0] == 90:
        assert found["wgmma"] == found["wgmma_from_registers"] > 0
        assert found["serialized"] == 0, "each wgmma waits for the one before"
        assert found["stored_per_round"] <= 3 * 4 * found["config"]["block_n"] < found["tile_bytes"]
        assert found["exchanged"] == 0, "weights move between lanes"


def test_the_small_kernels_compile(reports):
    small = {key: found for key, found in reports["compile"].items() if "config" not in found}
    assert len(small) == 8 and not any(found["spilled"] for found in small.values())


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
