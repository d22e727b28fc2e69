"""Quantizers beside each other on one model: size, time, and how far each is from the original on held-out text.

Every method quantizes the same model with the same calibration tokens (one choice of them a seed) at every number of bits, and
is measured on the same sequences. Values are kept per sequence in OUT/results.json, written after every run: an interrupted
comparison goes on where it stopped, and later commands add methods, bits and seeds to it.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from foem_eval import compare_tables
from foem_eval.dequantized import load_dequantized
from foem_eval.divergence import Divergence, Remembered, measure, read_sequences
from foem_eval.methods import Method, parse, run_peer, split
from foem_eval.peers import environments
from foem_eval.provenance import provenance
from foem_vllm import models
from foem_vllm.calibration import DEFAULT as DEFAULT_CALIBRATION
from foem_vllm.checkpoint import storage
from foem_vllm.errors import FoemError
from foem_vllm.job import calibration_tokens, pick_device
from foem_vllm.pipeline import quantize
from foem_vllm.recipe import QuantizeConfig
from foem_vllm.report import REPORT_FILE

RESULTS_FILE = "results.json"
TEXT_FIELDS = {"calibration", "split", "text_column", "chat_template", "samples", "seq_len"}  # decide the calibration tokens


@dataclasses.dataclass
class Comparison:
    """What is compared and how. The first block decides the numbers and is stored with them.

    samples x seq_len: calibration tokens of each seed. sequences of sequence_length tokens are measured (None: all) from that
    part of the evaluation text that `split` names: "all"; "dev", a seeded choice of dev_sequences of them; "test", all others.
    """
    model: str
    evaluation: str | None = None
    group_size: int = 128
    calibration: str = DEFAULT_CALIBRATION
    samples: int = 256
    seq_len: int = 2048
    sequences: int | None = None
    sequence_length: int = 512
    split: str = "all"
    dev_sequences: int = 128

    methods: Sequence[str] = ("rtn", "gptq", "foem")
    bits: Sequence[int] = (4,)
    seeds: Sequence[int] = (0,)
    baseline: str | None = None
    out: pathlib.Path = pathlib.Path("compare")
    device: str | None = None
    trust_remote_code: bool = False
    peers_folder: pathlib.Path = environments.FOLDER
    keep: bool = False
    resume: bool = False

    def stored(self) -> dict:
        """The settings that all runs in one results file share; files by name, because a path says nothing elsewhere."""
        names = [f.name for f in dataclasses.fields(self)]
        values = {name: getattr(self, name) for name in names[: names.index("methods")]}
        return {k: pathlib.Path(v).name if isinstance(v, str) and pathlib.Path(v).exists() else v for k, v in values.items()}

    def common(self, bits: int, seed: int) -> dict:
        """The fields of QuantizeConfig that all methods share."""
        return dict(bits=bits, seed=seed, group_size=self.group_size, calibration=self.calibration, samples=self.samples,
                    seq_len=self.seq_len, device=self.device, trust_remote_code=self.trust_remote_code)


def compare(c: Comparison) -> dict:
    """Do what is missing, write results.json, table.md, table.csv and plots into c.out, print the table; returns the results.

    Raises FoemError on bad input before anything is computed. The model and one quantized model are in memory at a time.
    """
    logging.disable_progress_bar()
    out = pathlib.Path(c.out)
    wanted = plan(c)
    folder = models.resolve(c.model)
    hf_config = models.load_config(folder, c.trust_remote_code)
    sequences = held_out(c, folder, hf_config)
    results = load(out / RESULTS_FILE, {**c.stored(), "evaluation_sha256": digest(sequences), "measured": len(sequences)})
    made_by = provenance()
    todo = [run for run in wanted if not is_done(results, run, made_by["commit"], c.resume)]
    known = {run["method"] for run in results["runs"]} | {method.text for method, _, _ in wanted}
    if c.baseline and c.baseline not in known:
        raise FoemError(f"--baseline {c.baseline} is not among the methods ({', '.join(sorted(known))}); add it to --methods")
    peers = {m.peer: environments.ensure(m.peer, c.peers_folder) for m, _, _ in todo if m.peer}
    if todo:
        device = pick_device(c.device)
        original = Remembered(load_dequantized(folder, device=device, trust_remote_code=c.trust_remote_code))
        results |= made_by
    with working_folder(out) as work:
        for number, (method, bits, seed) in enumerate(todo, 1):
            run = {"method": method.text, "bits": bits, "seed": seed, "commit": made_by["commit"], "date": made_by["date"]}
            target = work / slug(run)
            tokens = tokens_of(c, folder, hf_config, seed or 0, work) if seed is not None else None
            if method.peer:
                log = out / "logs" / f"{slug(run)}.log"
                run |= run_theirs(c, method, peers[method.peer], folder, target, bits, seed, tokens, log)
            else:
                run |= run_ours(c, method, folder, target, bits, seed, tokens)
            run |= storage(target)
            quantized = load_dequantized(target, device=device, trust_remote_code=c.trust_remote_code)
            found = measure(original, {"quantized": quantized}, sequences)
            del quantized
            results["original"] = {**storage(folder), **rounded(found["original"], ("loss",))}
            run |= rounded(found["quantized"], Divergence._fields)
            add(results, run)
            store(out / RESULTS_FILE, results)
            print(f"[{number}/{len(todo)}] W{bits} {method.text}" + ("" if seed is None else f", seed {seed}") +
                  f": KL {found['quantized'].kl.mean():.5f}, {run['quantize_seconds']:.1f} s", flush=True)
            if c.keep:
                shutil.rmtree(out / "checkpoints" / target.name, ignore_errors=True)
                (out / "checkpoints").mkdir(exist_ok=True)
                target.rename(out / "checkpoints" / target.name)
            else:
                shutil.rmtree(target)
    compare_tables.write(results, out, c.baseline)
    return results


def plan(c: Comparison) -> list[tuple[Method, int, int | None]]:
    """Every (method, bits, seed) in order; one run without a seed for methods that read no text. FoemError on bad settings."""
    methods = [parse(text) for text in split(c.methods)]
    for name, values in (("methods", methods), ("bits", c.bits), ("seeds", c.seeds)):
        if not values:
            raise FoemError(f"--{name} names none; give at least one")
    for bits in c.bits:
        if bits not in (2, 3, 4, 8):
            raise FoemError(f"--bits {bits}: cannot be stored; choose among 2, 3, 4 and 8")
    runs = []
    for bits in c.bits:
        silent = {m for m in methods if not m.reads_text(**c.common(bits, c.seeds[0]))}
        for seed in c.seeds:
            runs += [(m, bits, None if m in silent else seed) for m in methods if m not in silent or seed == c.seeds[0]]
    return runs


def held_out(c: Comparison, folder: pathlib.Path, hf_config) -> torch.Tensor:
    """[S, sequence_length] tokens to measure on; FoemError that says what to give where there are none."""
    if c.evaluation is None:
        raise FoemError("--evaluation is missing: give a .txt file, or a .jsonl file with a `text` field a line, of text that is "
                        "not in the calibration text")
    if (c.sequences is not None and c.sequences < 1) or c.sequence_length < 2 or c.dev_sequences < 1:
        raise FoemError(f"--sequences {c.sequences}, --sequence-length {c.sequence_length} and --dev-sequences {c.dev_sequences} "
                        "must be at least 1, 2 and 1")
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if limit and c.sequence_length > limit:
        raise FoemError(f"--sequence-length {c.sequence_length} is longer than this model's context of {limit}; use "
                        f"--sequence-length {limit}")
    tokenizer = models.load_tokenizer(folder, c.trust_remote_code)
    return read_sequences(tokenizer, c.evaluation, c.sequence_length, c.sequences, part=c.split, dev=c.dev_sequences)


def run_ours(c: Comparison, method: Method, folder: pathlib.Path, target: pathlib.Path, bits: int, seed: int | None,
             tokens: tuple[torch.Tensor, pathlib.Path] | None) -> dict:
    """One checkpoint by our quantizer, in this process; with the layers' relative errors where the method measures them."""
    start = time.perf_counter()
    report = quantize(folder, target, method.config(**c.common(bits, seed or 0)))
    run = {"quantize_seconds": round(time.perf_counter() - start, 3)}
    if tokens:
        run["calibration_sha256"] = report.recipe["calibration_sha256"]
        if run["calibration_sha256"] != digest(tokens[0]) and not TEXT_FIELDS & dict(method.options).keys():
            raise RuntimeError(f"{method.text} did not see the calibration tokens that the other methods see")
    layers = json.loads((target / REPORT_FILE).read_text("utf-8"))["layers"]
    run["layers"] = {row["name"]: float(f"{row['relative']:.6g}") for row in layers if row["relative"] is not None}
    return run


def run_theirs(c: Comparison, method: Method, python: pathlib.Path, folder: pathlib.Path, target: pathlib.Path, bits: int,
               seed: int, tokens: tuple[torch.Tensor, pathlib.Path], log: pathlib.Path) -> dict:
    """One checkpoint by a peer, in a process of its own; its seconds for quantizing, and those of the whole process."""
    options = ["--bits", str(bits), "--group-size", str(c.group_size), "--seed", str(seed)]
    options += ["--device", c.device] if c.device else []
    options += ["--trust-remote-code"] if c.trust_remote_code else []
    start = time.perf_counter()
    own = run_peer(method, python, folder, target, tokens[1], options, log)
    return {"quantize_seconds": own, "process_seconds": round(time.perf_counter() - start, 3),
            "calibration_sha256": digest(tokens[0])}


def tokens_of(c: Comparison, folder: pathlib.Path, hf_config, seed: int, work: pathlib.Path) -> tuple[torch.Tensor, pathlib.Path]:
    """The calibration tokens [samples, seq_len] of a seed, and the file that peers read them from; sampled once."""
    path = work / f"tokens-{seed}.safetensors"
    if not path.is_file():
        tokens = calibration_tokens(QuantizeConfig(**c.common(4, seed)), folder, hf_config)
        save_file({"input_ids": tokens.contiguous()}, path)
    return load_file(path)["input_ids"], path


def digest(tokens: torch.Tensor) -> str:
    """As in foem_report.json, so that both can be compared."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def rounded(values: Divergence, names: Sequence[str]) -> dict[str, list[float]]:
    """Per sequence, six digits: far below the differences between sequences, and a third of the file's size."""
    return {name: [float(f"{v:.6g}") for v in getattr(values, name).tolist()] for name in names}


@contextlib.contextmanager
def working_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder for checkpoints on the same disk as the results, gone afterwards."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FoemError(f"--out {out}: cannot be made ({error.strerror}); name a folder you may write to") from None
    with tempfile.TemporaryDirectory(prefix=".work-", dir=out) as folder:
        yield pathlib.Path(folder)


def slug(run: dict) -> str:
    """A file name for a run."""
    seed = "" if run["seed"] is None else f"-s{run['seed']}"
    return re.sub(r"[^\w.+=-]+", "_", f"{run['method']}-w{run['bits']}{seed}")


def load(path: pathlib.Path, settings: dict) -> dict:
    """The stored results, or empty ones. FoemError when they were made with other settings."""
    if not path.is_file():
        return {"settings": settings, "original": None, "runs": []}
    try:
        results = json.loads(path.read_text("utf-8"))
        found = results["settings"]
    except (ValueError, KeyError):
        raise FoemError(f"{path}: is no result of foem compare; name another --out") from None
    changed = [f"{key} {found.get(key)!r}, now {value!r}" for key, value in settings.items() if found.get(key) != value]
    if changed:
        raise FoemError(f"{path} was made with other settings ({'; '.join(changed)}); name another --out, or the same settings")
    return results


def store(path: pathlib.Path, results: dict) -> None:
    """Write so that an interruption leaves the earlier file whole. One key and one run a line: a file that a diff can show."""
    lines = [f' "{key}": {json.dumps(value)}' for key, value in results.items() if key != "runs"]
    lines.append(' "runs": [\n  ' + ",\n  ".join(json.dumps(run) for run in results["runs"]) + "\n ]")
    fresh = path.with_suffix(".new")
    fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    fresh.replace(path)


def is_done(results: dict, run: tuple[Method, int, int | None], commit: str, any_commit: bool) -> bool:
    method, bits, seed = run
    return any((r["method"], r["bits"], r["seed"]) == (method.text, bits, seed) and (any_commit or r["commit"] == commit)
               for r in results["runs"])


def add(results: dict, run: dict) -> None:
    """Append a run; one of the same method, bits and seed gives way."""
    same = ("method", "bits", "seed")
    results["runs"] = [r for r in results["runs"] if any(r[k] != run[k] for k in same)] + [run]
