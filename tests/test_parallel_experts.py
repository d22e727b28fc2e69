"""Experts over one, two and four ranks: every form of checkpoint gives what float64 gives, by kernels that doctor foretells."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")

from parallel_experts import FORMS, checkpoint, exact, loaded, outcomes  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vllm_layers import rank_of  # noqa: E402

from foem_vllm.doctor import examine  # noqa: E402
from foem_vllm.errors import FoemError  # noqa: E402

HERE = pathlib.Path(__file__).parent
ORDERED = re.compile("act-order|mixed")
ENV = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, list[dict]]:
    """{number of ranks: what each found}; two by two processes, four by one that is told its rank: no layer here communicates."""
    from vllm.distributed import get_tp_group

    folder = tmp_path_factory.mktemp("ranks")
    processes = [subprocess.Popen([sys.executable, str(HERE / "parallel_experts.py"), str(rank), "2", str(folder)], env=ENV,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]  # fmt: skip
    found = {}
    with rank_of(1, 0, tmp_path_factory.mktemp("alone")):
        for world in (1, 4):
            found[world] = []
            for get_tp_group().rank_in_group in range(world):
                found[world].append(outcomes(world))
    for process in processes:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said[-3000:]
    found[2] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_ranks_add_up_to_float64(form, ranks):
    y, terms = exact(checkpoint(form)[2])
    room = 2.0**-22 * terms  # sums in float32; errors add up like a random walk
    assert bool((y.abs() > 10 * room).any())
    for world, found in ranks.items():
        for expert_parallel in (False, True):
            parts = [rank[form, expert_parallel]["y"].double() for rank in found]
            assert bool(((sum(parts) - y).abs() <= room).all()), (world, expert_parallel)
            assert all(part.any() for part in parts)  # every rank did its part


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """{form: its checkpoint}."""
    made = {form: tmp_path_factory.mktemp("form") for form in FORMS}
    for form, folder in made.items():
        config, stored, _ = checkpoint(form)
        save_file(stored, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"quantization_config": config.to_json(), "dtype": "float16"}))
    return made


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("form", FORMS)
def test_doctor_foretells_what_ranks_are_given(form, expert_parallel, ranks, folders):
    """Which products by which kernel in how many bytes, of the rank that has most. How many columns of each group a rank gets of
    an activation order is in the g_idx, which the doctor does not read: there it is right on average."""
    for world, found in ranks.items():
        said = examine(str(folders[form]), world, "cpu", expert_parallel=expert_parallel)
        assert said["ours"]["served"] and [row["kernel"] for row in said["layers"]] == ["cpu_w4a16"] * 2
        for i, row in enumerate(said["layers"]):
            problems, sizes = zip(*(rank[form, expert_parallel]["layouts"][i] for rank in found))
            assert {p.bits for p in problems} == {row["bits"]} and {p.n for p in problems} == {row["n"]}
            if world > 1 and not expert_parallel and "down" in row["name"] and ORDERED.search(form):
                assert abs(row["bytes"] / max(sizes) - 1) < 0.25 and {p.group_size for p in problems} <= {16, row["k"]}
                continue
            most = max(problems, key=lambda p: (p.k, p.groups))
            assert (row["k"], row["group_size"], row["symmetric"], row["bytes"]) == (most.k, most.group_size, most.symmetric,
                                                                                   max(sizes))  # fmt: skip


def test_more_ranks_than_experts_are_refused(tmp_path_factory, folders):
    said = examine(str(folders["sym"]), 8, "cpu", expert_parallel=True)["problems"]
    with rank_of(1, 0, tmp_path_factory.mktemp("alone")), pytest.raises(FoemError) as refused:
        loaded("sym", 8, expert_parallel=True)
    assert str(refused.value) == f"{said[0]['tensor']}: {said[0]['problem']}; {said[0]['remedy']}"
