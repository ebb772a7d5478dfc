"""Clients that are too slow for a connection, against a real listening server with short limits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from promptmill.api.http import connections

ASK = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"

#: Its connection ends with its answer.
ASK_ONCE = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

#: Seconds that a head may take, or a client may take nothing, where the test is that it is cut off.
SHORT_S = 0.7

#: Seconds that an answer takes to begin: more than a head may take.
THINKS_S = 1.0

#: Seconds after which a test no longer waits for what must come.
MOST_S = 60.0

#: Far more than lies in all buffers on the way.
BLOCKS = 4_000


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection ends by its time, however slow this machine is."""
    monkeypatch.setattr(connections, "HEAD_S", 10 * MOST_S)
    monkeypatch.setattr(connections, "TAKE_S", 10 * MOST_S)


App = Callable[[Scope, Receive, Send], Awaitable[None]]


def answering_after(wait: Callable[[], Awaitable[object]]) -> App:
    """Answers each request when its wait is over."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})

    return answer


app = answering_after(partial(asyncio.sleep, THINKS_S))


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(BLOCKS):
        await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
    await send({"type": "http.response.body"})


@contextlib.asynccontextmanager
async def listening(served: App, crowd: connections.Crowd | None = None) -> AsyncIterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        protocol: Any = partial(connections.Connection, crowd=crowd)
        server = uvicorn.Server(uvicorn.Config(served, http=protocol, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve([found]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield found.getsockname()[1]
        finally:
            for connection in list(server.server_state.connections):
                connection.transport.abort()
            server.should_exit = server.force_exit = True
            await serving


@contextlib.asynccontextmanager
async def connected(port: int, **named: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is closed in any case: what a failing test leaves open fails the test after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **named)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read(reader: asyncio.StreamReader, count: int = 65_536) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(count), MOST_S)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
def test_who_sends_no_whole_head_is_cut_off(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", SHORT_S)

    async def test() -> None:
        async with listening(app) as port, connected(port) as (reader, writer):
            writer.write(begun)
            assert await read(reader) == b""

    asyncio.run(test())


def test_a_dripped_head_after_an_answer_is_cut_off_and_a_slow_answer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", SHORT_S)

    async def test() -> None:
        async with listening(app) as port, connected(port) as (reader, writer):
            for _ in range(2):
                writer.write(ASK % b"")
                answer = await read(reader)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                if not answer.endswith(b"done"):
                    assert await read(reader) == b"done"
            writer.write(b"GET / HTTP/1.1\r\nX-Long: ")
            ending = asyncio.create_task(read(reader))
            while not ending.done():
                writer.write(b"a")
                await asyncio.wait({ending}, timeout=0.05)
            assert await ending == b""

    asyncio.run(test())


async def refusal(port: int, sent: bytes) -> bytes:
    """The last that comes back for what is sent."""
    async with connected(port) as (reader, writer):
        writer.write(sent)
        answer = b""
        while block := await read(reader):
            answer = block
        return answer


async def taken_in() -> None:
    """The server, which runs in this loop, has taken in what was sent: rounds of the loop count, not seconds."""
    for _ in range(12):
        await asyncio.sleep(0.001)


async def size_of_all(reader: asyncio.StreamReader) -> int:
    """Bytes until the connection ends."""
    size = 0
    while block := await read(reader):
        size += len(block)
    return size


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_a_head_has_a_largest_size(end: bytes) -> None:
    async def test() -> None:
        async with listening(app) as port:
            head = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * connections.LARGEST_HEAD
            assert (await refusal(port, head + end)).startswith(b"HTTP/1.1 431 ")

    asyncio.run(test())


@pytest.mark.parametrize(
    "rest",
    [ASK % b"" + b"GET / HTTP/1.1\r\nX-Long: ", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Long: "],
    ids=["pipelined", "trailer"],
)
def test_no_endless_line_comes_after_a_head_either(rest: bytes) -> None:
    async def test() -> None:
        async with listening(endless) as port, connected(port, limit=1024) as (reader, writer):
            writer.write(rest)
            await taken_in()
            writer.write(b"a" * 2 * connections.LARGEST_HEAD)
            assert await size_of_all(reader) < BLOCKS * 65_536

    asyncio.run(test())


def test_who_takes_nothing_of_an_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "TAKE_S", SHORT_S)

    async def test() -> None:
        ended = asyncio.Event()

        async def told(scope: Scope, receive: Receive, send: Send) -> None:
            await endless(scope, receive, send)
            ended.set()

        async with listening(told) as port, connected(port, limit=1024) as (reader, writer):
            writer.write(ASK % b"")
            # What is sent to a client that was cut off goes nowhere, at once.
            await asyncio.wait_for(ended.wait(), MOST_S)
            assert await size_of_all(reader) < BLOCKS * 65_536

    asyncio.run(test())


def test_who_takes_it_slowly_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than each pause, by far, and shorter than all.
    monkeypatch.setattr(connections, "TAKE_S", 2.5)

    async def test() -> None:
        async with listening(endless) as port, connected(port, limit=1024) as (reader, writer):
            writer.write(ASK_ONCE)
            size, pauses = 0, 0
            while block := await read(reader, 2**20):
                size += len(block)
                if size // 2**25 > pauses:
                    pauses += 1
                    await asyncio.sleep(0.4)
            assert size >= BLOCKS * 65_536
            assert pauses * 0.4 > connections.TAKE_S

    asyncio.run(test())


Connect = Callable[..., Awaitable[list[asyncio.StreamReader]]]


@contextlib.asynccontextmanager
async def crowded(served: App, most: int) -> AsyncIterator[Connect]:
    """Connects clients to a server that has so many connections."""
    opened = contextlib.AsyncExitStack()

    async def connect(address: str, sent: bytes, count: int = 1) -> list[asyncio.StreamReader]:
        """So many connections from one address of this machine, on each of which this is sent, in turn."""
        readers = []
        for _ in range(count):
            reader, writer = await opened.enter_async_context(connected(port, local_addr=(address, 0)))
            writer.write(sent)
            readers.append(reader)
            await taken_in()
        return readers

    async with listening(served, connections.Crowd(most, 8)) as port, opened:
        yield connect


async def is_served(reader: asyncio.StreamReader) -> bool:
    answer = await read(reader)
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 ")), answer
    return answer.startswith(b"HTTP/1.1 200 ")


def test_requests_of_one_address_have_at_most_half_of_all_connections() -> None:
    async def test() -> None:
        go = asyncio.Event()
        async with crowded(answering_after(go.wait), 10) as connect:
            of_one = await connect("127.0.0.2", ASK % b"", 7)
            of_another = await connect("127.0.0.3", ASK % b"")
            go.set()
            assert [await is_served(each) for each in of_one] == [True] * 5 + [False] * 2
            assert await is_served(of_another[0])

    asyncio.run(test())


#: What waits for its client: no head, a part of a head, a part of a body.
UNFINISHED = [b"", b"GET / HTTP/1.1\r\nHost: loc", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1234"]


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await answering_after(taken_in)(scope, receive, send)


@pytest.mark.parametrize("unfinished", UNFINISHED, ids=["nothing", "head", "body"])
def test_where_all_is_full_the_oldest_unfinished_request_of_the_largest_address_goes(unfinished: bytes) -> None:
    async def test() -> None:
        async with crowded(reading, 8) as connect:
            small = await connect("127.0.0.2", unfinished)
            large = await connect("127.0.0.3", unfinished, 4)
            middle = await connect("127.0.0.4", unfinished, 3)
            [newcomer] = await connect("127.0.0.5", ASK % b"")
            assert await is_served(newcomer)
            assert await read(large[0]) == b""
            assert not any(each.at_eof() for each in (*small, *large[1:], *middle))

    asyncio.run(test())


def test_an_answer_that_its_client_does_not_take_goes_where_all_is_full() -> None:
    async def test() -> None:
        go, sent = asyncio.Event(), [0]

        async def by_path(scope: Scope, receive: Receive, send: Send) -> None:
            async def counted(message: Any) -> None:
                await send(message)
                sent[0] += 1

            if scope["path"] == "/endless":
                await endless(scope, receive, counted)
            else:
                await answering_after(go.wait)(scope, receive, send)

        async with crowded(by_path, 2) as connect:
            [slow] = await connect("127.0.0.2", ASK % b"endless")
            # It reads no further than its own buffer.
            before = -1
            while before != sent[0]:
                before = sent[0]
                await taken_in()
            [first] = await connect("127.0.0.3", ASK % b"")
            [second] = await connect("127.0.0.4", ASK % b"")
            go.set()
            assert [await is_served(each) for each in (first, second)] == [True, True]
            assert await size_of_all(slow) < BLOCKS * 65_536
            assert slow.at_eof() or slow.exception() is not None

    asyncio.run(test())


def test_an_address_with_requests_under_way_does_not_lose_them_to_its_own_newcomers() -> None:
    async def test() -> None:
        go = asyncio.Event()
        async with crowded(answering_after(go.wait), 4) as connect:
            mine = await connect("127.0.0.2", ASK % b"", 2)
            other = await connect("127.0.0.3", b"")
            [newcomer] = await connect("127.0.0.2", ASK % b"")
            go.set()
            assert not await is_served(newcomer)
            assert [await is_served(each) for each in mine] == [True, True]
            assert not other[0].at_eof()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:ffff::1", "2001:db8:1::/48"),
        ("2001:db8:1::2", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/48"),
    ],
)
def test_whose_connection_it_is(address: str, network: str) -> None:
    class Transport(asyncio.BaseTransport):
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return (address, 1234)

    assert connections._network(Transport()) == network
