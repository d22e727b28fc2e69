"""Some linears of a finished checkpoint once more (--redo): the others keep their codes, and what feeds the ones that are solved
again comes from the model as it is quantized now."""

from __future__ import annotations

import functools
import pathlib
import re
from dataclasses import dataclass

import torch

from foem_vllm import experts, plan
from foem_vllm.checkpoint import quantized_modules, read_linear, read_report
from foem_vllm.errors import FoemError
from foem_vllm.format import FormatConfig, read_config
from foem_vllm.integrity import file_digest, verify_files
from foem_vllm.job import Job
from foem_vllm.report import REPORT_FILE, LayerResult, Report
from foem_vllm.spec import Quantized, QuantSpec
from foem_vllm.stream import Weights


@dataclass
class Kept:
    """What stays of a finished checkpoint. names: full names of the linears whose codes are kept. sha256: of its config.json."""

    config: FormatConfig
    weights: Weights
    report: Report
    names: set[str]
    sha256: str

    @functools.cached_property
    def results(self) -> dict[str, LayerResult]:
        return {layer.name: layer for layer in self.report.layers}

    def read(self, job: Job, name: str) -> tuple[LayerResult, Quantized]:
        """(what was reported, codes and grid) of a linear that is kept."""
        stored = job.weights.stored_name(name)
        n, k = job.empty.get_submodule(name).weight.shape
        spec = job.plan.specs[name]
        result = self.results.get(stored) or LayerResult(stored, n, k, spec.bits, spec.group_size)
        return result, read_linear(self.weights, stored, self.config)[0]


def keep(job: Job, out: pathlib.Path, pattern: str) -> Kept:
    """Change the job's plan: linears that the regular expression `pattern` finds are quantized as it says, all others of the
    checkpoint `out` as they are there.

    Raises FoemError when `out` is no whole checkpoint of ours, was made of another model, is of another format or has other
    groups, and when the pattern finds nothing.
    """
    if not (out / REPORT_FILE).is_file():
        raise FoemError(f"{out}: no finished checkpoint of foem-vllm ({REPORT_FILE} is missing); --redo needs one")
    try:
        again = {name for name in job.plan.specs if re.search(pattern, job.weights.stored_name(name))}
    except re.error as error:
        raise FoemError(f"--redo {pattern}: not a regular expression ({error})") from None
    config, weights = read_config(out), Weights(out)
    verify_files(out, config.meta)
    if not again:
        example = job.weights.stored_name(next(iter(job.plan.specs)))
        raise FoemError(f"--redo {pattern} finds none of the linears, which are called {example} and the like")
    if config.checkpoint_format != job.recipe.checkpoint_format:
        raise FoemError(
            f"{out} is of checkpoint_format {config.checkpoint_format!r}, and what is quantized again would be of "
            f"{job.recipe.checkpoint_format!r}; give --format {config.checkpoint_format}, and the same symmetry"
        )
    there = set(quantized_modules(weights.files))
    report = Report.from_json(read_report(out))
    kept = {name for name in job.plan.specs if name not in again and job.weights.stored_name(name) in there}
    strangers = there - {job.weights.stored_name(name) for name in job.plan.specs}
    if strangers:
        raise FoemError(
            f"{out}: {min(strangers)} is quantized there, but nothing of that name would be here; give the same model, --lm-head "
            "and --exclude as before"
        )
    for name in set(job.plan.specs) - again - kept:
        stored = job.weights.stored_name(name)
        del job.plan.specs[name]
        job.plan.skipped[stored] = report.skipped.get(stored, "not quantized before")
    if job.plan.head not in job.plan.specs:
        job.plan.head = None
    job.plan.specs |= {name: config.spec_for(job.weights.stored_name(name)) for name in kept}
    experts.check_whole(job.blocks_name, job.blocks, set(job.plan.specs))
    if kept:
        check_alike(out, config.spec, job.recipe.spec)
    for name in kept:
        plan.check_groups(name, job.empty.get_submodule(name).weight.shape[1], job.plan.specs[name])
    check_source(job, out, weights)
    return Kept(config, weights, report, kept, file_digest(out / "config.json"))


def check_source(job: Job, out: pathlib.Path, weights: Weights) -> None:
    """FoemError when what both leave as it is has other values in the model than in the checkpoint `out`, of these weights."""
    for name in job.untouched():
        stored = job.weights.stored_name(name)
        if stored not in weights.files or not torch.equal(weights.read(stored), job.weights.read(name)):
            raise FoemError(
                f"{out}: {stored} is not there as it is in {job.folder}; give the model that the checkpoint was made of"
            )


def check_alike(out: pathlib.Path, before: QuantSpec, now: QuantSpec) -> None:
    """FoemError when more than the bits would differ between linears: the checkpoint has no rules that say so."""
    for what in ("group_size", "symmetric", "desc_act"):
        there, here = getattr(before, what), getattr(now, what)
        if there != here:
            raise FoemError(
                f"{out}: {what} is {there} there, and would be {here} in what is quantized again; give the same --group-size, "
                "--asym and --act-order as before"
            )


def recipe_of(kept: Kept, now: dict, pattern: str) -> dict:
    """What the report says in the end: the recipe of the checkpoint, and what was done again and how."""
    changed = {key: value for key, value in now.items() if kept.report.recipe.get(key) != value}
    return {**kept.report.recipe, "redone": [*kept.report.recipe.get("redone", []), {"pattern": pattern, **changed}]}
