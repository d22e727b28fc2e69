"""Commands of `foem` that measure: analyze, eval, compare."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from foem_vllm import calibration
from foem_vllm.cli_options import DEFAULTS, Device, GroupSize, Model, Quiet, Samples, SeqLen, Source, TextColumn, TrustRemoteCode
from foem_vllm.errors import FoemError


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
