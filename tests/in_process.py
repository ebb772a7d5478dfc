"""A command in the process of a test: what it says and how it ends, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO
from unittest import mock

import pytest
import sqlalchemy as sa

from promptmill.cli import main

#: What commands and their libraries may take for themselves.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def run_in_process(
    arguments: list[str], folder: Path, environment: Mapping[str, str], stdin: str | None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``arguments``, run by the entry point itself.

    Files stand in for its streams, as in a shell's redirection: there is no terminal, and each has a descriptor.
    """
    with contextlib.ExitStack() as put_back:
        given, out, err = (put_back.enter_context(_file()) for _ in range(3))
        given.write(stdin or "")
        given.seek(0)
        patch = put_back.enter_context(pytest.MonkeyPatch.context())
        patch.chdir(folder)
        patch.setattr(sys, "argv", arguments)
        for name, stream in (("stdin", given), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        # With clear=True what the command itself sets is put back too.
        put_back.enter_context(mock.patch.dict(os.environ, environment, clear=True))
        put_back.enter_context(_connections_closed())
        put_back.enter_context(_signals_kept())
        put_back.enter_context(_logging_kept())
        put_back.enter_context(_warnings_of_a_program())
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        assert isinstance(code, int), f"a command ends with an exit code, not with {code!r}"
        return code, _text(out), _text(err)


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _text(file: IO[str]) -> str:
    file.flush()
    file.seek(0)
    return file.read()


@contextlib.contextmanager
def _connections_closed() -> Iterator[None]:
    """Connections of pools end with the command, as with a process."""
    opened: list[Any] = []

    def note(connection: Any, _record: object) -> None:
        opened.append(connection)

    sa.event.listen(sa.Pool, "connect", note)
    yield
    sa.event.remove(sa.Pool, "connect", note)
    for connection in opened:
        connection.close()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """Loggers keep their levels and handlers: those of a command write to its streams."""
    every = [logging.root, *logging.root.manager.loggerDict.values()]
    known = [each for each in every if isinstance(each, logging.Logger)]
    before = [(each, each.level, each.propagate, each.disabled, list(each.handlers)) for each in known]
    yield
    for logger, level, propagate, disabled, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.disabled, logger.handlers = propagate, disabled, handlers


@contextlib.contextmanager
def _warnings_of_a_program() -> Iterator[None]:
    """Warnings are shown or passed over as Python does for programs, and are no errors as in tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _say
        yield
        # What the command left open is collected here, and not as an error in the midst of another test.
        gc.collect(1)


def _say(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
