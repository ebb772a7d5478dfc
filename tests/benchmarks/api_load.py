"""The API under load: 200 clients at once, a chat beside a job of 10,000, and an upload of a million lines.

python -m tests.benchmarks.api_load [clients] [upload] [beside]
"""

from __future__ import annotations

import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from redis import Redis
from redis.exceptions import RedisError

from tests.api.conftest import Server, Starter, end_all, free_port, starter_of
from tests.conftest import _redis_binary

CLIENTS = 200
CALLS = 6_000
LINES = 1_000_000

#: Of one chat alone: an echo of a slow model, so that a step has a length.
STEP_S = 0.02


@contextmanager
def stack() -> Iterator[Starter]:
    """A folder, a Redis, and what starts servers and workers on them."""
    with tempfile.TemporaryDirectory(prefix="promptmill-") as folder:
        port = free_port()
        redis = subprocess.Popen(
            [_redis_binary(), "--port", str(port), "--save", "", "--dir", folder], stdout=subprocess.DEVNULL
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


async def _client(server: Server, number: int, calls: int, took: list[float], wrong: list[str]) -> None:
    """Raw HTTP, so that the client costs little of the two cores."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for call in range(calls):
        text = f"say {number} {call}"
        body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": text}]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        began = time.perf_counter()
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        length = int(status.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        answer = await reader.readexactly(length)
        took.append(time.perf_counter() - began)
        if b" 200 " not in status[:16] or json.loads(answer)["choices"][0]["message"]["content"] != text:
            wrong.append(status[:60].decode())
    writer.close()


async def _load(server: Server, clients: int, calls: int) -> tuple[float, list[float], list[str]]:
    took: list[float] = []
    wrong: list[str] = []
    began = time.perf_counter()
    await asyncio.gather(*(_client(server, number, calls // clients, took, wrong) for number in range(clients)))
    return time.perf_counter() - began, took, wrong


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
            seconds, took, wrong = asyncio.run(_load(server, count, calls))
            after = _cpu_s(server.process.pid), _cpu_s(worker.pid), time.process_time()
            spent = [1000 * (late - early) / len(took) for early, late in zip(before, after, strict=True)]
            p50, p99 = statistics.median(took), statistics.quantiles(took, n=100)[98]
            print(
                f"{count} clients: {len(took)} answers, {len(wrong)} wrong, {len(took) / seconds:.0f} requests/s, "
                f"latency p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms; "
                f"CPU ms a request: server {spent[0]:.2f}, worker {spent[1]:.2f}, client {spent[2]:.2f}"
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
    chosen = sys.argv[1:] or ["clients", "upload", "beside"]
    for name in chosen:
        {"clients": clients, "upload": upload, "beside": beside}[name]()
