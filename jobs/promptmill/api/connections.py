"""Connections with limits: on the size of a request's head, on the time to send it, and to take what is sent."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Seconds from the first byte of a request (or from the connection) to the end of its head.
HEAD_S = 20.0

#: Seconds that a client may take nothing of what waits for it.
TAKE_S = 60.0

#: Largest head of a request, in bytes; also what may come in a row that belongs to no body.
LARGEST_HEAD = 65_536

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(HttpToolsProtocol):
    """uvicorn's, which waits for ever for the end of a head, however long, and for a client that stops to read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        #: Bytes that the parser was given since it last got anywhere, and those of the fields of this head.
        self._pending = self._fields = 0
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > LARGEST_HEAD:
            self._refuse()
        elif self._is_answering:
            self._head = _none(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_S, self.transport.abort)

    def on_message_begin(self) -> None:
        self._fields = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, more: int) -> None:
        self._fields += more
        if self._fields > LARGEST_HEAD:
            # The parser stops, and has ``send_400_response`` called.
            raise ValueError("the head is too large")

    def on_headers_complete(self) -> None:
        self._pending = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._fields > LARGEST_HEAD:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        if self._is_answering:
            # In the middle of another answer.
            self.transport.abort()
        elif not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

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
