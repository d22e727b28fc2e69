"""Where the loss of a quantized model comes from: first order, second order or neither, linear by linear, on held-out text.

For a quantized linear with weight W0 [N, K] in the original model, Q in the checkpoint and delta = Q - W0, and the next-token
loss L (mean over a sequence's tokens, nats), Taylor's expansion along delta reads

    L(W0 + delta) - L(W0)  =  a + b + r,    a = <grad L, delta>,    b = 1/2 delta^T Hess delta,    r = the remainder.

The left side is measured, a and b come from automatic differentiation, r is what is left. Each linear is looked at twice: alone
(every other weight is the original's) and cumulatively (every linear that runs before it is quantized already, which is what
happens to it in the quantized model; these changes add up to the total change of the loss). At layer level the squared error of
the output splits exactly, with X_q the inputs behind the quantized prefix and X_fp the original's:

    |W0 X_fp - Q X_q|^2  =  |delta X_q|^2  -  2 <W0 (X_fp - X_q), delta X_q>  +  |W0 (X_fp - X_q)|^2
                            quadratic         cross: first order in delta        constant

L is the loss against the true next token. The KL divergence to the original model would not do: it is smallest, with a gradient
of exactly zero, at W0, so it has no first order to find. Weights that the checkpoint leaves alone are taken from the original.
Left out: mixtures of experts, whose linears do not see every token.
"""

from __future__ import annotations

import hashlib
import pathlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from foem_vllm import fp8, models
from foem_vllm.analysis_report import OBJECTIVE, SETTINGS, STEPS, summarize
from foem_vllm.checkpoint import quantized_modules, read_linear, tensor_sizes
from foem_vllm.errors import FoemError
from foem_vllm.format import TENSORS, FormatConfig, dequantize, read_config
from foem_vllm.job import calibration_tokens, pick_device
from foem_vllm.pipeline import progress_bar
from foem_vllm.recipe import QuantizeConfig
from foem_vllm.report import Report
from foem_vllm.stream import StopForward, Weights

LOGITS_PER_BATCH = 1 << 23  # float32; double backward keeps several copies

Stream = list[torch.Tensor | None]  # hidden states [B, T, D] before a block, batch by batch; None before the first


class Network:
    """The original model in float32 with eager attention (the kind that can be differentiated twice), and the tokens [S, T]."""

    def __init__(self, folder: pathlib.Path, tokens: torch.Tensor, device: torch.device, trust_remote_code: bool = False):
        self.model = models.load_eager(folder, torch.float32, trust_remote_code).to(device)
        self.blocks_name, self.blocks = models.find_blocks(self.model)
        vocabulary = self.model.config.get_text_config().vocab_size
        self.batches = tokens.to(device).split(max(1, LOGITS_PER_BATCH // (tokens.shape[1] * vocabulary)))

    @contextmanager
    def _skipping(self, start: int, hidden: torch.Tensor | None) -> Iterator[None]:
        """Blocks before `start` hand on `hidden`, what they were found to compute, instead of computing it again."""
        for block in self.blocks[:start]:
            block.forward = lambda *args, **kwargs: hidden
        try:
            yield
        finally:
            for block in self.blocks[:start]:
                del block.forward

    def batch_loss(self, batch: int, start: int = 0, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """[B] float64: next-token loss of every sequence of a batch, nats per token."""
        ids = self.batches[batch]
        with self._skipping(start, hidden):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        tokens = F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="none")
        return tokens.view(len(ids), -1).mean(1)

    def loss(self, start: int = 0, stream: Stream | None = None) -> torch.Tensor:
        """[S] float64 on the CPU, of all sequences."""
        batches = range(len(self.batches))
        return torch.cat([self.batch_loss(b, start, stream[b] if stream else None) for b in batches]).cpu()

    def advance(self, start: int, stream: Stream, names: list[str]) -> tuple[Stream, dict[str, list[torch.Tensor]]]:
        """(stream before the next block, name -> inputs of that linear batch by batch) of block `start` as it is now.

        `start` behind the last block: the inputs of the linears (the head's) that follow.
        """
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        after: Stream = []

        def leave(module, args, out):
            after.append(out[0] if isinstance(out, tuple) else out)
            raise StopForward

        with ExitStack() as hooks:
            for name in names:
                linear = self.model.get_submodule(name)
                handle = linear.register_forward_pre_hook(lambda m, args, name=name: inputs[name].append(args[0]))
                hooks.callback(handle.remove)
            if start < len(self.blocks):
                hooks.callback(self.blocks[start].register_forward_hook(leave).remove)
            for b, hidden in enumerate(stream):
                try:
                    self.batch_loss(b, start, hidden)
                except StopForward:
                    pass
        return after, inputs

    def derivatives(
        self, linear: nn.Linear, delta: torch.Tensor, start: int, stream: Stream
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(<grad L, delta>, 1/2 delta^T Hess delta), each [S] float64, at the present weights. delta: [N, K] float32.

        The weight is W + t delta with one t per sequence. Sequences of a batch do not see each other, so the first and second
        derivative of the summed losses in t are both for every sequence at once, without a gradient as big as W: the second
        is the Hessian-vector product (double backward) already multiplied by delta.
        """
        first, second = [], []
        for b, hidden in enumerate(stream):
            size = len(self.batches[b])
            t = torch.zeros(size, device=delta.device, requires_grad=True)

            def move(module, args, out, t=t, size=size):
                return out + (t[:, None] * F.linear(args[0], delta).reshape(size, -1)).reshape(out.shape)

            handle = linear.register_forward_hook(move)
            try:
                with torch.enable_grad():
                    (slope,) = torch.autograd.grad(self.batch_loss(b, start, hidden).sum(), t, create_graph=True)
                    (curvature,) = torch.autograd.grad(slope.sum(), t)
            finally:
                handle.remove()
            first.append(slope.detach())
            second.append(curvature / 2)
        return torch.cat(first).double().cpu(), torch.cat(second).double().cpu()


def decompose(
    network: Network, linear: nn.Linear, q: torch.Tensor, start: int, stream: Stream, base: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The terms of one linear, [S] float64 each, from weights that give the loss `base` [S]; leaves the weight as it was.

    q: [N, K] float32, the weight in the checkpoint. The central differences move the weight itself and read losses only, so they
    check the derivatives by another way.
    """
    w0, delta = linear.weight, q - linear.weight

    def loss_at(weight: torch.Tensor) -> torch.Tensor:
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return network.loss(start, stream)

    a, b = network.derivatives(linear, delta, start, stream)
    change = loss_at(q) - base
    terms = {"measured": change, "first_order": a, "second_order": b, "remainder": change - a - b}
    for step in STEPS:
        up, down = loss_at(w0 + step * delta), loss_at(w0 - step * delta)
        terms[f"first_order_{step}"] = (up - down) / (2 * step)
        terms[f"second_order_{step}"] = (up + down - 2 * base) / (2 * step**2)
    linear.weight = w0
    return terms


def split_objective(w0: torch.Tensor, q: torch.Tensor, x_fp: list[torch.Tensor], x_q: list[torch.Tensor], batches) -> dict:
    """The terms of |W0 X_fp - Q X_q|^2 per token and output, [S] float64 each; `power` is |W0 X_fp|^2 on the same scale.

    w0, q: [N, K] float32. x_fp, x_q: inputs [..., K] batch by batch, of the same tokens.
    """
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in (*OBJECTIVE, "total", "power")}
    for ids, original, quantized in zip(batches, x_fp, x_q):
        drift, error = F.linear(original - quantized, w0), F.linear(quantized, q - w0)
        reference = F.linear(original, w0)
        squares = (error**2, -2 * drift * error, drift**2, (reference - F.linear(quantized, q)) ** 2, reference**2)
        for name, values in zip(parts, squares):
            parts[name].append(values.reshape(len(ids), -1).double().mean(1).cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def original_weights(folder: pathlib.Path, hf_config, trust_remote_code: bool) -> Weights:
    """The original's tensors by the names that a checkpoint made of it has: GPT-2's files have shorter ones, and a head that a
    checkpoint holds for itself may be stored as the embedding only."""
    weights = Weights(folder)
    if any(dtype in fp8.DTYPES for dtype, _ in weights.headers.values()):
        raise FoemError(f"{folder}: weights in 8-bit floating point; give the same model in 16 or 32 bits as --source")
    empty = models.build_empty(hf_config, torch.float32, trust_remote_code)
    models.adapt_names(empty, weights)
    models.straighten(empty, weights)
    models.untie(empty, weights)
    for name in list(weights.files):
        weights.files.setdefault(weights.stored_name(name), weights.files[name])
    return weights


def check_pair(out: pathlib.Path, source: pathlib.Path, packed: Weights, weights: Weights, config: FormatConfig) -> None:
    """Refuse a checkpoint and an original that do not belong together: names, shapes, or values that should not have changed."""
    pair = f"{out} and {source} do not belong together"
    modules, found = set(quantized_modules(packed.files)), tensor_sizes(out)
    original = {name: shape for name, (_, shape) in weights.headers.items()}
    if not modules:
        raise FoemError(f"{out}: no quantized weights (no tensor ends in .qweight); give a checkpoint made by `foem quantize`")
    for module in sorted(modules):
        if f"{module}.weight" not in original:
            raise FoemError(f"{pair}: {module} is quantized, but the original has no {module}.weight; give its own original")
        spec = config.spec_for(module)
        if spec is None:
            read_linear(packed, module, config)  # says what is wrong
        rows, n = found[f"{module}.qweight"][0]
        k = found[f"{module}.g_idx"][0][0] if f"{module}.g_idx" in found else rows * 32 // spec.bits
        shape = original[f"{module}.weight"]
        shape = shape[::-1] if f"{module}.weight" in weights.transposed else shape
        if shape != (n, k):
            raise FoemError(
                f"{pair}: {module} is {[n, k]}, but {list(shape)} in the original; give the checkpoint's own original"
            )
    stored = {name for name in found if not (name.rpartition(".")[0] in modules and name.rpartition(".")[2] in TENSORS)}
    for name in sorted(stored & set(original)):
        if found[name][0] != original[name]:
            shapes = f"{list(found[name][0])}, but {list(original[name])} in the original"
            raise FoemError(f"{pair}: {name} is {shapes}; give the checkpoint's own original")
        # Tools may store these in another half precision; anything beyond its rounding is another model.
        if not torch.allclose(packed.read(name).float(), weights.read(name).float(), rtol=2**-7, atol=1e-6):
            raise FoemError(
                f"{pair}: {name} is not quantized, but holds other values; give the model from which the checkpoint was made"
            )
    for name in sorted(stored - set(original)):
        if name.endswith(".bias") and not packed.read(name).any() or name == "lm_head.weight":
            continue  # some tools write zero biases, some write a tied head twice
        raise FoemError(f"{pair}: {name} is not in the original; give the model from which the checkpoint was made")


def order_linears(network: Network, modules: set[str]) -> list[tuple[int, list[str]]]:
    """[(block number, names of its quantized linears)] in the order in which the model runs them; the head's comes last."""
    calls: list[str] = []
    linears = models.find_linears(network.model)
    with ExitStack() as hooks:
        for name in sorted(modules):
            if name not in linears:
                raise FoemError(
                    f"{name}: no linear of that name in transformers' {type(network.model).__name__}; it cannot be analyzed"
                )
            linear = linears[name]
            hooks.callback(linear.register_forward_pre_hook(lambda m, args, name=name: calls.append(name)).remove)
        network.batch_loss(0)
    if sorted(calls) != sorted(modules):
        odd = next(name for name in sorted(modules) if calls.count(name) != 1)
        raise FoemError(f"{odd} runs {calls.count(odd)} times a pass; only dense models, where all run once, can be analyzed")
    groups: dict[int, list[str]] = {}
    for name in calls:
        inside = name.startswith(network.blocks_name + ".")
        if not inside and linears[name] is not network.model.get_output_embeddings():
            raise FoemError(f"{name}: quantized, but in no decoder block; only blocks and the output head can be analyzed")
        index = int(name.removeprefix(network.blocks_name + ".").split(".")[0]) if inside else len(network.blocks)
        groups.setdefault(index, []).append(name)
    return sorted(groups.items())


@torch.no_grad()
def analyze(
    out: str | pathlib.Path,
    source: str | pathlib.Path,
    text: str,
    sequences: int = 16,
    seq_len: int = 256,
    seed: int = 0,
    text_column: str = "text",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
    only: Callable[[str], bool] | None = None,
) -> dict:
    """Decompose the loss change of the checkpoint `out` of the model `source` on sequences x seq_len tokens of `text`.

    text: a file or hub data set that the calibration did not use. only: which quantized linears to look at; the others keep the
    original's weights. Returns what analysis.json holds; losses in nats per token, estimates as mean, low and high (95 %). The
    global random state is left as found. Needs memory for the model in float32 and one block's inputs. Raises FoemError on bad
    input.
    """
    started = time.perf_counter()
    out = pathlib.Path(out)
    if sequences < 2:
        raise FoemError(f"--sequences {sequences}: intervals over sequences need at least 2; 16 or more are sensible")
    if not out.is_dir():
        raise FoemError(f"{out}: no such folder; give a checkpoint made by `foem quantize`")
    config, packed = read_config(out), Weights(out)
    folder = models.resolve(source)
    hf_config = models.load_config(folder, trust_remote_code)
    target, weights = pick_device(device), original_weights(folder, hf_config, trust_remote_code)
    check_pair(out, folder, packed, weights, config)
    try:
        tokens = calibration_tokens(
            QuantizeConfig(calibration=text, text_column=text_column, samples=sequences, seq_len=seq_len, seed=seed),
            folder,
            hf_config,
        )
    except FoemError as error:  # the same checks as for calibration, under this command's option names
        raise FoemError(str(error).replace("--calibration", "--text").replace("--samples", "--sequences")) from None
    network = Network(folder, tokens, target, trust_remote_code)
    models.straighten(network.model, weights)
    modules = {m for m in quantized_modules(packed.files) if only is None or only(m)}
    groups = order_linears(network, modules)
    terms: dict[str, dict[str, dict[str, torch.Tensor]]] = {setting: {} for setting in SETTINGS}
    objective: dict[str, dict[str, torch.Tensor]] = {}
    relative: dict[str, float] = {}

    def original_weight(name: str) -> torch.Tensor:
        weight = weights.read(f"{name}.weight").to(target, torch.float32)
        return weight.T if f"{name}.weight" in weights.transposed else weight

    def quantized_weight(name: str) -> torch.Tensor:
        q, w0 = dequantize(*read_linear(packed, name, config)).to(target), original_weight(name)
        relative[name] = float((q - w0).norm() / w0.norm())
        if relative[name] > 1:  # not even 2 bits do that; a linear of another model does
            raise FoemError(
                f"{out} and {folder} do not belong together: {name} differs from the original by more than its own size; give "
                "the model from which the checkpoint was made"
            )
        return q

    with progress_bar(progress, 2 * len(modules)) as step:
        original_loss = base = network.loss()
        if not torch.isfinite(original_loss).all():
            raise FoemError(f"{folder}: NaN or Inf in its loss on this text; the model is damaged, download it again")
        stream_fp: Stream = [None] * len(network.batches)
        stream_q, block = list(stream_fp), 0
        for index, names in groups:
            while block < index:  # blocks without quantized linears
                stream_fp, stream_q = (network.advance(block, stream, [])[0] for stream in (stream_fp, stream_q))
                block += 1
            next_fp, inputs_fp = network.advance(index, stream_fp, names)
            for setting, stream in zip(SETTINGS, (stream_fp, stream_q)):
                for name in names:
                    step(f"{name} {setting}")
                    linear, q = network.model.get_submodule(name), quantized_weight(name)
                    start = original_loss if setting == "single" else base
                    terms[setting][name] = found = decompose(network, linear, q, index, stream, start)
                    if setting == "cumulative":
                        base = base + found["measured"]
                        linear.weight = nn.Parameter(q, requires_grad=False)
            next_q, inputs_q = network.advance(index, stream_q, names)
            for name in names:
                w0, q = original_weight(name), quantized_weight(name)
                objective[name] = split_objective(w0, q, inputs_fp.pop(name), inputs_q.pop(name), network.batches)
            stream_fp, stream_q, block = next_fp, next_q, index + 1
        quantized_loss = network.loss()
        step("done")
    return summarize(terms, objective, relative, original_loss, quantized_loss) | {
        "recipe": {
            "checkpoint": out.name,
            "source": str(source) if not pathlib.Path(source).exists() else folder.name,
            "text": pathlib.Path(text).name,
            "sequences": sequences,
            "seq_len": seq_len,
            "seed": seed,
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
            "quantization": {k: v for k, v in ((config.meta or {}).get("foem") or {}).items() if k != "sha256"},
        },
        "environment": Report({}).to_json()["environment"] | {"device": str(target)},
        "seconds": time.perf_counter() - started,
    }
