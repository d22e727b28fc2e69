"""Checkpoints served by real vLLM on a GPU: numbers beside transformers, tokens per second beside stock GPTQ and bf16.

Used by gpu_check's step `serve`; every engine is a process of its own that runs this file. Needs a folder with vLLM, made for a
machine that has none: importable packages, and an env.sh that puts them on PYTHONPATH. vLLM finds our plugin through metadata
that setup.py writes for the occasion, so nothing need be installed.
"""
from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINYLM = ROOT / "eval" / "tinylm"
# Qwen3-8B; the tests write it smaller
QWEN3_8B = dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                intermediate_size=12288, vocab_size=151936, max_position_embeddings=40960)
BATCHES = (1, 16, 64)
PROMPT, OUTPUT = 64, 128  # tokens, decoding
LONG, PROMPTS = 2048, 8  # tokens and prompts, prefill
ENGINE_SECONDS = 240  # a first start compiles for 40 to 110 s


# --- in the engine's process ------------------------------------------------------------------------------------------------

def engine(job: dict, out: pathlib.Path) -> None:
    """Load job["model"] with LLM options job["options"]; score job["ids"]; with job["throughput"] measure. Writes as it goes."""
    from vllm import LLM, SamplingParams
    started = time.perf_counter()
    llm = LLM(model=job["model"], dtype="bfloat16", max_num_seqs=max(BATCHES), seed=0, skip_tokenizer_init=True,
              enable_prefix_caching=False, **job["options"])
    config = llm.llm_engine.vllm_config
    answer = {"ready_seconds": time.perf_counter() - started, "quantization": config.model_config.quantization,
              "compilation": config.compilation_config.mode.name, "graphs": config.compilation_config.cudagraph_mode.name}

    def save(**found):
        answer.update(found)
        out.write_text(json.dumps(answer))
    save()
    prompts = [{"prompt_token_ids": ids} for ids in job["ids"]]
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    scored = llm.generate(prompts, asked, use_tqdm=False)
    save(logprobs=[[found[t].logprob for t, found in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:])] for o in scored])
    if not job["throughput"]:
        return

    def seconds(batch: int, length: int, tokens: int) -> float:
        """Median of three, after one to warm up."""
        prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % 256 for j in range(length)]} for i in range(batch)]
        asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            done = llm.generate(prompts, asked, use_tqdm=False)
            times.append(time.perf_counter() - started)
            assert all(len(o.outputs[0].token_ids) == tokens for o in done)
        return statistics.median(times[1:])
    decode = {}
    for batch in BATCHES:
        # the first token comes with the prompt: what is left of the time belongs to the others
        decode[batch] = batch * (OUTPUT - 1) / (seconds(batch, PROMPT, OUTPUT) - seconds(batch, PROMPT, 1))
        save(decode_tokens_per_second=decode)
    save(prefill_tokens_per_second=PROMPTS * LONG / seconds(PROMPTS, LONG, 1))


# --- in gpu_check's process -------------------------------------------------------------------------------------------------

def plugin_path(folder: pathlib.Path) -> str:
    """`folder`, made such that on PYTHONPATH it is this working tree installed: links to its packages, and metadata.

    Links, because the working tree itself on the path would make its folder kernels/ the package `kernels` of Hugging Face.
    """
    if not folder.exists():
        folder.mkdir(parents=True)
        for package in (ROOT / "foem_vllm", ROOT / "kernels" / "foem_kernels"):
            (folder / package.name).symlink_to(package)
        subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)], cwd=ROOT, check=True,
                       capture_output=True)
    return str(folder)


def run_engine(job: dict, site: pathlib.Path, work: pathlib.Path, name: str, limit: float) -> dict:
    """What `engine` wrote, the kernels its log names, and its error, if any. Killed, with all it started, after `limit` s."""
    out, log = work / f"{name}.json", work / f"{name}.log"
    environment = {**os.environ, "PYTHONPATH": plugin_path(work / "path"), "VLLM_LOGGING_LEVEL": "INFO"}
    command = 'set -e; . "$0"/env.sh; exec "$@"'
    with log.open("w") as file:
        process = subprocess.Popen(["bash", "-c", command, str(site), sys.executable, __file__, json.dumps(job), str(out)],
                                   env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            error = None if process.wait(limit) == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:.0f} s"
        finally:
            try:  # engine processes outlive a parent that died
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    said = log.read_text(errors="replace")
    answer = json.loads(out.read_text()) if out.exists() else {}
    answer["kernels"] = sorted(set(re.findall(r"foem kernel (\w+) for", said)))
    if error:
        answer["error"] = f"{error}: ...{said[-1500:]}"
    return answer


def write_random_checkpoint(folder: pathlib.Path, quantized: bool, device: str, **shape) -> None:
    """A Qwen3 of these sizes: random 4-bit weights, group 128, in GPTQ's format; or, not quantized, its config alone.

    Every layer has the same weights: packed once, written under each layer's names. Without checksums, which would read all of
    it once more.
    """
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    from foem_vllm.format import FormatConfig, Quantized, QuantSpec, pack
    folder.mkdir(parents=True)
    config = Qwen3Config(**shape, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, dtype="bfloat16")
    config.architectures = ["Qwen3ForCausalLM"]
    spec = QuantSpec(4, 128)
    if quantized:
        config.quantization_config = FormatConfig(spec).to_json()
    config.save_pretrained(folder)
    if not quantized:
        return
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    sizes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
             "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
             "mlp.down_proj": (hidden, inner)}
    r = torch.Generator(device).manual_seed(0)
    layer = {}
    for module, (n, k) in sizes.items():
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device, generator=r)
        # uniform codes have a standard deviation of 4.6: x of unit variance stays one
        scales = ((0.5 + torch.rand(n, k // 128, device=device, generator=r)) / (4.6 * k ** 0.5)).half()
        layer |= {f"{module}.{key}": t.cpu() for key, t in pack(Quantized(codes, scales), spec).items()}
    for norm, size in (("input_layernorm", hidden), ("post_attention_layernorm", hidden), ("self_attn.q_norm", head),
                       ("self_attn.k_norm", head)):
        layer[f"{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)

    def table():
        t = torch.randn(config.vocab_size, hidden, device=device, generator=r)
        return t.bfloat16().cpu()
    shards = [{f"model.layers.{i}.{key}": t for key, t in layer.items()} for i in range(config.num_hidden_layers)]
    # logits with a standard deviation of about 2, so that a wrong kernel shows
    shards.append({"model.embed_tokens.weight": table(), "lm_head.weight": table() * (2 / hidden ** 0.5),
                   "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@torch.no_grad()
def logprobs(model, ids: list[list[int]]) -> list[torch.Tensor]:
    """Of every token given those before it, one [len - 1] per sequence."""
    device = next(model.parameters()).device
    found = []
    for row in ids:
        t = torch.tensor([row], device=device)
        found.append(model(t).logits[0, :-1].float().log_softmax(-1).gather(1, t[0, 1:, None])[:, 0].cpu())
    return found


def tinylm_job(work: pathlib.Path, device: str) -> tuple[dict, list[torch.Tensor], float]:
    """(job for `engine`, transformers' log-probabilities in float32, tolerance): the demo's model, default preset.

    The tolerance is twice what bfloat16 moves transformers itself: vLLM rounds at other places, independently.
    """
    from foem_eval.dequantized import load_dequantized
    from foem_eval.divergence import read_sequences
    from transformers import AutoTokenizer

    from foem_vllm import QuantizeConfig, quantize
    folder = work / "tinylm"
    quantize(TINYLM / "qwen3", folder, QuantizeConfig(preset="balanced", calibration=str(TINYLM / "data" / "calibration.jsonl"),
                                                      samples=128, seq_len=256, device=device))
    sequences = read_sequences(AutoTokenizer.from_pretrained(folder), TINYLM / "data" / "evaluation.jsonl", 256, limit=8)
    ids = [torch.as_tensor(s).flatten().tolist() for s in sequences]
    exact, rounded = (logprobs(load_dequantized(folder, dtype, device), ids) for dtype in (torch.float32, torch.bfloat16))
    tolerance = 2 * max(float((a - b).abs().max()) for a, b in zip(exact, rounded))
    return {"model": str(folder), "options": {"quantization": "foem", "max_model_len": 512, "gpu_memory_utilization": 0.3},
            "ids": ids, "throughput": False}, exact, tolerance


def judge_tinylm(answer: dict, exact: list[torch.Tensor], tolerance: float) -> dict:
    """The answer without its long lists, with `passed` and why not."""
    found = {key: value for key, value in answer.items() if key != "logprobs"}
    problems = [answer["error"]] if "error" in answer else []
    if "logprobs" in answer:
        differences = torch.cat([(torch.tensor(a) - b).abs() for a, b in zip(answer["logprobs"], exact)])
        found |= {"mean_difference": float(differences.mean()), "max_difference": float(differences.max()),
                  "tolerance": tolerance}
        if not found["max_difference"] < tolerance:
            problems.append("log-probabilities differ from transformers by more than the tolerance")
    else:
        problems.append("no log-probabilities")
    if answer.get("quantization") != "foem":
        problems.append(f"the plugin did not serve it, but {answer.get('quantization')}")
    if "NONE" in (answer.get("graphs", "NONE"), answer.get("compilation", "NONE")):
        problems.append(f"no graphs or no compilation: {answer.get('graphs')}, {answer.get('compilation')}")
    if not answer["kernels"] or "reference" in answer["kernels"]:
        problems.append(f"kernels: {answer['kernels']}")
    return {**found, "passed": not problems, "problems": problems}


def compare(engines: dict[str, dict]) -> dict:
    """foem's tokens per second over the others', and how far its log-probabilities of the same weights are from stock GPTQ's."""
    foem, found = engines.get("foem", {}), {}
    for other in ("gptq", "bf16"):
        theirs = engines.get(other, {})
        for batch, rate in theirs.get("decode_tokens_per_second", {}).items():
            if batch in foem.get("decode_tokens_per_second", {}):
                found[f"decode, batch {batch}, over {other}"] = foem["decode_tokens_per_second"][batch] / rate
        if "prefill_tokens_per_second" in theirs and "prefill_tokens_per_second" in foem:
            found[f"prefill over {other}"] = foem["prefill_tokens_per_second"] / theirs["prefill_tokens_per_second"]
    if "logprobs" in foem and "logprobs" in engines.get("gptq", {}):
        differences = (torch.tensor(foem["logprobs"]) - torch.tensor(engines["gptq"]["logprobs"])).abs()
        found["logprob difference to gptq"] = {"mean": float(differences.mean()), "max": float(differences.max())}
    return found


def check_serve(site: pathlib.Path, work: pathlib.Path, remaining: Callable[[], float],
                save: Callable[[dict], None]) -> tuple[bool, dict]:
    """(whether every engine that ran is right, what was found). Engines for which no time is left are named as skipped."""
    result = {"skipped": []}
    job, exact, tolerance = tinylm_job(work, "cuda")
    torch.cuda.empty_cache()  # the engines want the memory
    result["tinylm"] = judge_tinylm(run_engine(job, site, work, "tinylm", min(ENGINE_SECONDS, remaining())), exact, tolerance)
    print(f"  tinylm: {result['tinylm']}", flush=True)
    save(result)
    write_random_checkpoint(work / "8b", True, "cuda", **QWEN3_8B)
    write_random_checkpoint(work / "8b-bf16", False, "cuda", **QWEN3_8B)
    torch.cuda.empty_cache()
    ids = [[(31 * i + 17 * j * j) % 50000 for j in range(128)] for i in range(4)]
    engines = {}
    for name, model, options in (("foem", "8b", {"quantization": "foem"}), ("gptq", "8b", {"quantization": "gptq"}),
                                 ("bf16", "8b-bf16", {"load_format": "dummy"})):
        if remaining() < 60:
            result["skipped"].append(f"Qwen3-8B {name}: out of time")
            continue
        job = {"model": str(work / model), "ids": ids, "throughput": True,
               "options": {"max_model_len": 4096, "gpu_memory_utilization": 0.6, **options}}
        engines[name] = run_engine(job, site, work, name, min(ENGINE_SECONDS, remaining()))
        shown = {key: value for key, value in engines[name].items() if key != "logprobs"}
        print(f"  Qwen3-8B {name}: {shown}", flush=True)
        result |= {"qwen3_8b": {**result.get("qwen3_8b", {}), name: shown}, "compared": compare(engines)}
        save(result)
    print(f"  {result.get('compared')}", flush=True)
    return result["tinylm"]["passed"] and not any("error" in answer for answer in engines.values()), result


if __name__ == "__main__":
    engine(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))
    # vLLM may abort in its own shutdown, when everything asked for is long written
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
