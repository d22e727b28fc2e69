"""What quantizing costs, counted: bytes, operations and steps of every stage, for any model that is a stack of blocks.

The counts follow the code (block, capture, rows, solver, selection, descent, writer); what a machine makes of them are rates,
measured or assumed, which are not in here. Left out: reading the calibration text, embeddings, scales tuned end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FOLDS = 4  # selection.FOLDS
ACTIVATION = 2  # bytes of a number in bfloat16, which the model runs in on GPUs
FLOAT = 4
STEPS = 0.2  # descent.STEPS
# What is counted in which unit.
UNITS = {
    "load": "bytes of the original's blocks",
    "forward": "operations of blocks on the calibration text",
    "moments": "operations of second moments",
    "merge": "bytes of moments added up, fold by fold",
    "factor": "operations of Cholesky factors and triangular inverses",
    "rows": "operations of products of weights and K x K matrices",
    "descent": "bytes that single steps of codes pass over",
    "round": "weights whose range is searched, that are rounded and refitted",
    "write": "weights packed, hashed, written and read back",
}


@dataclass(frozen=True)
class Stage:
    """Linears that share an input of k numbers, n outputs in all. residual: the output joins the residual stream. ends: it is the
    output of attention or of the MLP, which does not run again once it is known. copies: experts; share: of the tokens that
    each sees."""

    k: int
    n: int
    residual: bool = False
    ends: bool = False
    copies: int = 1
    share: float = 1.0

    @property
    def weights(self) -> int:
        return self.k * self.n * self.copies


@dataclass(frozen=True)
class Block:
    """stages: in order. width: of the queries of all heads together, for attention."""

    stages: tuple[Stage, ...]
    width: int

    @property
    def weights(self) -> int:
        return sum(stage.weights for stage in self.stages)


@dataclass(frozen=True)
class Model:
    """blocks: (block, how many are alike). outer: numbers in embeddings and head."""

    name: str
    hidden: int
    blocks: tuple[tuple[Block, int], ...]
    outer: int
    source_bytes: int = 2  # a weight

    @property
    def weights(self) -> int:
        return sum(block.weights * count for block, count in self.blocks)


@dataclass(frozen=True)
class Text:
    samples: int = 256
    length: int = 2048

    @property
    def tokens(self) -> int:
        return self.samples * self.length


def dense(name: str, layers: int, hidden: int, inner: int, heads: int, kv: int, head: int, vocab: int, tables: int = 2) -> Model:
    """Llama and Qwen3. tables: 1 where head and embeddings are tied."""
    attend = attention(hidden, heads, kv, head)
    return Model(name, hidden, ((Block((*attend.stages, *mlp(hidden, inner)), attend.width), layers),), tables * vocab * hidden)


def attention(hidden: int, heads: int, kv: int, head: int) -> Block:
    """Only that part of a block."""
    qkv, o = Stage(hidden, (heads + 2 * kv) * head), Stage(heads * head, hidden, residual=True, ends=True)
    return Block((qkv, o), heads * head)


def mlp(hidden: int, inner: int, **how) -> tuple[Stage, ...]:
    return Stage(hidden, 2 * inner, **how), Stage(inner, hidden, residual=not how, ends=not how, **how)


def moe(name: str, layers: int, hidden: int, inner: int, experts: int, top: int, attend: Block, vocab: int, **parts) -> Model:
    """attend: the attention alone. parts: shared (width of the shared expert); dense_layers of width dense_inner come first."""
    routed = mlp(hidden, inner, copies=experts, share=top / experts)
    shared = mlp(hidden, parts["shared"]) if parts.get("shared") else ()
    block = Block((*attend.stages, *shared, *routed), attend.width)
    first = parts.get("dense_layers", 0)
    plain = Block((*attend.stages, *mlp(hidden, parts["dense_inner"])), attend.width) if first else None
    blocks = ((plain, first), (block, layers - first)) if first else ((block, layers),)
    return Model(name, hidden, blocks, 2 * vocab * hidden)


def latent_attention(hidden: int, heads: int, q_rank: int, kv_rank: int, nope: int, rope: int, value: int) -> Block:
    """DeepSeek's: queries, keys and values through narrow layers."""
    stages = (
        Stage(hidden, q_rank + kv_rank + rope),
        Stage(q_rank, heads * (nope + rope)),
        Stage(kv_rank, heads * (nope + value)),
        Stage(heads * value, hidden, residual=True, ends=True),
    )
    return Block(stages, heads * (nope + rope))


MODELS = (
    dense("8B dense (Qwen3-8B)", 36, 4096, 12288, 32, 8, 128, 151936),
    dense("70B dense (Llama 3)", 80, 8192, 28672, 64, 8, 128, 128256),
    dense("405B dense (Llama 3.1)", 126, 16384, 53248, 128, 8, 128, 128256),
    moe("1T MoE (Kimi-K2)", 61, 7168, 2048, 384, 8, latent_attention(7168, 64, 1536, 512, 128, 64, 128), 163840,
        shared=2048, dense_layers=1, dense_inner=18432),
)  # fmt: skip


@dataclass
class Cost:
    """Stage -> amount in its unit: what ranks share, and what each of them does whole. The same of steps: small operations in a
    row that are over before the next one is asked for. reduced: bytes of moments that ranks add up."""

    shared: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    whole: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    shared_steps: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    whole_steps: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    reduced: float = 0.0

    def total(self, stage: str) -> float:
        return self.of_rank(stage)[0]

    def of_rank(self, stage: str, ranks: int = 1) -> tuple[float, float]:
        """(amount, steps) of one of so many."""
        amount = self.shared[stage] / ranks + self.whole[stage]
        return amount, self.shared_steps[stage] / ranks + self.whole_steps[stage]


def cost(model: Model, text: Text, corrected: bool = True, descended: float = 1.0) -> Cost:
    """Of the whole model. corrected: preset balanced (corrected target, descent); else fast. descended: share of the linears
    whose codes are moved once more because held-out text agrees."""
    found = Cost()
    for block, count in model.blocks:
        add_block(found, block, count, model, text, corrected, descended)
    return found


def add_block(found: Cost, block: Block, count: int, model: Model, text: Text, corrected: bool, descended: float) -> None:
    streams = 2 if corrected else 1
    found.whole["load"] += count * streams * block.weights * model.source_bytes
    found.whole["write"] += count * block.weights
    found.shared["forward"] += count * forward(block, text, corrected)
    for stage in block.stages:
        n, k, times = stage.n, stage.k, count * stage.copies
        tokens = text.tokens * stage.share
        borrowed = 4 * k if tokens < k else 0  # of all tokens, for experts that see few
        cross = 0 if not corrected else n if stage.residual else k
        found.shared["moments"] += times * (tokens + borrowed) * (k * k + 2 * k * cross)
        found.reduced += times * FOLDS * FLOAT * k * (k + cross)
        # Experts are dealt out to ranks; so are the rows of a linear, but not its factors.
        alone, steps = (found.shared, found.shared_steps) if stage.copies > 1 else (found.whole, found.whole_steps)
        held = 1 + (cross > 0)
        alone["merge"] += times * (20 if corrected else 4) * 3 * FLOAT * k * k * held
        factors, inverses = (8, 2) if corrected else (1, 1)
        alone["factor"] += times * (factors / 3 + inverses) * k**3
        found.shared["rows"] += times * n * k * k * (13 if corrected else 9)
        found.shared["round"] += times * n * k
        steps["round"] += times * (2 if corrected else 1) * (300 + 25 * k / 128)
        if corrected:
            found.shared["descent"] += times * STEPS * k * (n * descended + 64) * k * FLOAT * 8
            steps["descent"] += times * (1 + descended) * STEPS * k * 15


def forward(block: Block, text: Text, corrected: bool) -> float:
    """Operations of one block on the whole text, in the quantized model and in the original one."""
    total = 0.0
    for i, stage in enumerate(block.stages):
        runs = passes(block.stages, i, corrected) + corrected
        total += 2 * text.tokens * stage.share * stage.weights * runs
        if i == 0:  # queries and keys, and values, half of them masked
            total += 2 * text.tokens * text.length * block.width * runs
    return total


def passes(stages: tuple[Stage, ...], index: int, corrected: bool) -> int:
    """How often a stage of the quantized model is run: for every later stage of its part of the block, to collect its inputs;
    then that part is known. Of experts the last stage's inputs are made for both models, and all run once more at the end."""
    if stages[index].copies > 1:
        return 1 if index == len(stages) - 1 else 2 + corrected
    end = next(i for i in range(index, len(stages)) if stages[i].ends)
    return max(1, end - index)


def memory(model: Model, text: Text, corrected: bool = True, ranks: int = 1, number: int = ACTIVATION) -> dict[str, float]:
    """Bytes at the worst moment of one process, by what they are. number: bytes of a number the model runs in. activations are
    what a store may put elsewhere: both streams, what the original showed, parts that are known, inputs of one linear."""
    streams, tokens = (2 if corrected else 1), text.tokens / ranks
    stages = [stage for block, _ in model.blocks for stage in block.stages]
    worst = max(stages, key=lambda s: moment_bytes(s, corrected))
    widest = max((stage.k for stage in stages if stage.ends), default=0)
    return {
        "embeddings": model.outer * number,
        "blocks": streams * max(block.weights for block, _ in model.blocks) * number,
        "moments": moment_bytes(worst, corrected),
        "solver": FLOAT * (5 * worst.k**2 + 8 * worst.n * worst.k),
        "activations": tokens * number * ((7 if corrected else 3) * model.hidden + widest),
    }


def moment_bytes(stage: Stage, corrected: bool) -> float:
    """Sums of every fold, their means, and those of all folds."""
    cross = 0 if not corrected else stage.n if stage.residual else stage.k
    return FLOAT * stage.k * (stage.k + cross) * ((2 * FOLDS + 2) if corrected else 2)
