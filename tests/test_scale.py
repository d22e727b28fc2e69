"""The estimate at scale: its shapes are the models', its counts those of the code, its page that of the committed measurement."""

from __future__ import annotations

import json
import pathlib
import sys
import time

import pytest
import torch
import transformers
from tiny_models import CALIBRATION, write_model

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "eval"))

import scale  # noqa: E402
import scale_model  # noqa: E402
from scale_model import MODELS, UNITS, Block, Stage, Text, cost, dense, forward, memory, mlp, passes  # noqa: E402
from scale_stages import TIMED, Stopwatch  # noqa: E402

from foem_vllm import QuantizeConfig, descent, quantize, selection  # noqa: E402


@pytest.mark.parametrize("model, billions", [*zip(MODELS, (8.19, 70.55, 405.85, 1026.4))])
def test_models_have_the_published_sizes(model, billions):
    assert (model.weights + model.outer) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_block_counts_what_transformers_builds():
    config = transformers.Qwen3Config(
        hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = dense("", 3, 64, 192, 4, 2, 32, 100)
    linears = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert counted.weights + 100 * 64 == sum(linears) and counted.outer == 2 * 100 * 64


def test_constants_are_those_of_the_code():
    assert (scale_model.FOLDS, scale_model.STEPS) == (selection.FOLDS, descent.STEPS)


def flops(tmp_path, text: Text, preset: str) -> float:
    """Operations of matrix products inside BlockInputs.run and of linears that are run on their own, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    from foem_vllm.stream import BlockInputs

    total, run = 0, BlockInputs.run

    def counting(*arguments):
        nonlocal total
        with FlopCounterMode(display=False) as counter:
            try:
                return run(*arguments)
            finally:
                total += counter.get_total_flops()

    source = write_model(tmp_path / "model", "qwen3", torch.bfloat16)
    how = QuantizeConfig(preset=preset, calibration=str(CALIBRATION), samples=text.samples, seq_len=text.length, group_size=32,
                         device="cpu")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockInputs, "run", counting)
        quantize(source, tmp_path / preset, how)
    return total


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_forward_passes_are_as_many_as_torch_counts(tmp_path, preset):
    """Trial runs, which look for stages and sums once, do not grow with the text: more of it is compared with less, the batches
    being as large."""
    texts = Text(128, 128), Text(256, 128)
    few, many = (flops(tmp_path / str(t.samples), t, preset) for t in texts)
    alike, count = dense("", 2, 64, 128, 4, 2, 32, 4096).blocks[0]
    found = [count * forward(alike, t, preset == "balanced") for t in texts]
    more = texts[0].tokens
    outside = sum(2 * more * stage.weights for stage in alike.stages if stage.ends) * count  # run on their own inputs
    attention = 2 * more * 128 * alike.width * count * (1 + (preset == "balanced"))  # which torch does not count on CPUs
    assert many - few == found[1] - found[0] - outside - attention


def test_parts_of_a_block_run_until_they_are_known():
    stages = dense("", 1, 64, 128, 4, 2, 16, 10).blocks[0][0].stages
    assert [passes(stages, i, True) for i in range(4)] == [1, 1, 1, 1]
    narrow = scale_model.latent_attention(64, 4, 24, 8, 16, 8, 16).stages
    routed = (*narrow, *mlp(64, 32, copies=8, share=0.25))
    assert [passes(routed, i, True) for i in range(6)] == [3, 2, 1, 1, 3, 1]


def test_more_ranks_share_text_rows_and_experts_but_not_factors():
    text, one = Text(8, 64), dense("", 1, 64, 128, 4, 2, 16, 10)
    found = cost(one, text)
    assert found.of_rank("factor", 8) == found.of_rank("factor") and found.of_rank("moments", 8)[0] == found.shared["moments"] / 8
    experts = scale_model.Model("", 64, ((Block(mlp(64, 32, copies=8, share=0.25), 64), 1),), 0)
    assert cost(experts, text).of_rank("factor", 8)[0] == cost(experts, text).of_rank("factor")[0] / 8
    assert memory(one, text, ranks=8)["activations"] == memory(one, text)["activations"] / 8


def test_moments_and_factors_of_one_layer_by_hand():
    only = scale_model.Model("", 4, ((Block((Stage(4, 6, residual=True, ends=True),), 4), 2),), 0)
    found = cost(only, Text(10, 10))
    assert found.total("moments") == 2 * 100 * (16 + 2 * 4 * 6) and found.total("factor") == 2 * (8 / 3 + 2) * 64
    assert cost(only, Text(10, 10), corrected=False).total("moments") == 2 * 100 * 16


def test_the_stopwatch_takes_times_apart_and_leaves_no_trace(tmp_path):
    from foem_vllm import solver

    before = solver.find_grid, torch.linalg.cholesky_ex, solver.pick
    source = write_model(tmp_path / "model", "qwen3", torch.bfloat16)
    started = time.process_time()
    with Stopwatch() as watch:
        how = QuantizeConfig(calibration=str(CALIBRATION), samples=8, seq_len=32, group_size=32, device="cpu")
        quantize(source, tmp_path / "out", how)
    spent = time.process_time() - started  # of all threads, as the stages have it: more than wall time where two cores compute
    assert set(TIMED) == set(UNITS) == set(watch.seconds)
    assert all(value > 0 for value in watch.seconds.values())
    assert sum(watch.seconds.values()) <= spent, "a second counted twice"
    assert (solver.find_grid, torch.linalg.cholesky_ex, solver.pick) == before


def test_the_committed_page_follows_from_the_committed_measurement():
    measured = json.loads((ROOT / "eval/results/scale_cpu.json").read_text("utf-8"))
    assert (ROOT / "eval/results/scale.md").read_text("utf-8") == scale.page(measured), "run python eval/scale.py"
    rows = {(r["model"], r["preset"], r["ranks"]): sum(r["seconds"].values()) for r in scale.estimate(measured)}
    assert len(rows) == 16 and all(rows[m, p, 8] < rows[m, p, 1] for m, p, _ in rows)
    first = scale.check(measured)[0]
    assert first["predicted_s"] == pytest.approx(first["measured_s"], rel=1e-6), "the run that the rates are fitted on"
