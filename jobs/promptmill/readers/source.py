"""Bytes to lines of text: files, standard input, .gz and .zst, with a place for every problem."""

from __future__ import annotations

import gzip
import hashlib
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from promptmill.errors import DatasetError

#: Longest line, in bytes. A longer one is an error of its own, and is never in memory whole.
LONGEST_LINE = 16 * 1024 * 1024

#: Bytes read at a time.
BLOCK = 1024 * 1024

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class TextLine:
    """A line without its end. ``number`` counts from 1; ``error`` is set when ``text`` cannot be had."""

    number: int
    text: str
    error: str | None = None


class Source:
    """A file that can be read several times from its start."""

    def __init__(self, path: Path, name: str, *, is_stdin: bool = False, spooled: IO[bytes] | None = None) -> None:
        self._path = path
        self._spooled = spooled
        self.name = name
        self.is_stdin = is_stdin
        self._sha256: str | None = None

    @classmethod
    def open(cls, path: str) -> Source:
        """Raises :class:`DatasetError` when there is no such file, it is a folder, or it cannot be read."""
        if path == "-":
            return cls._stdin()
        found = Path(path)
        if found.is_dir():
            raise DatasetError(f"{path} is a folder", hint="Give a file.")
        try:
            with found.open("rb") as file:
                empty = not file.read(1)
        except FileNotFoundError:
            raise DatasetError(f"there is no file {path}", hint="Check the path.") from None
        except OSError as problem:
            raise DatasetError(f"cannot read {path}: {problem.strerror}") from None
        if empty:
            raise DatasetError(f"{path} is empty", hint="A dataset has at least one line.")
        return cls(found, found.name)

    @classmethod
    def _stdin(cls) -> Source:
        spooled = tempfile.NamedTemporaryFile(prefix="promptmill-stdin-")  # noqa: SIM115 - closed by close()
        while block := sys.stdin.buffer.read(BLOCK):
            spooled.write(block)
        spooled.flush()
        if not spooled.tell():
            spooled.close()
            raise DatasetError("standard input is empty", hint="A dataset has at least one line.")
        return cls(Path(spooled.name), "<stdin>", is_stdin=True, spooled=spooled)

    def close(self) -> None:
        if self._spooled is not None:
            self._spooled.close()

    @property
    def compression(self) -> str | None:
        return {".gz": "gz", ".zst": "zst"}.get(self._path.suffix.lower())

    @property
    def ending(self) -> str:
        """The ending that tells the format, behind it any .gz or .zst left out."""
        path = self._path.with_suffix("") if self.compression else self._path
        return path.suffix.lower()

    @property
    def sha256(self) -> str:
        if self._sha256 is None:
            with self._path.open("rb") as file:
                self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._sha256

    def first_line(self) -> str:
        """The first line that is not blank, at most 64 KiB of it. Raises DatasetError when there is none."""
        for line in self.lines():
            if line.text.strip() or line.error:
                return line.text.strip()[:65_536]
        raise DatasetError(f"{self.name} has no lines but blank ones", hint="A dataset has at least one line.")

    def lines(self) -> Iterator[TextLine]:
        """Every line. A problem of the compression ends the reading with a DatasetError."""
        with self._opened() as file:
            yield from _lines(_Blocks(file, self.name))

    def _opened(self) -> BinaryIO:
        if self.compression == "gz":
            return cast(BinaryIO, gzip.open(self._path, "rb"))
        if self.compression == "zst":
            import zstandard

            opened: BinaryIO = zstandard.open(self._path, "rb")
            return opened
        return self._path.open("rb")


class _Blocks:
    """Reads blocks and turns errors of decompression into one clear error."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name

    def read(self) -> bytes:
        try:
            return self._file.read(BLOCK)
        except (OSError, EOFError, zlib.error) as problem:
            raise DatasetError(f"{self._name} is damaged: {problem}", hint="Compress or copy it again.") from None
        except Exception as problem:
            if type(problem).__name__ != "ZstdError":
                raise
            raise DatasetError(f"{self._name} is damaged: {problem}", hint="Compress or copy it again.") from None


def _lines(blocks: _Blocks) -> Iterator[TextLine]:
    number, offset, rest = 0, 0, b""
    block = blocks.read()
    if block.startswith(BOM):
        block, offset = block[len(BOM) :], len(BOM)
    while block:
        parts = (rest + block).split(b"\n")
        rest = parts.pop()
        for part in parts:
            number += 1
            yield _decoded(number, offset, part)
            offset += len(part) + 1
        if len(rest) > LONGEST_LINE:
            number += 1
            skipped, rest = _skip_line(blocks, rest)
            yield TextLine(number, "", f"the line is longer than {LONGEST_LINE // 2**20} MiB")
            offset += skipped
        block = blocks.read()
    if rest:
        yield _decoded(number + 1, offset, rest)


def _skip_line(blocks: _Blocks, start: bytes) -> tuple[int, bytes]:
    """Read past the end of an endless line; returns how many bytes were skipped and what follows them."""
    skipped = len(start)
    while block := blocks.read():
        end = block.find(b"\n")
        if end >= 0:
            return skipped + end + 1, block[end + 1 :]
        skipped += len(block)
    return skipped, b""


def _decoded(number: int, offset: int, line: bytes) -> TextLine:
    if len(line) > LONGEST_LINE:
        return TextLine(number, "", f"the line is longer than {LONGEST_LINE // 2**20} MiB")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as problem:
        return TextLine(number, "", f"not UTF-8 at byte {offset + problem.start} of the file")
    return TextLine(number, text[:-1] if text.endswith("\r") else text)
