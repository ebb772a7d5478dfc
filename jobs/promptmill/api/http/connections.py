"""Connections with limits: on their number, on the size of a head, on the time to send it, and to take what is sent."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import resource
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Seconds from the first byte of a request (or from the connection) to the end of its head.
HEAD_S = 20.0

#: Seconds that a client may take nothing of what waits for it.
TAKE_S = 60.0

#: Largest head of a request, in bytes; also what may come in a row that belongs to no body.
LARGEST_HEAD = 65_536

#: Most connections at one time, where the process may have so many descriptors.
MOST_CONNECTIONS = 4_000

#: Descriptors for all else: databases, Redis, children, and connections that are refused but not closed yet.
OTHER_DESCRIPTORS = 256

#: Descriptors of one connection: its own, and that of a file that it sends or fetches.
DESCRIPTORS_EACH = 2

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


BUSY = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"


@dataclass(slots=True)
class Crowd:
    """The connections of each network. One has at most half of all.

    Where there is no place for another connection, the oldest that waits for its client makes room.
    """

    #: Most connections, and most that wait to be taken in: each of these has a descriptor before it can be refused.
    most: int
    backlog: int
    _held: dict[str, dict[Connection, None]] = field(default_factory=dict)

    def enter(self, connection: Connection, network: str) -> bool:
        """Whether there is a place for one more connection; then :meth:`leave` has to follow."""
        mine = self._held.get(network, {})
        if len(mine) >= max(1, self.most // 2):
            is_free = _make_room([mine])
        elif sum(map(len, self._held.values())) >= self.most:
            is_free = _make_room([each for each in self._held.values() if len(each) >= max(1, len(mine))])
        else:
            is_free = True
        if is_free:
            self._held.setdefault(network, {})[connection] = None
        return is_free

    def leave(self, connection: Connection, network: str) -> None:
        held = self._held.get(network, {})
        held.pop(connection, None)
        if not held:
            self._held.pop(network, None)


def _make_room(networks: list[dict[Connection, None]]) -> bool:
    """Cut off the oldest connection that waits for its client, of the largest network that has one."""
    for held in sorted(networks, key=len, reverse=True):
        for each in held:
            if each.waits_for_client:
                del held[each]
                each.transport.abort()
                return True
    return False


def crowd() -> Crowd:
    """As many as this process has descriptors for, after asking the system for all that it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = MOST_CONNECTIONS * DESCRIPTORS_EACH + OTHER_DESCRIPTORS
    wanted = enough if hard == resource.RLIM_INFINITY else min(hard, enough)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # A Mac may have a lower limit than it tells.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    usable = enough if soft == resource.RLIM_INFINITY else min(soft, enough)
    others = min(OTHER_DESCRIPTORS, usable // 2)
    return Crowd(max(2, (usable - others) // DESCRIPTORS_EACH), max(8, others // 2))


def _network(transport: asyncio.BaseTransport) -> str:
    """Whose connection it is: an address, and of version 6 the largest network that one subscriber has."""
    try:
        address = ipaddress.ip_address(transport.get_extra_info("peername")[0].partition("%")[0])
    except (TypeError, ValueError, IndexError, AttributeError):
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 48), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)


class Connection(HttpToolsProtocol):
    """uvicorn's, which waits for ever for the end of a head, however long, and for a client that stops to read."""

    def __init__(self, *arguments: Any, crowd: Crowd | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._crowd = crowd
        #: Where it comes from, while it counts.
        self._from: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        #: Bytes that the parser was given since it last got anywhere, and those of the fields of this head.
        self._pending = self._fields = 0
        super().connection_made(transport)
        if self._crowd is not None:
            network = _network(transport)
            if not self._crowd.enter(self, network):
                transport.write(BUSY)
                transport.close()
                return
            self._from = network
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

    @property
    def waits_for_client(self) -> bool:
        """The client has not sent a whole request, or does not take the answer."""
        return not self._is_answering or self.cycle.more_body or self._taking is not None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self._taking or self.loop.call_later(TAKE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taking = _none(self._taking)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._taking = _none(self._head), _none(self._taking)
        if self._crowd is not None and self._from is not None:
            self._crowd.leave(self, self._from)
            self._from = None
        super().connection_lost(exc)


def _none(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer any more."""
    if timer is not None:
        timer.cancel()
    return None
