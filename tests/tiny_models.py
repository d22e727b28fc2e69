"""Small random-weight models of several architectures, written as ordinary model folders, with tinylm's tokenizer."""

import pathlib
import shutil

import torch
import transformers

ROOT = pathlib.Path(__file__).parent.parent
TINYLM = ROOT / "eval/tinylm/qwen3"
CALIBRATION = ROOT / "eval/tinylm/data/calibration.jsonl"
EVALUATION = ROOT / "eval/tinylm/data/evaluation.jsonl"

COMMON = dict(
    vocab_size=4096,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)
CONFIGS = {
    "llama": ("LlamaConfig", COMMON),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 16}),
    "gemma": ("GemmaConfig", {**COMMON, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**COMMON, "head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {**COMMON, "head_dim": 16, "sliding_window": 16}),
    "phi3": ("Phi3Config", COMMON),
    "falcon": (
        "FalconConfig",
        dict(
            vocab_size=4096,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=256,  # four times the hidden size, as vLLM takes for granted
            new_decoder_architecture=True,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "opt": (
        "OPTConfig",
        dict(
            vocab_size=4096,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=128,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        dict(
            vocab_size=4096,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
}
CONFIGS |= {  # of linears that vLLM fuses without its model classes saying so, or otherwise than they say
    "glm4": ("Glm4Config", {**COMMON, "head_dim": 32}),
    "stablelm": ("StableLmConfig", COMMON),
    "gptj": (
        "GPTJConfig",
        dict(vocab_size=4096, n_embd=128, n_layer=2, n_head=4, n_positions=128, rotary_dim=32, bos_token_id=0, eos_token_id=0),
    ),
}
MOE_CONFIGS = {  # of fused experts: their linears are no modules of transformers' model
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**COMMON, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "mixtral": ("MixtralConfig", {**COMMON, "head_dim": 32, "num_local_experts": 4, "sliding_window": None}),
    "deepseek_v2": (  # latent attention, in the sizes of vLLM's kernel for CPUs; a dense layer first, then shared experts too
        "DeepseekV2Config",
        {
            **COMMON,
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
    ),
}

OTHER_CONFIGS = {  # of linears that are no nn.Linear of transformers' model, or that stay
    "bloom": (
        "BloomConfig",
        dict(vocab_size=4096, hidden_size=128, n_layer=2, n_head=4, seq_length=128, bos_token_id=0, eos_token_id=0),
    ),
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=4096, n_embd=128, n_layer=2, n_head=4, n_inner=256, n_positions=128, bos_token_id=0, eos_token_id=0),
    ),
}
TEXT = dict(COMMON, hidden_size=128, intermediate_size=256, head_dim=32)
VISION = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
VISION_CONFIGS = {  # of image-text models; vision towers have as many layers as the language model
    "gemma3_vision": (
        "Gemma3Config",
        dict(text_config={**TEXT, "sliding_window": 16}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=9),
    ),
    "llava": (
        "LlavaConfig",
        dict(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "model_type": "clip_vision_model"},
            image_token_index=9,
        ),
    ),
}


def write_model(folder: pathlib.Path, arch: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> pathlib.Path:
    """A model of `arch` with random weights in `folder`; the global random state is left as found."""
    name, values = (CONFIGS | MOE_CONFIGS | OTHER_CONFIGS | VISION_CONFIGS)[arch]
    config = getattr(transformers, name)(**{**values, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = "AutoModelForImageTextToText" if arch in VISION_CONFIGS else "AutoModelForCausalLM"
        model = getattr(transformers, kind).from_config(config)
        for p in model.parameters():  # wider than the usual initialization, so that attention and activations do something
            if p.ndim >= 2:
                p.data.mul_(4)
    model.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINYLM / file, folder / file)
    return folder
