"""What a checkpoint asks of whoever serves it: which modules are quantized and how, what is wrong, what a rank computes.

Everything here follows from the config and the safetensors headers alone. The vLLM plugin refuses with it before anything is
loaded, and `foem doctor` predicts with it; vLLM is not imported.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from foem_vllm.errors import FoemError
from foem_vllm.format import FormatConfig, QuantSpec, stored_shapes

Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # {tensor: (safetensors dtype, shape)}
FLOATS = ("F16", "BF16", "F32")
AGAIN = "download or quantize the checkpoint again"
LAYER = re.compile(r"(?P<stack>(?:.*?\.)?(?:layers|h|blocks|block))\.(?P<number>\d+)\.(?P<rest>.+)")
EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
# {model: (module whose tensors vLLM's class puts in another order by rows, packed or not; the release of vLLM that ended it)}
REARRANGED = {"BloomForCausalLM": ("query_key_value", None), "GPTNeoXForCausalLM": ("query_key_value", (0, 32))}
STEP = 16  # every kernel takes groups of a multiple of this many columns, and one group for all columns
EXPERT_SIZES = (128, 64, 32, STEP)  # groups that every kernel for experts takes, when they are whole


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: with which tensor, what, and what to do."""

    tensor: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.tensor} {self.problem}; {self.remedy}"


def columns_of(module: str, headers: Headers, spec: QuantSpec) -> int:
    """Input columns of a quantized module: from its g_idx, else the number that its words and its scales both allow."""
    g_idx = headers.get(f"{module}.g_idx")
    if g_idx and len(g_idx[1]) == 1:
        return g_idx[1][0]
    words, groups = (next(iter(headers.get(f"{module}.{key}", ("", ()))[1]), 0) for key in ("qweight", "scales"))
    most = words * 32 // spec.bits
    fewest = max(most - 31 // spec.bits, 1)
    return next((k for k in range(most, fewest - 1, -1) if spec.groups(k) == groups), most)


def module_findings(module: str, headers: Headers, spec: QuantSpec) -> Iterator[Finding]:
    """What is missing from the tensors of a quantized module, or of another shape or dtype than `spec` makes it."""
    n = (headers[f"{module}.qweight"][1] or (0,))[-1]
    for key, (shape, dtype) in stored_shapes(spec, columns_of(module, headers, spec), n).items():
        tensor = f"{module}.{key}"
        if tensor not in headers:
            if key != "g_idx" or spec.desc_act:
                yield Finding(tensor, "is missing", AGAIN)
        elif headers[tensor][1] != shape or headers[tensor][0] not in (("I32",) if dtype is torch.int32 else FLOATS):
            yield Finding(
                tensor,
                f"is {headers[tensor][0]} {list(headers[tensor][1])}, but bits={spec.bits} and group_size={spec.group_size} "
                f"need {'I32' if dtype else 'floating point'} {list(shape)}",
                "correct bits and group_size in config.json, or download the checkpoint again",
            )
    if f"{module}.weight" in headers and LAYER.match(f"{module}.weight"):
        yield Finding(f"{module}.weight", "is there beside quantized weights of the same module", AGAIN)


def missing_layers(headers: Headers, modules: Mapping[str, QuantSpec], expected: int | None) -> list[Finding]:
    """Of the decoder layers with quantized `modules`: numbers that no tensor has before the last one, or, in the longest stack,
    among `expected` ones; and the modules that are in all layers but one, where those others are alike and it has nothing that
    they have not. Names alone cannot know more: there are models whose layers differ.

    >>> h = {f"model.layers.{i}.{m}.qweight": ("I32", (1, 1)) for i, m in ((0, "o"), (0, "q"), (2, "o"))}
    >>> for finding in missing_layers(h, {name[:-8]: None for name in h}, 4):
    ...     print(finding.tensor, finding.problem)
    model.layers.1 has no tensors
    model.layers.3 has no tensors
    model.layers.2.q is missing
    """
    stacks: dict[str, dict[int, set[str]]] = {}
    for tensor in headers:
        if found := LAYER.match(tensor):
            module = EXPERT_NUMBER.sub(".experts.", found["rest"]).rpartition(".")[0]
            stacks.setdefault(found["stack"], {}).setdefault(int(found["number"]), set()).add(module)
    findings = []
    quantized = sorted({found["stack"] for module in modules if (found := LAYER.match(f"{module}.qweight"))})
    longest = max(quantized, key=lambda stack: len(stacks[stack]), default=None)  # others: layers that draft, towers
    for stack in quantized:
        layers = stacks[stack]
        count = max(expected or 0, max(layers) + 1) if stack == longest else max(layers) + 1
        findings += [Finding(f"{stack}.{i}", "has no tensors", AGAIN) for i in range(count) if i not in layers]
        kinds = Counter(map(frozenset, layers.values()))
        whole = max(kinds, key=lambda kind: (kinds[kind], len(kind)))
        if len(kinds) == 2 and kinds[whole] == len(layers) - 1:
            number, names = next((number, names) for number, names in layers.items() if names != whole)
            lacking = sorted(whole - names) if names < whole else ()
            findings += [Finding(f"{stack}.{number}.{name}", "is missing", AGAIN) for name in lacking]
    return findings


def inspect_modules(headers: Headers, config: FormatConfig) -> tuple[dict[str, QuantSpec], list[Finding]]:
    """({module: spec} of the modules with a qweight, everything that is wrong with them). Raises FoemError on broken rules."""
    modules, findings = {}, []
    for tensor in headers:
        module, _, key = tensor.rpartition(".")
        if key != "qweight":
            continue
        spec = config.spec_for(module)
        if spec is None:
            findings.append(
                Finding(
                    tensor,
                    "is quantized, but a `dynamic` rule of config.json excludes its module",
                    "config.json belongs to other weights: download both again",
                )
            )
            continue
        modules[module] = spec
        findings += module_findings(module, headers, spec)
    if headers and not modules and not findings:
        findings.append(
            Finding(
                "*.qweight",
                "is the name of no tensor, although config.json says GPTQ",
                "serve it without --quantization, or quantize it with `foem quantize`",
            )
        )
    return modules, findings


def quantized_modules(headers: Headers, config: FormatConfig, where: str) -> dict[str, QuantSpec]:
    """{module: spec} of the modules with a qweight. Raises FoemError with the first finding; where: the checkpoint."""
    modules, findings = inspect_modules(headers, config)
    if findings:
        more = f" ({len(findings) - 1} more like it)" if len(findings) > 1 else ""
        raise FoemError(f"{where}: {findings[0]}{more}")
    return modules


def rearranged(architectures: Sequence[str], release: tuple[int, int] | None = None) -> dict[str, tuple[str, str]]:
    """{last name of a module: (model, remedy)} of what vLLM takes only unquantized. release: of vLLM; None for any."""
    found = {}
    for model in set(architectures) & set(REARRANGED):
        last, ended = REARRANGED[model]
        if ended is None or (release and release < ended):
            newer = f"use vLLM {ended[0]}.{ended[1]} or newer, or " if ended else ""
            found[last] = model, f"{newer}quantize the model again with --exclude {last}"
    return found


def rearranged_findings(modules: Mapping, architectures: Sequence[str], release=None) -> Iterator[Finding]:
    """The first of the quantized modules that `rearranged` knows: their tensors would arrive as garbage, or not at all."""
    for last, (model, remedy) in rearranged(architectures, release).items():
        for name in [name for name in modules if name.rpartition(".")[2] == last][:1]:
            problem = f"is quantized, but vLLM's {model} puts its rows in another order as if they were not packed"
            yield Finding(name, problem, remedy)


def fused_specs(
    prefix: str, packed: Mapping[str, Sequence[str]], spec_of: Callable[[str], QuantSpec | None]
) -> dict[str, QuantSpec | None]:
    """{checkpoint module: its spec} of the modules that are fused into the served module `prefix`, in order; None: unquantized.

    packed: vLLM's {fused name: [names before fusion]}.
    """
    parent, _, last = prefix.rpartition(".")
    names = [f"{parent}.{name}" if parent else name for name in packed.get(last, [last])]
    return {name: spec_of(name) for name in names}


def kernel_groups(counts: Sequence[int]) -> tuple[int, int]:
    """(group size, columns) in which a kernel takes columns whose groups, one after the other, hold `counts` columns each.

    Kernels want one group, or groups of one size that STEP divides; only the last may be smaller. Other groups are cut into
    equal ones: of the greatest common divisor when kernels take that, else of STEP columns with some added to fill each group.

    >>> kernel_groups([128, 128, 100])
    (128, 356)
    >>> kernel_groups([64, 128])  # 192 .. 384 of 384 columns in groups of 128
    (64, 192)
    >>> kernel_groups([20, 30])
    (16, 64)
    """
    whole = all(count == counts[0] for count in counts[:-1]) and counts[-1] <= counts[0]
    if len(counts) == 1 or (whole and counts[0] % STEP == 0):
        return counts[0], sum(counts)
    size = math.gcd(*counts)
    size = STEP if size % STEP else size
    return size, sum(-(-count // size) * size for count in counts)


def expert_groups(counts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """`kernel_groups` of all experts of a layer, which are laid out alike: counts[e] are the columns of the groups of expert e.

    Kernels want one group of whole STEPs, or whole groups of one of EXPERT_SIZES.

    >>> expert_groups([[128, 64], [128, 64]])
    (64, 192)
    >>> expert_groups([[20, 30], [26, 24]])
    (16, 64)
    >>> expert_groups([[100]])
    (112, 112)
    """
    if all(len(groups) == 1 for groups in counts):
        size = -(-max(map(sum, counts)) // STEP) * STEP
        return size, size
    common = math.gcd(*(count for groups in counts for count in groups))
    size = next((size for size in EXPERT_SIZES if common % size == 0), STEP)
    return size, max(sum(-(-count // size) * size for count in groups) for groups in counts)


def share_counts(spec: QuantSpec, start: int, stop: int) -> list[int]:
    """Columns of every group among the columns start .. stop of a linear whose groups are in order."""
    if spec.group_size == -1:
        return [stop - start]
    size = spec.group_size
    edges = [start, *range((start // size + 1) * size, stop, size), stop]
    return [b - a for a, b in zip(edges, edges[1:])]


def rank_groups(spec: QuantSpec, start: int, stop: int) -> tuple[int, int]:
    """`kernel_groups` of `share_counts`: what a rank's kernel is asked to do."""
    return kernel_groups(share_counts(spec, start, stop))


def cut_order_groups(spec: QuantSpec, k: int, ranks: int) -> tuple[int, int]:
    """(group size, columns) that a rank needs, on average, for its part of the k columns of a linear in activation order.

    It holds some columns of every group; how many, only g_idx says. They are taken to need groups of STEP, and half of the
    most padding that this can cost.
    """
    columns = k // ranks + spec.groups(k) * (STEP - 1) // 2
    return STEP, -(-columns // STEP) * STEP
