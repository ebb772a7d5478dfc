"""Clients that are too slow for a connection, against a real listening server with short limits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from promptmill.api.http import connections

ASK = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"

#: Seconds that an answer takes to begin: more than a head may take.
THINKS_S = 0.8

#: Far more than lies in all buffers on the way.
BLOCKS = 4_000


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
async def listening(served: Callable[..., Awaitable[None]]) -> AsyncIterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        server = uvicorn.Server(uvicorn.Config(served, http=connections.Connection, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve([found]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield found.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await serving


async def read(reader: asyncio.StreamReader, count: int = 65_536) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(count), 5)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
def test_who_sends_no_whole_head_is_cut_off(begun: bytes) -> None:
    async def test() -> None:
        async with listening(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun)
            assert await read(reader) == b""
            writer.close()

    asyncio.run(test())


def test_a_dripped_head_after_an_answer_is_cut_off_and_a_slow_answer_is_not() -> None:
    async def test() -> None:
        async with listening(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
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
            writer.close()

    asyncio.run(test())


async def refusal(port: int, sent: bytes) -> bytes:
    """The last that comes back for what is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    answer = b""
    while block := await read(reader):
        answer = block
    writer.close()
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
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(rest)
            await asyncio.sleep(0.1)
            writer.write(b"a" * 2 * connections.LARGEST_HEAD)
            size = 0
            while block := await read(reader):
                size += len(block)
            assert size < BLOCKS * 65_536
            writer.close()

    asyncio.run(test())


def test_who_takes_nothing_of_an_answer_is_cut_off() -> None:
    async def test() -> None:
        async with listening(endless) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(ASK % b"")
            await asyncio.sleep(1.5)
            size = 0
            while block := await read(reader):
                size += len(block)
            assert size < BLOCKS * 65_536
            writer.close()

    asyncio.run(test())


def test_who_takes_it_slowly_has_it_all() -> None:
    async def test() -> None:
        async with listening(endless) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(ASK % b"")
            size, pauses = 0, 0
            while block := await read(reader, 2**20):
                size += len(block)
                if size // 2**26 > pauses:
                    pauses += 1
                    await asyncio.sleep(0.2)
            assert size >= BLOCKS * 65_536
            writer.close()

    asyncio.run(test())
