"""Connections with limits on time: to send the head of a request, and to take what is sent."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Seconds from the first byte of a request (or from the connection) to the end of its head.
HEAD_S = 20.0

#: Seconds that a client may take nothing of what waits for it.
TAKE_S = 60.0


class Connection(HttpToolsProtocol):
    """uvicorn's, which waits for ever for the end of a head, and for a client that stops to read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering:
            self._head = _none(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_S, self.transport.abort)

    @property
    def _is_answering(self) -> bool:
        """Its last head was read to the end and is not answered: how slow a body is, the gate looks at."""
        return self.cycle is not None and not self.cycle.response_complete

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self._taking or self.loop.call_later(TAKE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taking = _none(self._taking)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._taking = _none(self._head), _none(self._taking)
        super().connection_lost(exc)


def _none(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer any more."""
    if timer is not None:
        timer.cancel()
    return None
