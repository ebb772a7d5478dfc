"""The API under load: 200 clients at once, its own time at 500 requests a second, a chat beside a job of 10,000, and an
upload of a million lines.

python -m tests.benchmarks.api_load [clients] [overhead] [upload] [beside]
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from redis import Redis
from redis.exceptions import RedisError

from tests.api.conftest import Server, Starter, end_all, free_port, starter_of
from tests.conftest import redis_binary

CLIENTS = 200
CALLS = 6_000
RATE = 500.0
MOST_OVERHEAD_S = 0.05
LINES = 1_000_000

#: Of one chat alone: an echo of a slow model, so that a step has a length.
STEP_S = 0.02


@contextmanager
def stack() -> Iterator[Starter]:
    """A folder, a Redis, and what starts servers and workers on them."""
    with tempfile.TemporaryDirectory(prefix="promptmill-") as folder:
        port = free_port()
        redis = subprocess.Popen(
            [redis_binary(), "--port", str(port), "--save", "", "--dir", folder], stdout=subprocess.DEVNULL
        )
        while not _answers(port):
            time.sleep(0.05)
        starter = starter_of(Path(folder), f"sqlite:///{folder}/jobs.sqlite", f"redis://127.0.0.1:{port}/0")
        try:
            yield starter
        finally:
            end_all(starter.started)
            redis.terminate()
            redis.wait()


def _answers(port: int) -> bool:
    try:
        return bool(Redis(port=port).ping())
    except (OSError, RedisError):
        return False


@dataclass
class Found:
    """What the clients saw: seconds of each answer, the server's own part of them, and what was not right."""

    took: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _ask(connection: Connection, text: str, found: Found, began: float) -> None:
    """Raw HTTP, so that the client costs little of the two cores. ``began``: when the call was due."""
    reader, writer = connection
    body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": text}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    status = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(status.partition(b"content-length:")[2].split(b"\r\n")[0])
    answer = await reader.readexactly(length)
    found.took.append(time.perf_counter() - began)
    parts = re.findall(rb"(?:before|after);dur=([0-9.]+)", status)
    if b" 200 " not in status[:16] or json.loads(answer)["choices"][0]["message"]["content"] != text:
        found.wrong.append(status[:60].decode())
    elif len(parts) == 2:
        found.overhead.append(sum(map(float, parts)) / 1000)


async def _client(server: Server, number: int, calls: int, found: Found) -> None:
    connection = await asyncio.open_connection("127.0.0.1", server.port)
    for call in range(calls):
        await _ask(connection, f"say {number} {call}", found, time.perf_counter())
    connection[1].close()


async def _load(server: Server, clients: int, calls: int) -> tuple[float, Found]:
    """As many calls at a time as there are clients: what the server can do."""
    found, began = Found(), time.perf_counter()
    await asyncio.gather(*(_client(server, number, calls // clients, found) for number in range(clients)))
    return time.perf_counter() - began, found


async def _paced(server: Server, clients: int, calls: int, rate: float) -> tuple[float, Found]:
    """``rate`` calls a second, whatever has become of those before. A call that finds no client free waits, and its
    time counts from when it was due."""
    found = Found()
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(clients):
        free.put_nowait(await asyncio.open_connection("127.0.0.1", server.port))

    async def one(number: int, due: float) -> None:
        connection = await free.get()
        await _ask(connection, f"say {number}", found, due)
        free.put_nowait(connection)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(calls):
            due = began + number / rate
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            group.create_task(one(number, due))
    seconds = time.perf_counter() - began
    while not free.empty():
        free.get_nowait()[1].close()
    return seconds, found


def _p50_p99(seconds: list[float]) -> str:
    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    return f"p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms"


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children."""
    process = psutil.Process(pid)
    return sum(sum(each.cpu_times()[:2]) for each in [process, *process.children(recursive=True)])


def clients() -> None:
    with stack() as start:
        worker = start.worker("echo")
        server = start.server(JOBS_LOG_LEVEL="WARNING")
        asyncio.run(_load(server, 10, 200))
        for count, calls in ((1, 300), (10, 1000), (CLIENTS, CALLS)):
            before = _cpu_s(server.process.pid), _cpu_s(worker.pid), time.process_time()
            seconds, found = asyncio.run(_load(server, count, calls))
            after = _cpu_s(server.process.pid), _cpu_s(worker.pid), time.process_time()
            answers = len(found.took)
            spent = [1000 * (late - early) / answers for early, late in zip(before, after, strict=True)]
            print(
                f"{count} clients: {answers} of {calls} answers, {len(found.wrong)} wrong, "
                f"{answers / seconds:.0f} requests/s, latency {_p50_p99(found.took)}; "
                f"CPU ms a request: server {spent[0]:.2f}, worker {spent[1]:.2f}, client {spent[2]:.2f}"
            )


def overhead() -> None:
    """The API's own time, apart from that in the queue and on the worker, at a fixed rate of requests."""
    with stack() as start:
        start.worker("echo")
        server = start.server(JOBS_LOG_LEVEL="WARNING")
        asyncio.run(_load(server, 10, 200))
        seconds, found = asyncio.run(_paced(server, CLIENTS, CALLS, RATE))
        lost = CALLS - len(found.took) + len(found.wrong)
        late = sum(each > MOST_OVERHEAD_S for each in found.overhead)
        print(
            f"{RATE:.0f} requests/s asked for, {len(found.took) / seconds:.0f} answered by {CLIENTS} connections, "
            f"{lost} of {CALLS} lost or wrong; the API's own time {_p50_p99(found.overhead)} ({late} above "
            f"{1000 * MOST_OVERHEAD_S:.0f} ms), latency from when a call was due {_p50_p99(found.took)}"
        )


def upload() -> None:
    body = '"body":{{"model":"echo","messages":[{{"role":"user","content":"say {0} again"}}],"max_tokens":16}}}}'
    line = '{{"custom_id":"r-{0}","method":"POST","url":"/v1/chat/completions",' + body + "\n"
    content = "".join(line.format(row) for row in range(LINES)).encode()
    with stack() as start:
        start.worker("echo")
        server = start.server(JOBS_LOG_LEVEL="WARNING")
        process = psutil.Process(server.process.pid)
        with server.client(timeout=600) as client:
            began = time.perf_counter()
            file = client.files.create(file=("b.jsonl", io.BytesIO(content)), purpose="batch")
            sent_s, most = time.perf_counter() - began, process.memory_info().rss
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            keeper = next(each for each in process.children() if "batch_keeper" in " ".join(each.cmdline()))
            kept = 0
            while (state := client.batches.retrieve(batch.id)).status == "validating":
                most, kept = max(most, process.memory_info().rss), max(kept, keeper.memory_info().rss)
                time.sleep(0.2)
            stored_s = time.perf_counter() - began - sent_s
            print(
                f"{LINES:,} lines, {len(content) / 2**20:.0f} MiB: uploaded in {sent_s:.1f} s "
                f"({LINES / sent_s:,.0f} lines/s), validated and stored in {stored_s:.1f} s ({LINES / stored_s:,.0f} "
                f"lines/s), {state.status}; memory at most {most / 2**20:.0f} MiB (server), "
                f"{kept / 2**20:.0f} MiB (batches)"
            )
            client.batches.cancel(batch.id)


def beside() -> None:
    model = f"echo:prefill_s=0.0001,token_s={STEP_S}"
    with stack() as start:
        start.worker(model)
        server = start.server(JOBS_LOG_LEVEL="WARNING")

        def first_token_s() -> float:
            began = time.perf_counter()
            stream = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "one two three"}], stream=True
            )
            for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            waited = time.perf_counter() - began
            stream.close()
            return waited

        with server.client() as client:
            alone = sorted(first_token_s() for _ in range(30))
            lines = [{"prompt": f"{row} " + "word " * 100, "max_tokens": 90} for row in range(10_000)]
            client.post("/jobs", body={"model": model, "lines": lines}, cast_to=object)
            while server.get("/v1/jobs?limit=1")["data"][0]["ok"] == 0:
                time.sleep(0.2)
            busy = sorted(first_token_s() for _ in range(30))
            for name, waits in (("alone", alone), ("beside a job of 10,000", busy)):
                p50, p90, most = (1000 * waits[place] for place in (15, 27, -1))
                print(f"first token {name}: p50 {p50:.0f} ms, p90 {p90:.0f} ms, max {most:.0f} ms")
            print(
                f"a decode step is {1000 * STEP_S:.0f} ms; p50 waits {(busy[15] - alone[15]) / STEP_S:.1f} steps more"
            )


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["clients", "overhead", "upload", "beside"]
    for name in chosen:
        {"clients": clients, "overhead": overhead, "upload": upload, "beside": beside}[name]()
