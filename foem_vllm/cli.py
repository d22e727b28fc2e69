"""`foem`: quantize, inspect, doctor, analyze, eval, compare."""

from __future__ import annotations

import json
import pathlib
import signal
import sys
from typing import Annotated

import typer

from foem_vllm import __version__, calibration
from foem_vllm.errors import FoemError
from foem_vllm.pipeline import quantize as run_quantize
from foem_vllm.recipe import AUTO, DEFAULT_PRESET, METHODS, PRESETS, QuantizeConfig

app = typer.Typer(
    name="foem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize causal LMs to GPTQ-format INT4 with FOEM, look at the result, measure it.",
)
DEFAULTS = QuantizeConfig()


def _number_or_auto(value: str) -> float | str:
    if value == AUTO:
        return value
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor {AUTO}") from None


def _method(*flags: str, **how) -> typer.models.OptionInfo:
    return typer.Option(*flags, rich_help_panel="Method", **how)


def _calibration(*flags: str, **how) -> typer.models.OptionInfo:
    return typer.Option(*flags, rich_help_panel="Calibration", **how)


def _auto(help: str) -> typer.models.OptionInfo:
    return _method(help=help, parser=_number_or_auto, metavar="NUMBER|auto")


# What several commands take.
Model = Annotated[str, typer.Argument(help="Model folder, or hub name such as Qwen/Qwen3-0.6B.")]
GroupSize = Annotated[int, _method(help="Columns that share a scale; -1 for a whole row.")]
Source = Annotated[str, _calibration("--calibration", help="Hub data set, or a .txt, .jsonl, .json.gz or .parquet file.")]
Samples = Annotated[int, _calibration(help="Sequences.")]
SeqLen = Annotated[int, _calibration(help="Tokens a sequence.")]
TextColumn = Annotated[str, _calibration(help="Field or column that holds the text.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU where there is one.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no tables.")]


def _version(value: bool) -> None:
    if value:
        print(f"foem-vllm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
):
    pass


@app.command()
def quantize(
    model: Model,
    out: Annotated[pathlib.Path, typer.Argument(help="New folder for the checkpoint.")],
    preset: Annotated[
        str | None, _method(help=f"{' | '.join(PRESETS)}; default {DEFAULT_PRESET} unless a method is named.")
    ] = None,
    method: Annotated[str | None, _method(help=f"As in its paper, nothing more: {' | '.join(METHODS)}")] = None,
    bits: Annotated[int, _method(help="2, 3, 4 or 8.")] = DEFAULTS.bits,
    group_size: GroupSize = DEFAULTS.group_size,
    asym: Annotated[bool, _method("--asym", help="Asymmetric grid, with zero points.")] = False,
    act_order: Annotated[
        str | None, _method(help="none; group (GAR: better weights, no cost in serving); static; full (desc_act).")
    ] = None,
    alpha: Annotated[
        float | None, _auto("Weight of the input-drift term (gptaq, foem+gptaq: 0.25), or auto: per layer, on held-out text.")
    ] = None,
    beta: Annotated[float | None, _auto("Weight of the first-order term (foem, foem+gptaq: 0.2), or auto.")] = None,
    damp: Annotated[float | None, _auto("Damping, as a fraction of the Hessian's mean diagonal (0.05), or auto.")] = None,
    form: Annotated[
        str, _method(help="First-order term as published (by the authors' code) or consistent (every column).")
    ] = DEFAULTS.form,
    grid: Annotated[str | None, _method(help="Range of a group: minmax, or search (better weights, no cost in serving).")] = None,
    refit: Annotated[bool | None, _method("--refit/--no-refit", help="Scales once more when all codes are known.")] = None,
    descent: Annotated[
        bool | None,
        _method("--descent/--no-descent", help="Codes once more, one step at a time, in layers where held-out text agrees."),
    ] = None,
    correct: Annotated[
        float | None,
        _auto("Aim at the original model's outputs although the inputs have drifted: 0 to 1, or auto: per layer."),
    ] = None,
    guided: Annotated[
        bool | None,
        _method("--guided/--no-guided", help="Weight tokens by the gradient of the task loss: one backward pass over the text."),
    ] = None,
    finetune_scales: Annotated[
        bool | None,
        _method(
            "--finetune-scales/--no-finetune-scales",
            help="Tune the scales against the original model's logits, codes fixed; kept if held-out text agrees.",
        ),
    ] = None,
    calibration_source: Source = calibration.DEFAULT,
    split: Annotated[str, _calibration(help="Split of a hub data set.")] = DEFAULTS.split,
    text_column: TextColumn = DEFAULTS.text_column,
    chat_template: Annotated[
        bool, _calibration("--chat-template", help="Put every document into the model's chat template.")
    ] = False,
    samples: Samples = DEFAULTS.samples,
    seq_len: SeqLen = DEFAULTS.seq_len,
    seed: Annotated[int, _calibration(help="Which part of the text is used.")] = DEFAULTS.seed,
    device: Device = None,
    checkpoint_format: Annotated[str | None, typer.Option("--format", help="gptq or gptq_v2; default: by symmetry.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Regular expression of linears to leave as they are; repeatable.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model into a GPTQ-format checkpoint that vLLM serves."""
    config = QuantizeConfig(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=not asym,
        act_order=act_order,
        alpha=alpha,
        beta=beta,
        damping=damp,
        form=form,
        grid=grid,
        calibration=calibration_source,
        split=split,
        text_column=text_column,
        chat_template=chat_template,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        checkpoint_format=checkpoint_format,
        exclude=exclude or [],
        trust_remote_code=trust_remote_code,
        preset=preset,
        refit=refit,
        descent=descent,
        correct=correct,
        guided=guided,
        finetune_scales=finetune_scales,
    )
    report = run_quantize(model, out, config, progress=not quiet)
    notes = [f"{layer.name}: {note}" for layer in report.layers for note in layer.notes]
    for note in notes[:10]:
        print(f"note: {note}", file=sys.stderr)
    if len(notes) > 10:
        print(f"note: {len(notes) - 10} more in {out}/foem_report.json", file=sys.stderr)
    if not quiet:
        from foem_vllm.checkpoint import storage

        size = storage(out)
        print(
            f"{out}: {len(report.layers)} linears, {size['bits_per_weight']:.2f} bits per weight, {size['bytes'] / 1e6:.1f} MB, "
            f"{report.seconds['total']:.1f} s"
        )
        print(f"next: vllm serve {out} --quantization foem")


@app.command()
def inspect(
    folder: Annotated[pathlib.Path, typer.Argument(help="Checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what is in a checkpoint: format, layers, their errors, bits per weight, size."""
    from foem_vllm.checkpoint import describe
    from foem_vllm.report import kind_table, layer_table

    content = describe(folder)
    if as_json:
        print(json.dumps(content, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(
        f"{folder}: {content['bytes'] / 1e6:.1f} MB, {content['bits_per_weight']:.2f} bits per quantized weight, "
        f"{len(content['layers'])} quantized linears, checkpoint_format {content['checkpoint_format']}",
        soft_wrap=True,
    )
    if content["recipe"]:
        console.print("recipe: " + ", ".join(f"{k}={v}" for k, v in content["recipe"].items() if k != "sha256"), soft_wrap=True)
    if content["tuning"]:
        before, after = content["tuning"]["held_out_kl_before"], content["tuning"]["held_out_kl_after"]
        console.print(f"scales tuned: KL to the original on held-out calibration text {before:.5f} -> {after:.5f} nats a token")
    if content["by_kind"]:
        console.print(kind_table(content["by_kind"]))
    console.print(layer_table(content["layers"], "layers"))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name; config and headers are read, no weights.")],
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or an NVIDIA GPU that need not be here: sm_90.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of one rank; default: what the device has.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what will run each layer, what fits, what is wrong, and whether stock vLLM serves it. Exit code 1 on problems, 2 if it
    is no checkpoint."""
    from foem_vllm.doctor import NotACheckpoint, examine
    from foem_vllm.doctor_report import print_report

    try:
        found = examine(model, tensor_parallel_size, device, memory and int(memory * 1e9))
    except NotACheckpoint as error:
        print(f"foem: error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(json.dumps(found, indent=2)) if as_json else print_report(found)
    raise typer.Exit(bool(found["problems"]))


@app.command()
def analyze(
    folder: Annotated[pathlib.Path, typer.Argument(metavar="OUT", help="Quantized checkpoint folder.")],
    source: Annotated[str, typer.Option(help="The model it was made from: folder or hub name.")],
    text: Annotated[str, typer.Option(help="Held-out text: a .txt, .jsonl, .json.gz or .parquet file, or a hub data set.")],
    text_column: TextColumn = DEFAULTS.text_column,
    sequences: Annotated[int, typer.Option(help="Sequences; more of them narrow the intervals.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    seed: Annotated[int, typer.Option(help="Which part of the text is used.")] = 0,
    output: Annotated[pathlib.Path, typer.Option(help="Folder for analysis.json and analysis.png.")] = pathlib.Path(
        "foem_analysis"
    ),
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Split the loss change of every quantized linear into first order, second order and remainder, on held-out text."""
    from foem_vllm import analysis_report
    from foem_vllm.analyze import analyze as run

    analysis_report.prepare(output)
    content = run(folder, source, text, sequences, seq_len, seed, text_column, device, trust_remote_code, progress=not quiet)
    analysis_report.write(content, output)
    if not quiet:
        analysis_report.print_tables(content)
    for line in content["verdict"]:
        print(line)
    print(f"{output}/analysis.json, {output}/analysis.png: {content['seconds']:.0f} s")


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders or hub names: quantized, original, several for a table.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "wikitext",
    include_path: Annotated[pathlib.Path | None, typer.Option(help="Folder with more lm-eval tasks.")] = None,
    max_model_len: Annotated[int, typer.Option(help="Context; perplexities of different contexts do not compare.")] = 2048,
    backend: Annotated[str, typer.Option(help="vllm or hf.")] = "vllm",
    limit: Annotated[int | None, typer.Option(help="Only so many documents.")] = None,
) -> None:
    """Measure models with lm-eval and print one table."""
    from foem_eval.evaluate import evaluate as run
    from foem_eval.evaluate import print_table

    from foem_vllm.checkpoint import storage

    print_table(
        run(
            models,
            tasks,
            include_path=include_path,
            max_model_len=max_model_len,
            backend=backend,
            limit=limit,
            storage=lambda m: storage(pathlib.Path(m)) if pathlib.Path(m).is_dir() else {},
        )
    )


@app.command()
def compare(
    model: Model,
    out: Annotated[pathlib.Path, typer.Option(help="Folder for results.json, tables and plots; an earlier one is continued.")],
    evaluation: Annotated[
        str | None, typer.Option(help="Held-out text, a .txt or .jsonl file; needed.", rich_help_panel="Measuring")
    ] = None,
    methods: Annotated[
        list[str],
        typer.Option(
            help="Comma separated or repeated: rtn, gptq, gptaq, foem, foem+gptaq, fast, balanced, best, any of these with "
            "options (foem:beta=0.1,act_order=group); gptqmodel:gptq (or gptaq, foem, foem+gptaq); autoround (:iters=50)."
        ),
    ] = ["rtn,gptq,foem"],  # noqa: B006  typer copies it
    bits: Annotated[str, typer.Option(help="Comma separated: 2, 3, 4, 8.")] = "4",
    group_size: GroupSize = DEFAULTS.group_size,
    seeds: Annotated[str, typer.Option(help="Choices of calibration text, comma separated.")] = "0",
    baseline: Annotated[
        str | None, typer.Option(help="Method of the paired differences and ratios of KL, with bootstrap intervals.")
    ] = None,
    calibration_source: Source = calibration.DEFAULT,
    samples: Samples = DEFAULTS.samples,
    seq_len: SeqLen = DEFAULTS.seq_len,
    sequences: Annotated[
        int | None, typer.Option(help="A seeded choice of so many; default: the whole split.", rich_help_panel="Measuring")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.", rich_help_panel="Measuring")] = 512,
    split: Annotated[
        str,
        typer.Option(
            help="Part of the held-out text: all; dev, a seeded choice of --dev-sequences; test, all others. Tune on dev.",
            rich_help_panel="Measuring",
        ),
    ] = "all",
    dev_sequences: Annotated[int, typer.Option(help="Size of the dev part.", rich_help_panel="Measuring")] = 128,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    peers_folder: Annotated[
        pathlib.Path | None,
        typer.Option(help="Where GPTQModel's and AutoRound's environments are, or go; default: ~/.cache/foem-vllm/peers."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints, in OUT/checkpoints.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Also keep earlier results that another commit made.")] = False,
) -> None:
    """Quantize with several methods, peers among them, and measure all on held-out text: tables, plots, paired intervals."""
    try:
        from foem_eval.compare import Comparison
        from foem_eval.compare import compare as run
        from foem_eval.peers.environments import FOLDER
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise FoemError(f"foem compare needs {package}, which is not installed; pip install 'foem-vllm[eval]'") from None
    run(
        Comparison(
            model=model,
            evaluation=evaluation,
            group_size=group_size,
            calibration=calibration_source,
            samples=samples,
            seq_len=seq_len,
            sequences=sequences,
            sequence_length=sequence_length,
            split=split,
            dev_sequences=dev_sequences,
            methods=methods,
            bits=integers("--bits", bits),
            seeds=integers("--seeds", seeds),
            baseline=baseline,
            out=out,
            device=device,
            trust_remote_code=trust_remote_code,
            peers_folder=peers_folder or FOLDER,
            keep=keep,
            resume=resume,
        )
    )


def integers(option: str, text: str) -> list[int]:
    """The different numbers of a comma-separated list, in its order."""
    try:
        return list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise FoemError(f"{option} {text}: not a comma-separated list of whole numbers, as in {option} 4,3") from None


def main() -> None:
    """Entry point: a FoemError is one line on stderr and exit code 1; anything else is a bug and keeps its traceback."""
    # A polite kill unwinds like Ctrl-C, so that no half-written folder is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except FoemError as error:
        print(f"foem: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
