"""Which checkpoints of GPTQModel and AutoRound are served: by this project's plugin, by stock vLLM, and as `foem doctor` says?

    python -m foem_eval.peers.serving_matrix [--work out/serving_matrix] [--peers-folder out/peers] [--only REGEX]

Every form of the format that GPTQModel writes (and a few that it writes and we do not read), from the first two layers of the
demo's model with lm_head of its own. What a checkpoint means is what GPTQModel's own torch dequantization computes in float32.
Ours is served in float32, where nothing but the order of sums differs. Stock vLLM takes 16 bits only, and on some CPUs its kernel
rounds more than bfloat16 does; it counts as right where its answers are nearer than they would be with any one linear read a step
off (see `misread`). Every step keeps its results in --work and is continued after an interruption, answers for each commit apart;
all of it takes about half an hour on two cores.
"""
from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from foem_eval import processes
from foem_eval.dequantized import load_dequantized
from foem_eval.peers import environments
from foem_eval.provenance import provenance
from foem_vllm import calibration, doctor
from foem_vllm.checkpoint import quantized_modules, read_linear
from foem_vllm.errors import FoemError
from foem_vllm.format import dequantize, read_config
from foem_vllm.stream import Weights

ROOT = pathlib.Path(__file__).resolve().parents[3]
TINYLM, DATA = ROOT / "eval/tinylm/qwen3", ROOT / "eval/tinylm/data"
EXACT = 1e-4  # nats: five times the largest difference by the order of sums; a wrong zero point or group makes tenths
ENGINES = {  # name -> (LLM options, environment)
    "ours": ({"quantization": "foem", "dtype": "float32"}, {}),
    "stock": ({"quantization": "gptq", "dtype": "bfloat16"}, {"VLLM_PLUGINS": ""}),
}


def plan() -> list[dict]:
    """[{"name", "model", "config"}]: the full product of width, symmetry, order, group and head, then what else a config can
    say."""
    jobs = []

    def add(bits: int, sym: bool, group: int, order: bool = False, name: str = "", model: str = "model", **more) -> None:
        words = [f"w{bits}", "sym" if sym else "asym", f"g{group}" if group > 0 else "row", "desc" if order else "", name]
        # GPTQModel's default reorders columns by groups, which it refuses to do with one group.
        config = {"bits": bits, "sym": sym, "group_size": group, "desc_act": order, "format": "gptq",
                  **({"act_group_aware": False} if group == -1 else {}), **more}
        jobs.append({"name": "-".join(filter(None, words)), "model": model, "config": config})

    for bits, sym, order, group in itertools.product((2, 3, 4, 8), (True, False), (False, True), (128, 32, -1)):
        add(bits, sym, group, order)
        add(bits, sym, group, order, name="head", lm_head=True)
    for bits, sym in itertools.product((2, 3, 4, 8), (True, False)):
        add(bits, sym, 128, name="v2", format="gptq_v2")
    add(4, False, 32, True, "v2", format="gptq_v2")
    add(4, False, -1, name="v2-head", format="gptq_v2", lm_head=True)
    for bits, sym, group in ((4, True, 128), (4, False, 32), (8, True, 32)):
        add(bits, sym, group, True, "static", static_groups=True)
    add(4, True, 128, name="noreorder", act_group_aware=False)
    for group in (16, 64, 256):
        add(4, True, group)
    add(4, True, 64, name="excluded", dynamic={r"-:.*layers\.0\.mlp": {}})
    add(4, True, 64, name="mixed", dynamic={r"+:.*layers\.1\.self_attn": {"bits": 8}})
    add(4, True, 64, name="mixed-inside-qkv", dynamic={r"+:.*\.q_proj": {"bits": 8}})
    add(4, True, 128, name="planar", format="gptq_p")
    add(4, False, 128, name="planar", format="gptq_p")
    add(3, True, 128, name="planar", format="gptq_p")
    add(5, True, 128, name="planar", format="gptq_p")
    add(4, True, -1, name="reorder", act_group_aware=True)
    for bits, sym, group, order in ((4, True, 128, False), (4, False, 32, True), (3, False, 64, False), (8, True, -1, False)):
        add(bits, sym, group, order, name="moe", model="moe")
    return jobs


AUTOROUND = {"autoround-w4-sym-g128": ("--bits", "4"), "autoround-w2-sym-g32": ("--bits", "2", "--group-size", "32"),
             "autoround-w4-asym-g128": ("--bits", "4", "--asym")}


def write_model(folder: pathlib.Path) -> None:
    """The first two layers of tinylm with an lm_head of its own: GPTQModel quantizes none that is tied."""
    folder.mkdir(parents=True)
    tensors = load_file(TINYLM / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not re.search(r"layers\.([2-9]|\d\d)", name)}
    kept["lm_head.weight"] = kept["model.embed_tokens.weight"].clone()
    config = json.loads((TINYLM / "config.json").read_text())
    config.update(num_hidden_layers=2, layer_types=config["layer_types"][:2], tie_word_embeddings=False)
    for path in TINYLM.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def write_moe(model: pathlib.Path, folder: pathlib.Path, experts: int = 4) -> None:
    """`model` as a Qwen3-MoE: every expert is its MLP with a noise of its own, routers are random."""
    shutil.copytree(model, folder)
    config, r, kept = json.loads((model / "config.json").read_text()), torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        router = torch.randn(experts, config["hidden_size"], generator=r) * 0.1
        kept[f"model.layers.{layer}.mlp.gate.weight"] = router.bfloat16()
    for name, t in load_file(model / "model.safetensors").items():
        if ".mlp." not in name:
            kept[name] = t
            continue
        for expert in range(experts):
            noise = torch.randn(t.shape, generator=r) * 0.3 * t.float().std()
            kept[name.replace(".mlp.", f".mlp.experts.{expert}.")] = (t.float() + noise).to(t.dtype)
    config.update(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=experts, num_experts_per_tok=2,
                  moe_intermediate_size=config["intermediate_size"], norm_topk_prob=True, decoder_sparse_step=1,
                  mlp_only_layers=[])  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def write_tokens(path: pathlib.Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINYLM)
    sets = {name: calibration.sample_tokens(calibration.read_texts(str(DATA / f"{file}.jsonl")), tokenizer, count, 128, 0)
            for name, file, count in (("calibration", "calibration", 32), ("texts", "evaluation", 4))}
    save_file({name: t.contiguous() for name, t in sets.items()}, path)


def write_checkpoints(work: pathlib.Path, jobs: list[dict], peers: pathlib.Path) -> None:
    """FOLDER/name and FOLDER/name.json of every job, and of AutoRound's (see gptqmodel_matrix.py)."""
    if not (work / "model").is_dir():
        write_model(work / "model")
        write_tokens(work / "tokens.safetensors")
        save_file({"input_ids": load_file(work / "tokens.safetensors")["calibration"]}, work / "calibration.safetensors")
    if not (work / "moe").is_dir():
        write_moe(work / "model", work / "moe")
    for name, options in AUTOROUND.items():
        if not (work / name).is_dir():
            command = [environments.ensure("autoround", peers), environments.HERE / "autoround_quantize.py", work / "model",
                       work / name, work / "calibration.safetensors", "--iters", "20", *options]
            processes.run([str(c) for c in command], work / f"{name}.log")
    (work / "jobs.json").write_text(json.dumps([*jobs, *({"name": name, "config": None} for name in AUTOROUND)]))
    python = environments.ensure("gptqmodel", peers)
    processes.run([str(python), str(environments.HERE / "gptqmodel_matrix.py"), str(work)], work / "gptqmodel.log",
                  env=environments.environment())


def serve(work: pathlib.Path, engine: str, names: list[str], commit: str) -> dict[str, dict]:
    """{name: what vllm_offline.py found at `commit`}. A process that died of one checkpoint is followed by one for the rest."""
    options, env = ENGINES[engine]
    out, log = work / commit / engine, work / commit / f"{engine}.log"
    out.mkdir(parents=True, exist_ok=True)

    def known() -> dict[str, dict]:
        return {name: json.loads((out / f"{name}.json").read_text()) for name in names if (out / f"{name}.json").is_file()}

    while missing := [name for name in names if not known().get(name)]:
        command = [sys.executable, environments.HERE / "vllm_offline.py", work, out, json.dumps(options), *missing]
        with log.open("a") as file:
            done = subprocess.run(command, env={**processes.environment(), **env}, stdout=file, stderr=subprocess.STDOUT)
        if missing[0] not in known():
            raise FoemError(f"vLLM did not start; the last lines of {log}:\n{processes.tail(log)}")
        for name, found in known().items():
            if not found:
                (out / f"{name}.json").write_text(json.dumps({"refused": f"the process died, exit code {done.returncode}"}))
    return known()


def outcome(found: dict, reference: dict, limit: float, spread: bool = False) -> dict:
    """{"served": "equal", "different" or "refused"; "difference", of log-probabilities, or "why"}. difference: the largest, or
    with `spread` the root mean square."""
    if "refused" in found:
        return {"served": "refused", "why": found["refused"]}
    apart = torch.tensor(found["logprobs"]) - torch.tensor(reference["logprobs"])
    difference = float(apart.square().mean().sqrt() if spread else apart.abs().max())
    return {"served": "equal" if difference <= limit else "different", "difference": difference}


@torch.no_grad()
def misread(checkpoint: pathlib.Path, ids: torch.Tensor) -> float:
    """What the mildest misreading does: the least root mean square by which log-probabilities change in float32 when every code
    of one linear is a step off, as with a wrong zero point. Experts, which transformers fuses, are left out."""
    config, weights, model = read_config(checkpoint), Weights(checkpoint), load_dequantized(checkpoint)
    modules = dict(model.named_modules())

    def logprobs() -> torch.Tensor:
        return model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])

    found, right = [], logprobs()
    for name in set(quantized_modules(weights.files)) & modules.keys():
        q, spec = read_linear(weights, name, config)
        weight = modules[name].weight
        as_read = weight.clone()
        weight += dequantize(q._replace(codes=q.codes + 1), spec) - dequantize(q, spec)
        found.append(float((logprobs() - right).square().mean().sqrt()))
        weight.copy_(as_read)
    return min(found)


def row(work: pathlib.Path, name: str, answers: dict[str, dict]) -> dict:
    """Reference, predictions and outcomes of one checkpoint."""
    reference = json.loads((work / f"{name}.json").read_text())
    if "logprobs" not in reference:
        return {"name": name, "refused": reference.get("refused") or reference["unread"]}
    predicted = doctor.examine(str(work / name), device="cpu")
    found = {"name": name, "doctor": {"ours": predicted["ours"], "stock": predicted["stock"]},
             "ours": outcome(answers["ours"][name], reference, EXACT)}
    if "logprobs" in answers["stock"][name]:
        found["misread"] = misread(work / name, load_file(work / "tokens.safetensors")["texts"])
    found["stock"] = outcome(answers["stock"][name], reference, found.get("misread", 0), spread=True)
    return found


def agrees(predicted: dict, outcome: dict) -> bool:
    """Whether what was predicted to be served was, and rightly, and the rest was refused."""
    return outcome["served"] == ("equal" if predicted["served"] else "refused")


def say(o: dict) -> str:
    return f"{o['served']}, {o['difference']:.1g}" if "difference" in o else f"{o['served']}: {short(o['why'])}"


def short(text: str) -> str:
    """One line of an error message that fits a table's cell."""
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", text)
    line = " ".join((found[1] if found else text).split())
    return (line if len(line) <= 120 else line[:117] + "...").replace("|", "/")


def foretold(predicted: dict) -> str:
    return "served" if predicted["served"] else f"refused: {short(predicted['why'][0])}"


def markdown(content: dict) -> str:
    rows = [r for r in content["rows"] if "ours" in r]
    head = ("checkpoint", "ours, foretold", "ours, float32", "stock, foretold", "stock, bfloat16", "as foretold")
    lines = [f"`{content['command']}`, commit {content['commit']}, {content['machine']}, vLLM {content['versions']['vllm']}, "
             f"GPTQModel {content['gptqmodel']}, AutoRound {content['autoround']}.", "",
             "Numbers: how far log-probabilities are from those of GPTQModel's own torch dequantization in float32, in nats. "
             f"Ours: the largest difference, equal up to {EXACT:g}. Stock: root mean square, equal where it is less than with "
             "the codes of any one linear a step off, which makes "
             f"{min((r['misread'] for r in rows if 'misread' in r), default=0):.2g} or more.", "",
             content["summary"], "",
             "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = (r["name"], foretold(r["doctor"]["ours"]), say(r["ours"]), foretold(r["doctor"]["stock"]), say(r["stock"]),
                 "yes" if r["as_foretold"] else "**no**")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Not written, or not read back, by the peer itself:", ""]
    return "\n".join([*lines, *(f"* {r['name']}: {short(r['refused'])}" for r in content["rows"] if "refused" in r)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "out/serving_matrix")
    parser.add_argument("--peers-folder", type=pathlib.Path, default=environments.FOLDER, help="where peers are, or go")
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "eval/results/serving_matrix.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    made_by = provenance()
    jobs = [job for job in plan() if re.search(args.only, job["name"])]
    write_checkpoints(args.work, jobs, args.peers_folder)
    names = [name for name in [*(job["name"] for job in jobs), *AUTOROUND] if re.search(args.only, name)]
    written = [name for name in names if "logprobs" in json.loads((args.work / f"{name}.json").read_text())]
    answers = {engine: serve(args.work, engine, written, made_by["commit"]) for engine in ENGINES}
    rows = [row(args.work, name, answers) for name in names]
    for r in rows:
        if "ours" in r:
            r["as_foretold"] = all(agrees(r["doctor"][engine], r[engine]) for engine in ENGINES)
    compared = [r for r in rows if "ours" in r]
    count = {engine: sum(r[engine]["served"] == "equal" for r in compared) for engine in ENGINES}
    wrong = {engine: sum(r[engine]["served"] == "different" for r in compared) for engine in ENGINES}
    summary = (f"{len(compared)} checkpoints. Served right: ours {count['ours']}, "
               f"stock {count['stock']}. Served wrong: ours {wrong['ours']}, stock {wrong['stock']}. "
               f"`foem doctor` foretold {sum(r['as_foretold'] for r in compared)} of them.")
    content = {**made_by, **environments.VERSIONS, "exact": EXACT, "summary": summary, "rows": rows}
    args.json.write_text(json.dumps(content, indent=1) + "\n")
    args.json.with_suffix(".md").write_text(markdown(content))
    print(summary)


if __name__ == "__main__":
    main()
