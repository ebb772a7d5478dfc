"""Which models there are, and which workers hold each: read from the workers' rows, remembered for a moment."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy.engine import Engine

from promptmill.queue.dispatcher import ALIVE_S
from promptmill.store import catalog

#: Seconds that the list of workers is remembered.
REMEMBER_S = 2.0

#: Seconds in which a worker that went away may come back, before its model is unknown.
RETURN_S = 600.0

#: States of a worker that will take requests.
SERVING = ("idle", "busy", "loading", "restarting")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by the name that workers know, with the rows of the workers that serve it."""

    name: str
    workers: tuple[dict[str, Any], ...]

    @property
    def loaded(self) -> tuple[dict[str, Any], ...]:
        return tuple(each for each in self.workers if each["model"] == self.name)

    @property
    def since(self) -> int:
        return int(min(each["started_at"] for each in self.workers))


class ModelDirectory:
    """The models that live workers serve. Any thread may ask."""

    def __init__(self, db: Engine) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._models: dict[str, ServedModel] = {}
        self._aliases: dict[str, str] = {}
        self._workers: list[dict[str, Any]] = []
        self._seen: dict[str, float] = {}
        #: Name or short name -> name, of models that were served or asked for at any time; and when that was read.
        self._earlier: dict[str, str] = {}
        self._earlier_at = float("-inf")

    @property
    def is_fresh(self) -> bool:
        return time.monotonic() - self._read_at <= REMEMBER_S

    def refresh(self, *, now: bool = False) -> None:
        """Read the workers again, unless that was done a moment ago."""
        with self._lock:
            if self.is_fresh and not now:
                return
            workers = catalog.list_workers(self._db, ALIVE_S)
            self._workers = workers
            serving = [each for each in workers if each["state"] in SERVING]
            names = sorted({name for each in serving for name in models_of(each)})
            self._models = {
                name: ServedModel(name, tuple(each for each in serving if name in models_of(each))) for name in names
            }
            self._aliases = _aliases(names)
            self._read_at = time.monotonic()
            self._seen |= dict.fromkeys([*names, *self._aliases], self._read_at)

    @property
    def workers(self) -> list[dict[str, Any]]:
        return self._workers

    @property
    def models(self) -> list[ServedModel]:
        return list(self._models.values())

    def find(self, name: str) -> ServedModel | None:
        """A model by its name, or by its file's name where only one has it."""
        return self._models.get(name) or self._models.get(self._aliases.get(name, ""))

    def was_there(self, name: str) -> bool:
        """Whether a worker served the model a while ago: it may be restarting."""
        return time.monotonic() - self._seen.get(name, float("-inf")) < RETURN_S

    def resolve(self, name: str) -> str | None:
        """The name that workers know; also of a model that a worker may serve later, or again: jobs wait for it."""
        from promptmill_workers.checkpoints import BUNDLED

        found = self.find(name)
        return found.name if found else name if name in BUNDLED else self._once_served(name)

    def names(self) -> frozenset[str]:
        """All that :meth:`resolve` knows."""
        from promptmill_workers.checkpoints import BUNDLED

        self._once_served("")
        return frozenset((*self._models, *self._aliases, *BUNDLED, *self._earlier))

    def _once_served(self, name: str) -> str | None:
        with self._lock:
            if time.monotonic() - self._earlier_at > REMEMBER_S:
                names = sorted(catalog.models_once_served(self._db))
                self._earlier = _aliases(names) | {each: each for each in names}
                self._earlier_at = time.monotonic()
            return self._earlier.get(name)


def models_of(worker: dict[str, Any]) -> list[str]:
    import json

    names: list[str] = json.loads(worker["models"])
    return names


def _aliases(names: list[str]) -> dict[str, str]:
    """Short names of paths: ``/models/a.gguf`` is also ``a.gguf`` and ``a``."""
    short = [(each, name) for name in names for each in _short(name)]
    count = Counter(each for each, _ in short)
    return {each: name for each, name in short if count[each] == 1 and each not in names}


def _short(name: str) -> set[str]:
    if "/" not in name:
        return set()
    last = PurePosixPath(name.removeprefix("hf:").replace(":", "/")).name
    return {last, last.removesuffix(".gguf")}
