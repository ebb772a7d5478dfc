"""A TCP proxy that makes trouble: delays, cut connections, connections that are open in one direction only."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

#: What :meth:`Proxy.trouble` knows.
TROUBLES = ("delay", "cut", "half")

#: Seconds that a half-closed connection lives on, at least and at most: beyond a lease of the fault suite.
HALF_S = (1.0, 8.0)


class Proxy:
    """Listens on a free port and forwards to a port of this machine or a Unix socket."""

    def __init__(self, target: int | Path, rng: random.Random) -> None:
        self._target = target
        self._rng = rng
        self._delay_until = 0.0
        self._links: list[_Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for link in self._links:
            link.cut()

    def trouble(self, kind: str) -> None:
        """One of TROUBLES, now, to every connection."""
        if kind == "delay":
            self._delay_until = time.monotonic() + self._rng.uniform(0.5, 3)
        for link in list(self._links):
            match kind:
                case "cut":
                    link.cut()
                case "half":
                    link.half_close(self._rng)

    def _wait(self) -> None:
        if (left := self._delay_until - time.monotonic()) > 0:
            time.sleep(left)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = self._connect()
                except OSError:
                    client.close()
                    continue
                link = _Link(client, server)
                self._links.append(link)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=link.forward, args=(source, sink, self._wait), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target))
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(self._target))
        return server


class _Link:
    """A connection on both sides of the proxy. Its two directions end one by one."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._ends = (client, server)
        self._silent: socket.socket | None = None
        self._lock = threading.Lock()
        self._directions = 2

    def forward(self, source: socket.socket, sink: socket.socket, wait: Callable[[], None]) -> None:
        """One direction, to its end, which the other side is told of."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                wait()
                if source is not self._silent:
                    sink.sendall(data)
            if source is not self._silent:
                sink.shutdown(socket.SHUT_WR)
        with self._lock:
            self._directions -= 1
            over = self._directions == 0
        if over:
            self.cut()

    def half_close(self, rng: random.Random) -> None:
        """End one direction for a while, then both. Its receiver is told of it, or waits for what never comes."""
        source, sink = rng.sample(self._ends, 2)
        if rng.random() < 0.5:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
        else:
            self._silent = source
        later = threading.Timer(rng.uniform(*HALF_S), self.cut)
        later.daemon = True
        later.start()

    def cut(self) -> None:
        for each in self._ends:
            # Shutting down wakes the thread that reads from it; closing alone does not.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
