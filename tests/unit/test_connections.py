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

#: Seconds that an answer takes to begin: more than a head may take.
THINKS_S = 0.8

#: Far more than lies in all buffers on the way.
BLOCKS = 4_000

#: Connections of the test that runs.
OPENED: list[asyncio.StreamWriter] = []


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.4)
    monkeypatch.setattr(connections, "TAKE_S", 0.4)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(THINKS_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(BLOCKS):
        await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
    await send({"type": "http.response.body"})


@contextlib.asynccontextmanager
async def listening(
    served: Callable[..., Awaitable[None]], crowd: connections.Crowd | None = None
) -> AsyncIterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        protocol: Any = partial(connections.Connection, crowd=crowd)
        server = uvicorn.Server(uvicorn.Config(served, http=protocol, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve([found]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield found.getsockname()[1]
        finally:
            # Also where a test failed: a socket that is left open fails another test.
            for writer in OPENED:
                writer.transport.abort()
            OPENED.clear()
            server.should_exit = server.force_exit = True
            await serving


async def opened(
    port: int, local: str | None = None, limit: int = 65_536
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that ends with the server at the latest."""
    local_addr = None if local is None else (local, 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit, local_addr=local_addr)
    OPENED.append(writer)
    return reader, writer


async def read(reader: asyncio.StreamReader, count: int = 65_536) -> bytes:
    try:
        # So long that no busy machine is taken for a server that hangs.
        return await asyncio.wait_for(reader.read(count), 60)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
def test_who_sends_no_whole_head_is_cut_off(begun: bytes) -> None:
    async def test() -> None:
        async with listening(app) as port:
            reader, writer = await opened(port)
            writer.write(begun)
            assert await read(reader) == b""

    asyncio.run(test())


def test_a_dripped_head_after_an_answer_is_cut_off_and_a_slow_answer_is_not() -> None:
    async def test() -> None:
        async with listening(app) as port:
            reader, writer = await opened(port)
            for _ in range(2):
                writer.write(ASK % b"")
                answer = await read(reader)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                if not answer.endswith(b"done"):
                    assert await read(reader) == b"done"
            writer.write(b"GET / HTTP/1.1\r\nX-Long: ")
            ending = asyncio.create_task(read(reader))
            for _ in range(60):
                writer.write(b"a")
                await asyncio.wait({ending}, timeout=0.05)
                if ending.done():
                    break
            assert ending.done()
            assert await ending == b""

    asyncio.run(test())


async def refusal(port: int, sent: bytes) -> bytes:
    """The last that comes back for what is sent."""
    reader, writer = await opened(port)
    writer.write(sent)
    answer = b""
    while block := await read(reader):
        answer = block
    return answer


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_a_head_has_a_largest_size(end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that nothing but its size can end it.
    monkeypatch.setattr(connections, "HEAD_S", 60.0)

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
        async with listening(endless) as port:
            reader, writer = await opened(port, limit=1024)
            writer.write(rest)
            await asyncio.sleep(0.1)
            writer.write(b"a" * 2 * connections.LARGEST_HEAD)
            size = 0
            while block := await read(reader):
                size += len(block)
            assert size < BLOCKS * 65_536

    asyncio.run(test())


def test_who_takes_nothing_of_an_answer_is_cut_off() -> None:
    async def test() -> None:
        async with listening(endless) as port:
            reader, writer = await opened(port, limit=1024)
            writer.write(ASK % b"")
            await asyncio.sleep(1.5)
            size = 0
            while block := await read(reader):
                size += len(block)
            assert size < BLOCKS * 65_536

    asyncio.run(test())


def test_who_takes_it_slowly_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than any pause, and shorter than all of them.
    monkeypatch.setattr(connections, "TAKE_S", 1.5)

    async def test() -> None:
        async with listening(endless) as port:
            reader, writer = await opened(port)
            # The end of the answer is the end of the connection, which else stays for another request.
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            size, pauses = 0, 0
            while block := await read(reader, 2**20):
                size += len(block)
                if size // 2**25 > pauses and pauses < 3:
                    pauses += 1
                    await asyncio.sleep(0.6)
            assert pauses * 0.6 > connections.TAKE_S
            assert size >= BLOCKS * 65_536

    asyncio.run(test())


Connect = Callable[..., Awaitable[list[asyncio.StreamReader]]]


@contextlib.asynccontextmanager
async def crowded(served: Callable[..., Awaitable[None]], most: int) -> AsyncIterator[Connect]:
    """Connects clients to a server that has so many connections."""

    async def connect(address: str, sent: bytes, count: int = 1) -> list[asyncio.StreamReader]:
        """So many connections from one address of this machine, on each of which this is sent, in turn."""
        readers = []
        for _ in range(count):
            reader, writer = await opened(port, address)
            writer.write(sent)
            readers.append(reader)
            # The server has taken it in before the next one comes.
            await asyncio.sleep(0.01)
        return readers

    async with listening(served, connections.Crowd(most, 8)) as port:
        yield connect


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection ends by its time."""
    monkeypatch.setattr(connections, "HEAD_S", 60.0)
    monkeypatch.setattr(connections, "TAKE_S", 60.0)


async def is_served(reader: asyncio.StreamReader) -> bool:
    answer = await read(reader)
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 ")), answer
    return answer.startswith(b"HTTP/1.1 200 ")


def test_requests_of_one_address_have_at_most_half_of_all_connections(patient: None) -> None:
    async def test() -> None:
        async with crowded(app, 10) as connect:
            of_one = await connect("127.0.0.2", ASK % b"", 7)
            of_another = await connect("127.0.0.3", ASK % b"")
            assert [await is_served(each) for each in of_one] == [True] * 5 + [False] * 2
            assert await is_served(of_another[0])

    asyncio.run(test())


#: What waits for its client: no head, a part of a head, a part of a body.
UNFINISHED = [b"", b"GET / HTTP/1.1\r\nHost: loc", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1234"]


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await app(scope, receive, send)


@pytest.mark.parametrize("unfinished", UNFINISHED, ids=["nothing", "head", "body"])
def test_where_all_is_full_the_oldest_unfinished_request_of_the_largest_address_goes(
    patient: None, unfinished: bytes
) -> None:
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


def test_an_answer_that_its_client_does_not_take_goes_where_all_is_full(patient: None) -> None:
    async def by_path(scope: Scope, receive: Receive, send: Send) -> None:
        await (endless if scope["path"] == "/endless" else app)(scope, receive, send)

    async def test() -> None:
        async with crowded(by_path, 2) as connect:
            [slow] = await connect("127.0.0.2", ASK % b"endless")
            # It reads no further than its own buffer.
            await asyncio.sleep(0.3)
            [first] = await connect("127.0.0.3", ASK % b"")
            [second] = await connect("127.0.0.4", ASK % b"")
            assert [await is_served(each) for each in (first, second)] == [True, True]
            with contextlib.suppress(ConnectionError):
                while await slow.read(2**20):
                    pass
            assert slow.at_eof() or slow.exception() is not None

    asyncio.run(test())


def test_an_address_with_requests_under_way_does_not_lose_them_to_its_own_newcomers(patient: None) -> None:
    async def test() -> None:
        async with crowded(app, 4) as connect:
            mine = await connect("127.0.0.2", ASK % b"", 2)
            other = await connect("127.0.0.3", b"")
            [newcomer] = await connect("127.0.0.2", ASK % b"")
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
