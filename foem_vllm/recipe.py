"""Everything a user can decide about quantizing: named methods, presets, what they leave open, what makes no sense together."""

from __future__ import annotations

import pathlib
import re
from dataclasses import asdict, dataclass, field

from foem_vllm import calibration
from foem_vllm.errors import FoemError
from foem_vllm.grid import GRIDS
from foem_vllm.solver import SolverConfig
from foem_vllm.spec import QuantSpec
from foem_vllm.zeros import CHECKPOINT_FORMATS

# The papers' methods, name -> default (alpha, beta). RTN is the same grid without the loop.
METHODS = {"rtn": None, "gptq": (0.0, 0.0), "gptaq": (0.25, 0.0), "foem": (0.0, 0.2), "foem+gptaq": (0.25, 0.2)}
# What a named method does beyond alpha and beta: nothing that its paper does not.
PLAIN = {
    "act_order": "none",
    "damping": 0.05,
    "grid": "minmax",
    "refit": False,
    "descent": False,
    "correct": 0.0,
    "guided": False,
    "finetune_scales": False,
}
_FAST = {**PLAIN, "method": "gptq", "act_order": "static", "grid": "search", "refit": True}
PRESETS = {
    "fast": _FAST,
    "balanced": {**_FAST, "descent": True, "correct": "auto"},
    "best": {**_FAST, "descent": True, "correct": "auto", "guided": True, "finetune_scales": True},
}
DEFAULT_PRESET = "balanced"
AUTO = "auto"


@dataclass
class QuantizeConfig:
    """Everything that decides the result.

    preset: one of PRESETS, the default when method is None too; method: one of METHODS. The next ones are None for what the
    preset or method says. alpha, beta, damping: numbers or "auto", chosen per layer on held-out calibration text (selection).
    form: of the first-order term. act_order, grid, refit, descent: see QuantSpec and SolverConfig. correct: strength of the
    corrected target, 0 to 1 or "auto". guided: tokens weighted by the task loss. finetune_scales: tuned end to end (endtoend).

    bits_per_weight: what the quantized linears may take on average, scales included; bits are then chosen for each (sensitivity).

    activation_memory: GB of host memory for activations, None for half of what is free; the others wait in a file.
    calibration: hub data set or file; samples sequences of seq_len tokens, chosen by seed. device: None for CUDA where present.
    checkpoint_format: None for "gptq" when symmetric and "gptq_v2" when not. exclude: regexes of modules left as they are.
    lm_head: the output head too.
    """

    method: str | None = None
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: str | None = None
    alpha: float | str | None = None
    beta: float | str | None = None
    damping: float | str | None = None
    form: str = "published"
    grid: str | None = None
    calibration: str = calibration.DEFAULT
    split: str = "train"
    text_column: str = "text"
    chat_template: bool = False
    samples: int = 256
    seq_len: int = 2048
    seed: int = 0
    device: str | None = None
    activation_memory: float | None = None
    checkpoint_format: str | None = None
    exclude: list[str] = field(default_factory=list)
    trust_remote_code: bool = False
    preset: str | None = None
    refit: bool | None = None
    descent: bool | None = None
    correct: float | str | None = None
    guided: bool | None = None
    finetune_scales: bool | None = None
    bits_per_weight: float | None = None
    lm_head: bool = False


@dataclass(frozen=True)
class Recipe:
    """A QuantizeConfig with every default filled in. solver: None for RTN. auto: which of alpha, beta and damping are chosen per
    layer. correct: None for fitted. stated: what decides the result, for the report, the model card and meta.foem.
    bits_per_weight: within which bits are chosen for every linear; None: spec says them."""

    spec: QuantSpec
    solver: SolverConfig | None
    auto: tuple[str, ...]
    correct: float | None
    guided: bool
    finetune_scales: bool
    grid: str
    checkpoint_format: str
    stated: dict
    bits_per_weight: float | None = None

    @property
    def needs_original(self) -> bool:
        """Whether a second stream must run through the original model."""
        return self.solver is not None and (
            self.solver.alpha > 0 or self.correct != 0 or "alpha" in self.auto or self.finetune_scales
        )

    @property
    def judged(self) -> bool:
        """Whether something is chosen by how it does on a part of the text that it was not made from."""
        return self.solver is not None and bool(self.correct is None or self.auto or self.solver.descent)


def resolve(config: QuantizeConfig) -> Recipe:
    """FoemError on combinations that make no sense."""
    if config.preset is not None and config.preset not in PRESETS:
        raise FoemError(f"--preset {config.preset} is unknown; choose one of {', '.join(PRESETS)}")
    if config.preset and config.method:
        raise FoemError(f"--preset {config.preset} and --method {config.method} exclude each other; give one of them")
    if config.method is not None and config.method not in METHODS:
        raise FoemError(f"--method {config.method} is unknown; choose one of {', '.join(METHODS)}")
    preset = None if config.method else config.preset or DEFAULT_PRESET
    defaults = PRESETS[preset] if preset else {**PLAIN, "method": config.method}
    chosen = {key: default if getattr(config, key) is None else getattr(config, key) for key, default in defaults.items()}
    terms = METHODS[chosen["method"]]
    for name, index in (("alpha", 0), ("beta", 1)):
        value = getattr(config, name)
        if value is not None and value != 0 and (terms is None or not (terms[index] or preset or value == AUTO)):
            users = [m for m, d in METHODS.items() if d and d[index]]
            raise FoemError(f"--{name} {value} has no meaning for --method {config.method}; use --method {' or '.join(users)}")
        chosen[name] = value if value is not None else terms[index] if terms else None
    if config.samples < 1 or config.seq_len < 2:
        raise FoemError(f"--samples {config.samples} and --seq-len {config.seq_len} must be at least 1 and 2")
    if chosen["grid"] not in GRIDS:
        raise FoemError(f"--grid {chosen['grid']} is unknown; choose one of {', '.join(GRIDS)}")
    if terms is None:
        options = {"act_order": "--act-order", "damping": "--damp", "finetune_scales": "--finetune-scales"}
        options["bits_per_weight"] = "--bits-per-weight"
        for name in ("act_order", "refit", "descent", "correct", "damping", "guided", "finetune_scales", "bits_per_weight"):
            option = options.get(name, f"--{name}")
            if getattr(config, name) not in (None, PLAIN.get(name)):
                raise FoemError(f"{option} has no meaning for --method rtn, which rounds every weight by itself; leave it away")
    for name in ("alpha", "beta", "damping", "correct"):
        value = chosen[name]
        if value not in (None, AUTO) and (isinstance(value, str) or not 0 <= value <= 1):
            raise FoemError(f"{name}={value} must lie between 0 and 1, or be {AUTO}")
    if chosen["correct"] and chosen["alpha"]:
        raise FoemError("--alpha and --correct both correct for drifted inputs; give one of them")
    for pattern in config.exclude:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FoemError(f"--exclude {pattern}: not a regular expression ({error})") from None
    spec = QuantSpec(config.bits, config.group_size, config.symmetric, chosen["act_order"])
    checkpoint_format = config.checkpoint_format or ("gptq" if config.symmetric else "gptq_v2")
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise FoemError(f"--format {checkpoint_format} is unknown; choose one of {', '.join(CHECKPOINT_FORMATS)}")
    if checkpoint_format == "gptq" and not config.symmetric:
        raise FoemError("--format gptq cannot hold every asymmetric zero point; use gptq_v2")
    stated = {**asdict(config), "preset": preset, **chosen}
    if config.bits_per_weight is not None:
        stated["bits"] = None  # no single number
    if terms is None:
        stated |= dict.fromkeys(
            (
                "damping",
                "form",
                "calibration",
                "samples",
                "seq_len",
                "seed",
                "refit",
                "descent",
                "correct",
                "guided",
                "finetune_scales",
            )
        )
        return Recipe(spec, None, (), 0.0, False, False, chosen["grid"], checkpoint_format, _tidy(stated))
    auto = tuple(name for name in ("alpha", "beta", "damping") if chosen[name] == AUTO)
    if (auto or chosen["correct"] == AUTO or config.bits_per_weight is not None) and config.samples < 2:
        raise FoemError(f"--samples {config.samples}: choosing on held-out text needs at least 2 sequences")
    start = {"alpha": 0.0, "beta": 0.0, "damping": PLAIN["damping"]}
    start |= {name: chosen[name] for name in start if name not in auto}
    solver = SolverConfig(
        **start, form=config.form, grid=chosen["grid"], refit=bool(chosen["refit"]), descent=bool(chosen["descent"])
    )
    correct = None if chosen["correct"] == AUTO else float(chosen["correct"])
    guided, tuned = bool(chosen["guided"]), bool(chosen["finetune_scales"])
    return Recipe(
        spec, solver, auto, correct, guided, tuned, chosen["grid"], checkpoint_format, _tidy(stated), config.bits_per_weight
    )


def _tidy(stated: dict) -> dict:
    for name in ("device", "activation_memory", "trust_remote_code", "checkpoint_format"):
        stated.pop(name)
    if stated["calibration"] and pathlib.Path(stated["calibration"]).exists():
        stated["calibration"] = pathlib.Path(stated["calibration"]).name  # a local path says nothing elsewhere
    return {
        key: value for key, value in stated.items() if key == "symmetric" or not (value is None or value is False or value == [])
    }
