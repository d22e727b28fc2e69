"""Collect the text that tinylm is trained on, from documentation already installed on this machine.

Sources (English, permissively licensed; see LICENSES.md for the terms that travel with the shipped excerpts):

* Rust 1.x documentation in the toolchain (`rustc --print sysroot`): the book, the reference, the nomicon, Rust by
  Example, the cargo / rustc / rustdoc / clippy / edition / style / unstable books and the prose of the standard library
  (MIT OR Apache-2.0). The embedded book is left out: its prose is CC-BY-SA.
* The Node.js API reference, Markdown (MIT), as packaged in `/usr/share/doc/nodejs/api`.
* Docstrings of CPython's standard library (PSF-2.0).
* Operation descriptions of the AWS service models in the `botocore` package (Apache-2.0), where it is installed.

Documents are cleaned to plain text, paragraphs that occur twice are dropped, and the documents are divided, by a hash of
their name, into three disjoint sets: train, calibration and evaluation.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import html.parser
import importlib.util
import json
import pathlib
import re
import subprocess
import sysconfig
from collections.abc import Iterator

RUST_BOOKS = (
    "book",
    "reference",
    "nomicon",
    "rust-by-example",
    "cargo",
    "rustc",
    "rustdoc",
    "clippy",
    "edition-guide",
    "style-guide",
    "unstable-book",
    "error_codes",
)
BLOCK_TAGS = {"p", "li", "tr", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "div", "section", "blockquote", "pre"}
SKIP_TAGS = {"script", "style", "nav", "button", "svg", "title", "noscript", "select", "form"}


class _Text(html.parser.HTMLParser):
    """Plain text of an HTML page: of its <main> element, or of its rustdoc `docblock`s when `docblocks` is set."""

    def __init__(self, docblocks: bool):
        super().__init__(convert_charrefs=True)
        self.docblocks, self.depth, self.skip, self.inside, self.pre = docblocks, 0, 0, None, 0
        self.parts: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag in ("br", "hr", "img", "input", "meta", "link", "wbr", "col"):
            return
        self.depth += 1
        classes = dict(attrs).get("class") or ""
        opens = "docblock" in classes.split() if self.docblocks else tag == "main"
        if self.inside is None and opens:
            self.inside = self.depth
        if tag in SKIP_TAGS or "sidebar" in classes or "buttons" in classes:
            self.skip = self.skip or self.depth
        if tag == "pre":
            self.pre += 1
            self.parts.append("\n\n")
        elif tag in BLOCK_TAGS and not self.pre:
            self.parts.append("\n- " if tag == "li" else "\n\n")

    def handle_endtag(self, tag):
        if self.skip == self.depth:
            self.skip = 0
        if tag == "pre" and self.pre:
            self.pre -= 1
        if tag in BLOCK_TAGS and not self.pre:
            self.parts.append("\n\n" if tag != "li" else "\n")
        if self.inside == self.depth:
            self.inside = None
        self.depth -= 1

    def handle_data(self, data):
        if self.inside is not None and not self.skip:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def _clean(text: str) -> str:
    text = "".join(c for c in text if c == "\n" or c.isprintable() or c == "\t").replace("\u00a7", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"(?m)^-?[ \t]*$\n(?:-?[ \t]*\n)+", "\n", text)  # empty list items of navigation bars
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def rust_documents() -> Iterator[tuple[str, str]]:
    root = pathlib.Path(subprocess.check_output(["rustc", "--print", "sysroot"], text=True).strip())
    root = root / "share/doc/rust/html"
    for part in (*RUST_BOOKS, "std"):
        for page in sorted((root / part).rglob("*.html")):
            if page.name in ("print.html", "toc.html", "all.html", "404.html"):
                continue
            raw = page.read_text("utf-8", "replace")
            if part == "std" and ('http-equiv="refresh"' in raw or "docblock" not in raw):
                continue
            parser = _Text(docblocks=part == "std")
            parser.feed(raw)
            yield f"rust/{page.relative_to(root)}", _clean("".join(parser.parts))


def node_documents() -> Iterator[tuple[str, str]]:
    root = pathlib.Path("/usr/share/doc/nodejs/api")
    for page in sorted(root.glob("*.md")):
        text = re.sub(r"<!--.*?-->", "", page.read_text("utf-8"), flags=re.S)
        text = re.sub(r"^\[[^\]]+\]: .*$", "", text, flags=re.M)
        # One document per second-level section: API pages are long, and the split below is by document.
        for i, section in enumerate(re.split(r"(?m)^(?=## )", text)):
            yield f"node/{page.name}#{i}", _clean(section)


def cpython_documents() -> Iterator[tuple[str, str]]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"} & set(name.parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        docs = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if doc := ast.get_docstring(node):
                    title = getattr(node, "name", name.with_suffix("").as_posix().replace("/", "."))
                    docs.append(f"{title}\n\n{doc}")
        yield f"cpython/{name}", _clean("\n\n".join(docs))


def botocore_documents() -> Iterator[tuple[str, str]]:
    spec = importlib.util.find_spec("botocore")
    if spec is None:
        return
    for path in sorted(pathlib.Path(spec.origin).parent.glob("data/*/*/service-2.json.gz")):
        model = json.loads(gzip.decompress(path.read_bytes()))
        docs = [(model["metadata"]["serviceId"], model.get("documentation", ""))]
        docs += [(name, op.get("documentation", "")) for name, op in model["operations"].items()]
        text = []
        for title, html_text in docs:
            parser = _Text(docblocks=False)
            parser.feed(f"<main>{html_text}</main>")
            text.append(f"{title}\n\n{''.join(parser.parts)}")
        # The large services would outweigh everything else.
        yield f"botocore/{path.parts[-3]}/{path.parts[-2]}", _clean("\n\n".join(text))[:12000]


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every document, without paragraphs seen before (60 characters and up) and without tiny documents."""
    seen: set[bytes] = set()
    for source in (rust_documents, node_documents, cpython_documents, botocore_documents):
        for name, text in source():
            kept = []
            for paragraph in text.split("\n\n"):
                digest = hashlib.blake2b(re.sub(r"\s+", " ", paragraph).strip().encode(), digest_size=12).digest()
                if len(paragraph) < 60 or digest not in seen:
                    kept.append(paragraph)
                    seen.add(digest)
            text = _clean("\n\n".join(kept))
            if len(text) >= 400:
                yield name, text


def split(name: str) -> str:
    """Which set a document belongs to; depends on its name only."""
    bucket = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % 1000
    return "evaluation" if bucket < 60 else "calibration" if bucket < 150 else "train"


def main() -> None:
    """Write data/calibration.jsonl and data/evaluation.jsonl (shipped) and train.jsonl (not shipped)."""
    here = pathlib.Path(__file__).parent
    (here / "data").mkdir(exist_ok=True)
    files = {
        s: (here / ("data" if s != "train" else "") / f"{s}.jsonl").open("w") for s in ("train", "calibration", "evaluation")
    }
    sizes = dict.fromkeys(files, 0)
    by_source: dict[str, int] = {}
    for name, text in documents():
        where = split(name)
        # Long documents would dominate the small held-out sets.
        if where != "train":
            text = text[:12000]
        files[where].write(json.dumps({"text": text, "source": name}) + "\n")
        sizes[where] += len(text)
        by_source[name.split("/")[0]] = by_source.get(name.split("/")[0], 0) + len(text)
    print(sizes, by_source)


if __name__ == "__main__":
    main()
