"""A Redis that takes connections and answers nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from promptmill.errors import BrokerError
from promptmill.queue import broker
from promptmill.queue.broker import Broker
from promptmill.types import ChunkId


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Its backlog takes the connections; nobody reads them."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listening:
        listening.setblocking(False)
        yield listening


def connections(listening: socket.socket) -> int:
    count = 0
    while True:
        try:
            listening.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda asked: asked.waiting(["m"]), lambda asked: asked.waiting_chunks("m"), lambda asked: asked.ping(),
    ],
    ids=["waiting", "waiting_chunks", "ping"],
)  # fmt: skip
def test_it_is_asked_once_and_for_a_moment(
    silent: socket.socket, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Broker], object]
) -> None:
    monkeypatch.setattr(broker, "ASK_TIMEOUT_S", 0.2)
    with pytest.raises(BrokerError):
        ask(Broker(f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))
    assert connections(silent) == 1


def test_publishing_gives_up(silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "ASK_TIMEOUT_S", 0.2)
    # Seconds between the tries of Redis' client.
    monkeypatch.setattr("redis.retry.sleep", lambda seconds: None)
    with pytest.raises(BrokerError):
        Broker(f"redis://127.0.0.1:{silent.getsockname()[1]}/0").publish([ChunkId("01", 0)], "m", 5)
