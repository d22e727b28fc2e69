"""foem_report.json as one HTML page: plots, tables, nothing from the network, everything escaped.

It is made from the report's dictionary alone, so that `foem inspect --html` can make it again. The page forbids itself to load
anything (Content-Security-Policy), and its one script, which sorts and filters tables, is allowed by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import pathlib
import re
from collections import Counter

from foem_vllm import html_charts as charts
from foem_vllm.errors import FoemError
from foem_vllm.html_charts import Html, join, tag
from foem_vllm.report import tuning_told

ROWS = 2000  # of linears; a table of all experts of a large model would take a browser minutes
EXAMPLES = 200  # names behind one reason or note

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d2126; --quiet: #5d6670; --line: #dfe3e8; --panel: #f5f7f9;
  --accent: #0b66c3; --warm: #b3420e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #e4e7eb; --quiet: #9aa4af; --line: #2e353d;
  --panel: #1c2127; --accent: #5aa9f5; --warm: #f08c5a; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
p { margin: .3rem 0 .7rem; max-width: 60rem } .quiet { color: var(--quiet) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .6rem; margin: 1.2rem 0 }
.tile { background: var(--panel); border-radius: .4rem; padding: .6rem .8rem } .tile { overflow-wrap: anywhere }
.tile b { display: block; font-size: 1.25rem }
.scroll { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: .4rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { position: sticky; top: 0; background: var(--panel); font-weight: 600 }
th:first-child, td:first-child, .text { text-align: left }
.text { white-space: normal; overflow-wrap: anywhere } .scroll .text { min-width: 14rem }
th button { all: unset; cursor: pointer } th button:focus-visible { outline: 2px solid var(--accent) }
th[aria-sort=ascending] button::after { content: " \\25B2" } th[aria-sort=descending] button::after { content: " \\25BC" }
input { font: inherit; padding: .2rem .5rem; margin: .4rem 0; width: 22rem; max-width: 100%; background: var(--page);
  color: var(--text); border: 1px solid var(--line); border-radius: .3rem }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 2rem }
code { font-size: .85em; overflow-wrap: anywhere } details { margin: .4rem 0 }
summary { cursor: pointer } svg { display: block; max-width: 100%; height: auto } svg text { fill: var(--quiet); font-size: 11px }
.cell { fill: var(--accent) } .worst { fill: var(--warm) } .bar { fill: var(--accent) } .none { fill: var(--line) }
.curve { fill: none; stroke: var(--accent); stroke-width: 1.5 }
"""

SCRIPT = """
const key = (row, column) => { const t = row.cells[column].textContent, n = parseFloat(t); return isNaN(n) ? t : n; };
const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b :
  String(a).localeCompare(String(b), undefined, {numeric: true});
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending", sign = down ? -1 : 1;
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((a, b) => {
      const x = key(a, column), y = key(b, column);
      return (x === "-") - (y === "-") || sign * compare(x, y); }));
  }));
  const filter = document.getElementById(table.dataset.filter);
  if (filter) filter.addEventListener("input", () => { for (const row of body.rows)
    row.hidden = !row.textContent.toLowerCase().includes(filter.value.toLowerCase()); });
}
"""


def render(report: dict) -> str:
    """The page of a report: Report.to_json(), with what checkpoint.read_report adds.

    Keys that an older report lacks leave their part of the page out.
    """
    name = report.get("model") or "checkpoint"
    layers = report.get("layers") or []
    parts = [
        tag("h1", name),
        tag("p", headline(report), cls="quiet"),
        tiles(report, layers),
        errors(layers),
        by_kind(report.get("by_kind") or {}),
        bits(layers),
        layer_section(layers),
        experts(report.get("tokens_of_experts") or {}),
        notes(layers),
        skipped(report.get("skipped") or {}),
        tag("div", seconds(report.get("seconds") or {}), memory(report.get("memory") or {}), cls="columns"),
        provenance(report),
    ]
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width"),
        tag("title", f"{name}: foem quantize"),
        tag("style", Html(STYLE)),
    ]
    page = tag("html", tag("head", *head), tag("body", *parts, tag("script", Html(SCRIPT))), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def write(report: dict, path: pathlib.Path) -> None:
    """The page as a file; FoemError when it cannot be written."""
    try:
        path.write_text(render(report), "utf-8")
    except OSError as error:
        raise FoemError(f"{path}: cannot be written ({error.strerror}); choose another file") from None


def headline(report: dict) -> str:
    recipe = report.get("recipe") or {}
    grid = "symmetric" if recipe.get("symmetric") else "asymmetric"
    group = recipe.get("group_size")
    method = f"preset {recipe['preset']} ({recipe.get('method')})" if recipe.get("preset") else f"method {recipe.get('method')}"
    bits = f"{recipe['bits']} bits" if recipe.get("bits") else "bits chosen for each linear"
    return f"Quantized by foem-vllm: {method}, {bits}, groups of {group}, {grid}"


def tiles(report: dict, layers: list[dict]) -> Html:
    """The figures that a reader wants first."""
    storage, relative = report.get("storage") or {}, [(x["relative"], x["name"]) for x in layers if x.get("relative") is not None]
    total = (report.get("seconds") or {}).get("total")
    figures = [(f"{len(layers):,}", "quantized linears")]
    if storage:
        figures += [(f"{storage['bits_per_weight']:.2f}", "bits a quantized weight, grid included")]
        figures += [(size(storage["bytes"]), "all tensors")]
    if relative:
        figures += [(f"{sum(r for r, _ in relative) / len(relative):.2e}", "mean relative error of a linear's output")]
        figures += [(f"{max(relative)[0]:.2e}", f"worst: {max(relative)[1]}")]
    if total is not None:
        figures += [(duration(total), "wall time")]
    if tuning := report.get("tuning"):
        figures += [tuning_told(tuning)]
    return tag("div", *(tag("div", tag("b", figure), what, cls="tile") for figure, what in figures), cls="tiles")


def errors(layers: list[dict]) -> Html:
    known = [x for x in layers if x.get("relative") is not None]
    if not known:
        return section("Errors", tag("p", "No calibration text was read (rounding to nearest), so no error is known."))
    text = (
        "Power of the output error over power of the output, on the calibration text; blocks from left to right, the stronger "
        "the colour the larger (logarithmic). Experts of a block are averaged."
    )
    return section("Errors", tag("p", text), charts.heat_map([(x["name"], x["relative"]) for x in known], mark="largest"))


def bits(layers: list[dict]) -> Html:
    """Weights by their bits; where bits differ, also which linear has how many."""
    weights: Counter = Counter()
    for x in layers:
        weights[x["bits"]] += x["n"] * x["k"]
    if len(weights) < 2:
        return Html("")
    rows = [(f"{b} bits", weights[b], f"{weights[b] / sum(weights.values()):.1%} of the weights") for b in sorted(weights)]
    text = "Bits of every linear, blocks from left to right: the stronger the colour the more."
    return section("Bits", charts.bars(rows), tag("p", text), charts.heat_map([(x["name"], x["bits"]) for x in layers]))


def by_kind(kinds: dict) -> Html:
    """What was chosen on held-out text, by kind of linear."""

    def counts(values) -> str:
        return ", ".join(f"{value} \N{MULTIPLICATION SIGN} {count}" for value, count in (values or {}).items()) or "-"

    columns = ["kind", "linears", "relative error", "correction", "alpha", "beta", "damping", "held-out gain"]
    rows = [
        [
            kind,
            row["linears"],
            number(row.get("relative"), ".2e"),
            number(row.get("correction"), ".2f"),
            *(counts(row.get(name)) for name in ("alpha", "beta", "damping")),
            number(row.get("gain"), ".1%"),
        ]
        for kind, row in kinds.items()
    ]
    return section("By kind of linear", table(columns, rows)) if rows else Html("")


LAYER_COLUMNS = {  # heading: value of a layer
    "layer": lambda x: x["name"],
    "relative error": lambda x: number(x.get("relative"), ".2e"),
    "loss a token": lambda x: number(x.get("loss"), ".3g"),
    "N": lambda x: x["n"],
    "K": lambda x: x["k"],
    "bits": lambda x: x["bits"],
    "group": lambda x: x["group_size"],
    "tokens": lambda x: x.get("tokens") or "-",
    "correction": lambda x: number(x.get("correction"), ".2f"),
    "descent": lambda x: {True: "yes", False: "no"}.get(x.get("descent"), "-"),
    "damping": lambda x: number(x.get("damping"), "g"),
    "alpha": lambda x: number((x.get("chosen") or {}).get("alpha"), "g"),
    "beta": lambda x: number((x.get("chosen") or {}).get("beta"), "g"),
    "held-out gain": lambda x: number((x.get("chosen") or {}).get("gain"), ".1%"),
    "notes": lambda x: "; ".join(x.get("notes") or []) or "-",
}


def layer_section(layers: list[dict]) -> Html:
    """Every linear, the worst first; of more than ROWS only those."""
    ordered = sorted(layers, key=lambda x: -1.0 if x.get("relative") is None else x["relative"], reverse=True)
    shown = ordered[:ROWS]
    rows = [[value(x) for value in LAYER_COLUMNS.values()] for x in shown]
    left = f"The {ROWS:,} worst of {len(layers):,}; the others are in foem_report.json." if len(layers) > ROWS else ""
    hint = tag("p", f"Worst first; click a heading to sort. {left}", cls="quiet")
    box = tag("input", id="filter", type="search", placeholder="filter, for example down_proj", aria_label="filter layers")
    return section("Layers", hint, box, table(list(LAYER_COLUMNS), rows, filter="filter", text={"notes"}))


def experts(coverage: dict[str, list[int]]) -> Html:
    """How many tokens each expert saw."""
    rows = []
    for module, tokens in coverage.items():
        ranked = sorted(tokens)
        rows.append(
            [
                module,
                len(ranked),
                ranked[0],
                ranked[len(ranked) // 2],
                ranked[-1],
                sum(t == 0 for t in ranked),
                charts.curve(ranked[::-1]),
            ]
        )
    columns = ["experts of", "experts", "fewest tokens", "median", "most", "without any", "tokens, most to fewest"]
    text = "Calibration tokens that the router gave each expert. One with few borrows from all of its block: see the notes."
    return section("Experts", tag("p", text), table(columns, rows)) if rows else Html("")


def notes(layers: list[dict]) -> Html:
    """Notes that differ in numbers only stand together."""
    found: dict[str, list[str]] = {}
    for x in layers:
        for note in x.get("notes") or []:
            found.setdefault(re.sub(r"\d+(\.\d+)?", "\N{HORIZONTAL ELLIPSIS}", note), []).append(f"{x['name']}: {note}")
    return section("Notes and warnings", *map(named_list, found, found.values())) if found else Html("")


def skipped(reasons: dict[str, str]) -> Html:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return section("Left unquantized", *map(named_list, found, found.values())) if found else Html("")


def named_list(what: str, members: list[str]) -> Html:
    more = [tag("li", f"... and {len(members) - EXAMPLES:,} more")] if len(members) > EXAMPLES else []
    items = tag("ul", *(tag("li", tag("code", m)) for m in members[:EXAMPLES]), *more)
    return tag("details", tag("summary", f"{what} ({len(members):,})"), items)


def seconds(found: dict[str, float]) -> Html:
    """Wall time by stage, longest first."""
    if not found:
        return Html("")
    total = found.get("total")
    stages = {name: value for name, value in found.items() if name != "total"}
    if total and total - sum(stages.values()) > 0.005 * total:
        stages["not broken down"] = total - sum(stages.values())
    rows = [(n, v, duration(v) + (f", {v / total:.0%}" if total else "")) for n, v in sorted(stages.items(), key=lambda i: -i[1])]
    whole = tag("p", f"{duration(total)} in all.") if total else Html("")
    return tag("div", tag("h2", "Time"), whole, charts.bars(rows))


def memory(found: dict[str, int]) -> Html:
    rows = [(name, value, size(value)) for name, value in found.items()]
    return tag("div", tag("h2", "Memory"), charts.bars(rows)) if rows else Html("")


def provenance(report: dict) -> Html:
    """What decides the result, and where it was made."""
    tables = (("Recipe", "recipe"), ("Environment", "environment"), ("Checksums (sha256)", "sha256"))
    return tag("div", *(settings(title, report.get(key) or {}) for title, key in tables), cls="columns")


def settings(title: str, values: dict) -> Html:
    rows = [tag("tr", tag("td", key), tag("td", tag("code", value), cls="text")) for key, value in values.items()]
    return tag("div", tag("h2", title), tag("table", tag("tbody", *rows))) if rows else Html("")


def section(title: str, *content) -> Html:
    return tag("section", tag("h2", title), *content)


def table(columns: list[str], rows: list[list], filter: str | None = None, text: set[str] = frozenset()) -> Html:
    """A table whose headings sort it, without the columns that hold nothing but "-". filter: id of the input that hides rows.
    text: columns of words."""
    kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    classes = {i: "text" if columns[i] in text else None for i in kept}
    head = tag("tr", *(tag("th", tag("button", columns[i]), cls=classes[i]) for i in kept))
    body = [tag("tr", *(tag("td", row[i], cls=classes[i]) for i in kept)) for row in rows]
    whole = tag("table", tag("thead", head), tag("tbody", join(body, "\n")), cls="sortable", data_filter=filter)
    return tag("div", whole, cls="scroll")


def number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def duration(value: float) -> str:
    if value >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    return f"{int(value // 60)} min {int(value % 60)} s" if value >= 60 else f"{value:.2f} s"
