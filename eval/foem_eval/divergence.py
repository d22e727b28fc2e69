"""How far a quantized model is from its original: KL divergence, next-token loss and top-1 agreement on held-out text.

Values are kept per sequence, because two quantized models are compared by the differences on the same sequences: these vary much
less than the values themselves. All logits are float32.
"""
from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Divergence(NamedTuple):
    """Per sequence [S], float64, means over its tokens. kl: KL(original || model), nats. loss: next-token loss of the model,
    nats. agreement: share of positions where both models' most probable token is the same."""
    kl: torch.Tensor
    loss: torch.Tensor
    agreement: torch.Tensor

    def summary(self) -> dict[str, float]:
        """Means, and the standard error of each."""
        return {key: value for name, t in self._asdict().items()
                for key, value in ((name, float(t.mean())), (f"{name}_se", standard_error(t)))}


def standard_error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


def paired_difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(mean, standard error) of a - b over the same sequences."""
    return float((a - b).mean()), standard_error(a - b)


def read_sequences(tokenizer, path: str | pathlib.Path, length: int = 512, limit: int | None = None,
                   seed: int = 0) -> torch.Tensor:
    """[S, length] int64: the documents of a .jsonl with `text`, joined by the end-of-text token, cut into windows.

    With `limit` a seeded choice of that many windows, in text order. Needs at least `length` tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"] + end
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if not len(windows):
        raise ValueError(f"{path}: {len(ids)} tokens, but one sequence needs {length}; give a longer text")
    if limit is not None and limit < len(windows):
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:limit]
        windows = windows[chosen.sort().values]
    return windows


@torch.inference_mode()
def measure(original, models: dict[str, object], sequences: torch.Tensor,
            progress: Iterable[int] | None = None) -> dict[str, Divergence]:
    """Divergence of each model from `original` on sequences [S, L]; the original itself is in the result as "original".

    Every position that predicts a token of the sequence counts (L - 1 of them). The original's logits are computed once per
    sequence and never kept for more than one, so a large vocabulary fits. `progress`: an iterator over range(S), a progress
    bar for instance.
    """
    values = {name: ([], [], []) for name in ("original", *models)}
    for i in range(len(sequences)) if progress is None else progress:
        ids = sequences[i:i + 1]
        target = ids[0, 1:]
        reference = _log_probabilities(original, ids)
        best = reference.argmax(-1)
        for name, (kl, loss, agreement) in values.items():
            own = reference if name == "original" else _log_probabilities(models[name], ids)
            kl.append((reference.exp() * (reference - own)).sum(-1).double().mean())
            loss.append(F.nll_loss(own, target.to(own.device)).double())
            agreement.append((own.argmax(-1) == best).double().mean())
    return {name: Divergence(*(torch.stack(v).cpu() for v in lists)) for name, lists in values.items()}


def _log_probabilities(model, ids: torch.Tensor) -> torch.Tensor:
    """[L - 1, vocabulary] float32, for the positions whose next token is in `ids` [1, L]."""
    return model(ids.to(model.device)).logits[0, :-1].float().log_softmax(-1)
