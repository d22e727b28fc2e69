"""A small random vision-language model, Idefics3: a Llama that reads images, with a processor that needs no network.

Of the architectures that vLLM's CPU build and transformers both run it is the smallest whose code does without torchvision.
"""

from __future__ import annotations

import pathlib

import torch
from tiny_models import TINYLM

IMAGE_SIZE, PATCH = 56, 14
TEXT = dict(
    model_type="llama",
    vocab_size=4160,  # tinylm's 4096 and room for the names of image parts
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE_SIZE, patch_size=PATCH
)
PROMPT = "<image> a house of stone and"


def image(seed: int = 0) -> torch.Tensor:
    """uint8 [60, 80, 3], noise."""
    return torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_vision_model(folder: pathlib.Path) -> pathlib.Path:
    """Model and processor in `folder`; the global random state is left as found."""
    from transformers import AutoTokenizer, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(TINYLM)
    parts = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *parts]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    config = Idefics3Config(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Idefics3ForConditionalGeneration(config)
        for p in model.parameters():
            if p.ndim >= 2:
                p.data.mul_(4)
    model.save_pretrained(folder)
    size = {"longest_edge": IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    Idefics3Processor(images, tokenizer, image_seq_len=(IMAGE_SIZE // PATCH // 2) ** 2).save_pretrained(folder)
    return folder


def pixels(folder: pathlib.Path, picture: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model takes beside token ids for a uint8 [height, width, 3] image."""
    from transformers import AutoProcessor

    found = AutoProcessor.from_pretrained(folder).image_processor(images=[picture.numpy()], return_tensors="pt")
    return {key: found[key] for key in ("pixel_values", "pixel_attention_mask")}
