"""Small text files that people write: templates, schemas, task files, examples."""

from __future__ import annotations

from pathlib import Path

#: Some editors begin a file with it. It is no part of the text.
BOM = "\ufeff"


def read_text(path: str | Path) -> str:
    """The text of a file of UTF-8, without byte order marks where lines begin: files are put together with them in.

    Raises OSError and UnicodeDecodeError.
    """
    return without_marks(Path(path).read_text(encoding="utf-8"))


def without_marks(text: str) -> str:
    """``text`` without a byte order mark at the start of any of its lines."""
    return text.removeprefix(BOM).replace(f"\n{BOM}", "\n")
