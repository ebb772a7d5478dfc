"""Datasets of the Hugging Face hub, by its own library: ``hf:OWNER/NAME``, ``hf:OWNER/NAME/CONFIG:SPLIT``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptmill.errors import DatasetError, first_line
from promptmill.readers.fields import BadLine
from promptmill.readers.parquet import plain

#: Begins the name of such a dataset.
PREFIX = "hf:"


def records(name: str) -> Iterator[bytes]:
    """The records as lines of JSON. The split is ``test``, ``validation`` or ``train``, the first there is.

    Raises :class:`DatasetError` where the library is missing, or cannot load the dataset.
    """
    datasets = _library(name)
    where, config, split = _parts(name)
    try:
        chosen = split or _first_split(datasets, where, config)
        for number, record in enumerate(datasets.load_dataset(where, config, split=chosen, streaming=True), start=1):
            yield _line(name, number, record)
    except DatasetError:
        raise
    except Exception as problem:
        # The library raises errors of many kinds, its own and those of what it is made of.
        raise DatasetError(
            f"cannot load {name}: {first_line(problem)}", hint="Check the name, the split, and the network."
        ) from None


def _library(name: str) -> Any:
    try:
        found: Any = importlib.import_module("datasets")
    except ImportError:
        found = None
    # A folder called datasets in the working directory can be imported too, and holds nothing.
    if not hasattr(found, "load_dataset"):
        raise DatasetError(f"{name}: the library 'datasets' is not installed", hint="pip install 'promptmill[hf]'")
    return found


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """Repository or folder, configuration and split of ``hf:WHERE[:SPLIT]``."""
    where, _, split = name.removeprefix(PREFIX).partition(":")
    if not where:
        raise DatasetError(f"'{name}' names no dataset", hint="Write hf:OWNER/NAME or hf:OWNER/NAME:SPLIT.")
    if Path(where).is_dir():
        return where, None, split or None
    owner, *rest = where.split("/")
    return "/".join([owner, *rest[:1]]), "/".join(rest[1:]) or None, split or None


def _first_split(datasets: Any, where: str, config: str | None) -> str:
    names = datasets.get_dataset_split_names(where, config)
    return next((each for each in ("test", "validation", "train") if each in names), str(names[0]))


def _line(name: str, number: int, record: dict[str, Any]) -> bytes:
    try:
        found = {field: plain(value, field) for field, value in record.items()}
    except BadLine as problem:
        raise DatasetError(
            f"{name}:{number}: {problem}", hint="Leave the column out: save what you need as JSONL."
        ) from None
    return json.dumps(found).encode() + b"\n"
