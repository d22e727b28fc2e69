"""How far a quantized model is from its original: KL divergence, next-token loss and top-1 agreement on held-out text.

Values are kept per sequence, because two quantized models are compared by the differences on the same sequences: these vary much
less than the values themselves. All logits are float32.
"""
from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from foem_vllm.calibration import read_texts
from foem_vllm.errors import FoemError

PARTS = ("all", "dev", "test")


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


class Bootstrap(NamedTuple):
    """Two methods' values, a and b. difference: mean of a - b; ratio: mean of a over mean of b; each with its 95 % interval."""
    difference: float
    difference_interval: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]


def bootstrap(a: torch.Tensor, b: torch.Tensor, draws: int = 10_000, seed: int = 0) -> Bootstrap:
    """How sure a difference between two methods is. a, b: values [seeds, S] of the same calibration seeds and sequences.

    Percentiles of `draws` resamples with replacement: of seeds, and of sequences, which are the same for every seed of a draw
    because every seed's model was measured on the same ones. One row stands for every seed (a method that reads no text). With
    few seeds their share of the interval is coarse: two give three possible means.
    """
    means_a, means_b = resampled(a, b, draws, seed)
    a, b = (x.double().mean() for x in (a, b))
    return Bootstrap(float(a - b), _interval(means_a - means_b), float(a / b), _interval(means_a / means_b))


def ratio_of_all(cells: Sequence[tuple[torch.Tensor, torch.Tensor]], draws: int = 10_000) -> tuple[float, tuple[float, float]]:
    """Geometric mean over cells (a, b) of mean of a over mean of b, with its 95 % interval. A draw takes the same seeds and
    sequences in every cell: models that are measured on the same text are not independent."""
    mean = torch.stack([a.double().mean().log() - b.double().mean().log() for a, b in cells]).mean().exp()
    drawn = [torch.stack(resampled(a, b, draws, 0)).log() for a, b in cells]
    return float(mean), _interval(torch.stack([a - b for a, b in drawn]).mean(0).exp())


def resampled(a: torch.Tensor, b: torch.Tensor, draws: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[draws] means of a and of b, see `bootstrap`."""
    rows = max(len(a), len(b))
    a, b = (x.double().expand(rows, -1) if len(x) == 1 else x.double() for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"values of shape {list(a.shape)} and {list(b.shape)} are not of the same seeds and sequences")
    generator = torch.Generator().manual_seed(seed)
    seeds, sequences = (_shares(draws, n, generator) for n in a.shape)
    means_a, means_b = (((seeds @ x) * sequences).sum(1) for x in (a, b))
    return means_a, means_b


def _shares(draws: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """[draws, n] float64: how often each of n things is in a resample of n, over n."""
    chosen = torch.randint(n, (draws, n), generator=generator)
    return torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, chosen, torch.full((draws, n), 1 / n, dtype=torch.float64))


def _interval(values: torch.Tensor) -> tuple[float, float]:
    """95 %."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def read_sequences(tokenizer, path: str | pathlib.Path, length: int = 512, limit: int | None = None, seed: int = 0,
                   part: str = "all", dev: int = 128) -> torch.Tensor:
    """[S, length] int64: the documents of a local text file, joined by the end-of-text token, cut into windows.

    part: "dev", the seeded choice of `dev` windows; "test", all windows but these; "all". What was tuned on dev can be measured
    on test, whose windows it has not seen. With `limit` a seeded choice of that many of the part's windows, in text order, so
    that part "dev" is the same as part "all" with limit=dev. Raises FoemError when the text is too short.
    """
    if part not in PARTS:
        raise FoemError(f"--split {part}: unknown; choose one of {', '.join(PARTS)}")
    if not pathlib.Path(path).is_file():
        raise FoemError(f"--evaluation {path}: no such file; give a .txt or .jsonl file of held-out text")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in read_texts(str(path), option="--evaluation"):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    windows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    if not len(windows):
        raise FoemError(f"--evaluation {path}: {len(ids)} tokens, but one sequence needs {length}; give a longer text")
    if part != "all":
        if len(windows) <= dev and part == "test":
            raise FoemError(f"--evaluation {path}: {len(windows)} sequences of {length} tokens, and --dev-sequences {dev} leaves "
                            "none for the test part; give a longer text, or lower it")
        chosen = _choice(len(windows), dev, seed)
        windows = windows[chosen if part == "dev" else ~chosen]
    return windows if limit is None else windows[_choice(len(windows), limit, seed)]


def _choice(n: int, limit: int, seed: int) -> torch.Tensor:
    """[n] bool: a seeded choice of `limit` of n."""
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:limit]] = True
    return chosen


class Remembered:
    """A model whose logits [1, L, vocabulary] of earlier sequences are kept, up to `budget` bytes on the model's device: an
    original that many models are compared with is then run once. Called as `measure` calls a model."""

    def __init__(self, model, budget: int = 2 << 30):
        self.model, self.device, self.budget, self.kept = model, model.device, budget, {}

    def __call__(self, ids: torch.Tensor):
        key = ids.cpu().numpy().tobytes()
        if key in self.kept:
            return self.kept[key]
        output = SimpleNamespace(logits=self.model(ids).logits)
        self.budget -= output.logits.nbytes
        if self.budget >= 0:
            self.kept[key] = output
        return output


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
