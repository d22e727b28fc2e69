"""Does tensor parallelism change what a model says? Every form of linear that a rank cuts in its own way, through vLLM's engine.

    make parallel                       # eval/results/parallel.{json,md}; half an hour; keeps what this commit measured
    python eval/parallel.py --only odd-v1,phi3 --resume

tests/parallel_forms.py makes models whose decoder layers each have another form, rounded to nearest. vLLM serves each with one
process and with two, in float32 and in bfloat16. Two comparisons with transformers on the dequantized weights in float64:

* every decoder layer by itself: the engine's residual stream before a layer goes through transformers' layer, and what comes out
  is compared with the engine's stream behind it: root mean square of the difference. So each form has a number of its own.
* the whole model: log-probabilities of texts, and greedy tokens, of one process and two, of STAGED also of two pipeline stages.

The measure of both is what the dtype does to transformers itself on the same input; ROOM says how many times that is still equal.
Kernels multiply inputs by codes and subtract zero points times the sum of the inputs; where a grid is coarse (2 bits, one scale a
row) those terms are ten times as large as what they leave, and so are their roundings: `cancellation` takes them from the codes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from foem_eval import offline  # noqa: E402
from foem_eval.provenance import missing, of_commits, provenance  # noqa: E402
from parallel_forms import MODELS, Model, write  # noqa: E402

from foem_vllm import doctor  # noqa: E402
from foem_vllm.checkpoint import quantized_modules, read_linear  # noqa: E402
from foem_vllm.format import dequantize, read_config  # noqa: E402
from foem_vllm.models import find_blocks  # noqa: E402
from foem_vllm.stream import Weights  # noqa: E402

TEXTS, LENGTH, NEW_TOKENS = 4, 64, 16
RANKS = (1, 2)
STAGED = "odd-v1"
# With enforce_eager vLLM 0.32's CPU engine never runs the pass that allocates what later stages receive: an assertion fails in
# GPUModelRunner.sync_and_gather_intermediate_tensors, and the request ends as a KeyError in the scheduler's update_from_output.
STAGES = {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
# In float32 times the cancellation. Our kernels add up one group after the other, transformers' library in a tree: over 16 groups
# that is 4 times the error of the mean case. In bfloat16 both add up in float32 and round once. Fixed before the committed run;
# a rank's cut that is wrong by one group lies far outside (NOTES.md).
ROOM = {"float32": 4, "bfloat16": 2}


def token_ids() -> torch.Tensor:
    """int64 [TEXTS, LENGTH], any tokens of the smallest vocabulary: the weights are random too."""
    smallest = min(model.sizes.get("vocab_size", 4096) for model in MODELS.values())
    return torch.randint(1, smallest, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))


def serve(names: list[str], work: pathlib.Path, dtype: str, ranks: int, **options) -> list[dict]:
    """What vLLM says of the checkpoints, see foem_eval.offline, with "streams"."""
    out = pathlib.Path(tempfile.mkdtemp(dir=work))
    options = {"dtype": dtype, "new_tokens": NEW_TOKENS, "streams": True, "enable_prefix_caching": False,
               "tensor_parallel_size": ranks, **options}  # fmt: skip
    # vLLM binds a rank to a NUMA node each, and there may be one only.
    found = offline.serve(names, work, out, env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, **options)
    answers = [found[name] for name in names]
    for name, answer in zip(names, answers):
        if "logprobs" in answer and options["streams"]:
            answer["streams"] = load_file(out / f"{name}.safetensors")["streams"]
    return answers


def load(folder: pathlib.Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    eager = {"experts_implementation": "eager"}  # the only one that knows float64
    return AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=dtype, **eager).eval()


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """float64 [sequences, length - 1]: of every token given those before it."""
    return model(ids).logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


@torch.no_grad()
def layer_outputs(model: torch.nn.Module, ids: torch.Tensor, streams: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(float64 [layers, length, hidden], what every decoder layer makes of its own of `streams` [layers (+ 1), length, hidden];
    [length, experts] of every layer's router where there is one)."""
    outputs, routers, hooks = [], [], []

    def routed(router, arguments, output):
        routers.append((output[0] if isinstance(output, tuple) else output).reshape(streams.shape[1], -1).double())

    def replaced(stream):
        return lambda layer, arguments, named: ((stream[None].to(model.dtype), *arguments[1:]), named)

    def noted(layer, arguments, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).reshape(streams.shape[1:]).double())

    for layer, stream in zip(find_blocks(model)[1], streams):
        hooks += [layer.register_forward_pre_hook(replaced(stream), with_kwargs=True), layer.register_forward_hook(noted)]
        hooks += [m.gate.register_forward_hook(routed) for m in layer.modules() if hasattr(m, "experts") and hasattr(m, "gate")]
    model(ids[:1])
    for hook in hooks:
        hook.remove()
    return torch.stack(outputs), routers


def decided(exact: list[torch.Tensor], rounded: list[torch.Tensor], count: int, shape: torch.Size) -> torch.Tensor:
    """[layers, length]: 1 where rounding cannot change which `count` experts a token goes to, 0 at near ties of the router."""
    if not exact:
        return torch.ones(shape[:2], dtype=torch.float64)
    ordered = torch.stack(exact).sort(2, descending=True).values
    noise = (torch.stack(rounded) - torch.stack(exact)).abs().amax(2)
    return (ordered[..., count - 1] - ordered[..., count] > 2 * noise).double()


def cancellation(folder: pathlib.Path, layer: int) -> float:
    """How much larger the terms of a product are than what they leave, at least 1: of the worst linear of a decoder layer."""
    weights, config = Weights(folder), read_config(folder)
    found = [1.0]
    for module in quantized_modules(weights.files):
        if f".{layer}." in module:
            q, spec = read_linear(weights, module, config)
            codes, w = dequantize(q._replace(zeros=torch.zeros_like(q.scales)), spec), dequantize(q, spec)
            found.append(float(((codes.square().mean() + (codes - w).square().mean()) / w.square().mean()).sqrt()))
    return max(found)


def distances(found: torch.Tensor, exact: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[layers]: root mean square of the difference of [layers, length, hidden] over the tokens that are `counted`."""
    return ((found.double() - exact).square().mean(2) * counted).sum(1).div(counted.sum(1)).sqrt()


def compare(model: Model, folder: pathlib.Path, answers: dict, ids: torch.Tensor) -> dict:
    """The row of a model; numbers of layers are multiples of transformers' own. answers: {dtype: {ranks: what `serve` gave}}."""
    exact = load(folder, torch.float64)
    expected = logprobs(exact, ids)
    coarse = {form: cancellation(folder, layer) for layer, form in enumerate(model.forms)}
    row = {"cancellation": coarse}
    for dtype, by_ranks in answers.items():
        rounded = load(folder, getattr(torch, dtype))
        rounding = float((logprobs(rounded, ids) - expected).abs().max())
        far = {ranks: float((torch.tensor(a["logprobs"]).double() - expected).abs().max()) for ranks, a in by_ranks.items()}
        layers, ties = {}, 0
        for ranks, answer in by_ranks.items():
            right, routers = layer_outputs(exact, ids, answer["streams"])
            coarser, others = layer_outputs(rounded, ids, answer["streams"])
            counted = decided(routers, others, getattr(exact.config, "num_experts_per_tok", 0), right.shape)
            ties += int((1 - counted).sum())
            multiples = distances(answer["streams"][1:], right, counted) / distances(coarser, right, counted)
            layers[ranks] = dict(zip(model.forms, multiples.tolist(), strict=True))
        row[dtype] = {"rounding": rounding, "difference": far, "layers": layers, "ties": ties,
                      "same_greedy": len({json.dumps(a["greedy"]) for a in by_ranks.values()}) == 1}  # fmt: skip
    row["equal"] = row["float32"]["same_greedy"] and all(within(row[dtype], dtype, coarse) for dtype in answers)
    return row


def room(dtype: str, cancelled: float) -> float:
    """How many times what the dtype does to transformers counts as equal."""
    return ROOM[dtype] * (cancelled if dtype == "float32" else 1)


def within(row: dict, dtype: str, coarse: dict[str, float]) -> bool:
    layers = all(multiple <= room(dtype, coarse[form]) for found in row["layers"].values() for form, multiple in found.items())
    return layers and max(row["difference"].values()) <= room(dtype, max(coarse.values())) * row["rounding"]


def run(name: str, work: pathlib.Path, ids: torch.Tensor) -> dict:
    """The row of one model: write, serve four times or five, compare."""
    model = MODELS[name]
    folder = write(work / name, model)
    answers = {dtype: {ranks: serve([name], work, dtype, ranks, **model.options)[0] for ranks in RANKS} for dtype in ROOM}
    refused = [f"{dtype}, {ranks}: {answer['refused']}" for dtype, found in answers.items() for ranks, answer in found.items()
               if "refused" in answer]  # fmt: skip
    row = {"refused": "; ".join(refused)} if refused else compare(model, folder, answers, ids)
    together = model.options.get("enable_expert_parallel", False)
    served = [doctor.examine(str(folder), ranks, "cpu", expert_parallel=together)["ours"]["served"] for ranks in RANKS]
    row["foretold"] = all(known != bool(refused) for known in served)
    if name == STAGED:
        row["stages"] = staged(serve([name], work, "float32", 1, streams=False, **STAGES)[0], answers["float32"][1])
    return row


def staged(answer: dict, alone: dict) -> dict | str:
    """How far two pipeline stages are from one process, or why vLLM did not serve them."""
    if "refused" in answer:
        return answer["refused"]
    far = (torch.tensor(answer["logprobs"]) - torch.tensor(alone["logprobs"])).abs().max()
    return {"difference": float(far), "same_greedy": answer["greedy"] == alone["greedy"]}


def by_form(rows: dict[str, dict], form: str) -> str:
    """A table's line: of the models that have a form, the one that comes nearest to the bound of each column."""
    having = [row for name, row in rows.items() if form in MODELS[name].forms and "refused" not in row]
    cells = []
    for dtype in ROOM:
        for ranks in RANKS:
            found = [(row[dtype]["layers"][str(ranks)][form], room(dtype, row["cancellation"][form])) for row in having]
            cells.append("{:.2f} of {:.3g}".format(*max(found, key=lambda pair: pair[0] / pair[1])))
    return f"| {form} | {len(having)} | " + " | ".join(cells) + " |"


def by_model(name: str, row: dict) -> str:
    title = f"{name} ({len(MODELS[name].forms)} layers)"
    if "refused" in row:
        return f"| {title} | | | | | | | | {row['refused']} | {'yes' if row['foretold'] else '**no**'} |"
    cells = [f"{value:.1e}" for dtype in ROOM for value in (*row[dtype]["difference"].values(), row[dtype]["rounding"])]
    greedy = "same" if row["float32"]["same_greedy"] else "**others**"
    foretold = "yes" if row["foretold"] else "**no**"
    return f"| {title} | {' | '.join(cells)} | {greedy} | {'equal' if row['equal'] else '**different**'} | {foretold} |"


def say_staged(found: dict | str | None) -> str:
    if not isinstance(found, dict):
        return found or "not measured"
    greedy = "the same" if found["same_greedy"] else "**other**"
    return f"log-probabilities differ by at most {found['difference']:.1e}, {greedy} greedy tokens"


def table(results: dict) -> str:
    rows = {name: row for name, row in results["rows"].items() if name in MODELS}
    forms = list(dict.fromkeys(form for name in rows for form in MODELS[name].forms))
    made = f"{of_commits(rows)}, {results['date']}, vLLM {results['versions']['vllm']}, {results['machine']}"
    return "\n".join([
        f"`{results['command']}`, {made}.", "",
        "Whole models: largest difference of a log-probability from transformers on the dequantized weights in float64, in nats, "
        "and what the dtype does to transformers. Forms, one a decoder layer: how far a layer is from transformers' in float64 "
        "on the same input, as a multiple of what the dtype does to transformers' layer. Equal: in bfloat16 up to "
        f"{ROOM['bfloat16']} times that; in float32 up to {ROOM['float32']} times, and times the size of the terms of a product "
        "in units of what they leave (`cancellation`), and the same greedy tokens of one process and two. Tokens at which "
        "rounding may change which experts the router chooses are left out of a layer: "
        f"{sum(row[dtype].get('ties', 0) for row in rows.values() for dtype in ROOM if dtype in row)} in all. Foretold: what "
        "`foem doctor` says of one rank and of two is what happened.", "",
        "| | float32: one process | two | transformers | bfloat16: one | two | transformers | greedy tokens | | foretold |",
        "|---|---|---|---|---|---|---|---|---|---|", *(by_model(name, row) for name, row in rows.items()), "",
        f"Two pipeline stages and one process, {STAGED}, float32: {say_staged(rows.get(STAGED, {}).get('stages'))}.", "",
        "| form | models | float32: one process | two | bfloat16: one | two |", "|---|---|---|---|---|---|",
        *(by_form(rows, form) for form in forms), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="models, comma-separated")
    parser.add_argument("--resume", action="store_true", help="keep what other commits measured")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "eval/results/parallel.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {"rows": {}}
    asked = arguments.only.split(",") if arguments.only else list(MODELS)
    if unknown := [n for n in asked if n not in MODELS]:
        sys.exit(f"parallel: no model {', '.join(unknown)}; choose from {', '.join(MODELS)}")
    ids, made_by = token_ids(), provenance()
    with tempfile.TemporaryDirectory(prefix="foem-parallel-") as work:
        save_file({"texts": ids}, pathlib.Path(work) / "tokens.safetensors")
        for name in missing(asked, results["rows"], made_by["commit"], arguments.resume):
            results["rows"][name] = run(name, pathlib.Path(work), ids) | {"commit": made_by["commit"]}
            results |= made_by | {"command": "make parallel"}
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(arguments.results.read_text())  # keys as strings
    text = table(results)
    arguments.results.with_suffix(".md").write_text(text)
    print(text)
    sys.exit(any(not (row.get("equal") and row["foretold"]) for row in results["rows"].values()))


if __name__ == "__main__":
    main()
