"""Files that appear whole or not at all: what was there stays until the new one is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(output: str | Path) -> Iterator[Path]:
    """The path to write to; it becomes ``output`` when the block ends well, and is gone when it does not."""
    target = Path(output)
    if target.exists() and not target.is_file():
        # /dev/null and its like are written to, not replaced.
        yield target
        return
    partial = Path(f"{output}.part-{os.getpid()}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
