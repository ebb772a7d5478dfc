"""The server is killed in the middle of things, over PostgreSQL: nothing half-done stays, and another one goes on."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import SLOW, Server, Starter, answered, batch_lines, end_all, finished, starter_of
from tests.conftest import wait_until


@pytest.fixture
def start(tmp_path: Path, migrated_postgres_url: str, redis_url: str) -> Iterator[Starter]:
    starter = starter_of(tmp_path, migrated_postgres_url, redis_url)
    try:
        yield starter
    finally:
        end_all(starter.started)


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


def test_a_server_killed_in_an_upload_leaves_no_file(start: Starter) -> None:
    server = start.server()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", "10000000")
    connection.endheaders(b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n')
    connection.send(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + b"x" * 500_000)
    parts = server.command.folder / "files" / "parts"
    wait_until(lambda: any(parts.iterdir()), "the upload has begun")
    kill(server)
    connection.close()
    assert any(parts.iterdir())
    assert list(start.server().client().files.list()) == []
    wait_until(lambda: not any(parts.iterdir()), "nothing of the upload is left", 20)


def test_a_server_killed_in_streams_frees_every_slot(start: Starter) -> None:
    start.worker(SLOW, slots=2)
    server = start.server()
    text = " ".join(["word"] * 3000)

    def stream() -> None:
        asked: list[Any] = [{"role": "user", "content": text}]
        with contextlib.suppress(Exception):
            for _ in server.client().chat.completions.create(model=SLOW, messages=asked, stream=True, max_tokens=3000):
                pass

    threads = [threading.Thread(target=stream) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    kill(server)
    for thread in threads:
        thread.join(20)
    client = start.server().client()
    began = time.monotonic()
    answer = client.chat.completions.create(model=SLOW, messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content == "hello"
    # Each of the two would have run for a minute.
    assert time.monotonic() - began < 30


def test_a_server_killed_after_a_cancel_ends_the_batch_when_it_is_back(start: Starter) -> None:
    start.worker(SLOW, slots=2)
    server = start.server()
    client = server.client()
    file = client.files.create(file=("b.jsonl", batch_lines(2000, SLOW)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    wait_until(lambda: answered(client, batch.id) > 0, "the batch runs", 90)
    client.batches.cancel(batch.id)
    kill(server)
    again = start.server().client()
    ended = finished(again, batch.id, 30)
    assert ended.status == "cancelled"
    lines = [
        json.loads(line)["custom_id"]
        for name in (ended.output_file_id, ended.error_file_id)
        for line in again.files.content(name).iter_lines()
    ]
    assert sorted(lines) == sorted(f"r-{row}" for row in range(2000))
