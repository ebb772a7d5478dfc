"""Keys, owners, limits, and clients that mean no good."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.conftest import ECHO, SLOW, Server, Starter, batch_lines, end_all, finished, starter_of
from tests.api.test_jobs import call, refused
from tests.conftest import wait_until

TASK = """
task: t
prompt: {user: "{{ input.q }}"}
expected: {a: a}
scores: [{exact: a}]
"""


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Server]:
    """A server that asks for keys."""
    folder = tmp_path_factory.mktemp("locked")
    starter = starter_of(folder, f"sqlite:///{folder / 'jobs.sqlite'}", redis_server)
    try:
        starter.worker(ECHO)
        yield starter.server("--require-key", JOBS_API_MAX_FILE_BYTES="100000")
    finally:
        end_all(starter.started)


def key(server: Server, name: str, *options: str) -> str:
    return str(json.loads(server.command("keys", "create", "--name", name, "--json", *options).out)["key"])


def text_of(server: Server, path: str, headers: dict[str, str]) -> str:
    asked = urllib.request.Request(server.url + path, headers=headers)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return str(answer.read().decode())


def test_without_a_key_nothing_is_told(locked: Server) -> None:
    for path in ("/v1/models", "/v1/jobs", "/v1/files", "/metrics", "/v1/system/status"):
        assert refused(locked, path)[0] == 401
    with pytest.raises(openai.AuthenticationError) as caught:
        locked.client("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert locked.get("/healthz") == {"status": "ok"}


def test_a_key_is_shown_once_and_stored_as_a_hash(locked: Server) -> None:
    secret = key(locked, "once")
    assert secret not in locked.command("keys", "list", "--json").out
    database = (locked.command.folder / "jobs.sqlite").read_bytes()
    assert secret.encode() not in database
    assert len(list(locked.client(secret).models.list())) == 1


def test_a_revoked_key_is_refused(locked: Server) -> None:
    client = locked.client(key(locked, "short"))
    client.models.list()
    assert locked.command("keys", "revoke", "short").code == 0
    time.sleep(2.5)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_revoked_key_loses_its_open_streams(start: Starter) -> None:
    start.worker(SLOW, slots=4)
    server = start.server("--require-key")
    secret = key(server, "stream", "--scope", "submit")
    body = {"model": SLOW, "lines": ["word " * 2_000]}
    job = call(server, "/v1/jobs", body, Authorization=f"Bearer {secret}")
    asked = urllib.request.Request(f"{server.url}/v1/jobs/{job['id']}/events")
    asked.add_header("Authorization", f"Bearer {secret}")
    message: list[Any] = [{"role": "user", "content": "word " * 2_000}]
    chat = server.client(secret).chat.completions.create(model=SLOW, messages=message, max_tokens=2_000, stream=True)
    with urllib.request.urlopen(asked, timeout=30) as followed:
        next(iter(chat))
        assert server.command("keys", "revoke", "stream").code == 0
        revoked_at = time.monotonic()
        with pytest.raises(openai.APIError, match="Incorrect API key"):
            list(chat)
        last = followed.read().decode().rstrip().splitlines()[-1]
        assert "invalid_api_key" in last
    assert time.monotonic() - revoked_at < 8


def test_scopes_are_kept(locked: Server) -> None:
    client = locked.client(key(locked, "reader", "--scope", "read"))
    client.models.list()
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.files.create(file=("a.jsonl", batch_lines(1)), purpose="batch")
    assert caught.value.code == "missing_scope"


def test_no_other_key_sees_that_an_object_exists(locked: Server) -> None:
    mine, theirs = locked.client(key(locked, "mine")), locked.client(key(locked, "theirs"))
    boss = locked.client(key(locked, "boss", "--scope", "admin"))
    file = mine.files.create(file=("a.jsonl", batch_lines(2)), purpose="batch")
    batch = mine.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    done = finished(mine, batch.id)
    for attempt in (
        lambda: theirs.files.retrieve(file.id), lambda: theirs.files.content(done.output_file_id),
        lambda: theirs.files.delete(file.id), lambda: theirs.batches.retrieve(batch.id),
        lambda: theirs.batches.cancel(batch.id), lambda: theirs.get(f"/jobs/{done.job_id}", cast_to=object),
        lambda: theirs.get(f"/jobs/{done.job_id}/results", cast_to=object),
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError):
            attempt()  # type: ignore[no-untyped-call]
    assert list(theirs.files.list()) == []
    assert list(theirs.batches.list()) == []
    # Their batch of my file finds no such file.
    stolen = theirs.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert finished(theirs, stolen.id).errors.data[0].param == "file_id"
    assert boss.batches.retrieve(batch.id).id == batch.id


def test_what_runs_for_another_key_has_no_name(start: Starter) -> None:
    start.worker(SLOW)
    server = start.server("--require-key")
    mine, theirs = [{"Authorization": f"Bearer {key(server, name)}"} for name in ("mine", "theirs")]
    lines = [{"prompt": f"{row} " * 400, "max_tokens": 400} for row in range(4)]
    job = call(server, "/v1/jobs", {"model": SLOW, "name": "my secret", "lines": lines}, **mine)
    wait_until(lambda: "my secret" in text_of(server, "/pages/workers", mine), "the worker shows the job")
    seen = [text_of(server, path, theirs) for path in ("/", "/pages/workers", "/v1/system/status", "/metrics")]
    assert not [each for each in seen if "my secret" in each or job["id"] in each]
    assert call(server, "/v1/system/status", **mine)["jobs"] == {"running": 1}
    assert call(server, "/v1/system/status", **theirs)["jobs"] == {}
    call(server, f"/v1/jobs/{job['id']}/cancel", {}, **mine)


def test_no_key_learns_whether_another_one_asked_the_same(start: Starter) -> None:
    """Neither by a chat nor by a job: nothing of it is cached or copied for the other one."""
    start.worker("demo")
    server = start.server("--require-key")
    mine, theirs = key(server, "mine"), key(server, "theirs")
    chat = [{"role": "system", "content": "You are careful and helpful. " * 8}, {"role": "user", "content": "a secret"}]
    lines = [{"id": "a", "messages": chat, "max_tokens": 4}]

    def cached(who: str) -> int:
        with server.client(who) as client:
            made = client.chat.completions.create(model="demo", messages=chat, max_tokens=4, temperature=0)  # type: ignore[arg-type]
        return int(made.usage.prompt_tokens_details.cached_tokens)  # type: ignore[union-attr, arg-type]

    def result(who: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {who}"}
        job = call(server, "/v1/jobs", {"model": "demo", "lines": lines}, **headers)["id"]
        wait_until(lambda: call(server, f"/v1/jobs/{job}", **headers)["state"] == "completed", "the job ends")
        return dict(json.loads(call(server, f"/v1/jobs/{job}/results", **headers).splitlines()[0]))

    first = result(mine)
    cached(mine)
    assert cached(theirs) == 0
    other = result(theirs)
    assert (other["cached_tokens"], other.get("deduplicated"), other["latency_s"] is None) == (0, None, False)
    assert other["text"] == first["text"]


def test_scores_of_another_key_are_no_metrics(locked: Server) -> None:
    mine, theirs = [{"Authorization": f"Bearer {key(locked, name)}"} for name in ("scored", "curious")]
    body = {"model": ECHO, "name": "my-evaluation", "task": TASK, "lines": [{"q": "a", "a": "a"}]}
    job = call(locked, "/v1/jobs", body, **mine)
    ended = ("completed", "failed")
    wait_until(lambda: call(locked, f"/v1/jobs/{job['id']}", **mine)["state"] in ended, "the job ends")
    assert locked.command("score", job["id"]).code == 0
    assert 'task="my-evaluation"' in text_of(locked, "/metrics", mine)
    assert "my-evaluation" not in text_of(locked, "/metrics", theirs)


def test_limits_answer_429_with_a_time(locked: Server) -> None:
    client = locked.client(key(locked, "slow", "--requests-per-s", "1"))
    with pytest.raises(openai.RateLimitError) as caught:
        assert [client.models.list() for _ in range(10)] == []
    assert int(caught.value.response.headers["retry-after"]) >= 1
    small = locked.client(key(locked, "small", "--stored-bytes", "600"))
    small.files.create(file=("a.jsonl", batch_lines(1)), purpose="batch")
    with pytest.raises(openai.RateLimitError):
        small.files.create(file=("a.jsonl", batch_lines(20)), purpose="batch")
    # One that does not say how long it is, too.
    connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=10)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    sent = {"Authorization": f"Bearer {small.api_key}", "Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/v1/files", iter([head, batch_lines(20)]), sent, encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["retry-after"]) == (429, "60")
    connection.close()
    few = key(locked, "few", "--queued-requests", "5")
    body = {"model": ECHO, "lines": [f"say {row}" for row in range(50)]}
    assert refused(locked, "/v1/jobs", body, Authorization=f"Bearer {few}")[0] == 429


def test_prompts_of_one_call_and_forms_of_the_page_count(locked: Server) -> None:
    one = locked.client(key(locked, "one", "--concurrent", "2"))
    assert len(one.completions.create(model=ECHO, prompt=["a", "b"]).choices) == 2
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            one.completions.create(model=ECHO, prompt=["a", "b", "c"], stream=stream)
        assert caught.value.param == "prompt"
    slow = {"Authorization": f"Bearer {key(locked, 'forms', '--requests-per-s', '1')}"}
    statuses = {refused(locked, "/pages/jobs/unknown/pause", {}, **slow)[0] for _ in range(10)}
    assert statuses == {404, 429}


def test_a_file_beyond_the_limit_leaves_nothing(locked: Server) -> None:
    client = locked.client(key(locked, "large"))
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a.jsonl", batch_lines(2000)), purpose="batch")
    assert caught.value.status_code == 413
    assert list(client.files.list()) == []
    assert list((locked.command.folder / "files" / "parts").iterdir()) == []


def test_a_name_never_becomes_a_path(locked: Server) -> None:
    client = locked.client(key(locked, "path"))
    file = client.files.create(file=("../../../tmp/evil.jsonl", batch_lines(1)), purpose="batch")
    assert file.filename == "evil.jsonl"
    stored = {path.name for path in (locked.command.folder / "files").rglob("*") if path.is_file()}
    assert file.id in stored
    assert "evil.jsonl" not in stored


def test_bombs_are_refused(locked: Server) -> None:
    secret = key(locked, "bomb")
    body = gzip.compress(b"x" * 1000)
    request = urllib.request.Request(
        f"{locked.url}/v1/chat/completions", body,
        {"Content-Encoding": "gzip", "Content-Type": "application/json", "Authorization": f"Bearer {secret}"},
    )  # fmt: skip
    with pytest.raises(urllib.request.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 415
    caught.value.close()
    client = locked.client(secret)
    bomb = gzip.compress(b'{"prompt": "' + b"x" * 80_000_000 + b'"}')
    file = client.files.create(file=("b.jsonl.gz", bomb), purpose="user_data")
    code, problem = refused(locked, "/v1/jobs", {"model": ECHO, "file_id": file.id}, Authorization=f"Bearer {secret}")
    assert code == 400
    assert "bytes inside" in problem["message"]


def test_a_server_without_keys_is_for_this_machine_and_its_own_pages(served: Server) -> None:
    assert refused(served, "/v1/models", Host="evil.example")[1]["code"] == "wrong_host"
    assert refused(served, "/v1/jobs", {}, Origin="https://evil.example")[1]["code"] == "cross_origin"
    with urllib.request.urlopen(f"{served.url}/v1/models", timeout=10) as answer:
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/files?limit=--5", {}, 400), ("/v1/jobs?limit=%C2%B2", {}, 400), ("/v1/batches?limit=1e1", {}, 400),
        ("/v1/files/%00", {}, 400), ("/v1/jobs?after=%00", {}, 400), ("/pages/jobs/a%00", {}, 400),
        ("/v1/jobs", {"Origin": "http://["}, 403),
        ("/v1/jobs", {"Cookie": "promptmill=a.\u00b2.c"}, 401),
        ("/v1/jobs", {"Cookie": 'promptmill="a\\000.99999999999.c"'}, 401),
    ],
)  # fmt: skip
def test_what_no_program_would_send_is_no_bug(locked: Server, path: str, headers: dict[str, str], status: int) -> None:
    if status == 400:
        headers = {"Authorization": f"Bearer {key(locked, 'odd')}"}
    assert refused(locked, path, **headers)[0] == status


def test_numbers_of_forms_are_ascii(served: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().files.create(
            file=("a.jsonl", batch_lines(1)), purpose="batch",
            extra_body={"expires_after": {"anchor": "created_at", "seconds": "\u00b2"}},
        )  # fmt: skip
    assert caught.value.param == "expires_after.seconds"


def test_a_nul_is_refused_over_postgresql_too(tmp_path: Path, migrated_postgres_url: str, redis_url: str) -> None:
    starter = starter_of(tmp_path, migrated_postgres_url, redis_url)
    try:
        server = starter.server()
        for path in ("/v1/files/%00", "/v1/jobs/%00", "/v1/batches?after=a%00", "/v1/files?purpose=%00", "/jobs/%00"):
            assert refused(server, path)[0] == 400
        lines: list[Any] = [{"prompt": "a", "id": "x\0y"}]
        assert refused(server, "/v1/jobs", {"model": "demo", "lines": lines})[0] == 400
        # Kept as errors, such lines lose only what cannot be stored.
        lines = [*lines, {"prompt": "ok", "id": "half \udc00"}, "fine"]
        job = call(server, "/v1/jobs", {"model": "demo", "lines": lines[::2], "skip_invalid": True})
        assert (job["rows"], job["errors"]) == (2, 1)
        texts = [*map(json.dumps, lines[:2]), r'{"a\u0000": 1, "a\u0000": 2}', '{"prompt": "fine"}']
        (tmp_path / "bad.jsonl").write_text("\n".join(texts))
        done = starter.command("submit", "bad.jsonl", "--model", "demo", "--skip-invalid", "--json")
        assert done.code == 0, done.err
        failed = starter.command("results", "@last", "--failed").out.splitlines()
        assert [json.loads(line)["id"] for line in failed] == ["row-0", "row-1", "row-2"]
    finally:
        end_all(starter.started)


@pytest.mark.parametrize(
    ("line", "end"),
    [(b"X-Long: " + b"a" * 1000 + b"\r\n", b""), (b"X" * 1000, b""), (b"X-Long: " + b"a" * 1000 + b"\r\n", b"\r\n")],
    ids=["many", "one", "whole"],
)
@pytest.mark.parametrize("first", [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", b"GET /"])
def test_large_heads_are_cut_off(served: Server, first: bytes, line: bytes, end: bytes) -> None:
    began, answer = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as wire:
        try:
            for piece in (first, *[line] * 100, end):
                wire.sendall(piece)
            answer = wire.recv(1000)
        except ConnectionError:
            pass
    # Nothing at all is a closed connection; a head that does not end is cut off later than this.
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
    assert time.monotonic() - began < 10


def test_an_upload_that_is_cut_off_leaves_nothing(served: Server) -> None:
    before = len(list(served.client().files.list()))
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", "100000")
    connection.endheaders(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"a": 1}')
    connection.close()
    time.sleep(0.5)
    assert len(list(served.client().files.list())) == before
    assert list((served.command.folder / "files" / "parts").iterdir()) == []
    assert call(served, "/healthz") == {"status": "ok"}


def test_no_prompt_is_in_any_log(served: Server, client: openai.OpenAI) -> None:
    secret = "unrepeatable-words-of-a-client"
    client.chat.completions.create(model=ECHO, messages=[{"role": "user", "content": secret}])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=ECHO, messages=[{"role": "user", "content": secret}], temperature=9)
    logs = "".join(path.read_text() for path in served.command.folder.glob("*.log"))
    assert "POST /v1/chat/completions 200" in logs
    assert secret not in logs
