"""What is printed to a terminal, without what the terminal would obey. Files and pipes get every character."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import IO, TextIO, cast

from promptmill.errors import OutputFailed

#: The control characters of ASCII and Latin-1 but for a line's end and a tab, and those that turn text around.
_OBEYED = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {ord("\n"), ord("\t")}
)


def printable(text: str) -> str:
    """Foreign text that moves no cursor, changes no colour or title, and reaches no clipboard."""
    return text.translate(_OBEYED)


def for_people(stream: IO[str]) -> IO[str]:
    """``stream``; one to a terminal prints what is :func:`printable`."""
    if isinstance(stream, _Printable) or stream is None or not stream.isatty():
        return stream
    return cast("IO[str]", _Printable(stream))


def say(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a line. A terminal gets it without control characters, a file or a pipe as it is.

    Raises BrokenPipeError when the reader of stdout has gone, and OutputFailed for a full disk and similar faults.
    """
    stream = for_people(sys.stderr if err else sys.stdout)
    try:
        stream.write(f"{text}\n" if nl else str(text))
        stream.flush()
    except BrokenPipeError:
        if not err:
            raise
        nobody_reads(sys.stderr)
    except OSError as problem:
        nobody_reads(stream)
        raise OutputFailed(f"cannot write: {problem.strerror or problem}") from problem


def nobody_reads(stream: IO[str]) -> None:
    """Let what is still to be written vanish: Python would try it again at the end, and fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Printable:
    """A stream to a terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = cast("TextIO", stream)

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
