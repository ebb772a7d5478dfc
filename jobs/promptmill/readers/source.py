"""Bytes to lines of text: files, standard input, .gz and .zst, with a place for every problem."""

from __future__ import annotations

import gzip
import hashlib
import re
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Protocol

from promptmill.errors import DatasetError

#: Longest line, in bytes. A longer one is an error of its own, and is never in memory whole.
LONGEST_LINE = 16 * 1024 * 1024
TOO_LONG = f"the line is longer than {LONGEST_LINE // 2**20} MiB"

#: Bytes read at a time.
BLOCK = 1024 * 1024

#: Bytes of zstandard unpacked at a time. Four bytes can stand for 128 KiB, so this bounds memory at 32 MiB.
ZST_STEP = 1024

BOM = b"\xef\xbb\xbf"

#: The same as text. Inside a file it is left where two files were put together.
MARK = "\ufeff"

#: How a UTF-16 file begins, which spreadsheets like to write.
UTF16 = (b"\xff\xfe", b"\xfe\xff")

#: First bytes -> compression, for files whose name does not tell it.
MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}


class TextLine(NamedTuple):
    """A line without its end. ``number`` counts from 1; ``error`` is set when ``text`` cannot be trusted.

    A named tuple because there is one for every line: it is made four times as fast as a frozen dataclass.
    """

    number: int
    text: str
    error: str | None = None


class Readable(Protocol):
    """What is read in blocks."""

    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


class DatasetSource:
    """A file that can be read several times from its start. A stream is kept in a temporary file for that."""

    def __init__(self, path: Path, name: str, *, spooled: IO[bytes] | None = None) -> None:
        self._path = path
        self._spooled = spooled
        self.name = name

    @property
    def path(self) -> Path:
        """Where it can be read; a temporary file for what came through a pipe."""
        return self._path

    @property
    def is_stream(self) -> bool:
        """It came through a pipe, so that its name tells nothing."""
        return self._spooled is not None

    @classmethod
    def open(cls, path: str) -> DatasetSource:
        """Raises :class:`DatasetError` when there is no such file, it is a folder, or it cannot be read."""
        if path == "-":
            return cls._spool(sys.stdin.buffer, "<stdin>")
        found = Path(path)
        try:
            kind = found.stat().st_mode
            if stat.S_ISDIR(kind):
                raise DatasetError(f"{path} is a folder", hint="Give a file.")
            with found.open("rb") as file:
                if not stat.S_ISREG(kind):
                    return cls._spool(file, found.name)
                empty = not file.read(1)
        except FileNotFoundError:
            raise DatasetError(f"there is no file {path}", hint="Check the path.") from None
        except (OSError, ValueError) as problem:
            raise DatasetError(f"cannot read {path[:200]}: {getattr(problem, 'strerror', problem)}") from None
        if empty:
            raise DatasetError(f"{path} is empty", hint="A dataset has at least one line.")
        return cls(found, found.name)

    @classmethod
    def _spool(cls, stream: IO[bytes], name: str) -> DatasetSource:
        """Keep what can be read only once: standard input, a named pipe, a shell's ``<(command)``."""
        return cls.spooled(iter(lambda: stream.read(BLOCK), b""), name)

    @classmethod
    def spooled(cls, blocks: Iterable[bytes], name: str) -> DatasetSource:
        """Keep ``blocks`` in a temporary file. Raises :class:`DatasetError` where there are none."""
        spooled = tempfile.NamedTemporaryFile(prefix="promptmill-")  # noqa: SIM115 - closed by close()
        try:
            for block in blocks:
                spooled.write(block)
            spooled.flush()
            if not spooled.tell():
                raise DatasetError(f"{name} is empty", hint="A dataset has at least one line.")
        except BaseException:
            spooled.close()
            raise
        return cls(Path(spooled.name), name, spooled=spooled)

    def close(self) -> None:
        if self._spooled is not None:
            self._spooled.close()

    @cached_property
    def compression(self) -> str | None:
        """By the name, else by the first bytes, with which no text begins."""
        by_name = {".gz": "gz", ".zst": "zst"}.get(Path(self.name).suffix.lower())
        return by_name or next((kind for magic, kind in MAGIC.items() if self.begins_with(magic)), None)

    def begins_with(self, magic: bytes) -> bool:
        """Whether these are the file's first bytes, as it lies on disk."""
        with self._path.open("rb") as file:
            return file.read(len(magic)) == magic

    @property
    def ending(self) -> str:
        """The ending that tells the format, behind it any .gz or .zst left out."""
        path = Path(self.name)
        return (path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path).suffix.lower()

    @cached_property
    def sha256(self) -> str:
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def first_lines(self, most: int) -> list[str]:
        """The first lines that are not blank, fewer where they are long. Raises DatasetError when there is none."""
        found: list[str] = []
        size = 0
        for line in self.lines():
            text = line.text.strip().removeprefix(MARK)
            if text or line.error:
                found.append(text)
                size += len(text)
            if len(found) == most or size > LONGEST_LINE:
                break
        if not found:
            raise DatasetError(f"{self.name} has no lines but blank ones", hint="A dataset has at least one line.")
        return found

    def lines(self, quoted: bool = False) -> Iterator[TextLine]:
        """Every line. A problem of the compression ends the reading with a DatasetError.

        ``quoted``: a line's end between quotes, as cells of tables have it, does not tell how the lines end.
        """
        with self._path.open("rb") as file:
            unpacked = self._unpacked(file)
            try:
                yield from _lines(_Blocks(unpacked, self.name), self.name, quoted)
            finally:
                unpacked.close()

    def _unpacked(self, file: BinaryIO) -> Readable:
        if self.compression == "gz":
            return gzip.GzipFile(fileobj=file)
        return ZstFile(file) if self.compression == "zst" else file


class _Blocks:
    """Reads blocks and turns errors of decompression into one clear error."""

    def __init__(self, file: Readable, name: str) -> None:
        self._file = file
        self._name = name

    def read(self) -> bytes:
        try:
            return self._file.read(BLOCK)
        except (OSError, EOFError, zlib.error) as problem:
            raise DatasetError(f"{self._name} is damaged: {problem}", hint="Compress or copy it again.") from None


#: The first line of a table, to its end outside of quotes.
_FIRST = re.compile(rb'[^\r\n"]*(?:"[^"]*"[^\r\n"]*)*(\r\n|\r|\n)')


def _ends_in_cr(block: bytes, quoted: bool) -> bool:
    """Whether lines end in a carriage return alone, as on old Macs, and in some spreadsheets on new ones."""
    first = _FIRST.match(block) if quoted else None
    return first[1] == b"\r" if first else b"\r" in block and b"\n" not in block


def _lines(blocks: _Blocks, name: str, quoted: bool = False) -> Iterator[TextLine]:
    number, offset, rest = 0, 0, b""
    block = blocks.read()
    if block.startswith(UTF16):
        raise DatasetError(
            f"{name}: not UTF-8 at byte 0 of the file: it looks like UTF-16",
            hint="Convert it: iconv -f UTF-16 -t UTF-8",
        )
    if block.startswith(BOM):
        block, offset = block[len(BOM) :], len(BOM)
    end = b"\r" if _ends_in_cr(block, quoted) else b"\n"
    while block:
        parts = (rest + block).split(end)
        rest = parts.pop()
        for part in parts:
            number += 1
            yield _decoded(number, offset, part)
            offset += len(part) + 1
        block = b""
        if len(rest) > LONGEST_LINE:
            number += 1
            skipped, block = _skip_line(blocks, rest, end)
            yield TextLine(number, "", TOO_LONG)
            rest, offset = b"", offset + skipped
        block = block or blocks.read()
    if rest:
        yield _decoded(number + 1, offset, rest)


def _skip_line(blocks: _Blocks, start: bytes, end: bytes) -> tuple[int, bytes]:
    """Read past the end of an endless line; returns how many bytes were skipped and what follows them."""
    skipped = len(start)
    while block := blocks.read():
        at = block.find(end)
        if at >= 0:
            return skipped + at + 1, block[at + 1 :]
        skipped += len(block)
    return skipped, b""


def _decoded(number: int, offset: int, line: bytes) -> TextLine:
    if len(line) > LONGEST_LINE:
        return TextLine(number, "", TOO_LONG)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as problem:
        # What can be read of it is kept: a quote in it still opens or closes a field of a CSV file.
        problem_text = f"not UTF-8 at byte {offset + problem.start} of the file"
        return TextLine(number, line.decode("utf-8", "replace").removesuffix("\r"), problem_text)
    if "\0" in text:
        return TextLine(number, "", f"a NUL character at byte {offset + line.index(0)} of the file")
    return TextLine(number, text[:-1] if text.endswith("\r") else text)


class ZstFile:
    """A Zstandard file, read to its end or not at all: any number of frames, one after another.

    zstandard's own file objects end silently where a file was cut off; here that is an :class:`EOFError`. Bytes that
    are no zstandard are an :class:`OSError`.
    """

    def __init__(self, file: BinaryIO) -> None:
        # Here, because most datasets are not compressed.
        import zstandard

        self._zstandard = zstandard
        self._decompressor = zstandard.ZstdDecompressor()
        self._file = file
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False

    def read(self, size: int, /) -> bytes:
        """At least ``size`` bytes, less at the end only, b"" behind it."""
        unpacked = bytearray()
        while len(unpacked) < size and (packed := self._file.read(ZST_STEP)):
            unpacked += self._unpack(packed)
        if not unpacked and self._in_frame:
            raise EOFError("it ends in the middle")
        return bytes(unpacked)

    def _unpack(self, packed: bytes) -> bytes:
        unpacked = b""
        while packed:
            try:
                unpacked += self._frame.decompress(packed)
            except self._zstandard.ZstdError as problem:
                raise OSError(str(problem)) from None
            self._in_frame, packed = not self._frame.eof, b""
            if self._frame.eof:
                packed = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
        return unpacked

    def close(self) -> None:
        self._file.close()
