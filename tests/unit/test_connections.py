"""Clients that are too slow for a connection, against a real listening server with short limits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from promptmill.api import connections

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
        server = uvicorn.Server(
            uvicorn.Config(served, http=connections.Connection, lifespan="off", log_config=None)  # type: ignore[arg-type]
        )
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
