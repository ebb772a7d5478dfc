"""The worker's side of the engine host: start the child process, talk to it, notice its death."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from promptmill import errors
from promptmill.core import programs
from promptmill.core.settings import Settings
from promptmill.errors import ModelError, PromptmillError
from promptmill.types import (
    EngineCounters,
    ErrorClass,
    Request,
    Result,
)
from promptmill_workers.devices import Device
from promptmill_workers.engines.contract import EngineInfo, EngineOptions
from promptmill_workers.host.socket_folder import SOCKET_NAME, SocketFolder, remove_leftovers
from promptmill_workers.host.wire import LiveText, pack_request, result_of

log = logging.getLogger("promptmill.host")

#: Lines of the host's log that are kept for the message about its death.
LAST_WORDS = 20

#: Characters of these lines that go into an error message.
LAST_WORDS_CHARS = 300


class HostCrashed(ModelError):
    """Loading the model ended the engine process."""


class HostDied(Exception):
    """The host ended or stalled while it held requests. ``str()`` is its last words."""

    def __init__(self, words: str, error_class: ErrorClass = ErrorClass.ENGINE_CRASH) -> None:
        super().__init__(words)
        self.error_class = error_class


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What a host loads, and where."""

    model: str
    device: Device
    options: EngineOptions
    stall_timeout_s: float = 300.0
    load_timeout_s: float = 1800.0
    log_level: str = "INFO"
    #: Compute identical greedy requests once.
    deduplicate: bool = True
    #: Hosts that may be loaded at one time.
    loaded_models: int = 1

    @classmethod
    def of(
        cls,
        settings: Settings,
        model: str,
        device: Device,
        *,
        slots: int | None,
        context_tokens: int | None,
    ) -> HostConfig:
        """What the settings and a command's own options come to on ``device``."""
        options = EngineOptions(
            slots=slots,
            context_tokens=context_tokens,
            kv_cells=settings.kv_cells,
            kv_type=settings.kv_type,
            batch_tokens=settings.batch_tokens,
            threads=settings.threads or device.threads,
            device=device.engine_device,
        )
        return cls(
            model,
            device,
            options,
            settings.stall_timeout_s,
            settings.load_timeout_s,
            settings.log_level,
            settings.deduplicate,
            settings.loaded_models,
        )


class EngineHost:
    """One child process with one model on one device."""

    def __init__(self, config: HostConfig) -> None:
        self.config = config
        self.info: EngineInfo | None = None
        self.load_s: float | None = None
        remove_leftovers()
        self._folder = SocketFolder()
        self._address = str(self._folder.path / SOCKET_NAME)
        self._words: deque[str] = deque(maxlen=LAST_WORDS)
        self._started = time.monotonic()
        self._ended_by_us = False
        self._process = self._spawn()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _spawn(self) -> subprocess.Popen[bytes]:
        # The parent binds, so that a connection is possible at once; it then closes its copy, so that a connection
        # to a dead host is refused instead of waiting for ever.
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._address)
        listener.listen(64)
        config = self.config
        with listener:
            order = {
                "socket": listener.fileno(),
                "model": config.model,
                "options": asdict(config.options),
                "cores": list(config.device.cores),
                "log_level": config.log_level,
                "deduplicate": config.deduplicate,
            }
            return programs.start(
                "promptmill_workers.host.process", order, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                pass_fds=[listener.fileno()], env=config.device.environment(os.environ),
            )  # fmt: skip

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            # What an engine writes while it dies may be anything; databases take no NUL.
            text = line.decode(errors="replace").replace("\0", "").rstrip()
            if text:
                self._words.append(text)
                log.debug("host %d: %s", self.pid, text)

    def wait_ready(self) -> EngineInfo:
        """Wait for the model; returns what was really set up.

        Raises the host's own :class:`PromptmillError` for a model that cannot be loaded, or :class:`ModelError`.
        """
        try:
            with contextlib.closing(self._connect()) as connection:
                self.info = self._greet(connection)
        except (HostDied, OSError, EOFError) as death:
            self.kill()
            raise HostCrashed(
                f"loading {self.config.model} ended the engine process: {self.last_words()}",
                hint="The file may be damaged or larger than the memory. JOBS_LOG_LEVEL=DEBUG shows the engine's log.",
            ) from death
        self.load_s = time.monotonic() - self._started
        return self.info

    def _greet(self, connection: Connection) -> EngineInfo:
        connection.send(("hello",))
        if not connection.poll(self.config.load_timeout_s):
            raise HostDied(f"nothing within {self.config.load_timeout_s:g} s")
        match connection.recv():
            case ("ready", EngineInfo() as info):
                return info
            case ("failed", name, message, hint):
                self.kill()
                raise _error_named(name)(message, hint=hint)
            case other:
                raise HostDied(f"unexpected message {type(other)}")

    def _connect(self) -> Connection:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(self._address)
        except OSError as problem:
            client.close()
            raise HostDied(self.last_words()) from problem
        return Connection(client.detach())

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """A session for the requests of one chunk. Leaving it drops what still runs."""
        connection = self._connect()
        try:
            connection.send(("hello",))
            yield Session(self, connection)
        except (OSError, EOFError) as problem:
            raise self.death() from problem
        finally:
            connection.close()

    def death(self) -> HostDied:
        """What became of the process. A SIGKILL that is not ours is the kernel's, for memory."""
        words = self.last_words()
        killed = self._process.poll() == -signal.SIGKILL and not self._ended_by_us
        return HostDied(words, ErrorClass.OUT_OF_MEMORY if killed else ErrorClass.ENGINE_CRASH)

    def last_words(self) -> str:
        """How the process ended, and the end of its log."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        self._reader.join(timeout=1)
        code = self._process.poll()
        how = "still runs" if code is None else f"exit code {code}" if code >= 0 else f"signal {-code}"
        words = " | ".join(self._words)[-LAST_WORDS_CHARS:]
        return f"the engine host ended ({how}){': ' + words if words else ''}"

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        if self.alive:
            self._ended_by_us = True
            self._process.kill()
        self._process.wait()
        self._reader.join(timeout=2)
        for pipe in (self._process.stdin, self._process.stderr):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()
        self._folder.remove()


class Session:
    """The requests of one chunk inside a host. ``drain`` and ``abandon`` may be called from another thread."""

    def __init__(self, host: EngineHost, connection: Connection) -> None:
        self._host = host
        self._connection = connection
        self._lock = threading.Lock()
        # The host knows of no request before it is sent some: what it is told of them waits for that.
        self._has_begun = False
        self._told: str | None = None
        self._outstanding = 0
        self._counters = EngineCounters()
        self.active = 0
        self.waiting = 0
        self.kv_cells_used = 0
        self.dropped = 0
        #: The host has answered at least one request.
        self.has_answered = False

    def answer(
        self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None = None
    ) -> Iterator[list[Result]]:
        """Send the requests and yield their results as they come, in batches, in any order.

        ``on_text`` is given the row and more text of each request that streams, as it comes. Ends when each has a
        result or was dropped. Raises :class:`HostDied`.
        """
        self._outstanding = len(requests)
        self._begin(requests)
        while self._outstanding > 0:
            match self._receive():
                case ("results", list() as batch, EngineCounters() as counters):
                    self._outstanding -= len(batch)
                    self._counters = self._counters.plus(counters)
                    self.has_answered = True
                    yield [result_of(each) for each in batch]
                case ("dropped", int() as count):
                    self._outstanding -= count
                    self.dropped += count
                case ("texts", list() as texts):
                    if on_text is not None:
                        for each in texts:
                            if each.answer == 0:
                                on_text(each.row, each.text)
                case ("beat", active, waiting, cells):
                    self.active, self.waiting, self.kv_cells_used = active, waiting, cells

    def counters(self) -> EngineCounters:
        """What the engine did for jobs that no session was told yet. What it does later is not this session's work."""
        self._send(("counters",))
        while True:
            match self._receive():
                case ("counters", EngineCounters() as counters):
                    self._counters = self._counters.plus(counters)
                    return self.take_counters()
                case ("dropped", int() as count):
                    self.dropped += count

    def take_counters(self) -> EngineCounters:
        """What came with the results since the last call."""
        taken, self._counters = self._counters, EngineCounters()
        return taken

    def go_live(self) -> None:
        """Its requests are urgent from now on, and come and go at any time: see :meth:`add` and :meth:`hear`."""
        self._send(("live",))

    def add(self, requests: Sequence[Request]) -> None:
        """Send more requests of a live session."""
        self._send(("add", [pack_request(each) for each in requests]))

    def cancel(self, rows: Sequence[int]) -> None:
        """Drop requests of a live session; nothing more is said of them."""
        self._send(("cancel", list(rows)))

    def hear(self, wait_s: float) -> tuple[list[LiveText], list[Result]] | None:
        """What a live session is told next: more text of rows, or results. None when nothing came in time."""
        if not self._connection.poll(wait_s):
            return None
        match self._connection.recv():
            case ("results", list() as batch, _):
                return [], [result_of(each) for each in batch]
            case ("texts", list() as texts):
                return texts, []
            case ("beat", active, waiting, cells):
                self.active, self.waiting, self.kv_cells_used = active, waiting, cells
        return [], []

    def drain(self) -> None:
        """Give back the requests that hold no slot yet; the others run to their end."""
        self._tell("drain")

    def abandon(self) -> None:
        """Give back every request that has no result, at once."""
        self._tell("abandon")

    def _begin(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._connection.send(("add", [pack_request(each) for each in requests]))
            self._has_begun = True
            if self._told is not None:
                self._connection.send((self._told,))

    def _tell(self, what: str) -> None:
        with self._lock:
            self._told = what
            if self._has_begun:
                self._connection.send((what,))

    def _send(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)

    def _receive(self) -> Any:
        if not self._connection.poll(self.stall_timeout_s):
            self.stalled()
        return self._connection.recv()

    @property
    def info(self) -> EngineInfo:
        """What its host has loaded."""
        assert self._host.info is not None
        return self._host.info

    @property
    def stall_timeout_s(self) -> float:
        return self._host.config.stall_timeout_s

    def stalled(self) -> NoReturn:
        """The host lives but makes no step: nothing but its end frees the device. Raises :class:`HostDied`."""
        self._host.kill()
        message = f"the engine made no step for {self.stall_timeout_s:g} s and was ended"
        raise HostDied(message, ErrorClass.STALL)


def _error_named(name: str) -> type[PromptmillError]:
    found = getattr(errors, name, ModelError)
    return found if isinstance(found, type) and issubclass(found, PromptmillError) else ModelError
