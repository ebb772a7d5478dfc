"""How the chunks of a process are told to end, and how it says that it cannot store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Shutdown:
    """Tells the chunks of this process to end: first what waits is given back, then what runs."""

    draining: threading.Event = field(default_factory=threading.Event)
    abandoning: threading.Event = field(default_factory=threading.Event)
    _waiting: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_blocked(self) -> bool:
        """Whether results wait for a database that does not take them."""
        return self._waiting > 0

    @contextmanager
    def blocked(self) -> Iterator[None]:
        with self._lock:
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
