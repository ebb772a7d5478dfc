"""Keeps the engine hosts of one device: one works; hosts of other models may stay loaded until memory is needed."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from promptmill.core.backoff import Backoff
from promptmill_workers.engines.contract import EngineInfo
from promptmill_workers.engines.kv_budget import CPU_SLOTS
from promptmill_workers.host.client import EngineHost, HostConfig, HostCrashed, HostDied, Session
from promptmill_workers.host.turns import Turns
from promptmill_workers.model_files import LoadedFiles

log = logging.getLogger("promptmill.worker")

#: Before a host that died is started again.
RESTART = Backoff(0.2, 30.0)

#: What those are told who wait for a host when there will be none.
STOPPING = "the worker is stopping"

#: Seconds between two looks of those who wait for a turn.
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a host must be to take a session. None: no matter."""

    model: str
    context_tokens: int | None = None
    fingerprint: str | None = None


def _is_stale(info: EngineInfo, wanted: Wanted) -> bool:
    """Whether the files must be loaded again: they were written to, or another model is wanted and may be there now."""
    if info.files is None:
        return False
    another = wanted.fingerprint is not None and wanted.fingerprint != info.fingerprint
    return info.is_overwritten or (another and not info.files.are_current)


class NotWanted(Exception):
    """The caller that waited for a session wants none any more."""


class ModelHosts:
    """Hands out sessions. Sessions of one model run together; another model waits until they have ended."""

    def __init__(self, config: HostConfig, on_change: Callable[[ModelHosts], None] | None = None) -> None:
        self._config = config
        # A context that was asked for is kept; else it is the engine's usual one, and grows with what jobs need.
        self._context_is_fixed = config.options.context_tokens is not None
        self._on_change = on_change or (lambda keeper: None)
        self._host: EngineHost | None = None
        # Hosts of other models that stay loaded, the least recently used first.
        self._parked: OrderedDict[str, EngineHost] = OrderedDict()
        self._users = 0
        self._alone = False
        self._turns = Turns()
        self._not_before = 0.0
        # Held while a host is loaded, which may take minutes: what others read of this object needs no lock.
        self._changed = threading.Condition()
        self._sessions: tuple[Session, ...] = ()
        self._closed = False
        #: What was loaded last of each model.
        self._loaded: dict[str, LoadedFiles] = {}
        #: Hosts that died one after the other without an answer between.
        self.deaths = 0
        self.restarts = 0
        self.state = "loading"

    @property
    def info(self) -> EngineInfo | None:
        host = self._host
        return host.info if host else None

    @property
    def load_s(self) -> float | None:
        host = self._host
        return host.load_s if host else None

    @property
    def pid(self) -> int | None:
        host = self._host
        return host.pid if host else None

    @property
    def slots(self) -> int:
        return self.info.slots if self.info else self._config.options.slots or CPU_SLOTS

    @property
    def is_backing_off(self) -> bool:
        """A host died, and the next one is not started yet."""
        return self._host is None and self._back_off_s() > 0

    def _back_off_s(self) -> float:
        return max(0.0, self._not_before - time.monotonic())

    def holds_another(self, model: str, fingerprint: str | None) -> bool:
        """Whether this machine's files of ``model`` are known to be another model than the one with ``fingerprint``."""
        found = self.fingerprint_of(model)
        return None not in (fingerprint, found) and found != fingerprint

    def fingerprint_of(self, model: str) -> str | None:
        """Which model this machine's files of ``model`` are; None where that is not known, or not any more."""
        found = self._loaded.get(model)
        return found.fingerprint if found is not None and found.are_current else None

    def load(self) -> tuple[int, int]:
        """Sequences that hold a slot, and requests that wait for one, by the host's last signs of life."""
        sessions = self._sessions
        return max((each.active for each in sessions), default=0), max((each.waiting for each in sessions), default=0)

    def kv_cells_used(self) -> int:
        """By the host's last sign of life."""
        return max((each.kv_cells_used for each in self._sessions), default=0)

    def turn_of(self, model: str) -> bool:
        """Whether a chunk of ``model`` is to run before those of the model that is loaded.

        Loading takes long: the loaded one goes on, but none waits for longer than FAIR_S because of it.
        """
        if self._host is None or self._config.model == model:
            return True
        return self._turns.passed_over_long(model)

    def kept_waiting_s(self, model: str) -> float:
        """Seconds that those have waited for this model who cannot run beside it."""
        return self._turns.kept_waiting_s(model)

    @property
    def model(self) -> str:
        """The model that is loaded, or will be."""
        return self._config.model

    def start(self, context_tokens: int | None = None) -> EngineInfo:
        """Load the configured model. Raises PromptmillError when that is impossible."""
        with self._changed:
            return self._ensure(Wanted(self._config.model, context_tokens))

    @contextmanager
    def session(
        self,
        model: str,
        context_tokens: int | None = None,
        *,
        alone: bool = False,
        urgent: bool = False,
        unwanted: threading.Event | None = None,
        fingerprint: str | None = None,
    ) -> Iterator[Session]:
        """A session with ``model`` and room for requests of ``context_tokens``, if need be ``alone`` in its host.

        ``fingerprint``: of the model that is wanted. Where another one is loaded and its files have changed since, they
        are loaded anew; whether they are the right ones then is to be looked at (``Session.info``).
        While an ``urgent`` one waits for its model, none of another model begins.

        Raises HostDied, NotWanted once ``unwanted`` is set while it waits for its turn, or PromptmillError for a model
        that cannot be loaded.
        """
        host = self._enter(Wanted(model, context_tokens, fingerprint), alone, urgent, unwanted or threading.Event())
        try:
            with host.session() as session:
                self._sessions = (*self._sessions, session)
                try:
                    yield session
                finally:
                    self._sessions = tuple(each for each in self._sessions if each is not session)
                    if session.has_answered:
                        self._worked(host)
        except HostDied:
            with self._changed:
                self._bury(host)
            raise
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def unload(self, model: str) -> bool:
        """End the host of a model that is not used; False for one that is in use or not loaded."""
        with self._changed:
            parked = self._parked.pop(model, None)
            if parked is not None:
                parked.kill()
                return True
            if self._host is None or self._config.model != model or self._users:
                return False
            self._host.kill()
            self._host = None
            self.state = "idle"
            self._on_change(self)
            return True

    def stop_loading(self) -> None:
        """No work begins here any more: end a host that is still being loaded. One that works goes on."""
        # Not under the condition, as of :meth:`close`.
        self._closed = True
        host = self._host
        if host is not None and host.info is None:
            host.kill()

    def back_off(self) -> float:
        """The model does not load here: leave work to others for so many seconds, more of them each time."""
        with self._changed:
            self._count_death()
        return self._back_off_s()

    def close(self) -> None:
        """End the host at once, and start no other."""
        # Not under the condition: a host that is being loaded must be ended too.
        self._closed = True
        host = self._host
        for each in [host, *self._parked.values()]:
            if each is not None:
                each.kill()

    # --- the caller holds the condition ------------------------------------------------------------------------------

    def _enter(self, wanted: Wanted, alone: bool, urgent: bool, unwanted: threading.Event) -> EngineHost:
        """Wait for a turn; the host then serves what is ``wanted`` and counts one user more."""
        model = wanted.model

        def may_enter() -> bool:
            if self._back_off_s():
                return False
            if self._turns.gives_way(model, alone, urgent):
                return False
            return self._users == 0 or (not (alone or self._alone) and self._serves(wanted))

        with self._changed, self._turns.waiting(model, alone, urgent, self._changed.notify_all):
            while not self._closed and not may_enter():
                if unwanted.is_set():
                    raise NotWanted
                # No one notifies of the end of a back-off, or of a job that was cancelled.
                self._changed.wait(min(LOOK_S, self._back_off_s() or LOOK_S))
            if self._closed:
                raise HostDied(STOPPING)
            self._ensure(wanted)
            assert self._host is not None
            self._users += 1
            self._alone = alone
            return self._host

    def _serves(self, wanted: Wanted) -> bool:
        if self._host is None or self._config.model != wanted.model:
            return False
        info, tokens = self._host.info, wanted.context_tokens
        if info is None:
            return True
        return not _is_stale(info, wanted) and (
            self._context_is_fixed or tokens is None or tokens <= info.context_tokens
        )

    def _ensure(self, wanted: Wanted) -> EngineInfo:
        host, model, context_tokens = self._host, wanted.model, wanted.context_tokens
        if host is not None and host.alive and host.info and self._serves(wanted):
            return host.info
        if host is not None and not host.alive:
            self._bury(host)
        elif host is not None:
            self._put_away(host, model)
        self._turns.came(model)
        parked = self._parked.pop(model, None)
        self._config = replace(self._config, model=model)
        if parked is not None and self._take_back(parked, wanted):
            assert self._host is not None
            assert self._host.info is not None
            self._on_change(self)
            return self._host.info
        if not self._context_is_fixed:
            self._config = replace(self._config, options=replace(self._config.options, needed_tokens=context_tokens))
        self.state = "loading"
        self._on_change(self)
        info = self._load()
        if info.files is not None:
            self._loaded[model] = info.files
        self.state = "idle"
        self._on_change(self)
        log.info("%s on %s: %d slots, context %d", info.model_name, info.device_got, info.slots, info.context_tokens)
        return info

    def _put_away(self, host: EngineHost, model: str) -> None:
        """Another ``model`` comes: keep this host if that is allowed, end the one that was used least recently."""
        self._host = None
        if self._config.loaded_models <= 1 or self._config.model == model:
            host.kill()
            return
        self._parked[self._config.model] = host
        while len(self._parked) >= self._config.loaded_models + (model in self._parked):
            oldest = next(name for name in self._parked if name != model)
            self._parked.pop(oldest).kill()

    def _take_back(self, host: EngineHost, wanted: Wanted) -> bool:
        """Work with a host that stayed loaded; False when it died, is stale or has too small a context."""
        self._host = host
        if host.alive and self._serves(wanted):
            return True
        host.kill()
        self._host = None
        return False

    def _worked(self, host: EngineHost) -> None:
        """A host that answers is no broken engine, whatever becomes of it; one that was replaced says nothing."""
        with self._changed:
            if self._host is host:
                self.deaths = 0

    def _bury(self, host: EngineHost) -> None:
        """A host died: the next one starts after the back-off. Several sessions may report one death."""
        if self._host is not host:
            return
        host.kill()
        self._host = None
        self._count_death()

    def _count_death(self) -> None:
        self.deaths += 1
        self.restarts += 1
        self._not_before = time.monotonic() + RESTART.delay_s(self.deaths)

    def _load(self) -> EngineInfo:
        """Start a host. One that crashes gets a second chance without the CPU's special kernels."""
        if self._closed:
            raise HostDied(STOPPING)
        self._host = EngineHost(self._config)
        try:
            return self._host.wait_ready()
        except HostCrashed as crash:
            self._host = None
            if self._closed:
                raise HostDied(STOPPING) from crash
            options = self._config.options
            if options.plain_kernels or options.device != "cpu":
                raise
            log.warning("%s; trying again without AMX and repacked weights", crash.message)
            self._config = replace(self._config, options=replace(options, plain_kernels=True))
            return self._load()
        except BaseException:
            self._host = None
            raise
