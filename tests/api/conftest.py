"""A real server process with a real worker, and the official client."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import Command, migrate, wait_until, workers_alive

#: A fast echo, and one that takes its time.
ECHO, SLOW = "echo", "echo:prefill_s=0.001,token_s=0.02"


#: Clients that are closed with the servers they talk to.
CLIENTS: list[openai.OpenAI] = []


@dataclass
class Server:
    """A server that runs, and how to start more beside it."""

    command: Command
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **({"max_retries": 0} | options))
        CLIENTS.append(made)
        return made

    def get(self, path: str, **headers: str) -> Any:
        asked = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.loads(answer.read())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Starter:
    """Starts servers and workers, and ends them after the test."""

    command: Command
    started: list[subprocess.Popen[str]]

    def server(self, *arguments: str, **settings: str) -> Server:
        command = Command(self.command.folder, self.command.environment | settings)
        # A port that was free may be taken by another test before the server listens there.
        while True:
            port = free_port()
            process = command.start("api", "--port", str(port), *arguments)
            self.started.append(process)
            server = Server(command, port, process)
            wait_until(lambda: process.poll() is not None or answers(server), "the server answers", 60)  # noqa: B023
            if process.poll() is None:
                return server
            assert f"cannot listen at 127.0.0.1:{port}" in log_of(command.folder), log_of(command.folder)

    def worker(self, *models: str, slots: int = 16) -> subprocess.Popen[str]:
        options = [part for model in models for part in ("--model", model)]
        before = workers_alive(self.command.environment)
        process = self.command.start("worker", "--device", "cpu", "--slots", str(slots), *options)
        self.started.append(process)
        wait_until(lambda: workers_alive(self.command.environment) > before, "the worker is ready", 120)
        return process


def answers(server: Server) -> bool:
    try:
        return bool(server.get("/healthz"))
    except OSError:
        return False


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text()[-4000:] for path in folder.glob("*.log"))


def starter_of(folder: Path, database_url: str, redis_url: str) -> Starter:
    command = Command(
        folder,
        {
            "JOBS_DATABASE_URL": database_url, "JOBS_REDIS_URL": redis_url, "JOBS_LEASE_S": "6",
            "JOBS_RUNTIME_DIR": str(folder / "run"), "JOBS_FILES_DIR": str(folder / "files"), "JOBS_GRACE_S": "2",
        },
    )  # fmt: skip
    # A folder that is not there yet is the product's to make, with the database in it.
    if database_url.startswith("sqlite") and Path(database_url.removeprefix("sqlite:///")).parent.is_dir():
        migrate(database_url)
    return Starter(command, [])


def end_all(started: list[subprocess.Popen[str]]) -> None:
    while CLIENTS:
        CLIENTS.pop().close()
    for process in reversed(started):
        process.terminate()
    for process in started:
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path: Path, redis_url: str) -> Iterator[Starter]:
    """Over SQLite, which is what a person at one machine has."""
    starter = starter_of(tmp_path, f"sqlite:///{tmp_path / 'jobs.sqlite'}", redis_url)
    try:
        yield starter
    finally:
        end_all(starter.started)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Server]:
    """One server with one worker of two echoes, for all tests of a module."""
    from redis import Redis

    with Redis.from_url(redis_server) as redis:
        redis.flushall()
    folder = tmp_path_factory.mktemp("served")
    starter = starter_of(folder, f"sqlite:///{folder / 'jobs.sqlite'}", redis_server)
    try:
        starter.worker(ECHO)
        yield starter.server()
    finally:
        end_all(starter.started)


@pytest.fixture
def client(served: Server) -> Iterator[openai.OpenAI]:
    with served.client() as made:
        yield made


def batch_lines(count: int, model: str = ECHO, **changes: Any) -> bytes:
    """A batch file of chat completions."""
    lines = []
    for row in range(count):
        body = {"model": model, "messages": [{"role": "user", "content": f"say {row} again"}], "max_tokens": 16}
        line = {"custom_id": f"r-{row}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line | changes))
    return "\n".join(lines).encode() + b"\n"


def answered(client: openai.OpenAI, batch_id: str) -> int:
    """How many requests of the batch have their answer."""
    counts = client.batches.retrieve(batch_id).request_counts
    return counts.completed if counts else 0


def finished(client: openai.OpenAI, batch_id: str, seconds: float = 60) -> Any:
    """The batch at its end."""
    states = ("completed", "failed", "expired", "cancelled")
    wait_until(lambda: client.batches.retrieve(batch_id).status in states, "the batch ends", seconds)
    return client.batches.retrieve(batch_id)


Check = Callable[[], bool]
