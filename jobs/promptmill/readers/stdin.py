"""Standard input for commands that read their dataset more than once."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def readable_again(dataset: str | None) -> Iterator[str | None]:
    """Standard input can be read once: it is kept in a file for all runs."""
    if dataset != "-":
        yield dataset
        return
    with tempfile.TemporaryDirectory(prefix="promptmill-") as folder:
        path = Path(folder) / "stdin.jsonl"
        path.write_bytes(sys.stdin.buffer.read())
        yield str(path)
