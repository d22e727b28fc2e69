"""Machine code of the Triton kernel for GPUs that are not here: a sample compiled now, and what the committed table claims."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels"))
pytest.importorskip("triton")

from compile_table import RESULT, Form, forms, stored_bytes  # noqa: E402
from foem_kernels.cost import registers, shared_bytes  # noqa: E402
from foem_kernels.triton_w4a16 import configuration  # noqa: E402

# capability, m, group size, dtype, asymmetric, bits, walking, descriptor: the decoding and the prefill form, each width, groups
# that tiles divide, what only the tuner picks.
SAMPLE = [(90, 1, 128, "bfloat16", True, 4), (90, 4096, 128, "bfloat16", True, 4), (90, 64, 256, "float16", False, 4),
          (90, 256, 4096, "bfloat16", True, 4), (90, 256, 128, "bfloat16", True, 8), (90, 1, 128, "float16", True, 8),
          (90, 64, 128, "bfloat16", False, 2), (80, 1, 128, "bfloat16", True, 4), (80, 256, 128, "float16", False, 4),
          (100, 64, 128, "bfloat16", True, 4), (90, 4096, 128, "bfloat16", True, 4, True),
          (90, 4096, 128, "float16", False, 4, True, True), (90, 4096, 4096, "bfloat16", True, 4, True, True),
          (90, 4096, 128, "bfloat16", True, 8, False, True), (100, 4096, 128, "bfloat16", True, 4, True, True)]
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that one thread block may have


def form(capability, m, g, dtype, asymmetric, bits, walking=False, tma=False):
    c = configuration(m, 6144, 4096, g, divmod(capability, 10), bits=bits)._replace(programs=int(walking), tma=tma)
    return Form(capability, bits, dtype, asymmetric, g, c.splits > 1, 4096, c)


def check(row, capability, c, bits, dtype):
    """What every compiled form owes; `row` as compile_table writes it."""
    assert row["spilled"] == 0
    assert row["shared"] <= SHARED[capability] * 1024
    if capability != 90:
        assert row["tcgen05" if capability == 100 else "mma"] > 0
        return
    assert row["wgmma"] == row["wgmma_from_registers"] > 0
    assert row["serialized"] == 0, "each wgmma waits for the one before"
    # Per round at most the scales' two terms and the zeros change layout through shared memory, never the weights. The loop of
    # a walk also holds the end of a tile, where y does.
    assert row["stored_per_round"] <= 3 * 4 * c.block_n + 2 * c.block_m * c.block_n * c.programs
    assert 3 * 4 * c.block_n < row["tile_bytes"]
    assert row["exchanged"] == 0, "weights move between lanes"
    assert row["registers"] <= registers(c, bits), "the cost model counts on more thread blocks than fit"
    assert row["shared"] <= shared_bytes(c, bits) + 3 * 1024, "the cost model counts on more thread blocks than fit"


@pytest.fixture(scope="module")
def sample():
    """A process of its own: TRITON_INTERPRET, which other tests set, must not be there when triton is imported."""
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], env=environment, text=True, capture_output=True,
                          timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def table():
    return json.loads(RESULT.read_text("utf-8"))["rows"]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_compiled_now(sample, case):
    f = form(*case)
    check(sample[str(case)], f.capability, f.c, f.bits, f.dtype)
    if f.capability == 90 and not f.asymmetric:
        assert sample[str(case)]["integer_conversions"] == 0


def test_the_table_has_every_form(table):
    assert set(table) == {f.name() for f in forms()}


def test_the_table_keeps_its_claims(table):
    for f in forms():
        check(table[f.name()], f.capability, f.c, f.bits, f.dtype)


def test_the_table_says_what_compiles_now(sample, table):
    """Where the compiler is the one that the table was made with."""
    import triton
    if json.loads(RESULT.read_text("utf-8"))["triton"] != triton.__version__:
        pytest.skip("another Triton than the table's")
    same = [(form(*case).name(), str(case)) for case in SAMPLE if form(*case).name() in table]
    assert same and all(table[name] == sample[case] for name, case in same)


def test_stores_to_shared_memory_are_seen():
    lines = ["st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};", "@%p1 st.shared.b16 [%r1], %rs1;",
             "st.shared::cta.v2.b32 [%r1], {%r2, %r3};", "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3, %r4, %r5};",
             "cp.async.cg.shared.global [%r1], [%rd1], 0x10;"]
    assert [stored_bytes([line], 1) for line in lines] == [16, 2, 8, 16, 0]


if __name__ == "__main__":
    from compile_table import compiled
    print(json.dumps({str(case): compiled(form(*case)) for case in SAMPLE}))
