"""Every form of linear that tensor parallelism cuts in its own way, one a decoder layer: a model of all of them at once.

Groups of 32, of 128 and of whole rows; act-order is a g_idx that mixes the groups, however the quantizer came to it. Group -1 has
no order. In the odd model a rank's columns end inside groups and inside words, and both ranks hold the only head of keys.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import NamedTuple

from checkpoints import write_rtn_checkpoint
from tiny_models import write_model

from foem_vllm.format import QuantSpec

BASE = QuantSpec(4, 128)


class Model(NamedTuple):
    """A model whose i-th decoder layer has the i-th of `forms`. head: rule of lm_head, None: stays as it is. options: of vLLM."""

    arch: str
    sizes: dict
    checkpoint_format: str
    head: dict | None
    forms: dict[str, dict]
    options: dict = {}


def uniform_forms() -> dict[str, dict]:
    """{name: overrides of BASE} of layers whose linears are all alike."""
    forms = {}
    for bits, sym, group, order in itertools.product((2, 3, 4, 8), (True, False), (32, 128, -1), (False, True)):
        if order and group == -1:
            continue
        words = [f"w{bits}", "sym" if sym else "asym", f"g{group}" if group > 0 else "row", *(["desc"] if order else [])]
        forms["-".join(words)] = {"": {"bits": bits, "sym": sym, "group_size": group, "desc_act": order}}
    return forms


UNIFORM = uniform_forms()
FORMS = UNIFORM | {  # name -> {end of the module's name: overrides of BASE, None: stays as it is}
    "q of 8 bits": {"q_proj": {"bits": 8}},
    "k asymmetric": {"k_proj": {"sym": False}},
    "v unquantized": {"v_proj": None},
    "v in an order of its own": {"v_proj": {"desc_act": True}},
    "q, k, v all different": {"q_proj": {"bits": 3, "sym": False}, "k_proj": {"bits": 8, "group_size": -1},
                              "v_proj": {"bits": 2, "group_size": 32, "desc_act": True}},
    "gate of 8 bits": {"gate_proj": {"bits": 8}},
    "up unquantized": {"up_proj": None},
    "up in other groups": {"up_proj": {"group_size": 32, "desc_act": True}},
    "o unquantized": {"o_proj": None},
    "down unquantized": {"down_proj": None},
    "down alone": {"q_proj": None, "k_proj": None, "v_proj": None, "o_proj": None, "gate_proj": None, "up_proj": None},
    "nothing": {"": None},
}  # fmt: skip


ODD = dict(hidden_size=192, head_dim=32, num_attention_heads=4, num_key_value_heads=1, intermediate_size=216, vocab_size=1000)
EVEN = dict(hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512)
EXPERTS = ODD | {"num_experts": 4, "moe_intermediate_size": 72}
MODELS = {
    "odd-v1": Model("qwen3", ODD, "gptq", {"group_size": 32}, FORMS),
    "odd-v2": Model("qwen3", ODD, "gptq_v2", {"bits": 3, "sym": False, "desc_act": True}, FORMS),
    "even-v1": Model("qwen3", EVEN, "gptq", {"bits": 8, "sym": False, "group_size": -1}, FORMS),
    "even-v2": Model("qwen3", EVEN, "gptq_v2", {"bits": 2, "sym": False, "group_size": 32}, FORMS),
    # q, k, v and gate, up are stored as one; falcon's heads take turns
    "phi3": Model("phi3", {k: v for k, v in ODD.items() if k != "head_dim"} | {"num_attention_heads": 6}, "gptq", None, UNIFORM),
    "falcon": Model("falcon", dict(hidden_size=192, num_attention_heads=6, ffn_hidden_size=768), "gptq", None, UNIFORM),
    "experts": Model("qwen3_moe", EXPERTS, "gptq_v2", None, UNIFORM),
    "expert-parallel": Model("qwen3_moe", EXPERTS, "gptq", None, UNIFORM, {"enable_expert_parallel": True}),
}


def rules(model: Model) -> dict[str, dict]:
    """The `dynamic` rules that give layer i the i-th form."""
    found = {}
    for i, form in enumerate(model.forms.values()):
        for end, override in form.items():
            found[f"{'-:' if override is None else ''}.*(layers|h)\\.{i}\\..*{end}"] = override or {}
    return found | ({"lm_head": model.head} if model.head else {})


def write(folder: pathlib.Path, model: Model) -> pathlib.Path:
    """The checkpoint of `model` in `folder`; `folder`/dense has it dequantized, for transformers."""
    source = write_model(folder.with_name(f"{folder.name}-model"), model.arch, num_hidden_layers=len(model.forms),
                         tie_word_embeddings=False, **model.sizes)
    return write_rtn_checkpoint(source, folder, BASE, model.checkpoint_format, lm_head=bool(model.head), dynamic=rules(model))
