"""Calibration text -> token sequences of equal length: a hub data set, or a local .txt, .jsonl, .json.gz or .parquet file."""

from __future__ import annotations

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator

import torch

from foem_vllm.errors import FoemError

SUFFIXES = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
DEFAULT = "allenai/c4"
HUB_FILES = {"allenai/c4": "en/c4-train.00000-of-01024.json.gz"}


def read_texts(source: str, split: str = "train", column: str = "text", option: str = "--calibration") -> Iterable[str]:
    """The documents of a text source, in stored order (a hub data set: streamed). option: what errors call it.

    `.txt` is one document; `.jsonl`, `.json` (one object a line) and their `.gz` have `column` in every line; `.parquet` has
    it as a column. Raises FoemError naming the file, the line and the remedy.
    """
    path = pathlib.Path(source)
    local = path.exists() or path.is_absolute() or source.startswith(".") or source.endswith(SUFFIXES)
    if not local:
        return _hub_texts(source, split, column, option)
    if not path.is_file():
        raise FoemError(f"{option} {source}: no such file; give a hub data set or a file ({', '.join(SUFFIXES)})")
    if not source.endswith(SUFFIXES):
        raise FoemError(f"{option} {source}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise FoemError(f"{option} {source}: the file is empty; give one with text")
    if source.endswith(".txt"):
        return [path.read_text("utf-8", "replace")]
    if source.endswith(".parquet"):
        return _parquet(path, column, option)
    try:
        return list(_json_lines(path, column, option))
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, option, error) from None


def _damaged(path: pathlib.Path, option: str, error: Exception) -> FoemError:
    return FoemError(f"{option} {path}: damaged, or of another kind than its name says ({error}); write or download it again")


def _parquet(path: pathlib.Path, column: str, option: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
        if column not in table.schema_arrow.names:
            raise FoemError(
                f"{option} {path}: no column {column!r} among {', '.join(table.schema_arrow.names)}; name it with --text-column"
            )
        found = [t for t in table.read([column]).column(column).to_pylist() if t]
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, option, error) from None
    if not all(isinstance(t, str) for t in found):
        raise FoemError(f"{option} {path}: column {column!r} is not one of text; name that with --text-column")
    return found


def _json_lines(path: pathlib.Path, column: str, option: str) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
                if not isinstance(text, str | None):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise FoemError(
                    f"{option} {path}: line {number} is not a JSON object with text in the field {column!r}; "
                    "name the field with --text-column"
                ) from None
            if text:
                yield text


def _hub_texts(name: str, split: str, column: str, option: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, data_files=HUB_FILES.get(name), split=split, streaming=True)
        for row in data:
            if column not in row:
                raise FoemError(f"{option} {name}: no column {column!r} among {', '.join(row)}; name it with --text-column")
            if row[column]:
                yield row[column]
    except FoemError:
        raise
    except Exception as error:  # datasets and the hub client raise many unrelated types
        raise FoemError(
            f"{option} {name}: the hub did not deliver this data set ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); check the name and the network, or give a local file"
        ) from None


def sample_tokens(
    texts: Iterable[str], tokenizer, samples: int, seq_len: int, seed: int, source: str = "calibration", chat: bool = False
) -> torch.Tensor:
    """[samples, seq_len] int64, in a seeded random order, from as many documents as possible.

    A document of seq_len tokens or more gives one window, at a random place; shorter ones are joined, the end-of-text token
    between them, and cut. Only when all documents have been used do the rests of long ones follow. A stream is shuffled within
    its first 20 * samples documents. Too few tokens raise FoemError with both numbers. With `chat` every document is put into
    the tokenizer's chat template as the assistant's turn. Only a generator of its own is used.
    """
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(texts, list):
        stream, texts = iter(texts), []
        for text in stream:
            texts.append(text)
            if len(texts) >= max(20 * samples, 1000):
                break
    if chat and not getattr(tokenizer, "chat_template", None):
        raise FoemError("--chat-template: this tokenizer has none; leave the option away")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    windows: list[list[int]] = []
    short: list[int] = []
    rests: list[int] = []
    for i in torch.randperm(len(texts), generator=generator).tolist():
        text = texts[i]
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "Continue."}, {"role": "assistant", "content": text}], tokenize=False
            )
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(ids) < seq_len:
            short += ids
        else:
            start = int(torch.randint(len(ids) - seq_len + 1, (1,), generator=generator))
            windows.append(ids[start : start + seq_len])
            rests += (ids[:start] + end if start else []) + ids[start + seq_len :]
        if len(windows) + len(short) // seq_len >= samples and len(texts) > 1:
            break
    windows += cut(short, seq_len)
    if len(windows) < samples:
        more = cut(rests, seq_len)
        windows += [more[i] for i in torch.randperm(len(more), generator=generator).tolist()]
    if len(windows) < samples:
        tokens = len(windows) * seq_len
        raise FoemError(
            f"--calibration {source}: {tokens} tokens, but --samples {samples} x --seq-len {seq_len} need {samples * seq_len}; "
            "give more text or lower one of them"
        )
    return torch.tensor(windows[:samples])[torch.randperm(samples, generator=generator)]


def cut(ids: list[int], length: int) -> list[list[int]]:
    """As many whole pieces as there are."""
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
