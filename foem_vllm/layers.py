"""The layers that vLLM makes of a checkpoint's modules, and what one of several ranks computes of each. vLLM is not imported.

vLLM fuses q, k and v, and gate and up; it cuts outputs of most linears into ranks, inputs of those that lead back to the
residual stream, and computes all experts of a block as one layer. Which is which it knows from its model classes; here names
say it (FUSED, ROW, WHOLE, EXPERT), which holds for the families in this project's tests. A name that is not known counts as a
linear whose outputs are cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from foem_kernels import Problem

from foem_vllm.errors import FoemError
from foem_vllm.expert_parts import NO_EXPERTS, Part, expert_specs
from foem_vllm.serving import Finding, Headers, columns_of, cut_order_groups, rank_groups
from foem_vllm.spec import QuantSpec

WHOLE = ("q_a_proj", "kv_a_proj_with_mqa")  # of latent attention: every rank computes them all
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "fused_qkv_a_proj": WHOLE}
FUSED_ON_DISK = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv")  # query, key and value heads in one module
ROW = ("o_proj", "down_proj", "out_proj", "fc2", "fc_out", "dense", "dense_4h_to_h", "c_proj", "wo", "w2")
EXPERT = re.compile(r"(?P<block>.*\.experts)\.(?P<expert>\d+)\.(?P<name>\w+)")
EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", *HEADS)
VOCABULARY_STEP = 64  # vLLM pads vocabularies to a multiple of it
FEWER = "use another --tensor-parallel-size"


@dataclass(frozen=True)
class Product:
    """What one kernel call computes: outputs n of a layer that are quantized alike."""

    spec: QuantSpec
    n: int
    problem: Problem


@dataclass(frozen=True)
class Layer:
    """A linear of vLLM as one rank computes it. members: {checkpoint module: spec, None when unquantized}, in order.

    n, k: of this rank; stored_n: outputs of the whole linear. parts: its products.
    """

    name: str
    members: Mapping[str, QuantSpec | None]
    n: int
    k: int
    stored_n: int
    parts: tuple[Product, ...]

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def head(self) -> bool:
        return self.kind in HEADS


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block as one rank computes them. count: of the rank that has most. parts: of one expert, gate and
    up together, then down; problems: what a kernel is asked to do of each, on the rank where that is most."""

    name: str
    count: int
    parts: tuple[Part, Part]
    problems: tuple[Problem, Problem]

    @property
    def kind(self) -> str:
        return "experts"


@dataclass(frozen=True)
class Asked:
    """For whom layers are made. heads, kv_heads: of the model, and experts of a layer, None when unknown. expert_parallel: ranks
    hold whole experts."""

    ranks: int
    dtype: torch.dtype
    device: str
    kv_heads: int | None = None
    expert_parallel: bool = False
    heads: int | None = None
    experts: int | None = None


def product(spec: QuantSpec, n: int, k: int, cut: bool, asked: Asked) -> Product:
    """Of n outputs and k inputs, which are a part of a row-parallel linear's if `cut`."""
    if spec.desc_act and cut:
        (size, columns), order = cut_order_groups(spec, k * asked.ranks, asked.ranks), False
    else:
        (size, columns), order = rank_groups(spec, 0, k), spec.desc_act and k % spec.group_size == 0
    return Product(spec, n, Problem(n, columns, spec.bits, size, spec.symmetric, asked.dtype, asked.device, order))


def share(size: int, what: str, module: str, asked: Asked, findings: list[Finding]) -> int:
    """A rank's part of `size`; notes in `findings` when there is none."""
    if size % asked.ranks:
        findings.append(Finding(module, f"has {size} {what}, which {asked.ranks} ranks cannot share evenly", FEWER))
    return -(-size // asked.ranks)


def outputs_of_rank(module: str, n: int, asked: Asked, findings: list[Finding]) -> int:
    last = module.rpartition(".")[2]
    if last in WHOLE:
        return n
    if last in HEADS:
        return -(-n // VOCABULARY_STEP) * VOCABULARY_STEP // asked.ranks
    if last in ("k_proj", "v_proj") and asked.kv_heads and asked.ranks > asked.kv_heads:
        return n // asked.kv_heads  # each rank has a copy of one head
    if last in FUSED_ON_DISK and asked.heads and asked.kv_heads and asked.ranks > asked.kv_heads:
        return n // (asked.heads + 2 * asked.kv_heads) * (-(-asked.heads // asked.ranks) + 2)  # likewise
    return share(n, "outputs", module, asked, findings)


def fusions(modules: Mapping[str, QuantSpec], headers: Headers) -> Iterator[tuple[str, dict[str, QuantSpec | None]]]:
    """(name of vLLM's layer, {checkpoint module: spec}) of every layer with a quantized module, experts apart."""
    done = set()
    for module in modules:
        if module in done or EXPERT.fullmatch(module):
            continue
        parent, _, last = module.rpartition(".")
        for fused, names in FUSED.items():
            members = [f"{parent}.{name}" for name in names]
            if last in names and all(m in modules or f"{m}.weight" in headers for m in members):
                done.update(members)
                yield f"{parent}.{fused}", {m: modules.get(m) for m in members}
                break
        else:
            yield module, {module: modules[module]}


def linear(name: str, members: dict[str, QuantSpec | None], headers: Headers, asked: Asked, findings: list[Finding]) -> Layer:
    sizes = {m: headers[f"{m}.weight" if s is None else f"{m}.qweight"][1] for m, s in members.items()}
    stored = {m: sizes[m][0] if s is None else sizes[m][-1] for m, s in members.items()}
    module, spec = next((m, s) for m, s in members.items() if s)
    k, row = columns_of(module, headers, spec), name.rpartition(".")[2] in ROW
    k_rank = share(k, "inputs", module, asked, findings) if row else k
    n_rank = {m: stored[m] if row else outputs_of_rank(m, stored[m], asked, findings) for m in members}
    runs: list[tuple[QuantSpec, int]] = []  # modules that stand beside each other and are quantized alike are one product
    before = None
    for m, s in members.items():
        if s and s == before:
            runs[-1] = (s, runs[-1][1] + n_rank[m])
        elif s:
            runs.append((s, n_rank[m]))
        before = s
    parts = tuple(product(s, n, k_rank, row and asked.ranks > 1, asked) for s, n in runs)
    return Layer(name, members, sum(n_rank.values()), k_rank, sum(stored.values()), parts)


def experts(modules: Mapping[str, QuantSpec], headers: Headers, asked: Asked, findings: list[Finding]) -> Iterator[Experts]:
    """The experts of every block that has quantized ones; blocks that cannot be served are findings."""
    blocks: dict[str, dict[str, int]] = {}
    for found in filter(None, map(EXPERT.fullmatch, modules)):
        names = blocks.setdefault(found["block"], {})
        names[found["name"]] = max(names.get(found["name"], 0), int(found["expert"]) + 1)
    for block, names in blocks.items():
        gate, up, down = next((names3 for names3 in EXPERT_NAMES if set(names3) & set(names)), (None,) * 3)
        if gate is None:
            known = " or ".join(", ".join(names3) for names3 in EXPERT_NAMES)
            findings.append(Finding(block, f"has experts of {', '.join(sorted(names))}, not of {known}",
                                    "serve it without --quantization foem"))  # fmt: skip
            continue
        count = asked.experts or max(names.values())
        try:
            specs = expert_specs(block, count, (gate, up, down), modules.get)
            sizes = {name: headers[f"{block}.0.{name}.qweight"][1][-1] for name in (gate, down)}
        except FoemError as error:
            findings.append(Finding(block, *re.fullmatch(r"(?:.*?: )?(.*); (.*)", str(error)).groups()))
            continue
        ranks = 1 if asked.expert_parallel else asked.ranks
        if asked.expert_parallel and asked.ranks > count:
            findings.append(Finding(block, *NO_EXPERTS.format(asked.ranks, count).split("; ")))
        if sizes[gate] % ranks:
            findings.append(Finding(f"{block}.0.{gate}", f"has {sizes[gate]} outputs, which {ranks} ranks cannot share evenly",
                                    f"{FEWER}, or --enable-expert-parallel"))  # fmt: skip
        parts = (Part("w13", (("w1", gate), ("w3", up)), specs[0], sizes[down], sizes[gate], False, ranks),
                 Part("w2", (("w2", down),), specs[1], sizes[gate], sizes[down], True, ranks))  # fmt: skip
        problems = tuple(max((replace(part, rank=rank).problem(asked.dtype, asked.device) for rank in range(ranks)),
                             key=lambda p: (p.k, p.groups)) for part in parts)  # fmt: skip
        yield Experts(block, -(-count // asked.ranks) if asked.expert_parallel else count, parts, problems)


def served_layers(
    modules: Mapping[str, QuantSpec], headers: Headers, asked: Asked
) -> tuple[list[Layer | Experts], list[Finding]]:
    """(layers with quantized modules as one rank computes them, what cannot be shared among ranks or computed together)."""
    findings: list[Finding] = []
    made: list[Layer | Experts] = [linear(name, members, headers, asked, findings) for name, members in fusions(modules, headers)]
    made += experts(modules, headers, asked, findings)
    return made, findings


def rest_per_rank(headers: Headers, modules: Mapping[str, QuantSpec], tied: bool, asked: Asked) -> int:
    """Numbers that a rank holds unquantized: embeddings, heads and linears in parts, everything else whole."""
    total = 0
    for tensor, (_, shape) in headers.items():
        module, _, key = tensor.rpartition(".")
        last = module.rpartition(".")[2]
        if module in modules and key != "bias" or (tied and last in HEADS):
            continue
        size = 1
        for length in shape:
            size *= length
        shared = (
            len(shape) == 2
            and last not in WHOLE
            and (
                last in (*EMBEDDINGS, *ROW, *FUSED) or any(last in names for names in FUSED.values()) or EXPERT.fullmatch(module)
            )
        )
        total += -(-size // asked.ranks) if shared else size
    return total
