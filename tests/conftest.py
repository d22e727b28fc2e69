"""Models that tests share."""
from __future__ import annotations

import pathlib

import pytest
import torch
from serving import answers, client, dense, folders, one_by_one, prompts, server  # noqa: F401  (fixtures of several modules)
from tiny_models import TINYLM


@pytest.fixture(scope="session")
def tinylm() -> pathlib.Path:
    """The trained model of the repository."""
    return TINYLM


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> pathlib.Path:
    """Two random layers, saved: where only names, shapes and files matter."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained")
    config = Qwen3Config(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=64, vocab_size=256, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def every_cpu(monkeypatch) -> None:
    """What stock vLLM serves is not to depend on the CPU that the tests run on; whether it does is a test of its own."""
    from foem_vllm import stock
    monkeypatch.setattr(stock, "multiplies", lambda: True)
