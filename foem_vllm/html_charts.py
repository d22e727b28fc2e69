"""HTML elements whose text is always escaped, and the few SVG charts of a report made of them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

VOID = {"meta", "input"}
WIDTH = 1150  # of a heat map at most, in user units; the page scales it down
POINTS = 64  # of a curve


class Html(str):
    """Text that is HTML already; any other string is escaped where it is put into an element."""


def join(parts: Iterable, between: str = "") -> Html:
    return Html(between.join(p if isinstance(p, Html) else html.escape(str(p)) for p in parts))


def tag(name: str, /, *content, **attributes) -> Html:
    """An element. Attributes: `cls` is class, _ is -, those that are None are left out."""
    shown = {("class" if k == "cls" else k.replace("_", "-")): v for k, v in attributes.items() if v is not None}
    opening = "".join([name, *(f' {k}="{html.escape(str(v))}"' for k, v in shown.items())])
    if name in VOID:
        return Html(f"<{opening}/>")
    return Html(f"<{opening}>{join(content)}</{name}>")


def svg(width: float, height: float, label: str, *content) -> Html:
    return tag(
        "svg",
        *content,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
        aria_label=label,
    )


def heat_map(values: Sequence[tuple[str, float]], mark: str | None = None) -> Html:
    """Values of linears by block (columns) and kind (rows): the larger the stronger the colour, on a logarithmic scale.

    values: (full name, number) of every linear; several in one cell, as experts, are averaged. mark: what the largest is called,
    which then has a colour of its own.
    """
    cells: dict[tuple[str, int], list[float]] = {}
    for name, value in values:
        cells.setdefault(place(name), []).append(value)
    means = {where: sum(found) / len(found) for where, found in cells.items()}
    kinds, blocks = list(dict.fromkeys(k for k, _ in means)), sorted({b for _, b in means})
    rows, columns = ({label: i for i, label in enumerate(labels)} for labels in (kinds, blocks))
    smallest, largest = min((v for v in means.values() if v > 0), default=1.0), max(means, key=means.get)
    span = math.log(max(means[largest], smallest) / smallest) or 1.0
    left, height = label_width(kinds), 18
    step = min(36.0, (WIDTH - left) / len(blocks))
    drawn = [text(left - 8, height * i + 13, kind, "end") for kind, i in rows.items()]
    for (kind, block), value in means.items():
        look = tag(
            "rect",
            tag("title", f"block {block}, {kind}: {value:.3g}"),
            x=f"{left + step * columns[block]:.1f}",
            y=height * rows[kind],
            width=f"{step * 0.92:.1f}",
            height=height - 2,
            cls="worst" if mark and (kind, block) == largest else "cell",
            fill_opacity=f"{0.1 + 0.9 * math.log(max(value, smallest) / smallest) / span:.2f}",
        )
        drawn.append(look)
    every = math.ceil(24 / step)  # numbers of blocks must not run into each other
    drawn += [text(left + step * (i + 0.46), height * len(kinds) + 12, b, "middle") for b, i in columns.items() if i % every == 0]
    caption = f"From {smallest:.3g} to {means[largest]:.3g}"
    caption += f"; {mark}: {largest[0]} of block {largest[1]}." if mark else "."
    chart = svg(left + step * len(blocks), height * len(kinds) + 18, "values by block and kind of linear", *drawn)
    return join([chart, tag("p", caption, cls="quiet")])


def place(name: str) -> tuple[str, int]:
    """(kind, number of the block) of a linear, by the first number in its name; experts lose theirs.

    >>> place("model.layers.3.mlp.experts.17.up_proj")
    ('mlp.experts.up_proj', 3)
    """
    found = re.match(r"\D*?\.(\d+)\.(.*)", name)
    return (re.sub(r"(?<=\.)\d+\.", "", found[2]), int(found[1])) if found else (name, 0)


def bars(rows: Sequence[tuple[str, float, str]]) -> Html:
    """(name, length, what is written beside) a row."""
    left, room, height = label_width([name for name, _, _ in rows]), 280, 22
    widest = max(length for _, length, _ in rows) or 1
    drawn = []
    for i, (name, length, beside) in enumerate(rows):
        width = max(1, room * length / widest)
        drawn += [
            text(left - 8, height * i + 15, name, "end"),
            tag("rect", x=f"{left:.1f}", y=height * i + 3, width=f"{width:.1f}", height=height - 6, cls="bar"),
            text(left + width + 6, height * i + 15, beside),
        ]
    return svg(left + room + 150, height * len(rows) + 4, "bars", *drawn)


def label_width(labels: Iterable[str]) -> float:
    """Room for names at the left, in the page's font of 11 pixels."""
    return 20 + 6.5 * max(map(len, labels))


def curve(values: Sequence[float]) -> Html:
    """A small line of values, from 0 to the largest."""
    step = max(1, math.ceil(len(values) / POINTS))
    shown, top = list(values[::step]), max(values) or 1
    width, height = 120, 24
    across = width / max(len(shown) - 1, 1)
    points = " ".join(f"{i * across:.1f},{height - 1 - (height - 2) * v / top:.1f}" for i, v in enumerate(shown))
    return svg(width, height, f"from {values[0]} to {values[-1]}", tag("polyline", points=points, cls="curve"))


def text(x: float, y: float, content: object, anchor: str | None = None) -> Html:
    return tag("text", content, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
