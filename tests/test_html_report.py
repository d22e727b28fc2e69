"""The report as a page and as a model card: everything in it, escaped, readable; looked at in Chromium where there is one."""

from __future__ import annotations

import html.parser
import json
import re
import shutil

import browser
import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_models import CALIBRATION, write_model
from typer.testing import CliRunner

from foem_vllm import QuantizeConfig, quantize
from foem_vllm.checkpoint import describe, read_report
from foem_vllm.cli import app
from foem_vllm.errors import FoemError
from foem_vllm.html_charts import VOID, Html, place, tag
from foem_vllm.html_report import ROWS, render, write
from foem_vllm.model_card import model_card

HOSTILE = '</td><script>alert("1")</script>`|\'&amp;'
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A quantized model with experts, something excluded, and parameters chosen per layer."""
    folder = tmp_path_factory.mktemp("report")
    config = QuantizeConfig(
        method="gptq", alpha="auto", calibration=str(CALIBRATION), samples=4, seq_len=32, group_size=32, device="cpu",
        exclude=["layers.1.self_attn.o_proj"],
    )  # fmt: skip
    quantize(write_model(folder / "qwen3_moe", "qwen3_moe"), folder / "out", config)
    return folder / "out"


def layer(name: str, relative: float | None, bits: int = 4, notes: tuple = ()) -> dict:
    chosen = {"alpha": 0.25, "beta": 0.0, "damping": 0.05, "gain": 0.031}
    return {"name": name, "n": 4096, "k": 1024, "bits": bits, "group_size": 128, "loss": 0.5, "relative": relative,
            "damping": 0.05, "tokens": 32768, "notes": list(notes), "correction": 0.71, "chosen": chosen,
            "descent": True}  # fmt: skip


def made_up(blocks: int, **more) -> dict:
    """A report of a dense model: errors grow with the depth, the last down_proj is the worst; bits alternate."""
    layers = [
        layer(f"model.layers.{b}.{kind}", 1e-3 * (b + 1) * (i + 1), 3 + b % 2, ["damping raised to 0.2"] if b == i else [])
        for b in range(blocks)
        for i, kind in enumerate(KINDS)
    ]
    return {
        "model": "acme/large",
        "recipe": {"method": "gptq", "preset": "balanced", "bits": 4, "group_size": 128, "symmetric": True, "calibration": "c4",
                   "samples": 256, "seq_len": 2048, "calibration_sha256": "ab" * 8},
        "environment": {"torch": "2.13"},
        "seconds": {"load": 10.0, "solve": 61.0, "total": 100.0},
        "memory": {"peak host RSS": 3_210_000_000},
        "tuning": {"held_out_kl_before": 0.02, "held_out_kl_after": 0.01},
        "tokens_of_experts": {},
        "layers": layers,
        "skipped": {"lm_head": "not a plain linear"},
        "storage": {"bytes": 4_600_000_000, "bits_per_weight": 3.77},
        "sha256": {"model.safetensors": "cd" * 32},
        **more,
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order; collects scripts, attributes and text, and the rows of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.cells = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in VOID:
            self.open.append(name)
        if name == "td":
            self.cells.append("")

    def handle_endtag(self, name):
        if name not in VOID:
            assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)
            if "td" in self.open:
                self.cells[-1] += data


def test_what_quantize_writes_names_every_linear_and_all_that_was_chosen(checkpoint):
    report = read_report(checkpoint)
    text = (checkpoint / "foem_report.html").read_text("utf-8")
    assert text == render(report), "the page follows from what is stored"
    page = Page(text)
    for x in report["layers"]:
        at = page.cells.index(x["name"])
        assert f"{x['relative']:.2e}" in page.cells[at : at + 3]
    assert len(report["layers"]) == 55 and sum("experts" in x["name"] for x in report["layers"]) == 48
    words = " ".join(page.text)
    assert "excluded by --exclude" in words and "model.layers.1.self_attn.o_proj" in words
    assert report["recipe"]["calibration_sha256"] in words and next(iter(report["sha256"].values())) in words
    assert f"{report['storage']['bits_per_weight']:.2f}" in words and "held-out gain" in words
    for tokens in report["tokens_of_experts"].values():
        ranked = sorted(tokens)
        assert [str(len(ranked)), str(ranked[0]), str(ranked[4]), str(ranked[-1])] in [
            page.cells[i : i + 4] for i in range(len(page.cells))
        ]
    kinds = set(report["by_kind"])
    assert "experts.up_proj" in kinds and len(kinds) == 7, "all experts are one kind"


def test_nothing_is_loaded_and_the_policy_forbids_it():
    page = Page(render(made_up(3)))
    names = dict(page.attributes)
    assert not {"src", "href", "style", "onclick"} & names.keys() and page.tags.count("script") == 1
    assert names["content"] and "link" not in page.tags and "default-src 'none'" in str(page.attributes)


def test_names_from_files_are_text():
    name = f"model.layers.0.{HOSTILE}"
    report = made_up(0, layers=[layer(name, 0.1, notes=[HOSTILE]), layer("b", 0.2, 3)], skipped={HOSTILE: HOSTILE}, model=HOSTILE)
    for key in ("recipe", "environment", "sha256"):
        report[key] = {**report[key], HOSTILE: HOSTILE}
    report["seconds"] = {HOSTILE: 1.0}
    report["memory"] = {HOSTILE: 1}
    report["tokens_of_experts"] = {HOSTILE: [0, 5]}
    report["by_kind"] = {HOSTILE: {"linears": 1, "alpha": {HOSTILE: 1}}}
    page = Page(render(report))
    assert page.tags.count("script") == 1 and "".join(page.text).count(HOSTILE) > 12
    assert tag("p", "<b>", Html("<i></i>"), cls='"') == '<p class="&quot;">&lt;b&gt;<i></i></p>'


def test_a_large_model_is_less_than_a_megabyte():
    page = render(made_up(126))
    assert len(page.encode()) < 1_000_000
    assert all(f"<td>model.layers.{b}.{kind}</td>" in page for b in range(126) for kind in KINDS)


def test_of_very_many_experts_the_worst_are_shown():
    layers = [layer(f"model.layers.{b}.mlp.experts.{e}.up_proj", 1e-6 * (e * 61 + b + 1)) for b in range(61) for e in range(384)]
    layers += [layer("model.layers.0.mlp.experts.384.up_proj", None)]
    coverage = {f"model.layers.{b}.mlp.experts": list(range(384)) for b in range(61)}
    page = render(made_up(0, layers=layers, tokens_of_experts=coverage))
    assert len(page.encode()) < 1_500_000
    shown = re.findall(r"<td>model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.up_proj</td>", page)
    assert shown == [(str(b), str(e)) for e in range(383, 0, -1) for b in range(60, -1, -1)][:ROWS]
    assert f"The {ROWS:,} worst of {len(layers):,}" in page


def test_reports_that_lack_something_make_a_page(tmp_path):
    assert "no error is known" in render({"layers": [layer("a", None)]})
    assert "no error is known" in render({})
    assert "method gptq, bits chosen for each linear, groups" in render({"recipe": {"method": "gptq", "bits_per_weight": 3.5}})
    assert "<h2>Time" not in render({"seconds": {}}) and "not broken down" in render({"seconds": {"load": 1.0, "total": 4.0}})
    zero = made_up(2)
    for x in zero["layers"]:
        x["relative"] = 0.0
    Page(render(zero))
    with pytest.raises(FoemError, match="cannot be written"):
        write({}, tmp_path / "missing/page.html")


def test_where_a_linear_stands():
    assert place("model.layers.12.mlp.down_proj") == ("mlp.down_proj", 12)
    assert place("model.layers.3.mlp.experts.17.up_proj") == ("mlp.experts.up_proj", 3)
    assert place("lm_head") == ("lm_head", 0)


@pytest.mark.parametrize("after, words, figure", [(0.01, "scales tuned", "0.02000 \N{RIGHTWARDS ARROW} 0.01000"),
                                                  (0.02, "they stay as they were", "0.02000")])  # fmt: skip
def test_scales_that_tuning_did_not_better_are_not_called_tuned(after, words, figure):
    page = render(made_up(2, tuning={"held_out_kl_before": 0.02, "held_out_kl_after": after}))
    assert words in page and figure in page
    assert ("scales tuned" in page) == (after < 0.02)


def test_inspect_makes_the_page_again(checkpoint, tmp_path):
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(checkpoint), "--html", str(page)])
    assert result.exit_code == 0 and result.output.startswith(str(page)), result.output
    assert page.read_text("utf-8") == (checkpoint / "foem_report.html").read_text("utf-8")


def test_without_a_report_there_is_no_page(checkpoint, tmp_path):
    with pytest.raises(FoemError, match="only `foem quantize` writes one"):
        read_report(tmp_path)
    (tmp_path / "foem_report.json").write_text("{")
    with pytest.raises(FoemError, match="not JSON"):
        read_report(tmp_path)
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / "foem_report.json").write_text("{")
    with pytest.raises(FoemError, match="not JSON"):
        describe(damaged)


# ---------------------------------------------------------------- the model card
def test_the_card_is_one_for_the_hub(checkpoint):
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["gptq", "4-bit", "foem"]
    assert card.data.base_model is None, "a local folder is no model of the hub"
    report = json.loads((checkpoint / "foem_report.json").read_text("utf-8"))
    worst = max(report["layers"], key=lambda x: x["relative"])
    mean = sum(x["relative"] for x in report["layers"]) / len(report["layers"])
    for expected in (f"`{worst['name']}` | {worst['relative']:.2e}", f"{mean:.2e} on average", "--quantization foem",
                     "licence of this model is unknown", report["recipe"]["calibration_sha256"], "qwen3\\_moe"):  # fmt: skip
        assert expected in card.text


def test_the_card_names_the_model_of_the_hub_and_survives_odd_values():
    data = ModelCard(model_card(made_up(1))).data
    assert data.base_model == "acme/large" and data.base_model_relation == "quantized"
    odd = made_up(0, model="a/b: [c]\n---", layers=[layer(HOSTILE, 0.1)])
    odd["recipe"]["calibration"] = HOSTILE
    text = model_card(odd)
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}
    assert "<script" not in re.sub(r"`[^`]*`|\\<", "", body)
    assert "Rounded to nearest" in model_card(made_up(0, layers=[layer("a", None)]))
    del odd["recipe"]["calibration"]
    assert "No calibration text was read." in model_card(odd)


# ---------------------------------------------------------------- in a browser
@pytest.mark.skipif(browser.find() is None, reason="no Chromium: apt-get install chromium")
def test_a_person_can_read_sort_and_filter_it(tmp_path):
    from PIL import Image

    write(made_up(126, tokens_of_experts={"model.layers.0.mlp.experts": [9, 0, 3]}), tmp_path / "page.html")
    with browser.Browser(tmp_path / "page.html", tmp_path / "profile") as chromium:
        column = "[...document.querySelectorAll('#filter ~ .scroll tbody tr:not([hidden])')].map(r => r.cells[%d].textContent)"
        assert chromium.run(column % 0)[0] == "model.layers.125.mlp.down_proj", "the worst first"
        head = "[...document.querySelectorAll('#filter ~ .scroll th button')].find(b => b.textContent === '%s').click()"
        chromium.run(head % "relative error"), chromium.run(head % "relative error")
        errors = list(map(float, chromium.run(column % 1)))
        assert errors == sorted(errors) and len(errors) == 882
        chromium.run(head % "layer")
        assert chromium.run(column % 0)[0] == "model.layers.125.self_attn.v_proj", "125 comes after 99"
        chromium.run("const f = document.getElementById('filter'); f.value = 'LAYERS.7.'; f.dispatchEvent(new Event('input'))")
        assert len(chromium.run(column % 0)) == 7
        chromium.run("f.value = ''; f.dispatchEvent(new Event('input'))")

        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        outside = """[...document.querySelectorAll("svg text, svg rect")].filter(e => {
          const a = e.getBoundingClientRect(), b = e.closest("svg").getBoundingClientRect();
          return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1 }).map(e => e.textContent)"""
        for width in (1280, 400):
            chromium.show(width)
            assert chromium.run(overflow) <= 0 and chromium.run(outside) == []
        # What is drawn: the marked cell has the colour meant for it, on the background that its user prefers.
        at = """(() => { const r = document.querySelector("rect.worst").getBoundingClientRect();
          return [r.x + r.width / 2, r.y + scrollY + r.height / 2] })()"""
        for scheme, page, worst in (("light", (255, 255, 255), (179, 66, 14)), ("dark", (20, 23, 27), (240, 140, 90))):
            chromium.show(scheme=scheme)
            chromium.screenshot(tmp_path / f"{scheme}.png")
            picture = Image.open(tmp_path / f"{scheme}.png").convert("RGB")
            assert picture.getpixel((2, 2)) == page and picture.getpixel(tuple(map(round, chromium.run(at)))) == worst
        requests = [m["params"]["request"]["url"] for m in chromium.messages if m.get("method") == "Network.requestWillBeSent"]
        assert requests == [(tmp_path / "page.html").as_uri()], "nothing else is asked for"
        complaints = [m for m in chromium.messages if m.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
        assert complaints == []
