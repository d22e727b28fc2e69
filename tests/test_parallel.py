"""Tensor parallelism for real, two processes on the CPU: every form of checkpoint gives what one process gives.

Pipeline parallelism is not here: vLLM 0.32's CPU engine loses requests between stages (KeyError in the scheduler's
update_from_output), with unquantized models too. Layers know nothing of stages; a stage loads its layers as any other.
"""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")

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


MIXED = {r".*layers\.1\.": {"desc_act": True, "group_size": 32}, r".*layers\.2\.": {"bits": 3, "group_size": 64},
         r".*layers\.3\.": {"bits": 2, "group_size": 16, "desc_act": True}, r".*layers\.4\.": {"bits": 8, "group_size": -1},
         r".*layers\.5\..*(q|gate)_proj": {"bits": 8}, r"-:.*layers\.5\..*v_proj": {}}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """A checkpoint whose layers are all the forms, and one as tools of 2023 wrote it."""
    root = tmp_path_factory.mktemp("parallel")
    sizes = dict(hidden_size=192, num_hidden_layers=6, head_dim=64, num_attention_heads=4, num_key_value_heads=1,
                 intermediate_size=216, tie_word_embeddings=False)
    models = write_model(root / "qwen3", "qwen3", **sizes), write_model(root / "llama", "llama", head_dim=32)
    mixed = write_rtn_checkpoint(models[0], root / "mixed", QuantSpec(4, 128, False), "gptq_v2", lm_head=True, dynamic=MIXED)
    old = write_rtn_checkpoint(models[1], root / "old", QuantSpec(4, 32, False, "full"))
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    (old / "quantize_config.json").write_text(json.dumps({"wbits": 4, "groupsize": 32}))  # neither desc_act nor sym
    (old / "model.safetensors").rename(old / "gptq_model-4bit-32g.safetensors")
    return mixed, old


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory) -> list[dict]:
    """The first by one process and by two, the second by one."""
    mixed, old = map(str, folders)
    jobs = [{"model": model, "quantization": "foem", "dtype": "float32", "max_model_len": 128, **parallel}
            for model, parallel in ((mixed, {}), (old, {}), (mixed, {"tensor_parallel_size": 2}))]
    asked = {"prompts": ["The weights of a", "In the beginning"], "max_tokens": 16,
             "texts": ["A tensor is an array of numbers that is indexed by several integers, and so on."]}
    out = tmp_path_factory.mktemp("answers") / "out"
    done = subprocess.run([sys.executable, str(HERE / "offline_llm.py"), json.dumps(jobs), json.dumps(asked), str(out)],
                          env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


def same_as_transformers(folder: pathlib.Path, answer: dict) -> bool:
    """In float32, where only the order of sums differs: log-probabilities of a text equal to three digits behind the point."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    for ids, logprobs in zip(answer["texts"], answer["logprobs"]):
        with torch.no_grad():
            exact = model(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert float(exact.std()) > 0.5  # or equality would mean little
        if float((torch.tensor(logprobs) - exact).abs().max()) > 1e-3:
            return False
    return True


def test_engines_of_one_and_two_processes_agree_with_transformers(folders, answers):
    alone, _, parallel = answers
    assert same_as_transformers(folders[0], alone) and same_as_transformers(folders[0], parallel)
    assert parallel["greedy"] == alone["greedy"]


def test_checkpoint_of_an_old_tool(folders, answers):
    """quantize_config.json alone, old names of keys, an activation order and zero points that only the tensors tell of."""
    assert same_as_transformers(folders[1], answers[1])
