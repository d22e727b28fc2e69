"""What is decided before any weight is read."""

import pytest
import torch
from tiny_models import write_model

from foem_vllm import models, plan
from foem_vllm.spec import QuantSpec
from foem_vllm.stream import Weights


@pytest.mark.parametrize("exclude, warned", [
    ([], []), (["self_attn"], []), (["mlp.down"], []), (["[qkv]_proj"], []), (["layers.1."], []),
    (["q_proj"], ["q_proj as it is, but not k_proj and v_proj"]),
    (["up_porj", "mlp$", "norm$"], ["--exclude mlp$ finds nothing in this model", "--exclude up_porj finds nothing"]),
    (["0.mlp.up_proj", "1.*v_proj"], ["up_proj as it is, but not gate_proj", "v_proj as it is, but not q_proj and k_proj"]),
])  # fmt: skip
def test_linears_that_vllm_fuses_with_excluded_ones_are_named(exclude, warned, tmp_path, caplog):
    """Stock vLLM: "Detected some but not all shards of ...qkv_proj are quantized"; the plugin serves them."""
    folder = write_model(tmp_path / "model", "llama")
    empty, weights = models.build_empty(models.load_config(folder), torch.float32), Weights(folder)
    plan.make(*models.find_blocks(empty), QuantSpec(4, 32), exclude, weights)
    said = sorted(record.getMessage() for record in caplog.records)
    assert len(said) == len(warned) and all(words in message for words, message in zip(warned, said))
