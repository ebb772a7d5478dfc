"""Files that commands write: what may be written is judged before any work, and what is written appears whole.

An output is ``-`` for stdout, a file, or what is no regular file: a device, a pipe. The last are written through.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from promptmill.core.terminal import for_people
from promptmill.errors import OutputFailed, PromptmillError

#: Standard output, as an argument.
STDOUT = "-"

#: Names of this process's stdout, and the folders in which names of open files are.
_STDOUT_NAMES = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_OPEN_FILES = ("/dev/std", "/dev/fd/", "/proc/")

#: Links that are followed at most, as Linux does.
_MOST_LINKS = 40


def refuse(outputs: Iterable[str | None], inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    """Raises PromptmillError for an output that cannot be written, or is one of the command's inputs.

    An input may be a folder or a pattern: all of its files are inputs. What stdin reads is one too.
    """
    known = [os.fspath(each) for each in inputs if each]
    seen: list[str] = []
    for output in outputs:
        if output is None or is_stdout(output):
            continue
        _refuse_unwritable(output)
        target = os.path.realpath(output)
        if target in seen and not _is_written_through(output):
            raise PromptmillError(f"{output} is given twice as an output", hint="Give another name.")
        seen.append(target)
        if not os.path.isfile(output):
            continue
        if (read := _input_at(output, known)) is not None:
            raise PromptmillError(
                f"{output} is not written over: this command reads it, as {read}", hint="Give another name."
            )


def is_stdout(output: str) -> bool:
    """Whether it is ``-``, or a name that the system has for the same."""
    return output == STDOUT or any(each in _STDOUT_NAMES for each in _links(output))


def holds_something(output: str) -> bool:
    """Whether writing to it would replace a file that is there."""
    return not is_stdout(output) and os.path.exists(output) and not _is_written_through(output)


def discard(output: str | None) -> None:
    """Remove the file of an earlier run, which must not pass for that of this one if it fails."""
    if output is not None and holds_something(output):
        os.unlink(output)


@contextmanager
def writing(output: str) -> Iterator[IO[str]]:
    """A stream to ``output``, UTF-8. A file appears when the block ends well; else what was there stays."""
    if is_stdout(output):
        with _told("stdout"):
            stream = for_people(sys.stdout)
            yield stream
            stream.flush()
    else:
        with appearing(output) as path, open(path, _mode(output), encoding="utf-8", newline="") as file:
            yield file


@contextmanager
def appearing(output: str) -> Iterator[Path]:
    """The path to write to; it becomes ``output`` when the block ends well, and is gone when it does not.

    The mode of a file that was there is kept. A link goes on leading to its file.
    """
    if _is_written_through(output):
        with _told(output):
            yield Path(output)
        return
    target = Path(os.path.realpath(output))
    with _told(output):
        partial = _new_beside(target)
        try:
            yield partial
            with suppress(FileNotFoundError):
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def folder_of(output: str) -> str | None:
    """Where something is kept until it can be written: on the disk of the file. None beside what is no file."""
    return None if _is_written_through(output) else os.path.dirname(os.path.realpath(output))


def _new_beside(target: Path) -> Path:
    """An empty file with an unguessable name and the mode that the umask gives."""
    partial = target.with_name(f".{secrets.token_hex(8)}.part")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return partial


def _mode(output: str) -> str:
    """Appended to what is open elsewhere, such as the log behind /dev/stderr: it is not cut off."""
    return "a" if _is_written_through(output) else "w"


@contextmanager
def _told(output: str) -> Iterator[None]:
    """Turn a full disk and similar faults into one clear error. A reader that has gone is left to the caller."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        if problem.errno is None:
            raise
        raise OutputFailed(f"cannot write {output}: {problem.strerror or problem}") from problem


def _refuse_unwritable(output: str) -> None:
    if os.path.isdir(output):
        raise PromptmillError(f"{output} is a folder", hint="Give a file's name.")
    if _is_written_through(output):
        if not os.access(output, os.W_OK):
            raise PromptmillError(f"{output} cannot be written to")
        return
    folder = folder_of(output) or ""
    if not os.path.isdir(folder):
        raise PromptmillError(f"there is no folder {folder}", hint="Make it first.")
    if not os.access(folder, os.W_OK):
        raise PromptmillError(f"{folder} cannot be written to")


def _is_written_through(output: str) -> bool:
    """A device, a pipe, a socket, or the name of a file that is open already. It is never replaced."""
    if not os.path.exists(output):
        return False
    return not os.path.isfile(output) or any(each.startswith(_OPEN_FILES) for each in _links(output))


def _links(output: str) -> Iterator[str]:
    """The absolute path, and one after the other those that it leads to."""
    path = os.path.abspath(output)
    for _ in range(_MOST_LINKS):
        yield path
        if not os.path.islink(path):
            return
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))


def _input_at(output: str, inputs: Iterable[str]) -> str | None:
    """The input that the file ``output`` is, or belongs to."""
    with suppress(OSError, AttributeError, ValueError):
        if os.path.samestat(os.stat(output), os.fstat(sys.stdin.fileno())):
            return "stdin"
    return next((each for each in inputs if _reads(each, output)), None)


def _reads(source: str, output: str) -> bool:
    import glob

    if os.path.isdir(source):
        return Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source))
    files = [source] if os.path.exists(source) else glob.iglob(source, recursive=True)
    return any(os.path.isfile(each) and os.path.samefile(each, output) for each in files)
