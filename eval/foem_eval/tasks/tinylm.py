"""Data of the lm-eval task `tinylm`, found beside this file: `data_files` in YAML would be relative to the caller's folder.

tinylm.jsonl is a link to eval/tinylm/data/evaluation.jsonl; a wheel holds a copy of the file in its place.
"""
import pathlib

import datasets

DATA = pathlib.Path(__file__).resolve().parent / "tinylm.jsonl"


def documents(**_) -> dict[str, datasets.Dataset]:
    """{"test": documents with `text` and `source`}. lm-eval passes the task's metadata, which is not needed."""
    return {"test": datasets.Dataset.from_json(str(DATA))}
