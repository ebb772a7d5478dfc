"""Who waits for the host of a device, and who goes first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Longest that chunks of one model wait because another one is loaded and has work.
FAIR_S = 60.0


class Turns:
    """Those that wait for the host. The lock of the host's keeper guards it."""

    def __init__(self) -> None:
        #: Model -> since when the first of its requests waits, and how many are urgent.
        self._waits: dict[str, float] = {}
        self._urgent: Counter[str] = Counter()
        #: Since when each of those waits that must have the host for itself.
        self._alone_since: list[float] = []
        #: Model -> since when its chunks are passed over for those of the model that is loaded.
        self._passed_over: dict[str, float] = {}

    @contextmanager
    def waiting(self, model: str, alone: bool, urgent: bool, on_end: Callable[[], None]) -> Iterator[None]:
        now = time.monotonic()
        self._waits.setdefault(model, now)
        if alone:
            self._alone_since.append(now)
        self._urgent[model] += urgent
        try:
            yield
        finally:
            self._waits.pop(model, None)
            if alone:
                self._alone_since.remove(now)
            self._urgent = +(self._urgent - Counter({model: int(urgent)}))
            on_end()

    def gives_way(self, model: str, alone: bool, urgent: bool) -> bool:
        """Whether another one goes first: one that is urgent, or that has waited long for the whole host."""
        if not urgent and any(each != model for each in self._urgent):
            return True
        return not (urgent or alone) and any(time.monotonic() - since > FAIR_S for since in self._alone_since)

    def kept_waiting_s(self, model: str) -> float:
        """Seconds that those have waited who cannot run beside ``model``. Needs no lock."""
        others = [since for name, since in dict(self._waits).items() if name != model]
        return max((time.monotonic() - since for since in (*others, *self._alone_since)), default=0.0)

    def passed_over_long(self, model: str) -> bool:
        """Whether chunks of ``model`` have now been passed over for FAIR_S."""
        return time.monotonic() - self._passed_over.setdefault(model, time.monotonic()) > FAIR_S

    def came(self, model: str) -> None:
        """The model is loaded: nothing of it is passed over any more."""
        self._passed_over.pop(model, None)
