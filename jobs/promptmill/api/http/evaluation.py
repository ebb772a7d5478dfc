"""What clients send is evaluated in children with limits, of which each key has its share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from promptmill.api.keys import Principal
from promptmill.api.limits import too_many
from promptmill.core.child_processes import ChildLimits, ChildPool

R = TypeVar("R")

#: Children at one time, those of one key among them, and calls of a key that run or wait.
MOST, MOST_OF_A_KEY, MOST_WAITING = 4, 2, 16

#: A body, a task file, or calls of tools in an answer.
QUICK = ChildLimits(10.0, 512)

#: A report, which reads all rows of a job; and the seconds more for each thousand of them.
REPORT_S, REPORT_S_PER_1000 = 30.0, 1.0
REPORT_MB = 2_048


def for_report(rows: int) -> ChildLimits:
    return ChildLimits(REPORT_S + REPORT_S_PER_1000 * rows / 1000, REPORT_MB)


class Evaluation:
    """A pool of children for the calls of one kind: quick ones never wait for slow ones. One event loop owns it."""

    def __init__(self) -> None:
        self._pool = ChildPool()
        self._threads = ThreadPoolExecutor(MOST, thread_name_prefix="child")
        self._free = asyncio.Semaphore(MOST)
        self._of_key: dict[str | None, asyncio.Semaphore] = {}
        self._waiting: Counter[str | None] = Counter()

    async def run(self, principal: Principal, limits: ChildLimits, function: Callable[..., R], *arguments: object) -> R:
        """``function(*arguments)`` in a child. Raises OverLimit, what the function raises, and a 429 for a key that
        waits for too many.
        """
        key = principal.key_id
        with self._counted(key):
            async with self._of_key.setdefault(key, asyncio.Semaphore(MOST_OF_A_KEY)), self._free:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, self._pool.call, limits, function, *arguments)

    @contextmanager
    def _counted(self, key: str | None) -> Iterator[None]:
        if self._waiting[key] >= MOST_WAITING:
            raise too_many(f"Too many calls at one time that take a while: {MOST_WAITING} are allowed.", 5)
        self._waiting[key] += 1
        try:
            yield
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
                self._of_key.pop(key, None)

    def close(self) -> None:
        """End all children, also those at work: this process is about to end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pool.close()
