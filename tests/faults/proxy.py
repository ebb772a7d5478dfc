"""A TCP proxy that makes trouble: delays, cut connections, connections closed on one side only."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from pathlib import Path


class Proxy:
    """Listens on a free port and forwards to a port of this machine or a Unix socket."""

    def __init__(self, target: int | Path, rng: random.Random) -> None:
        self._target = target
        self._rng = rng
        self._delay_until = 0.0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for pair in self._pairs:
            _close(*pair)

    def trouble(self) -> None:
        """One of the three, now."""
        match self._rng.choice(["delay", "cut", "half"]):
            case "delay":
                self._delay_until = time.monotonic() + self._rng.uniform(0.5, 3)
            case "cut":
                for pair in self._pairs:
                    _close(*pair)
            case "half":
                for client, _ in self._pairs:
                    with contextlib.suppress(OSError):
                        client.shutdown(socket.SHUT_RD)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = self._connect()
                except OSError:
                    client.close()
                    continue
                self._pairs.append((client, server))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target))
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(self._target))
        return server

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if (left := self._delay_until - time.monotonic()) > 0:
                    time.sleep(left)
                sink.sendall(data)
        _close(source, sink)


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        # Shutting down wakes the thread that reads from it; closing alone does not.
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
