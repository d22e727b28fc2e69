"""A vision-language model whose language part is quantized: served as transformers computes it, also asked with an image."""

import pathlib
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

pytest.importorskip("vllm")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "eval"))

import parallel  # noqa: E402
from checkpoints import write_rtn_checkpoint  # noqa: E402
from tiny_vision import PROMPT, image, pixels, write_vision_model  # noqa: E402

from foem_vllm.format import FormatConfig, QuantSpec  # noqa: E402
from foem_vllm.plugin import compat  # noqa: E402
from foem_vllm.plugin.config import FoemConfig  # noqa: E402

RULES = {"-:.*(vision_model|connector)": {}, ".*q_proj": {"bits": 8}, "-:.*layers\\.1\\.mlp\\.up_proj": {}}
SPEC = QuantSpec(4, 32, False)


def test_language_part_answers_with_and_without_an_image(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    folder = write_rtn_checkpoint(write_vision_model(tmp_path / "model"), tmp_path / "quantized", SPEC, dynamic=RULES)
    try:
        AutoImageProcessor.from_pretrained(folder)
    except (ImportError, ValueError) as error:
        assert "torchvision" in str(error).lower()
        pytest.skip(f"transformers {transformers.__version__} prepares images only with torchvision")
    texts = parallel.token_ids()
    save_file({"texts": texts, "image": image()}, tmp_path / "tokens.safetensors")
    answer = parallel.serve(["quantized"], tmp_path, "float32", 1, streams=False, image_prompt=PROMPT)[0]
    assert "refused" not in answer, answer["refused"]
    model = AutoModelForImageTextToText.from_pretrained(folder / "dense", dtype=torch.float32).eval()

    def exact(ids, **seen):
        with torch.no_grad():
            return model(input_ids=ids, **seen).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]

    assert float((torch.tensor(answer["logprobs"]) - exact(texts)).abs().max()) < 1e-4
    ids, found = torch.tensor([answer["image"]["ids"]]), torch.tensor([answer["image"]["logprobs"]])
    assert float((found - exact(ids, **pixels(folder, image()))).abs().max()) < 1e-4
    assert float((found - exact(ids, **pixels(folder, image(seed=1)))).abs().max()) > 1e-2  # another image, another answer


# How vLLM's classes rename modules of Gemma 3, LLaVA and Qwen2-VL (vLLM 0.32); they cannot be imported without torchvision.
PREFIXES = {"model.language_model.": "language_model.model.", "model.visual.": "visual.", "lm_head.": "language_model.lm_head.",
            "model.": "language_model.model."}  # fmt: skip


@pytest.mark.parametrize("stored", ["model.language_model.layers.0", "model.layers.0", "language_model.model.layers.0"])
def test_rules_speak_of_stored_names_and_layers_of_vllms(stored):
    """Whatever prefix the file has: rules are looked up by it, the result by the name that vLLM's layer has."""
    rules = {rf"{stored}\.mlp\.down_proj": {"bits": 8}, rf"-:{stored}\.self_attn\.v_proj": {}, "-:(model\\.)?visual": {}}
    formats = FormatConfig(SPEC, "gptq", True, rules)
    config = FoemConfig(formats)
    names = [f"{stored}.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")] + ["lm_head"]
    config.modules = {name: spec for name in names if (spec := formats.spec_for(name))}
    config.apply_vllm_mapper(compat.WeightsMapper(orig_to_new_prefix=PREFIXES))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = "language_model.model.layers.0"
    assert config.specs_for(f"{layer}.self_attn.qkv_proj") == {
        f"{layer}.self_attn.q_proj": SPEC, f"{layer}.self_attn.k_proj": None, f"{layer}.self_attn.v_proj": None}  # fmt: skip
    assert config.specs_for(f"{layer}.mlp.down_proj") == {f"{layer}.mlp.down_proj": QuantSpec(8, 32, False)}
    assert config.specs_for("language_model.lm_head") == {"language_model.lm_head": SPEC}
    assert config.specs_for("visual.blocks.0.attn.qkv") == {"visual.blocks.0.attn.qkv": None}
