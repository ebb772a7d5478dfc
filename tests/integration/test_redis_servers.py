"""Redis as operators run it: behind a socket, TLS, Sentinels and users with odd passwords. Real servers each."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from promptmill.core.redis_client import redis_client
from promptmill.errors import BrokerError
from promptmill.queue import broker
from promptmill.queue.broker import Broker
from promptmill.types import ChunkId
from tests.conftest import Command, answers, free_port, redis_binary, unavailable, wait_until

#: Of a user of Redis, with everything in it that a URL gives another meaning.
PASSWORD = "p@ss:w/o#r?d%&=[]"

Start = Callable[..., None]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a Redis with these lines as its configuration, and waits until a client can reach it."""
    processes = []

    def started(reached: str, *lines: str, binary: str | None = None, sentinel: bool = False) -> None:
        file = tmp_path / f"{uuid.uuid4().hex}.conf"
        file.write_text("\n".join((*lines, f"dir {tmp_path}", *([] if sentinel else ['save ""']))) + "\n")
        order = [binary or redis_binary(), str(file), *(["--sentinel"] if sentinel else [])]
        processes.append(subprocess.Popen(order, stdout=subprocess.DEVNULL))
        wait_until(lambda: answers(redis_client(reached)), f"Redis answers at {reached}", 20)

    yield started
    for process in processes:
        process.terminate()
        process.wait()


def works(url: str) -> None:
    """Everything that talks to Redis reaches it: Celery, the synchronous clients and those of the API."""
    broker = Broker(url)
    model = uuid.uuid4().hex
    broker.publish([ChunkId("01M7XP73KJS3YD4NWB2ERSBS24", 7)], model, 5)
    assert broker.waiting_chunks(model) == {ChunkId("01M7XP73KJS3YD4NWB2ERSBS24", 7)}
    broker.ping()
    assert asyncio.run(_asked(url))


async def _asked(url: str) -> bool:
    client = redis_client(url, asynchronous=True, socket_timeout=5)
    try:
        return bool(await client.ping())
    finally:
        await client.aclose()


def test_a_server_that_is_too_old_is_one_clear_sentence(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Broker(redis_url).ping()
    monkeypatch.setattr(broker, "OLDEST", (99, 1))
    with pytest.raises(BrokerError, match=r"^Redis at \S+ is \d+\.\d+\S*, and 99\.1 or newer is needed"):
        Broker(redis_url).ping()


@pytest.fixture
def socket_path() -> Iterator[Path]:
    # A short path: the system allows a hundred bytes.
    folder = Path("/tmp") / f"pm {uuid.uuid4().hex[:6]}"
    folder.mkdir()
    yield folder / "redis #1?.sock"
    shutil.rmtree(folder)


def test_a_socket_serves_with_and_without_a_password(start: Start, socket_path: Path) -> None:
    url = f"unix://{quote(str(socket_path))}?db=2"
    start(url, "port 0", f'unixsocket "{socket_path}"')
    works(url)
    with redis_client(url) as client:
        client.config_set("requirepass", PASSWORD)
    works(f"unix://{quote(str(socket_path))}?db=2&password={quote(PASSWORD, safe='')}")
    works(f"unix://:{PASSWORD}@{quote(str(socket_path))}?db=2")


def test_a_user_may_have_a_password_of_any_characters(start: Start) -> None:
    port = free_port()
    start(f"redis://worker:{PASSWORD}@127.0.0.1:{port}/1", f"port {port}", "bind 127.0.0.1",
          f'user worker on ">{PASSWORD}" ~* &* +@all', "user default off")  # fmt: skip
    works(f"redis://worker:{PASSWORD}@127.0.0.1:{port}/1")
    works(f"redis://worker:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/1")


def test_tls_is_spoken_and_certificates_are_checked(start: Start, tmp_path: Path) -> None:
    binary = shutil.which("redis-server")
    if binary is None or shutil.which("openssl") is None or not _speaks_tls(binary):
        unavailable("no redis-server with TLS, or no openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    port, certificate = free_port(), tmp_path / "cert.pem"
    url = f"rediss://:{PASSWORD}@localhost:{port}/0?ssl_ca_certs={certificate}&ssl_cert_reqs=required"
    start(url, "port 0", f"tls-port {port}", "bind 127.0.0.1", f"tls-cert-file {certificate}",
          f"tls-key-file {tmp_path / 'key.pem'}", f"tls-ca-cert-file {certificate}", "tls-auth-clients no",
          f'requirepass "{PASSWORD}"', binary=binary)  # fmt: skip
    works(url)
    works(f"rediss://:{PASSWORD}@localhost:{port}/0?ssl_cert_reqs=none")
    with pytest.raises(Exception, match="certificate") as refused:
        Broker(f"rediss://:{PASSWORD}@localhost:{port}/0").waiting(["m"])
    assert PASSWORD not in str(refused.value)


def _speaks_tls(binary: str) -> bool:
    done = subprocess.run(
        [binary, "--port", "0", "--tls-port", "1", "--tls-cert-file", "/none"], capture_output=True, text=True,
        timeout=20, check=False,
    )  # fmt: skip
    return "Bad directive" not in done.stdout + done.stderr


def test_sentinels_are_asked_for_the_server(start: Start) -> None:
    port, first, second = free_port(), free_port(), free_port()
    start(f"redis://:{PASSWORD}@127.0.0.1:{port}/0", f"port {port}", "bind 127.0.0.1", f'requirepass "{PASSWORD}"')
    for each in (first, second):
        start(f"redis://:ask me@127.0.0.1:{each}/0", f"port {each}", "bind 127.0.0.1", 'requirepass "ask me"',
              f"sentinel monitor mymaster 127.0.0.1 {port} 1", f'sentinel auth-pass mymaster "{PASSWORD}"',
              sentinel=True)  # fmt: skip
    works(f"sentinel://:{PASSWORD}@127.0.0.1:{first},127.0.0.1:{second}/mymaster/3?sentinel_password=ask me")
    works(f"sentinel://:{PASSWORD}@127.0.0.1:{second}/mymaster?sentinel_password=ask%20me")


@pytest.mark.parametrize("url", ["redis://:pa[ss@h:x/0", "amqp://u:pa[ss@h", "redis://:pa[ss@h/0?foo=1"])
def test_a_url_that_cannot_be_used_is_refused_before_a_job_is_stored(command: Command, url: str) -> None:
    command.environment["JOBS_REDIS_URL"] = url
    for arguments in (("submit", "-p", "hi", "--model", "echo"), ("--debug", "submit", "-p", "hi", "--model", "echo")):
        done = command(*arguments)
        assert (done.code, "JOBS_REDIS_URL" in done.err) == (2, True), done.err
        assert "pa[ss" not in done.err + done.out
    assert not (command.folder / "jobs.sqlite").exists()


def test_no_command_shows_a_password(command: Command) -> None:
    url = f"redis://worker:{PASSWORD}@127.0.0.1:1/0"
    command.environment["JOBS_REDIS_URL"] = url
    for arguments in (("config",), ("config", "--json"), ("submit", "-p", "hi", "--model", "echo"), ("reconcile",),
                      ("--debug", "reconcile")):  # fmt: skip
        done = command(*arguments)
        assert PASSWORD not in done.out + done.err
        assert quote(PASSWORD, safe="") not in done.out + done.err
    command.environment["JOBS_DATABASE_URL"] = "postgresql://u@127.0.0.1:1/d?password=hunter2"
    for arguments in (("config",), ("list",), ("--debug", "list"), ("db", "current")):
        done = command(*arguments)
        assert "hunter2" not in done.out + done.err
