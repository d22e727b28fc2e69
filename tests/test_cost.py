"""The cost model, the launches it chooses, and the tuner where there is no GPU. Expectations are published or counted by hand."""
import itertools
import json
import os
import subprocess
import sys

import pytest
from foem_kernels import cost, tuning
from foem_kernels.cost import H200, SHAPES, Configuration
from foem_kernels.triton_w4a16 import bucket, candidates, configuration

BUCKETS = sorted({bucket(m) for m in range(1, 4097)})


@pytest.mark.parametrize("m, us", [(1, 7.8), (16, 7.9), (32, 7.9), (64, 10.9), (128, 21.7), (256, 43.5), (1024, 174),
                                   (4096, 696)])
def test_floor_of_the_square(m, us):
    """8192 x 8192, one group per row, 4.3 TB/s and 790 TFLOP/s: 33.6 MB of codes, or 2 M N K operations."""
    assert cost.floor(m, 8192, 8192, 8192) == pytest.approx(us, rel=0.02)


def test_bytes_of_weights():
    assert cost.weight_bytes(256, 1024, 128) == 256 * (512 + 8 * 2)
    assert cost.weight_bytes(256, 1024, 128, 2, symmetric=False) == 256 * (256 + 8 * 3)
    assert cost.weight_bytes(256, 1000, 128, 3) == 256 * (500 + 8 * 2), "3 bits take four; the last group is short"
    assert cost.weight_bytes(256, 1024, 1024, 8) == 256 * (1024 + 2)


def test_a_plan_by_hand():
    """32 x 2 thread blocks of 4 warps; three weight tiles of 128 x 128 / 2 bytes wait in each."""
    p = cost.plan(Configuration(16, 128, 128, 2, 4, 4, "after"), 16, 4096, 4096, 128)
    assert p.blocks == 64 and p.per_sm == 4 and p.in_flight == 3 * 8192
    assert p.waves == pytest.approx(64 / (132 * 4))
    # 16 rounds in each thread block, three of them in 0.8 us; then the sums of two parts, written and read, and y
    reduction = 1 + (2 * 4 * 16 * 4096 + 2 * 16 * 4096) / 8.6e6
    assert p.predicted == pytest.approx(16 / 3 * 0.8 + 0.8 + reduction)


def test_a_walk_by_hand():
    """512 tiles of 128 x 256: four on the busiest of 132 multiprocessors, 16 rounds each, 0.8 us for the first loads.

    A block to each tile waits for its first loads four times. One that walks waits once, but each of its eight warps, two to a
    scheduler, has 30 instructions more a round.
    """
    c = Configuration(128, 256, 64, 1, 8, 4, "before")
    each, walk = (cost.plan(c._replace(programs=programs), 4096, 4096, 1024, 128) for programs in (0, 132))
    products = 4 * 16 * 2 * 128 * 256 * 64 / (790e6 / 132)
    assert (each.blocks, walk.blocks) == (512, 132) and each.per_sm == walk.per_sm == 1
    assert each.waves == walk.waves == pytest.approx(512 / 132)
    assert each.predicted == pytest.approx(products + 4 * 0.8)
    assert walk.predicted == pytest.approx(products + 0.8 + 4 * 16 * 2 * 30 / 1750)
    few = cost.plan(c._replace(programs=100), 4096, 4096, 1024, 128)
    assert few.predicted > 1.4 * walk.predicted, "100 blocks have six tiles each"


def test_blocks_walk_exactly_where_it_is_predicted_to_win():
    chosen = set()
    for (name, (n, k)), m, bits in itertools.product(SHAPES.items(), BUCKETS, (2, 4, 8)):
        c = configuration(m, n, k, 128, bits=bits)
        best = {walks: min((cost.plan(other, m, n, k, 128, bits).predicted for other in candidates(m, n, k, 128, bits=bits)
                            if bool(other.programs) == walks), default=float("inf")) for walks in (False, True)}
        assert bool(c.programs) == (best[True] < best[False]), (name, m, bits)
        if c.programs:
            chosen.add(name)
    assert chosen == {"Qwen3-0.6B qkv", "Qwen3-0.6B gate_up"}, "K = 1024: the longer rounds cost more than starts elsewhere"


def test_the_printed_table_shows_the_walks(capsys):
    assert cost.main() == 0
    lines = {(line[:20].strip(), line[20:26].strip()): line for line in capsys.readouterr().out.splitlines()}
    assert "*" in lines["Qwen3-0.6B qkv", "4096"]
    assert " 724.04    753.55 " in lines["8192", "4096"] and "*" not in lines["8192", "4096"]


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_no_plan_beats_the_floor(bits):
    for (n, k), m in itertools.product(SHAPES.values(), (1, 33, 128, 1000, 4096)):
        for c in candidates(m, n, k, 128, bits=bits):
            assert cost.plan(c, m, n, k, 128, bits).predicted >= cost.floor(m, n, k, 128, bits)


def grid(c, n):
    """Launches around `c` that the kernel can make, named here independently of `candidates`."""
    for block_n, splits in itertools.product((64, 128, 256), range(1, 17)):
        if n % block_n == 0 and (block_n < 256 or c.block_m >= 64):
            yield c._replace(block_n=block_n, splits=splits, num_warps=4 if c.block_m <= 32 or block_n == 64 else 8)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_the_machine_is_filled_where_it_can_be(name, bits):
    """No launch with more multiprocessors at work would be faster, over every M up to 4096."""
    n, k = SHAPES[name]
    for m in BUCKETS:
        chosen = configuration(m, n, k, 128, bits=bits)
        p = cost.plan(chosen, m, n, k, 128, bits)
        if p.blocks >= H200.sms:
            continue
        for c in grid(chosen, n):
            tiles = k // c.block_k
            if tiles // c.splits < 4 or -(-tiles // -(-tiles // c.splits)) != c.splits:
                continue  # too short for the load pipeline, or with an empty part
            other = cost.plan(c, m, n, k, 128, bits)
            assert other.blocks <= p.blocks or other.predicted >= p.predicted, (m, chosen, c)


@pytest.mark.parametrize("name", ["Qwen3-8B qkv", "Qwen3-8B o", "Qwen3-8B gate_up", "Qwen3-8B down", "8192"])
def test_decoding_keeps_enough_bytes_in_flight(name):
    """Little's law: bandwidth times latency, 26 kB on each multiprocessor, and every multiprocessor at work."""
    n, k = SHAPES[name]
    p = cost.plan(configuration(1, n, k, 128), 1, n, k, 128)
    assert p.blocks >= H200.sms and p.in_flight >= H200.memory / H200.sms * H200.latency


def test_choices_do_not_depend_on_more_than_the_bucket():
    assert BUCKETS == [16, 32, 64, *range(128, 1025, 128), 2048, 3072, 4096]
    for m in (1, 15, 17, 100, 1000, 3000, 4096, 100_000):
        assert bucket(m) >= min(m, 8192) and configuration(m, 4096, 4096, 128) == configuration(bucket(m), 4096, 4096, 128)


def test_shared_memory_fits():
    for (n, k), m, bits in itertools.product(SHAPES.values(), BUCKETS, (2, 4, 8)):
        assert all(cost.shared_bytes(c, bits) <= H200.shared - 1024 for c in candidates(m, n, k, 128, bits=bits))


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "foem_kernels", *arguments], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_tune_without_a_gpu_says_what_it_needs():
    done = run("tune", "--shapes", "Qwen3-8B o", "--m", "1")
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "NVIDIA GPU" in done.stderr


def test_dry_run_lists_candidates(capsys):
    assert tuning.main(["--shapes", "Qwen3-8B o", "256x512", "--m", "1", "3", "70", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
        "4096x4096 group 128 M 16", "4096x4096 group 128 M 128", "256x512 group 128 M 16", "256x512 group 128 M 128"]
    assert sum("Configuration(" in line for line in lines) >= 8
    assert tuning.main(["--shapes", "8192x8192", "--m", "4096", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "programs=132, tma=False" in out and "programs=132, tma=True" in out and "programs=0, tma=True" in out
    with pytest.raises(SystemExit):
        tuning.main(["--shapes", "no such layer", "--dry-run"])


def test_tuned_rows_come_back(tmp_path):
    c = Configuration(16, 128, 128, 2, 4, 4, "after")
    row = {"m": 16, "n": 256, "k": 512, "group_size": 128, "bits": 4, "us": 2.0, "configuration": c._asdict()}
    tuning.write([row, row | {"m": 32}], "NVIDIA Test 1", tmp_path)
    path = tuning.write([row | {"us": 1.0}], "NVIDIA Test 1", tmp_path)
    assert path.name == "nvidia_test_1.json"
    assert [(r["m"], r["us"]) for r in json.loads(path.read_text())["rows"]] == [(16, 1.0), (32, 2.0)]
    assert tuning.table("NVIDIA Test 1", tmp_path) == {(16, 256, 512, 128, 4): c, (32, 256, 512, 128, 4): c}
    assert tuning.table("NVIDIA Test 2", tmp_path) == {}
