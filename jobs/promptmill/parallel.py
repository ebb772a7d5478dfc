"""Long reading shared out among processes: ranges of a job's rows, and in their order what was found in them."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from sqlalchemy.engine import Engine

from promptmill.database import connect, reading
from promptmill.types import JobState

#: Rows of a job from which more than one process is worth its start.
WORTH_ROWS = 300_000

#: Rows that a process reads at a time.
RANGE_ROWS = 50_000

#: Pieces of work that are under way or wait for their turn, for each process: memory stays flat.
AHEAD = 2

R = TypeVar("R")

_most = 1


def allow(processes: int | None = None) -> None:
    """Let this process start others: as many as given, else one for each core.

    Only a program of ours does: a process is started by importing its main module again, and a script of somebody
    else's would begin from its first line.
    """
    global _most
    _most = processes or os.cpu_count() or 1


def processes() -> int:
    """How many processes may work; 1 where none may be started."""
    return _most


def is_worth(state: str, rows: int) -> bool:
    """Whether several processes are to read a job: each sees its own moment, so its rows must stay as they are."""
    return bool(JobState(state).is_final) and rows >= WORTH_ROWS and _most > 1


def ranges(rows: int) -> list[tuple[int, int]]:
    """Rows 0 to ``rows`` in ranges of RANGE_ROWS: the first one, and the first one after it."""
    return [(first, min(first + RANGE_ROWS, rows)) for first in range(0, rows, RANGE_ROWS)]


class Readers:
    """Processes that read a database, each by its own connection, so that each sees its own moment."""

    def __init__(self, pool: ProcessPoolExecutor, count: int) -> None:
        self._pool, self._count = pool, count

    def each(self, work: Callable[..., R], spans: Iterable[tuple[int, int]], *arguments: Any) -> Iterator[R]:
        """``work(connection, span, *arguments)`` of every span, in their order."""
        return in_turn(self._pool, self._count, _read, ((work, span, arguments) for span in spans))


@contextmanager
def readers(db: Engine) -> Iterator[Readers]:
    """Processes that read ``db``; they end with the block."""
    # Started afresh: a fork of a process that holds connections and threads could hang.
    url = db.url.render_as_string(hide_password=False)
    pool = ProcessPoolExecutor(_most, get_context("spawn"), _begin, (url,))
    try:
        yield Readers(pool, _most)
    finally:
        pool.shutdown(cancel_futures=True)


def in_turn(
    pool: ProcessPoolExecutor, count: int, work: Callable[..., R], pieces: Iterable[tuple[Any, ...]]
) -> Iterator[R]:
    """``work(*piece)`` of every piece, in their order, by ``count`` processes of ``pool``."""
    waiting: deque[Future[R]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(work, *piece))
        if len(waiting) >= count * AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_db: Engine | None = None


def _begin(url: str) -> None:
    global _db
    begin_process()
    _db = connect(url)


def begin_process() -> None:
    """For a process of a pool: to end with the one that started it, whatever that died of."""
    # Ctrl-C is for the process that asked; it ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(work: Callable[..., R], span: tuple[int, int], arguments: tuple[Any, ...]) -> R:
    assert _db is not None
    with reading(_db) as connection:
        return work(connection, span, *arguments)
