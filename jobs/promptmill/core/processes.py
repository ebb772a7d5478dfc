"""Work shared out among threads or processes, and what came of it in the order in which it was asked for."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from multiprocessing import parent_process
from typing import Any, TypeVar

#: Pieces of work that are under way or wait for their turn, for each of them: memory stays flat.
AHEAD = 2

R = TypeVar("R")

_most = 1


def allow(processes: int | None = None) -> None:
    """Let this process start others: as many as given, else one for each core.

    Only our own programs do: a process is started by importing its main module again, and a user's script would
    begin from its first line.
    """
    global _most
    _most = processes or os.cpu_count() or 1


def processes() -> int:
    """How many processes may work; 1 where none may be started."""
    return _most


def in_turn(pool: Executor, count: int, work: Callable[..., R], pieces: Iterable[tuple[Any, ...]]) -> Iterator[R]:
    """``work(*piece)`` of every piece, in their order, by ``count`` threads or processes of ``pool``."""
    waiting: deque[Future[R]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(work, *piece))
        if len(waiting) >= count * AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
