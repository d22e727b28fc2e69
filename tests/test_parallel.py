"""Tensor parallelism for real, two processes on the CPU: every form of checkpoint gives what one process gives.

Pipeline parallelism is not here but in eval/parallel.py: layers know nothing of stages, a stage loads its layers as any other.
"""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "eval"))

import parallel  # noqa: E402
import parallel_forms  # noqa: E402
from checkpoints import write_rtn_checkpoint  # noqa: E402
from parallel_layers import FORMS, SHAPES, checkpoint, inputs, outputs  # noqa: E402
from tiny_models import write_model  # noqa: E402
from vllm_layers import rank_of  # noqa: E402

from foem_vllm.format import QuantSpec  # noqa: E402

HERE = pathlib.Path(__file__).parent
ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
       "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # vLLM binds a rank to a NUMA node each, and there may be one only


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with rank_of(1, 0, tmp_path_factory.mktemp("alone")):
        yield {form: outputs(form, 0, 1) for form in FORMS}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [subprocess.Popen([sys.executable, str(HERE / "parallel_layers.py"), str(rank), "2", str(folder)], env=ENV,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    said = [process.communicate(timeout=300)[0] for process in ranks]
    assert not any(process.returncode for process in ranks), said[0][-3000:] + said[1][-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joined(form: str, module: str, ranks: list[dict]) -> torch.Tensor:
    """The output of a module over all ranks."""
    parts = [rank[form][module] for rank in ranks]
    if module.endswith(("o_proj", "down_proj")):
        assert all(torch.equal(part, parts[0]) for part in parts)  # summed over the ranks already
        return parts[0]
    if module.endswith(("k_proj", "v_proj")) and len(parts) > 1:
        assert torch.equal(*parts)  # one head of keys, which every rank holds
        return parts[0]
    return torch.cat(parts, 1)[:, : SHAPES[module][0]]


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_and_one_agree_with_float64(form, alone, two_ranks):
    for module, (weight, terms) in checkpoint(form)[2].items():
        x = inputs(weight.shape[1]).double()
        exact, room = x @ weight.T, weight.shape[1] * 2.0**-20 * (x.abs() @ terms.T)  # sums in float32
        for ranks in ([alone], two_ranks):
            assert bool(((joined(form, module, ranks).double() - exact).abs() <= room).all()), (module, len(ranks))


FORMS_AT_ONCE = "odd-v2"  # one head of keys, groups and words that ranks cut, a quantized head, zero points of 0


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> pathlib.Path:
    """A checkpoint whose layers are all the forms, and `old`, one as tools of 2023 wrote it."""
    root = tmp_path_factory.mktemp("parallel")
    parallel_forms.write(root / FORMS_AT_ONCE, parallel_forms.MODELS[FORMS_AT_ONCE])
    model = write_model(root / "llama", "llama", head_dim=32)
    old = write_rtn_checkpoint(model, root / "old", QuantSpec(4, 32, False, "full"))
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    (old / "quantize_config.json").write_text(json.dumps({"wbits": 4, "groupsize": 32}))  # neither desc_act nor sym
    (old / "model.safetensors").rename(old / "gptq_model-4bit-32g.safetensors")
    save_file({"texts": parallel.token_ids()}, root / "tokens.safetensors")
    return root


@pytest.fixture(scope="module")
def answers(work) -> list[dict]:
    """The first by one process and by two, the second by one."""
    alone, old = parallel.serve([FORMS_AT_ONCE, "old"], work, "float32", 1)
    two = parallel.serve([FORMS_AT_ONCE], work, "float32", 2)[0]
    for answer in (alone, two, old):
        assert "refused" not in answer, answer["refused"]
    return [alone, two, old]


def test_engines_of_one_and_two_processes_compute_every_form_as_transformers(work, answers):
    """Layer by layer on the same input, log-probabilities, greedy tokens; bounds of rounding: eval/parallel.py."""
    alone, two, _ = answers
    row = parallel.compare(parallel_forms.MODELS[FORMS_AT_ONCE], work / FORMS_AT_ONCE, {"float32": {1: alone, 2: two}},
                           parallel.token_ids())
    assert row["equal"], {ranks: {form: (far, parallel.room("float32", row["cancellation"][form])) for form, far in found.items()}
                          for ranks, found in row["float32"]["layers"].items()}


def test_checkpoint_of_an_old_tool(work, answers):
    """quantize_config.json alone, old names of keys, an activation order and zero points that only the tensors tell of."""
    ids = parallel.token_ids()
    exact = parallel.logprobs(parallel.load(work / "old", torch.float32), ids)
    assert float(exact.std()) > 0.5  # or equality would mean little
    assert float((torch.tensor(answers[2]["logprobs"]) - exact).abs().max()) < 1e-4
