"""Model families end to end: small random models, quantized by us, served by vLLM on this machine, beside transformers.

    make families                       # eval/results/families.{json,md}; a few minutes; keeps what this commit measured
    python eval/families.py --only opt --resume

Every family is quantized with a preset on a little text and served with `--quantization foem`, in float32 and in bfloat16. The
reference is transformers with the dequantized weights in float32. Equal: in float32 every log-probability is within SAME of it,
and so is every greedy token's from that of the best one. What bfloat16 does stands beside what it does to transformers; where
experts are routed it may be much, because a token that is nearly undecided between two of them may go to the other one. The
vision-language model is asked with an image too; what reads the image stays as it is. vLLM is asked to look for weights that were
not loaded, which it does by itself only in models without quantization.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from foem_eval.dequantized import dequantized_folder  # noqa: E402
from foem_eval.offline import STRICT, serve  # noqa: E402
from foem_eval.provenance import missing, of_commits, provenance  # noqa: E402
from tiny_models import CALIBRATION, CONFIGS, EVALUATION, MOE_CONFIGS, TINYLM, write_model  # noqa: E402
from tiny_vision import PROMPT, image, pixels, write_vision_model  # noqa: E402

from foem_vllm import QuantizeConfig, quantize  # noqa: E402
from foem_vllm.errors import FoemError  # noqa: E402

FAMILIES = {
    "llama": "Llama",
    "opt": "OPT",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "phi3": "Phi-3",
    "gpt_neox": "GPT-NeoX",
    "falcon": "Falcon",
    "glm4": "GLM-4",
    "stablelm": "StableLM",
    "gptj": "GPT-J",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "deepseek_v2": "DeepSeek-V2",
    "idefics3": "Idefics3",
}
TEXTS, LENGTH, NEW_TOKENS = 4, 64, 16
SAME = 1e-4  # nats
VISION = ("idefics3",)
LATENT = ("deepseek_v2",)
# vLLM 0.32's rotary embedding for CPUs turns the heads of latent attention wrongly, also of models that are not quantized.
PLAIN_ROTARY = {"compilation_config": {"custom_ops": ["none"]}}
WIDER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "word_embed_proj_dim": 128,
    "ffn_dim": 256,
    "ffn_hidden_size": 512,
}


def changes(name: str) -> dict:
    """Sizes that make attention heads 32 wide, the least that vLLM computes on CPUs."""
    has = (CONFIGS | MOE_CONFIGS)[name][1]
    return {key: value for key, value in WIDER.items() if key in has}


def token_ids() -> torch.Tensor:
    """int64 [TEXTS, LENGTH] of the evaluation text, the same for every family: they all have tinylm's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINYLM)
    lines = EVALUATION.read_text("utf-8").splitlines()[:TEXTS]
    return torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:LENGTH] for line in lines])


def load(folder: pathlib.Path, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' model with the dequantized weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    with dequantized_folder(folder, torch.float32) as plain:
        auto = AutoModelForImageTextToText if folder.name in VISION else AutoModelForCausalLM
        return auto.from_pretrained(plain, dtype=dtype).eval()


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: torch.Tensor, seen: dict) -> torch.Tensor:
    """[sequences, length, vocabulary]; seen: what the model takes beside token ids."""
    seen = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in seen.items()}
    return model(input_ids=ids, **seen).logits.float().log_softmax(-1)


def chosen(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[sequences, length - 1]: of every token given those before it."""
    return table[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def compare(folder: pathlib.Path, served: dict[str, dict], ids: torch.Tensor) -> dict:
    """How far vLLM is from transformers, in nats: a token's log-probability at most; the worst greedy token from the best one."""
    asked = {"": (ids, {}, served)}
    if folder.name in VISION:
        by_dtype = {dtype: {key: [value] for key, value in answer["image"].items()} for dtype, answer in served.items()}
        asked["image_"] = torch.tensor(by_dtype["float32"]["ids"]), pixels(folder, image()), by_dtype
    exact_model, rounded_model = load(folder, torch.float32), load(folder, torch.bfloat16)
    row = {}
    for prefix, (tokens, seen, answers) in asked.items():
        exact = chosen(logprobs(exact_model, tokens, seen), tokens)
        far = {dtype: float((torch.tensor(answer["logprobs"]) - exact).abs().max()) for dtype, answer in answers.items()}
        whole = torch.cat([tokens, torch.tensor(answers["float32"]["greedy"])], 1)
        length = tokens.shape[1]
        later = logprobs(exact_model, whole, seen)[:, length - 1 : -1]
        regret = float((later.max(-1).values - later.gather(2, whole[:, length:, None])[..., 0]).max())
        rounded = float((chosen(logprobs(rounded_model, tokens, seen), tokens) - exact).abs().max())
        found = {"difference": far["float32"], "regret": regret, "bfloat16": far["bfloat16"], "transformers_bfloat16": rounded}
        row |= {prefix + key: value for key, value in found.items()}
    row["equal"] = max(row[prefix + key] for prefix in asked for key in ("difference", "regret")) <= SAME
    return row


def run(names: list[str], work: pathlib.Path, preset: str) -> dict[str, dict]:
    """{family: row}: quantize, serve, compare."""
    ids, rows = token_ids(), {}
    save_file({"texts": ids, "image": image()}, work / "tokens.safetensors")
    for name in names:
        source = work / f"{name}-model"
        model = write_vision_model(source) if name in VISION else write_model(source, name, **changes(name))
        config = QuantizeConfig(
            preset=preset, bits=4, group_size=32, calibration=str(CALIBRATION), samples=32, seq_len=64, device="cpu"
        )
        try:
            report = quantize(model, work / name, config)
        except FoemError as error:
            rows[name] = {"refused": f"foem quantize: {error}"}
            continue
        rows[name] = {"linears": len(report.layers)}
    ready = [name for name in names if "refused" not in rows[name]]
    kinds = {name: {"image_prompt": PROMPT} for name in VISION} | dict.fromkeys(LATENT, PLAIN_ROTARY)
    groups: dict[tuple, list[str]] = {}  # vLLM wants a process for each kind of model
    for name in ready:
        groups.setdefault((name in MOE_CONFIGS, json.dumps(kinds.get(name, {}))), []).append(name)
    for same in groups.values():
        options = {"new_tokens": NEW_TOKENS, **STRICT, **kinds.get(same[0], {})}
        answers = {dtype: serve(same, work, work, dtype=dtype, **options) for dtype in ("float32", "bfloat16")}
        for name in same:
            served = {dtype: answers[dtype][name] for dtype in answers}
            refused = [f"{dtype}: {answer['refused']}" for dtype, answer in served.items() if "refused" in answer]
            rows[name] |= {"refused": "; ".join(refused)} if refused else compare(work / name, served, ids)
    return rows


def table(results: dict) -> str:
    lines = [
        "| family | linears | float32: differ by at most | regret of greedy tokens | | bfloat16 | transformers' bfloat16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in FAMILIES.items():
        row = results["rows"].get(name)
        if row is None:
            continue
        if "refused" in row:
            lines.append(f"| {title} | {row.get('linears', '')} | | | {row['refused']} | | |")
        else:
            said = "equal" if row["equal"] else "**different**"
            for prefix, asked in (("", ""), ("image_", ", asked with an image")):
                if prefix + "regret" in row:
                    far, regret = (f"{row[prefix + key]:.1e}" for key in ("difference", "regret"))
                    rounded = " | ".join(f"{row[prefix + key]:.3f}" for key in ("bfloat16", "transformers_bfloat16"))
                    lines.append(f"| {title}{asked} | {row['linears']} | {far} | {regret} | {said} | {rounded} |")
    return "\n".join(
        [
            *lines,
            "",
            f"W4 g32 {results['preset']}; `{results['command']}`, {of_commits(results['rows'])}, {results['date']}, "
            f"vLLM {results['versions']['vllm']}, {results['machine']}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="families, comma-separated")
    parser.add_argument("--resume", action="store_true", help="keep what other commits measured")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "eval/results/families.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {"rows": {}}
    asked = arguments.only.split(",") if arguments.only else list(FAMILIES)
    if unknown := [n for n in asked if n not in FAMILIES]:
        sys.exit(f"families: no family {', '.join(unknown)}; choose from {', '.join(FAMILIES)}")
    made_by = provenance()
    if names := missing(asked, results["rows"], made_by["commit"], arguments.resume):
        with tempfile.TemporaryDirectory(prefix="foem-families-") as work:
            rows = run(names, pathlib.Path(work), arguments.preset)
        results["rows"] |= {name: row | {"commit": made_by["commit"]} for name, row in rows.items()}
        results |= made_by | {"preset": arguments.preset, "command": "make families"}
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    arguments.results.with_suffix(".md").write_text(text)
    print(text)
    sys.exit(any(not row.get("equal") for row in results["rows"].values()))


if __name__ == "__main__":
    main()
