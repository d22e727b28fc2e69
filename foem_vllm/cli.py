"""`foem`: quantize, inspect, doctor, push, analyze, eval, compare."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import sys
from typing import Annotated

import typer

from foem_vllm import __version__, calibration, cli_measure, command, distributed, preflight
from foem_vllm.cli_options import (
    DEFAULTS,
    Device,
    GroupSize,
    Model,
    Quiet,
    Samples,
    SeqLen,
    Source,
    TextColumn,
    TrustRemoteCode,
    auto_option,
    calibration_option,
    method_option,
)
from foem_vllm.errors import FoemError
from foem_vllm.pipeline import quantize as run_quantize
from foem_vllm.recipe import DEFAULT_PRESET, METHODS, PRESETS, QuantizeConfig

app = typer.Typer(
    name="foem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize causal LMs to GPTQ-format INT4 with FOEM, look at the result, measure it.",
)


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
        str | None, method_option(help=f"{' | '.join(PRESETS)}; default {DEFAULT_PRESET} unless a method is named.")
    ] = None,
    method: Annotated[str | None, method_option(help=f"As in its paper, nothing more: {' | '.join(METHODS)}")] = None,
    bits: Annotated[int, method_option(help="2, 3, 4 or 8.")] = DEFAULTS.bits,
    bits_per_weight: Annotated[
        float | None,
        method_option(help="Bits chosen for each linear, where they lose least; so many on average, scales included (3.5)."),
    ] = None,
    group_size: GroupSize = DEFAULTS.group_size,
    asym: Annotated[bool, method_option("--asym", help="Asymmetric grid, with zero points.")] = False,
    act_order: Annotated[
        str | None, method_option(help="none; group (GAR: better weights, no cost in serving); static; full (desc_act).")
    ] = None,
    alpha: Annotated[
        float | None,
        auto_option("Weight of the input-drift term (gptaq, foem+gptaq: 0.25), or auto: per layer, on held-out text."),
    ] = None,
    beta: Annotated[float | None, auto_option("Weight of the first-order term (foem, foem+gptaq: 0.2), or auto.")] = None,
    damp: Annotated[float | None, auto_option("Damping, as a fraction of the Hessian's mean diagonal (0.05), or auto.")] = None,
    form: Annotated[
        str, method_option(help="First-order term as published (by the authors' code) or consistent (every column).")
    ] = DEFAULTS.form,
    grid: Annotated[
        str | None, method_option(help="Range of a group: minmax, or search (better weights, no cost in serving).")
    ] = None,
    refit: Annotated[bool | None, method_option("--refit/--no-refit", help="Scales once more when all codes are known.")] = None,
    descent: Annotated[
        bool | None,
        method_option(
            "--descent/--no-descent", help="Codes once more, one step at a time, in layers where held-out text agrees."
        ),
    ] = None,
    correct: Annotated[
        float | None,
        auto_option("Aim at the original model's outputs although the inputs have drifted: 0 to 1, or auto: per layer."),
    ] = None,
    guided: Annotated[
        bool | None,
        method_option(
            "--guided/--no-guided", help="Weight tokens by the gradient of the task loss: one backward pass over the text."
        ),
    ] = None,
    finetune_scales: Annotated[
        bool | None,
        method_option(
            "--finetune-scales/--no-finetune-scales",
            help="Tune the scales against the original model's logits, codes fixed; kept if held-out text agrees.",
        ),
    ] = None,
    calibration_source: Source = calibration.DEFAULT,
    split: Annotated[str, calibration_option(help="Split of a hub data set.")] = DEFAULTS.split,
    text_column: TextColumn = DEFAULTS.text_column,
    chat_template: Annotated[
        bool, calibration_option("--chat-template", help="Put every document into the model's chat template.")
    ] = False,
    samples: Samples = DEFAULTS.samples,
    seq_len: SeqLen = DEFAULTS.seq_len,
    seed: Annotated[int, calibration_option(help="Which part of the text is used.")] = DEFAULTS.seed,
    device: Device = None,
    activation_memory: Annotated[
        float | None,
        typer.Option(help="GB of host memory for activations, the rest waits in a file; default: half of what is free."),
    ] = None,
    checkpoint_format: Annotated[str | None, typer.Option("--format", help="gptq or gptq_v2; default: by symmetry.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Regular expression of linears to leave as they are; repeatable.")
    ] = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Quantize the output head too; one that is tied to the embedding is untied.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    redo: Annotated[
        str | None,
        typer.Option(help="OUT is finished: quantize again, as the options say, the linears that this regular expression finds."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be quantized, and the memory, disk and time it needs.")
    ] = False,
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
        activation_memory=activation_memory,
        checkpoint_format=checkpoint_format,
        exclude=exclude or [],
        lm_head=lm_head,
        trust_remote_code=trust_remote_code,
        preset=preset,
        refit=refit,
        descent=descent,
        correct=correct,
        guided=guided,
        finetune_scales=finetune_scales,
        bits_per_weight=bits_per_weight,
    )
    if dry_run:
        preflight.print_plan(preflight.examine(model, out, config))
        return
    report = run_quantize(model, out, config, progress=not quiet, resume=resume, redo=redo)
    if distributed.rank() != 0:
        return
    notes = [f"{layer.name}: {note}" for layer in report.layers for note in layer.notes]
    for note in notes[:10]:
        print(f"note: {note}", file=sys.stderr)
    if len(notes) > 10:
        print(f"note: {len(notes) - 10} more in {out}/foem_report.json", file=sys.stderr)
    if not quiet:
        from foem_vllm.checkpoint import storage

        if report.chosen_bits:
            from rich.console import Console

            from foem_vllm.report import bits_table

            Console().print(bits_table(report.chosen_bits))
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
    html: Annotated[pathlib.Path | None, typer.Option(help="Write the report of `foem quantize` as a page, here.")] = None,
) -> None:
    """Show what is in a checkpoint: format, layers, their errors, bits per weight, size."""
    from foem_vllm import html_report
    from foem_vllm.checkpoint import describe, read_report
    from foem_vllm.report import kind_table, layer_table, tuning_told

    if html:
        html_report.write(read_report(folder), html)
        print(f"{html}: {html.stat().st_size / 1e3:.0f} kB")
        return
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
        console.print("{1}: {0}".format(*tuning_told(content["tuning"])), soft_wrap=True)
    if content["by_kind"]:
        console.print(kind_table(content["by_kind"]))
    console.print(layer_table(content["layers"], "layers"))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name; config and headers are read, no weights.")],
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or an NVIDIA GPU that need not be here: sm_90.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of one rank; default: what the device has.")] = None,
    enable_expert_parallel: Annotated[bool, typer.Option("--enable-expert-parallel", help="Ranks hold whole experts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what will run each layer, what fits, what is wrong, and whether stock vLLM serves it. Exit code 1 on problems, 2 if it
    is no checkpoint."""
    from foem_vllm.doctor import NotACheckpoint, examine
    from foem_vllm.doctor_report import print_report

    try:
        found = examine(model, tensor_parallel_size, device, memory and int(memory * 1e9), enable_expert_parallel)
    except NotACheckpoint as error:
        print(f"foem: error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(json.dumps(found, indent=2)) if as_json else print_report(found)
    raise typer.Exit(bool(found["problems"]))


@app.command()
def push(
    folder: Annotated[pathlib.Path, typer.Argument(metavar="OUT", help="Checkpoint folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made where it is missing; default: main.")] = None,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, after a check that it is whole."""
    from foem_vllm import hub

    print(hub.push(folder, repo, private, revision))


app.command()(cli_measure.analyze)
app.command("eval")(cli_measure.evaluate)
app.command()(cli_measure.compare)


def main() -> None:
    """Entry point: a FoemError is one line on stderr and exit code 1; anything else is a bug and keeps its traceback."""
    # A polite kill unwinds like Ctrl-C, so that no half-written folder is left behind.
    command.words[:] = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if command.words[:1] == ["quantize"] and "--trust-remote-code" not in command.words:
        sys.modules.setdefault("sklearn", None)  # transformers imports it, 0.7 s, for a way of generating; None: not to be had
    try:
        app()
    except FoemError as error:
        print(f"foem: error: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if command.words[:1] == ["quantize"] and not end.code and distributed.size() == 1:
            leave()
        raise


def leave() -> None:
    """End this process, all of whose files are closed, at once: taking torch's modules apart takes a second."""
    with contextlib.suppress(AttributeError, OSError):  # where stdout is closed, or takes no more, Python ends as it always does
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
