"""A folder or a pattern of files as one dataset: the files in the order of their names, lines numbered in each."""

from __future__ import annotations

import glob
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from promptmill.errors import DatasetError
from promptmill.readers import ENDINGS, Dataset
from promptmill.types import DatasetLine

#: Most files of one dataset.
MOST_FILES = 10_000


class ManyFiles(Dataset):
    """Files of one format. Lines are counted through; :meth:`place` finds the file and the line in it again."""

    def __init__(self, name: str, parts: list[Dataset], paths: list[Path]) -> None:
        # Not a Dataset of a source of its own: everything is asked of the parts.
        self.name = name
        self.format = parts[0].format
        self.files = len(parts)
        self._parts = parts
        self._paths = paths
        self._starts: list[int] = []

    @property
    def sha256(self) -> str:
        """SHA-256 over the files' own SHA-256 and their names, in order."""
        found = hashlib.sha256()
        for part in self._parts:
            found.update(f"{part.sha256}  {part.name}\n".encode())
        return found.hexdigest()

    @property
    def number_duplicates(self) -> bool:
        return self._parts[0].number_duplicates

    def lines(self) -> Iterator[DatasetLine]:
        self._starts, last = [], 0
        for part in self._parts:
            start = last
            self._starts.append(start)
            for line in part.lines():
                last = start + line.line
                yield replace(line, line=last)

    def place(self, line: int) -> str:
        index = bisect_right(self._starts, line - 1) - 1
        return f"{self._paths[index]}:{line - self._starts[index]}"

    def _place_in_text(self, line: int) -> str:
        return self.place(line)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def open_many(name: str, open_: Callable[[Path], Dataset]) -> ManyFiles:
    """Open every file that ``name`` means. Raises :class:`DatasetError` for none, and for files of two formats."""
    try:
        paths = _paths(name)
    except OSError as problem:
        raise DatasetError(f"cannot read {name[:200]}: {problem.strerror}") from None
    if not paths and not Path(name).is_dir():
        raise DatasetError(f"there is no file {name[:200]}", hint="Check the path; as a pattern it matches nothing.")
    if not paths:
        raise DatasetError(
            f"{name} holds no dataset files", hint=f"Known endings: {', '.join(ENDINGS)}, each also with .gz or .zst."
        )
    if len(paths) > MOST_FILES:
        raise DatasetError(f"{name} holds {len(paths):,} files; the most is {MOST_FILES:,}")
    parts: list[Dataset] = []
    try:
        for path in paths:
            parts.append(open_(path))
        formats = {part.format: part.name for part in reversed(parts)}
        if len(formats) > 1:
            listed = ", ".join(f"{file} is {format_}" for format_, file in formats.items())
            raise DatasetError(f"{name} holds files of more than one format: {listed}", hint="Give a pattern.")
        return ManyFiles(name, parts, paths)
    except BaseException:
        for part in parts:
            part.close()
        raise


def _paths(name: str) -> list[Path]:
    """Files of a folder by their endings; whatever a pattern matches is meant."""
    if not Path(name).is_dir():
        return sorted(path for each in glob.glob(name, recursive=True) if (path := Path(each)).is_file())
    return sorted(path for path in Path(name).iterdir() if path.is_file() and _ending(path) in ENDINGS)


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path).suffix.lower()
