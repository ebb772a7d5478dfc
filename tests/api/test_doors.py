"""Doors that were open: logins, names of this machine, modes of files, and crowds of connections."""

from __future__ import annotations

import contextlib
import hmac
import http.client
import os
import socket
import sqlite3
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptmill.api.http.errors import ApiError
from promptmill.api.keys import Principal
from promptmill.api.limits import PAGE_CALLS_PER_S, KeyLimits
from promptmill.api.pages.login import COOKIE, LASTS_S, cookie_of
from promptmill.core.settings import Settings
from tests.api.conftest import Server, end_all, free_port, log_of, starter_of
from tests.api.test_jobs import refused
from tests.api.test_security import key
from tests.conftest import Clock, Command, wait_until

#: Descriptors that a process may have: fewer than there are connections below.
DESCRIPTORS = 256


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Server]:
    """A server that asks for keys, started where everybody may read what is made."""
    folder = tmp_path_factory.mktemp("doors")
    before = os.umask(0o000)
    starter = starter_of(folder, f"sqlite:///{folder / 'data' / 'jobs.sqlite'}", redis_server)
    try:
        yield starter.server("--require-key")
    finally:
        end_all(starter.started)
        os.umask(before)


def ask(server: Server, method: str, path: str, body: str | None = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        answer.read()
        return answer


def login(server: Server, secret: str, **headers: str) -> str:
    """The whole ``Set-Cookie`` of a login."""
    form = urllib.parse.urlencode({"key": secret, "next": "/"})
    kind = "application/x-www-form-urlencoded"
    answer = ask(server, "POST", "/login", form, Content_Type=kind, **headers)
    assert answer.status == 303
    return str(answer.headers["set-cookie"])


def status(server: Server, cookie: str) -> int:
    return ask(server, "GET", "/v1/jobs", Cookie=f"{COOKIE}={cookie}").status


def row_of(server: Server, name: str) -> tuple[str, str]:
    """What a reader of the table knows of a key: id and hash."""
    with contextlib.closing(sqlite3.connect(server.command.folder / "data" / "jobs.sqlite")) as db:
        found: tuple[str, str] = db.execute("SELECT id, key_sha256 FROM api_keys WHERE name = ?", (name,)).fetchone()
        return found


def test_who_reads_the_table_of_keys_cannot_log_in(locked: Server) -> None:
    secret = key(locked, "boss", "--scope", "admin")
    key_id, hashed = row_of(locked, "boss")
    ends = int(time.time()) + 3600
    for signer in (hashed, bytes.fromhex(hashed), "", key_id):
        for signed in (f"{key_id}.{ends}", f"{key_id}.{ends}.{hashed}"):
            signature = hmac.new(signer.encode() if isinstance(signer, str) else signer, signed.encode(), "sha256")
            assert status(locked, f"{key_id}.{ends}.{signature.hexdigest()}") == 401
    own = login(locked, secret).partition(";")[0].partition("=")[2]
    assert status(locked, own) == 200
    kept = locked.command("query", "SELECT * FROM installation", "--format", "csv").out
    assert (locked.command.folder / "files" / "login-secret").read_text() not in kept


def test_a_cookie_lasts_no_longer_than_the_server_says(locked: Server) -> None:
    key(locked, "long")
    known = bytes.fromhex((locked.command.folder / "files" / "login-secret").read_text())
    now = time.time()
    made = {after: cookie_of(known, *row_of(locked, "long"), now + after) for after in (0, 30 * 365 * 86_400, -LASTS_S)}
    assert {after: status(locked, cookie) for after, cookie in made.items()} == dict(
        zip(made, (200, 401, 401), strict=True)
    )


def test_a_revoked_key_takes_its_logins_along(locked: Server) -> None:
    own = login(locked, key(locked, "gone")).partition(";")[0].partition("=")[2]
    assert status(locked, own) == 200
    assert locked.command("keys", "revoke", "gone").code == 0
    assert status(locked, own) == 401


def test_a_cookie_keeps_to_tls_where_the_browser_came_by_it(locked: Server) -> None:
    secret = key(locked, "tls")
    plain = login(locked, secret).lower()
    assert "httponly" in plain
    assert "samesite=strict" in plain
    assert "secure" not in plain
    host = f"127.0.0.1:{locked.port}"
    assert "secure" in login(locked, secret, X_Forwarded_Proto="https").lower()
    assert "secure" in login(locked, secret, X_Forwarded_Proto="https, http").lower()
    assert "secure" in login(locked, secret, Host=host, Origin=f"https://{host}").lower()
    assert "secure" not in login(locked, secret, Host=host, Origin=f"http://{host}", X_Forwarded_Proto="http").lower()


def test_what_is_made_is_for_its_user_alone_whatever_the_umask(locked: Server) -> None:
    client = locked.client(key(locked, "modes"))
    client.files.create(file=("a.jsonl", b'{"custom_id": "a"}\n'), purpose="batch")
    folder = locked.command.folder
    open_to_others = [
        str(path.relative_to(folder))
        for place in ("data", "files")
        for path in (folder / place, *(folder / place).rglob("*"))
        # Parts and uploads lie in folders that only their user enters.
        if path.stat().st_mode & 0o077 and (path.is_dir() or path.parent.stat().st_mode & 0o077)
    ]
    assert open_to_others == []
    database = {path.name: path.stat().st_mode & 0o777 for path in (folder / "data").iterdir()}
    assert set(database.values()) == {0o600}
    assert len(database) == 3


def test_health_names_models_only_to_who_may_look(locked: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(sqlite3.connect(locked.command.folder / "data" / "jobs.sqlite")) as db:
        db.execute(
            "INSERT INTO workers (id, host, pid, state, models, device_asked, model, started_at, heartbeat_at) VALUES "
            "('w', 'h', 1, 'idle', '[\"secret-model\"]', 'cpu', 'secret-model', 0, "
            "(julianday('now') - 2440587.5) * 86400.0)"
        )
        db.commit()
    secret = key(locked, "looker", "--scope", "read")

    def named(**headers: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/health", headers=headers)
            body = connection.getresponse().read()
        assert b'"model_loaded":true' in body.replace(b" ", b"")
        return b"secret-model" in body

    assert not named()
    assert not named(Authorization="Bearer wrong")
    assert named(Authorization=f"Bearer {secret}")


@pytest.mark.parametrize("host", ["testserver", "[::1].evil.example", "localhost.evil.example", "[::1", "127.0.0.1:8x"])
def test_other_names_are_no_names_of_this_machine(served: Server, host: str) -> None:
    assert refused(served, "/v1/models", Host=host)[1]["code"] == "wrong_host"


def test_a_request_names_one_host(served: Server) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as wire:
        wire.sendall(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 400 ")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert ask(served, "GET", "/v1/models", Host=host).status == 200


def test_looks_at_pages_are_counted_too(clock: Clock) -> None:
    limits = KeyLimits(Settings(api_requests_per_s=0.5), clock)
    one = Principal("k", frozenset({"read"}), {})
    for _ in range(int(2 * PAGE_CALLS_PER_S)):
        limits.count(one, looks=True)
    with pytest.raises(ApiError, match="Rate limit"):
        limits.count(one, looks=True)
    # What a page asks for by itself takes nothing from the key's own calls.
    limits.count(one)
    for _ in range(40):
        clock.advance(0.5)
        limits.count(one, looks=True)


def test_a_key_waits_for_as_many_answers_as_it_may_and_no_more() -> None:
    limits = KeyLimits(Settings(api_concurrent=3))
    one, other = (Principal(name, frozenset({"submit"}), {}) for name in ("k", "l"))
    too_many = pytest.raises(ApiError, match="3 are allowed")
    with limits.running(one, 2), limits.running(one), limits.running(other, 3), too_many, limits.running(one):
        pytest.fail("a fourth answer")
    with limits.running(one, 3), pytest.raises(ApiError) as caught, limits.running(one, 4):
        pytest.fail("more than it may ever wait for")
    assert caught.value.status == 400


@pytest.fixture
def narrow(tmp_path: Path, redis_url: str) -> Iterator[Server]:
    """A server whose process may have few descriptors."""
    starter = starter_of(tmp_path, f"sqlite:///{tmp_path / 'jobs.sqlite'}", redis_url)
    port = free_port()
    with (tmp_path / "narrow.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"ulimit -n {DESCRIPTORS}; exec {Command.path()} api --port {port}"],
            cwd=tmp_path, env=starter.command._env, stdout=log, stderr=log, text=True,
        )  # fmt: skip
    server = Server(starter.command, port, process)

    def answers() -> bool:
        assert process.poll() is None, log_of(tmp_path)
        try:
            return bool(server.get("/healthz"))
        except OSError:
            return False

    try:
        wait_until(answers, "the server answers")
        yield server
    finally:
        end_all([process])


def test_idle_connections_of_three_addresses_keep_nobody_else_out(narrow: Server) -> None:
    with contextlib.ExitStack() as held:
        for number in range(300):
            wire = held.enter_context(socket.socket())
            wire.settimeout(10)
            wire.bind((f"127.0.0.{3 + number % 3}", 0))
            with contextlib.suppress(ConnectionError):
                wire.connect(("127.0.0.1", narrow.port))
                wire.sendall(b"G")
        for _ in range(5):
            began = time.monotonic()
            other = held.enter_context(socket.create_connection(("127.0.0.1", narrow.port), 10, ("127.0.0.2", 0)))
            other.sendall(b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert time.monotonic() - began < 2
    assert "Too many open files" not in log_of(narrow.command.folder)


def test_a_folder_that_is_not_the_servers_own_is_one_clear_error(command: Command) -> None:
    photo = command.folder / "data" / "photos" / "cat.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"precious")
    command.environment["JOBS_FILES_DIR"] = str(command.folder / "data")
    done = command("api", "--port", str(free_port()))
    assert done.code == 2
    assert "holds photos, which is not the API's" in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert photo.read_bytes() == b"precious"
