"""Train tinylm: a Qwen3-style (default) or Llama-style causal LM of about 5.8 M parameters, on two CPU cores in about an hour.

    python corpus.py && python train.py --out qwen3            # the model that the repository ships
    python train.py --arch llama --out llama

Seeded: the same machine, thread count and library versions give the same weights. Muon (Jordan et al. 2024) updates the
matrices inside the blocks, AdamW the embedding and the norms; the learning rate is constant, then falls linearly to zero.
Start it with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 (glibc): several times faster.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = pathlib.Path(__file__).parent
VOCABULARY = 4096
CONTEXT = 512
END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (HERE / name).open()]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, START_TURN, END_TURN],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def token_stream(tokenizer, texts: list[str], generator: torch.Generator) -> torch.Tensor:
    """All documents in a shuffled order, END between them; one in eight as a chat turn about its first line."""
    out: list[int] = []
    order = torch.randperm(len(texts), generator=generator).tolist()
    as_chat = (torch.rand(len(texts), generator=generator) < 1 / 8).tolist()
    for i in order:
        text = texts[i]
        if as_chat[i]:
            title = text.split("\n", 1)[0].strip("#`- ")[:80]
            text = f"{START_TURN}user\nTell me about {title}.{END_TURN}\n{START_TURN}assistant\n{text[:1500].strip()}{END_TURN}\n"
        out += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(out)


def build_model(arch: str):
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    if arch == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration (five steps, quintic) toward the nearest semi-orthogonal matrix."""
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


@torch.no_grad()
def evaluate(model, tokens: torch.Tensor, sequences: int = 32) -> float:
    """Mean next-token loss in nats over the first `sequences` windows of CONTEXT tokens."""
    model.eval()
    windows = tokens[: sequences * CONTEXT].view(-1, CONTEXT)
    losses = [F.cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:]) for w in windows]
    model.train()
    return torch.stack(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=["qwen3", "llama"], default="qwen3")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 512 tokens a step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    texts = read("train.jsonl")
    tokenizer = build_tokenizer(texts)
    held_out = torch.tensor(
        [t for text in read("data/evaluation.jsonl") for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    )
    model = build_model(args.arch)
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    optimizers = [Muon(inner, args.muon_lr), torch.optim.AdamW(rest, args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]
    base = [g["lr"] for o in optimizers for g in o.param_groups]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(texts)} documents", flush=True)

    windows = torch.empty(0, CONTEXT, dtype=torch.long)
    start = time.time()
    for step in range(args.steps):
        if len(windows) < args.batch:
            stream = token_stream(tokenizer, texts, generator)
            offset = int(torch.randint(CONTEXT, (1,), generator=generator))
            stream = stream[offset:]
            fresh = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
            windows = torch.cat([windows, fresh[torch.randperm(len(fresh), generator=generator)]])
            print(f"step {step}: an epoch is {fresh.numel():,} tokens", flush=True)
        batch, windows = windows[: args.batch], windows[args.batch :]
        scale = min(1.0, (step + 1) / 20, (args.steps - step) / (0.6 * args.steps))
        for group, lr in zip((g for o in optimizers for g in o.param_groups), base):
            group["lr"] = lr * scale
        hidden = model.model(batch).last_hidden_state[:, :-1].reshape(-1, model.config.hidden_size)
        loss = F.cross_entropy(model.lm_head(hidden), batch[:, 1:].reshape(-1))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"training diverged at step {step}")
        if step % 20 == 0:
            rate = (step + 1) * batch.numel() / (time.time() - start)
            print(f"step {step} loss {loss.item():.4f} lr x{scale:.3f} {rate:.0f} tokens/s", flush=True)
        if step % 200 == 199 or step == args.steps - 1:
            print(f"step {step} held-out loss {evaluate(model, held_out):.4f} nats/token", flush=True)
            model.generation_config.eos_token_id = [0, tokenizer.convert_tokens_to_ids(END_TURN)]
            clone = build_model(args.arch)
            clone.load_state_dict(model.state_dict())
            clone.generation_config = model.generation_config
            clone.to(torch.bfloat16).save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
