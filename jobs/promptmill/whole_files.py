"""Files that appear whole or not at all: what was there stays until the new one is complete."""

from __future__ import annotations

import os
import secrets
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
    # A name that nobody can have laid a link at, in a folder that others may write to.
    partial = Path(f"{output}.part-{secrets.token_hex(8)}")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
