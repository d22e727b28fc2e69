"""What will happen when a checkpoint is served, before it is: `foem doctor`.

Read are the config and the safetensors headers, nothing else; so what only weights show (damaged codes, zero points of the
wrong convention, a g_idx that is no order of groups) is found when the plugin loads them. Neither vLLM nor a GPU is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from foem_kernels import moe
from foem_kernels.registry import KERNELS, survey

from foem_vllm.errors import FoemError
from foem_vllm.format import CONFIG_FILES, METHODS, FormatConfig, method_of, stored_config
from foem_vllm.integrity import read_header, read_headers, weight_files
from foem_vllm.layers import EMBEDDINGS, HEADS, Asked, Experts, Layer, rest_per_rank, served_layers
from foem_vllm.serving import LAYER, Finding, Headers, inspect_modules, missing_layers, rearranged_findings
from foem_vllm.stock import refusals

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MEMORY_SHARE = 0.92  # of a GPU's memory, or a CPU's, what vLLM takes by default
AGAIN = "download the checkpoint again"
NUMBERS = {  # what configs call them
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "vocabulary": ("vocab_size",),
    "width": ("hidden_size", "n_embd", "d_model"),
}
OUTPUTS = ("embed_out", "output", "output_layer")  # heads that are not called one
UNSAYABLE = (
    "asymmetric weights in checkpoint_format 'gptq' (version 1), which cannot say zero point 0; a module that has one after all "
    "is refused by name when it is loaded"
)


class NotACheckpoint(FoemError):
    """There is nothing to examine."""


@dataclass(frozen=True)
class Content:
    """What is read. config: config.json; quantization: the quantization config as stored, None without one."""

    config: dict
    quantization: dict | None
    headers: Headers
    findings: list[Finding]

    @property
    def text(self) -> dict:
        """The config of the language model, which others wrap."""
        return {**self.config, **(self.config.get("text_config") or {})}

    @property
    def method(self) -> str | None:
        return method_of(self.quantization) if self.quantization else None


def read(model: str) -> Content:
    """Of a folder or a hub repository. Damaged files are findings, all of them; NotACheckpoint when there is nothing to read."""
    folder, hub = pathlib.Path(model), None
    if not folder.is_dir():
        folder, hub = download(model)
    if not (folder / "config.json").is_file():
        raise NotACheckpoint(f"{model}: no config.json; give a checkpoint folder or a hub name such as Qwen/Qwen3-0.6B")
    config, *other = (read_json(folder / name) for name in CONFIG_FILES if (folder / name).is_file())
    headers, findings = read_weights(folder) if hub is None else (hub, [])
    if not headers and not findings:
        raise NotACheckpoint(f"{model}: no .safetensors weights; convert the model with transformers' save_pretrained")
    return Content(config, next(filter(None, (stored_config(config), *other)), None), headers, findings)


def read_json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise NotACheckpoint(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise NotACheckpoint(f"{path}: holds {type(found).__name__}, not an object; download it again")
    return found


def read_weights(folder: pathlib.Path) -> tuple[Headers, list[Finding]]:
    """Headers of all files that can be read, and what is wrong with the others."""
    findings: list[Finding] = []
    headers: dict = {}
    with collected(findings):
        for path in weight_files(folder):
            with collected(findings):
                headers.update(read_header(path))
        if not findings:
            headers = read_headers(folder)  # also holds them against the index
    return headers, findings


def download(model: str) -> tuple[pathlib.Path, Headers]:
    """(folder with the JSON files, headers) of a hub repository; no weights are downloaded."""
    from huggingface_hub import HfApi

    try:
        folder = pathlib.Path(HfApi().snapshot_download(model, allow_patterns=list(CONFIG_FILES)))
        files = HfApi().get_safetensors_metadata(model).files_metadata.values()
    except Exception as error:  # the hub client raises many unrelated types
        raise NotACheckpoint(
            f"{model}: no such folder, and the hub did not deliver it ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "check the name, the network and `hf auth login`"
        ) from None
    return folder, {name: (t.dtype, tuple(t.shape)) for file in files for name, t in file.tensors.items()}


def finding_of(error: FoemError) -> Finding:
    """An error's sentence as a finding: "where: what; remedy", or "where what; remedy"."""
    text, _, remedy = str(error).partition("; ")
    where, what = re.match(r"(\S+?):? (.*)", text, re.DOTALL).groups()
    return Finding(where, what, remedy or AGAIN)


@contextlib.contextmanager
def collected(findings: list[Finding]) -> Iterator[None]:
    try:
        yield
    except FoemError as error:
        findings.append(finding_of(error))


def examine(
    model: str,
    tensor_parallel_size: int = 1,
    device: str | None = None,
    memory: int | None = None,
    expert_parallel: bool = False,
) -> dict:
    """Everything that `foem doctor` says, as `foem doctor --json` prints it.

    device: "cpu", "cuda", or a GPU's architecture such as "sm_90", which need not be here; default: a GPU where there is one.
    memory: bytes for one rank; default: what the device has. expert_parallel: ranks hold whole experts, not a part of each.
    `ours` and `stock` (whether each serves it, and why not), `layers` and `memory` are None unless it is a GPTQ checkpoint.
    Raises NotACheckpoint when there is nothing to examine, FoemError on impossible options.
    """
    device = check_device(device)
    if tensor_parallel_size < 1:
        raise FoemError(f"--tensor-parallel-size {tensor_parallel_size}: must be at least 1")
    content = read(model)
    text = content.text
    asked = Asked(tensor_parallel_size, served_dtype(text), device, kv_heads(text), expert_parallel, number(text, "heads"),
                  number(text, "experts"))  # fmt: skip
    findings = [*content.findings, *heads_finding(text, asked)]
    found, notes = {"layers": None, "memory": None, "ours": None, "stock": None}, []
    if content.method in METHODS:
        found = examine_gptq(content, asked, findings, notes, memory)
    return {
        "model": model,
        "method": content.method,
        "device": device,
        "tensor_parallel_size": tensor_parallel_size,
        "expert_parallel": expert_parallel,
        "dtype": str(asked.dtype).removeprefix("torch."),
        "problems": [asdict(finding) for finding in findings],
        "notes": notes,
        **found,
    }


def examine_gptq(content: Content, asked: Asked, findings: list[Finding], notes: list[str], memory: int | None) -> dict:
    """What depends on the quantization config; appends to `findings`, and to `notes` what only weights can show."""
    layers, modules = [], {}
    in_model = stored_config(content.config) or {}
    if "quant_method" in in_model and in_model["quant_method"] is None:
        findings.append(Finding("config.json", "says quant_method null, on which vLLM fails", 'write "quant_method": "gptq"'))
    with collected(findings):
        config = FormatConfig.from_json(content.quantization, "config.json")
        if config.zero_format == "gptq" and not config.spec.symmetric:
            notes.append(UNSAYABLE)
        modules, layers, wrong = layers_of(content, config, asked)
        findings += wrong
    why_not = stock_refusals(content, asked)
    rows, wrong = kernel_rows(layers)
    findings += wrong  # what our kernels cannot compute is no reason for others
    rest = rest_per_rank(content.headers, modules, bool(content.text.get("tie_word_embeddings")), asked) * asked.dtype.itemsize
    found = memory_of(sum(row["bytes"] * row["count"] for row in rows), rest, content.text, asked, memory)
    if rows and found["budget"] is not None and found["kv_room"] < (found["kv_bytes_per_token"] or 1):
        taken, has = (size / 1e9 for size in (found["quantized"] + rest, found["budget"]))
        problem = f"take {taken:.2f} GB of a rank's {has:.2f} GB and leave no room for a token's keys and values"
        small = Finding("weights", problem, "use a larger --tensor-parallel-size, or fewer bits")
        findings.append(small)
        why_not.append(str(small))
    return {
        "layers": rows,
        "memory": found,
        "ours": {"served": not findings, "why": [str(finding) for finding in findings]},
        "stock": {"served": not why_not, "why": why_not},
    }


def layers_of(content: Content, config: FormatConfig, asked: Asked) -> tuple[dict, list[Layer | Experts], list[Finding]]:
    """(quantized modules, layers, what is wrong with them); no layers where modules are wrong or files damaged."""
    modules, wrong = inspect_modules(content.headers, config)
    if content.findings:
        return modules, [], []  # what is in a damaged file would count as missing
    if wrong:
        return modules, [], wrong
    layers, wrong = served_layers(modules, content.headers, asked)
    lacking = missing_layers(content.headers, modules, number(content.text, "layers"))
    lacking += rearranged_findings(modules, content.config.get("architectures") or ())
    return modules, layers, [*lacking, *ends_findings(content), *wrong]


def ends_findings(content: Content) -> Iterator[Finding]:
    """What is wrong with the embedding and the head of a model that generates, by the names and sizes that most have."""
    if not any(re.search("ForCausalLM|LMHead|Generation", str(name)) for name in content.config.get("architectures") or ()):
        return
    ends = {tensor.rpartition(".")[0].rpartition(".")[2]: tensor for tensor in content.headers if not LAYER.match(tensor)}
    if not any("emb" in name or "wte" in name for name in ends):
        yield Finding("embed_tokens.weight", "is missing", AGAIN)
    tied = [config["tie_word_embeddings"] for config in (content.config, content.text) if "tie_word_embeddings" in config]
    if tied and not any(tied) and not any("head" in name or name in OUTPUTS for name in ends):
        yield Finding("lm_head.weight", "is missing, although config.json says tie_word_embeddings false", AGAIN)
    found = [tensor for tensor in content.headers if tensor.endswith(tuple(f".{n}.weight" for n in set(EMBEDDINGS) - set(HEADS)))]
    if len(found) == 1 and len(shape := content.headers[found[0]][1]) == 2 and not content.text.get("word_embed_proj_dim"):
        for what, size in zip(("vocabulary", "width"), shape):
            said = number(content.text, what)
            if said not in (None, size):
                yield Finding(found[0], f"is {list(shape)}, but config.json says {said} for the {what}",
                              "config.json and weights are of different models: download both again")  # fmt: skip


def stock_refusals(content: Content, asked: Asked) -> list[str]:
    """Why stock vLLM does not serve it: damage, and its own rules. It never looks at checkpoint_format."""
    own, raw = [], {**content.quantization, "checkpoint_format": "gptq"}
    damage = [*content.findings, *heads_finding(content.text, asked)]
    with collected(damage):
        config = FormatConfig.from_json(raw, "config.json")
        _, layers, wrong = layers_of(content, config, asked)
        damage += wrong
        own = refusals(raw, config, layers, asked.device, content.config.get("architectures") or ())
        if (in_model := stored_config(content.config)) and not in_model.get("quant_method"):
            own.insert(0, "the config has no quant_method")
    return list(dict.fromkeys([*map(str, damage), *own]))


def heads_finding(text: dict, asked: Asked) -> Iterator[Finding]:
    another = "use another --tensor-parallel-size"
    if asked.heads and asked.heads % asked.ranks:
        problem = f"gives the model {asked.heads} attention heads, which {asked.ranks} ranks cannot share evenly"
        yield Finding("config.json", problem, another)
    kv = None if text.get("kv_lora_rank") else asked.kv_heads
    if kv and kv != asked.heads and kv % asked.ranks and asked.ranks % kv:
        problem = f"gives the model {kv} heads of keys and values, which {asked.ranks} ranks can neither share nor copy evenly"
        yield Finding("config.json", problem, another)


def check_device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() and not torch.version.hip else "cpu"
    if device not in ("cpu", "cuda") and not re.fullmatch(r"sm_\d{2,3}[af]?", device):
        raise FoemError(f"--device {device}: choose cpu, cuda or the architecture of an NVIDIA GPU, such as sm_90")
    return device


def served_dtype(text: dict) -> torch.dtype:
    """In which vLLM computes by default: as stored, but float32 weights in bfloat16."""
    stored = DTYPES.get(str(text.get("dtype") or text.get("torch_dtype")), torch.bfloat16)
    return torch.bfloat16 if stored is torch.float32 else stored


def kv_heads(text: dict) -> int | None:
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return text.get("num_key_value_heads") or text.get("num_kv_heads") or number(text, "heads")


def number(text: dict, what: str) -> int | None:
    """One of NUMBERS as a model's config says it ("experts": of a layer); None where it does not say, or not one for all."""
    return next((text[key] for key in NUMBERS[what] if isinstance(text.get(key), int)), None)


def kernel_rows(layers: list[Layer | Experts]) -> tuple[list[dict], list[Finding]]:
    """A row for all products that are alike: what they are, the kernel, the bytes of one; and those that no kernel computes."""
    rows: dict[tuple, dict] = {}
    findings: list[Finding] = []
    for layer in layers:
        experts = isinstance(layer, Experts)
        problems = layer.problems if experts else [part.problem for part in layer.parts]
        names = ("experts gate_up", "experts down") if experts else [layer.kind] * len(problems)
        for name, p in zip(names, problems):
            try:
                kernel, passed_over = choose_experts(layer) if experts else choose_linear(p)
            except ValueError as error:
                findings.append(Finding(layer.name, f"can be computed by no kernel ({error})", "quantize again without experts"))
                break
            row = {"name": name, "count": 0, "bits": p.bits, "group_size": p.group_size, "symmetric": p.symmetric,
                   "act_order": p.act_order or (not experts and any(part.spec.desc_act for part in layer.parts)),
                   "n": p.n, "k": p.k, "kernel": kernel.name, "why_not_faster": passed_over,
                   "bytes": kernel.size(p) * (layer.count if experts else 1)}  # fmt: skip
            rows.setdefault(tuple(map(str, row.values())), row)["count"] += 1
    return list(rows.values()), findings


def choose_linear(p):
    *passed_over, (kernel, refused) = survey(p)
    if refused:
        raise ValueError(refused)
    return kernel, "; ".join(f"{k.name} {reason}" for k, reason in passed_over) if kernel.name == "reference" else ""


def choose_experts(layer: Experts):
    """The kernel for linears that the experts' kernel is made of."""
    module = moe.choose(*layer.problems)
    name = next(name for name, known in moe.KERNELS.items() if known is module)
    return next(kernel for kernel in KERNELS if kernel.name == name), ""


def memory_of(quantized: int, rest: int, text: dict, asked: Asked, given: int | None) -> dict:
    """Bytes of one rank; None where the config or the machine does not say. kv_tokens: what fits beside the weights, without
    activations and whatever else runs there."""
    budget = given or default_memory(asked)
    per_token = kv_bytes(text, asked)
    room = None if budget is None else budget - quantized - rest
    return {
        "quantized": quantized,
        "rest": rest,
        "budget": budget,
        "kv_room": room,
        "kv_bytes_per_token": per_token,
        "kv_tokens": None if room is None or per_token is None else max(room, 0) // per_token,
        "max_position_embeddings": text.get("max_position_embeddings"),
    }


def default_memory(asked: Asked) -> int | None:
    if asked.device == "cpu":  # vLLM takes its share of one NUMA node for each rank; ranks beyond those live together
        nodes = len(list(pathlib.Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * MEMORY_SHARE) // max(asked.ranks, nodes)
    if asked.device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory * MEMORY_SHARE)
    return None


def kv_bytes(text: dict, asked: Asked) -> int | None:
    """Of one token in all layers; full attention everywhere is assumed, so models with windows need less."""
    layers, heads, hidden = number(text, "layers"), number(text, "heads"), number(text, "width")
    if text.get("kv_lora_rank"):  # latent attention: one vector, on every rank
        return layers * (text["kv_lora_rank"] + text.get("qk_rope_head_dim", 0)) * asked.dtype.itemsize
    if not (layers and asked.kv_heads and (text.get("head_dim") or (heads and hidden))):
        return None
    head_dim = text.get("head_dim") or hidden // heads
    return 2 * layers * max(1, asked.kv_heads // asked.ranks) * head_dim * asked.dtype.itemsize
