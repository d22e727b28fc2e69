"""What will be quantized, and how: decided from the empty model and the headers, before any weight is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from foem_vllm import experts, models
from foem_vllm.errors import FoemError
from foem_vllm.layers import FUSED
from foem_vllm.spec import QuantSpec
from foem_vllm.stream import Weights

logger = logging.getLogger("foem_vllm")
EXCLUDED = "excluded by --exclude"
DENSE = "vLLM serves it only unquantized"


@dataclass
class Plan:
    """specs: full name of a linear that is quantized -> how. skipped: name in the files -> why it stays as it is; of linears by
    their own names, of other parameters with two or more dimensions by the parameter's. head: the output head, if in specs.
    towers: parts beside the language model, which also stay."""

    specs: dict[str, QuantSpec]
    skipped: dict[str, str]
    head: str | None = None
    towers: list[str] = field(default_factory=list)

    def excluded(self, linears: set[str]) -> list[str]:
        """Names in the files of the linears, and of parameters that could be taken for one, that stay; `linears`: of all."""
        return [name.removesuffix(".weight") for name in self.skipped if name in linears or name.endswith(".weight")]


def make(
    blocks_name: str, blocks: nn.ModuleList, spec: QuantSpec, exclude: list[str], weights: Weights, dense: Collection[str] = ()
) -> Plan:
    """Every linear of the blocks with `spec`, but those that a regular expression of `exclude` finds, or called one of `dense`.

    Warns of what only our plugin serves then, and of expressions that find nothing. Raises FoemError when nothing is left, when K
    is not a multiple of the group size, or when the files use other names.
    """
    plan = Plan({}, {})
    _warn_of_idle(exclude, {name.removesuffix(".weight") for name in weights.headers})
    for index, block in enumerate(blocks):
        prefix = f"{blocks_name}.{index}."
        for name, linear in models.find_linears(block).items():
            full = prefix + name
            if any(re.search(pattern, weights.stored_name(full)) for pattern in exclude):
                plan.skipped[weights.stored_name(full)] = EXCLUDED
                continue
            if name.rpartition(".")[2] in dense:
                plan.skipped[weights.stored_name(full)] = DENSE
                continue
            _check_named(full, f"{index}.{name}", weights)
            check_groups(full, linear.in_features, spec)
            plan.specs[full] = spec
        plan.skipped.update({weights.stored_name(prefix + n): "not a plain linear" for n in models.find_unquantizable(block)})
    experts.check_whole(blocks_name, blocks, set(plan.specs))
    if not plan.specs:
        raise FoemError("no linear is left to quantize; check --exclude and the architecture")
    if left := sorted(name for name, why in plan.skipped.items() if why == DENSE):
        logger.warning("%s and %d more stay as they are: vLLM serves them only unquantized", left[0], len(left) - 1)
    _warn_of_fused(plan, {weights.stored_name(name) for name in plan.specs})
    return plan


def _warn_of_idle(exclude: list[str], names: set[str]) -> None:
    for pattern in exclude:
        if not any(re.search(pattern, name) for name in names):
            logger.warning("--exclude %s finds nothing in this model, whose names are like %s", pattern, min(names))


def _warn_of_fused(plan: Plan, quantized: set[str]) -> None:
    """Say which excluded linears vLLM fuses with quantized ones (their names in the files): stock vLLM asks for one setting."""
    torn = {}
    for parent, _, last in (name.rpartition(".") for name, why in plan.skipped.items() if why == EXCLUDED):
        fused = next((members for members in FUSED.values() if last in members), ())
        if rest := [member for member in fused if f"{parent}.{member}" in quantized]:
            torn[last] = rest
    for last, rest in torn.items():
        logger.warning(
            "--exclude leaves %s as it is, but not %s, which vLLM computes together with it: `--quantization foem` serves that, "
            "stock vLLM refuses it; exclude all of them or none to serve it with stock vLLM",
            last,
            " and ".join(rest),
        )


def add_head(plan: Plan, model: nn.Module, spec: QuantSpec, exclude: list[str]) -> None:
    """The output head too, with `spec`. Raises FoemError where that could not be served, or --exclude finds it."""
    plan.head = models.find_head(model)
    if pattern := next((p for p in exclude if re.search(p, plan.head)), None):
        raise FoemError(f"--exclude {pattern} leaves {plan.head} as it is, and --lm-head quantizes it; leave one of them away")
    check_groups(plan.head, model.get_submodule(plan.head).in_features, spec)
    plan.specs[plan.head] = spec


def leave_towers(plan: Plan, towers: list[str]) -> None:
    """Parts of an image-text model beside its language model stay as they are."""
    plan.towers = towers
    plan.skipped |= dict.fromkeys(towers, "vision")


def tower_rules(plan: Plan) -> dict[str, dict]:
    """`dynamic` rules that exclude the towers, whatever they are called inside: vLLM and transformers differ there."""
    return {rf"-:(.*\.)?{re.escape(name)}\.": {} for name in plan.towers}


def _check_named(full: str, ending: str, weights: Weights) -> None:
    if f"{full}.weight" in weights.files:
        return
    near = next((n for n in weights.files if n.endswith(f"{ending}.weight")), next(iter(weights.files), "nothing"))
    raise FoemError(
        f"{full}.weight: not among the model's weights (found for example {near}); load and save the model once with transformers"
    )


def check_groups(name: str, k: int, spec: QuantSpec) -> None:
    """FoemError when `k` input columns are no whole number of groups."""
    if spec.group_size == -1 or k % spec.group_size == 0:
        return
    fitting = [g for g in (256, 128, 64, 32, 16) if k % g == 0]
    raise FoemError(
        f"{name} has {k} input columns, not a multiple of --group-size {spec.group_size}; choose "
        f"{' or '.join(map(str, [*fitting, -1]))}, or leave it out with --exclude"
    )


def linear_names(blocks_name: str, blocks: nn.ModuleList) -> set[str]:
    return {f"{blocks_name}.{i}.{name}" for i, block in enumerate(blocks) for name in models.find_linears(block)}
