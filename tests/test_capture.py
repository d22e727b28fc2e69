"""What hooks collect: moments in folds, and where a linear's output joins the residual stream in real transformers blocks."""

import functools

import pytest
import torch
import transformers
from tiny_models import COMMON, CONFIGS
from torch import nn

from foem_vllm import models
from foem_vllm.capture import Known, Moments, Part, find_part, find_stages, find_sum, observe, silent
from foem_vllm.errors import FoemError
from foem_vllm.selection import drift

MORE = {
    **CONFIGS,
    "granite": ("GraniteConfig", {**COMMON, "residual_multiplier": 0.22}),
    "olmo2": ("Olmo2Config", COMMON),
    "gpt_neox sequential": ("GPTNeoXConfig", {**CONFIGS["gpt_neox"][1], "use_parallel_residual": False}),
}


@functools.cache
def block_and_run(arch, dtype):
    """The second block of a random model and a callable that runs it as the model does."""
    name, values = MORE[arch]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**values)).to(dtype).eval()
        tokens = torch.randint(0, 4096, (2, 24))
    for p in model.parameters():
        if p.ndim == 2:
            p.data.mul_(4)
    block = models.find_blocks(model)[1][1]
    calls = []
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()

    @torch.no_grad()
    def run():
        out = block(*calls[0][0], **calls[0][1])
        return out[0] if isinstance(out, tuple) else out

    return block, run


LLAMA = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "", "self_attn.v_proj": None, "mlp.up_proj": None}
PLACES = {
    "llama": {**LLAMA, "self_attn.q_proj": None, "self_attn.k_proj": None},
    "qwen3": {**LLAMA, "self_attn.q_proj": None, "self_attn.k_proj": None},
    "phi3": {"self_attn.qkv_proj": None, "self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""},
    "gpt_neox": {"attention.query_key_value": None, "attention.dense": "", "mlp.dense_4h_to_h": ""},
    "gpt_neox sequential": {"attention.dense": "post_attention_layernorm", "mlp.dense_4h_to_h": ""},
    "opt": {"self_attn.q_proj": None, "self_attn.out_proj": "final_layer_norm", "fc2": ""},
    # Their norms stand between the linear and the stream: only the linear's own output is found, where the norm reads it.
    "gemma2": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"},
    "olmo2": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"},
    # Its linears join the stream times 0.22.
    "granite": {"self_attn.o_proj": None, "mlp.down_proj": None},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arch", PLACES)
def test_where_an_output_joins_the_stream(arch, dtype):
    block, run = block_and_run(arch, dtype)
    state, before = torch.get_rng_state(), run()
    for name, place in PLACES[arch].items():
        assert find_sum(block, name, run) == place, name
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(before, run())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


@pytest.mark.parametrize("arch", ["gemma2", "olmo2"])
def test_places_before_a_norm_hold_only_the_own_output(arch):
    block, run = block_and_run(arch, torch.float32)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        own = []
        handle = block.get_submodule(name).register_forward_hook(lambda m, args, out, own=own: own.append(out))
        seen = observe(block, {PLACES[arch][name]}, run)[PLACES[arch][name]]
        handle.remove()
        assert torch.equal(seen, own[0])


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "opt"])
def test_the_place_moves_with_the_weights(arch):
    """What the place is for: the change of a linear's output is the change there, token by token."""
    block, run = block_and_run(arch, torch.float32)
    for name, place in ((n, p) for n, p in PLACES[arch].items() if p is not None):
        linear = block.get_submodule(name)
        before = observe(block, {name, place}, run)
        old = linear.weight.data.clone()
        linear.weight.data += 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
        change = before[name] @ (linear.weight.data - old).T
        after = observe(block, {place}, run)[place]
        linear.weight.data = old
        assert torch.allclose(after - before[place], change.view(after.shape), atol=1e-4 * float(change.abs().max()) + 1e-6)


def test_stages_share_an_input():
    block, run = block_and_run("qwen3", torch.float32)
    stages = find_stages(models.find_linears(block), run)
    short = [[n.rpartition(".")[2] for n in s] for s in stages]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        return self.third(self.second(self.first(x)))


@torch.no_grad()
def test_observe_stops_as_soon_as_it_knows_everything():
    chain, x = Chain(), torch.randn(3, 4)
    ran = []
    for name in ("first", "second", "third"):
        chain.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: ran.append(name))
    seen = observe(chain, {"second"}, lambda: chain(x))
    assert set(seen) == {"second"} and torch.equal(seen["second"], chain.first(x)) and "second" not in ran
    ran.clear()
    seen = observe(chain, ["third", "second"], lambda: chain(x))
    assert set(seen) == {"second", "third"} and ran == ["first", "second"]
    ran.clear()
    seen = observe(chain, {"", "first"}, lambda: chain(x))
    assert ran == ["first", "second", "third"] and torch.equal(seen[""], chain(x)) and seen["first"] is x
    assert not any(m._forward_pre_hooks for m in chain.modules())


class Parts(nn.Module):
    """A block with parts that return a linear's output as it is, in a tuple, changed, or beside something else."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner = kind, nn.Module()
        self.inner.last = nn.Linear(4, 4)
        self.inner.forward = self.run
        self.outer = nn.Module()
        self.outer.inner, self.outer.forward = self.inner, lambda x: self.inner(x)
        self.calls = 0

    def run(self, x):
        self.calls += 1
        out = self.inner.last(x)
        return {"same": out, "tuple": (out, None), "changed": out + 1, "more": (out, x), "copy": out.clone()}[self.kind]

    def forward(self, x):
        out = self.outer(x)
        return x + (out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("kind", ["same", "tuple", "changed", "more", "copy"])
def test_parts_whose_output_is_that_of_a_linear(kind):
    block, x = Parts(kind), torch.randn(2, 3, 4)
    part = find_part(block, "outer.inner.last", lambda: block(x))
    assert part == {"same": Part("outer", 0), "tuple": Part("outer", 2)}.get(kind)
    assert find_part(block, "outer.inner.last", lambda: None) is None
    if part is None:
        return
    wanted, known = block(x), Known(block)
    known.add(part, [torch.zeros(2, 3, 4), block.inner.last(x)])
    block.calls = 0
    with known.of(1):
        assert torch.equal(block(x), wanted)
    with known.of(0):
        assert torch.equal(block(x), x)
    assert block.calls == 0 and torch.equal(block(x), wanted) and block.calls == 1


@pytest.mark.parametrize("bias", [False, True])
def test_a_silent_linear_gives_its_bias_alone(bias):
    linear, x = nn.Linear(3, 5, bias, dtype=torch.bfloat16), torch.randn(2, 4, 3, dtype=torch.bfloat16)
    expected = linear(torch.zeros_like(x))
    with silent(linear):
        assert torch.equal(linear(x), expected)
        linear(x).add_(1)
    assert torch.equal(linear(torch.zeros_like(x)), expected) and not torch.equal(linear(x), expected)


@pytest.mark.parametrize("kind", ["h", "d", "g"])
def test_folds_add_up_to_the_whole(kind):
    g = torch.Generator().manual_seed(0)
    k, n, sizes = 5, 3, (7, 4, 9, 2, 6)
    W = torch.randn(n, k, generator=g)
    moments = Moments(k, torch.device("cpu"), 4, kind == "d", n if kind == "g" else None)
    x = [torch.randn(1, t, k, generator=g) for t in sizes]
    extra = [torch.randn(1, t, n if kind == "g" else k, generator=g) for t in sizes]  # original minus quantized
    now = [torch.randn(e.shape, generator=g) for e in extra]
    for b, (a, e, c) in enumerate(zip(x, extra, now)):  # the last fold sees nothing
        then = c + e + (a @ W.T if kind == "g" else 0)
        moments.add(b % 3, a, *((None, None) if kind == "h" else (c, then)))

    def expected(parts):
        rows, drift = (torch.cat([t[b][0].double() for b in range(5) if b % 3 in parts]) for t in (x, extra))
        return rows.T @ rows / len(rows), drift.T @ rows / len(rows), len(rows)

    whole, two, folds = moments.means(), moments.means([0, 2]), moments.folds()
    assert [f.tokens for f in folds] == [9, 10, 9] and moments.tokens == 28
    for found, parts in [(whole, {0, 1, 2}), (two, {0, 2}), *((folds[i], {i}) for i in range(3))]:
        h, other, tokens = expected(parts)
        assert torch.allclose(found.h.double(), h, atol=1e-6) and found.tokens == tokens
        for name, value in (("d", found.d), ("g", drift(W, found) if kind == "g" else None)):
            assert (value is None) == (name != kind) and (value is None or torch.allclose(value.double(), other, atol=1e-5))


def test_half_precision_is_summed_in_float32():
    moments = Moments(4, torch.device("cpu"))
    for _ in range(600):
        moments.add(0, torch.ones(1, 4, dtype=torch.bfloat16))
    assert torch.equal(moments.means().h, torch.ones(4, 4))


def test_activations_that_are_not_finite_name_the_layer():
    moments = Moments(2, torch.device("cpu"), 2)
    moments.add(0, torch.ones(1, 2))
    moments.add(1, torch.tensor([[1.0, float("inf")]]))
    assert moments.means([0]).tokens == 1
    with pytest.raises(FoemError, match="model.layers.3.mlp.down_proj: NaN or Inf"):
        moments.means(name="model.layers.3.mlp.down_proj")
