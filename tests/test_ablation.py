"""eval/ablation.py: the table, from results with known values."""
from __future__ import annotations

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "eval"))

import ablation  # noqa: E402

WORTH = {"balanced:correct=0": 1.5, "gptq:alpha=auto": 0.8, "best:guided=false": 1.1}  # KL over the other's; 1 for the rest


@pytest.fixture
def measured(tmp_path):
    for name, (methods, samples) in ablation.TEXTS.items():
        for model in ablation.MODELS:
            runs = [{"method": method, "bits": bits, "seed": seed, "commit": "abc",
                     "quantize_seconds": 2.0 + seed + len(method) / 10,
                     "kl": [0.01 * (1 + seed) * WORTH.get(method, 1), 0.02 * WORTH.get(method, 1)],
                     "loss": [2 + (method in WORTH), 3 + (method in WORTH)]}
                    for method in methods for bits in ablation.BITS for seed in (0, 1, 2)]
            results = {"settings": {"measured": 2, "sequence_length": 8, "split": "test", "group_size": 128, "samples": samples,
                                    "seq_len": 256}, "machine": "a machine", "original": {"loss": [2, 3]}, "runs": runs}
            (tmp_path / f"{model}{name}").mkdir()
            (tmp_path / f"{model}{name}" / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_the_table_has_every_switch_beside_what_it_was_taken_from(measured):
    ablation.write(measured)
    rows = [line.strip("| ").split(" | ") for line in (measured / "table.md").read_text().splitlines() if line.startswith("| ")]
    found = {(row[0], row[1]): row[2:] for row in rows if row[0] in ablation.LEFT_OUT}
    assert len(found) == sum(map(len, ablation.LEFT_OUT.values()))
    assert found["balanced", "corrected target (`--correct 0`)"] == 4 * ["1.500 (+1.0000)"] + ["1.500 [1.500, 1.500]", "+1.0"]
    assert found["best", "weights of tokens (`--no-guided`)"][:5] == 4 * ["1.100 (+1.0000)"] + ["1.100 [1.100, 1.100]"]
    assert found["fast", "refit of scales (`--no-refit`)"] == 4 * ["the same"] + ["1.000 [1.000, 1.000]", "+1.2"]
    added = [row for row in rows if row[0] == "`--alpha auto`"]
    assert added == [["`--alpha auto`", *4 * ["0.800 (+1.0000)"], "0.800 [0.800, 0.800]", "+1.1"]]
    assert len([row for row in rows if row[0] == "`--beta auto`"]) == 2, "with much text and with little"


def test_every_switch_that_the_presets_turn_on_is_left_out_once():
    from foem_vllm.recipe import PLAIN, PRESETS
    for preset, below in (("fast", PLAIN), ("balanced", PRESETS["fast"]), ("best", PRESETS["balanced"])):
        on = {key for key, value in PRESETS[preset].items() if key != "method" and value != below.get(key)}
        left_out = {switch.split("=")[0] for name in ("fast", "balanced", "best") for switch in ablation.LEFT_OUT[name]}
        assert on <= left_out, f"{preset}: no row for {on - left_out}"
