"""Files and batches, by the official client against a real server with a real worker."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from promptmill.api.batches import batches
from promptmill.database.engine import connect, writing
from promptmill.database.tables import files, jobs
from tests.api.conftest import ECHO, SLOW, Server, Starter, answered, batch_lines, finished
from tests.conftest import wait_until


def upload(client: openai.OpenAI, content: bytes, name: str = "batch.jsonl", **options: Any) -> Any:
    return client.files.create(file=(name, io.BytesIO(content)), purpose="batch", **options)


def run_batch(client: openai.OpenAI, content: bytes, **options: Any) -> Any:
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | options
    batch = client.batches.create(input_file_id=upload(client, content).id, **asked)
    return finished(client, batch.id)


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).iter_lines()]


def test_a_file_comes_back_as_it_was_sent(client: openai.OpenAI) -> None:
    content = batch_lines(3)
    file = upload(client, content, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.object, file.filename, file.bytes, file.purpose) == ("file", "batch.jsonl", len(content), "batch")
    assert file.status == "processed"
    assert file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_lists_are_paged_to_their_end(client: openai.OpenAI) -> None:
    made = [upload(client, batch_lines(1)).id for _ in range(5)]
    listed = [each.id for each in client.files.list(limit=2, order="asc")]
    assert [each for each in listed if each in made] == made
    newest = [each.id for each in client.files.list(limit=2)]
    assert newest[:5] == made[::-1]
    assert client.files.list(purpose="batch_output", limit=1, after=made[0]).data == []


def test_a_file_that_expired_is_in_no_list(client: openai.OpenAI, served: Server) -> None:
    file = upload(client, batch_lines(1), expires_after={"anchor": "created_at", "seconds": 3600})
    db = connect(served.command.environment["JOBS_DATABASE_URL"])
    with writing(db) as connection:
        connection.execute(sa.update(files).where(files.c.id == file.id).values(expires_at=1.0))
    db.dispose()
    assert file.id not in [each.id for each in client.files.list()]
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_a_batch_runs_from_upload_to_content(client: openai.OpenAI) -> None:
    batch = run_batch(client, batch_lines(20), metadata={"run": "nightly"}, extra_body={"priority": 2})
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
    assert batch.metadata == {"run": "nightly"}
    assert batch.error_file_id is None
    assert batch.errors is None
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.expires_at == batch.created_at + 86_400
    lines = lines_of(client, batch.output_file_id)
    assert {line["custom_id"] for line in lines} == {f"r-{row}" for row in range(20)}
    first = next(line for line in lines if line["custom_id"] == "r-7")
    assert set(first) == {"id", "custom_id", "response", "error"}
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "say 7 again"
    assert body["object"] == "chat.completion"
    assert body["model"] == ECHO
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


def test_prompts_of_a_real_model_are_measured_before_it_runs(start: Starter, tmp_path: Path) -> None:
    from tests.unit.tiny_models import write_tiny_gguf

    model = write_tiny_gguf(tmp_path / "tiny.gguf", context=256)
    start.worker(str(model))
    server = start.server()
    client = server.client()
    lines = [json.loads(each) for each in batch_lines(3, "tiny").splitlines()]
    lines[1]["body"]["messages"][0]["content"] = "free phone " * 300
    lines[2]["body"]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("b.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    ended = finished(client, batch.id)
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("completed", 1, 2)
    found = {each["custom_id"]: each["response"]["body"]["error"] for each in lines_of(client, ended.error_file_id)}
    assert found["r-1"]["code"] == "context_length_exceeded"
    assert "knows no tools" in found["r-2"]["message"]
    # No worker was asked.
    asked = urllib.request.urlopen(f"{server.url}/v1/jobs/{ended.job_id}/results?failed=true", timeout=30)
    with asked as answer:
        assert [json.loads(each)["worker"] for each in answer.read().splitlines()] == [None, None]


def test_bad_rows_end_in_the_error_file_and_the_batch_completes(client: openai.OpenAI) -> None:
    good, bad = batch_lines(2), batch_lines(3).splitlines()[2]
    record = json.loads(bad)
    record["body"]["temperature"] = 9
    batch = run_batch(client, good + json.dumps(record).encode())
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 1)
    assert len(lines_of(client, batch.output_file_id)) == 2
    (line,) = lines_of(client, batch.error_file_id)
    assert line["custom_id"] == "r-2"
    assert line["error"] is None
    assert line["response"]["status_code"] == 400
    problem = line["response"]["body"]["error"]
    assert "temperature" in problem["message"]
    # As the same request alone would be told.
    assert (problem["param"], problem["code"]) == ("temperature", "invalid_value")


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 101}, {"temperature": "hot"}, {"temperature": 9}, {"messages": [IMAGE]}, {"messages": []},
        {"messages": [{"role": "user", "content": "x", "cache": 1}]},
    ],
)  # fmt: skip
def test_a_line_is_told_what_the_same_request_alone_is_told(client: openai.OpenAI, changes: dict[str, Any]) -> None:
    record = json.loads(batch_lines(1))
    record["body"] |= changes
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**record["body"])
    batch = run_batch(client, json.dumps(record).encode())
    (line,) = lines_of(client, batch.error_file_id)
    problem = line["response"]["body"]["error"]
    assert (problem["param"], problem["code"]) == (caught.value.param, caught.value.code)
    assert problem["message"].rstrip(".").lower() in caught.value.message.lower()


def test_a_text_that_is_too_long_is_called_as_its_endpoint_calls_it(client: openai.OpenAI) -> None:
    for url, name in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        line = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": ECHO, name: "word " * 140_000}}
        batch = run_batch(client, json.dumps(line).encode(), endpoint=url)
        (found,) = lines_of(client, batch.error_file_id)
        problem = found["response"]["body"]["error"]
        assert (problem["param"], problem["code"]) == (name, "context_length_exceeded")


def test_a_long_task_holds_nobody_else_up(served: Server) -> None:
    named = ", ".join(f"a{number}: b{number}" for number in range(12_000))
    body = {"input_file_id": "x", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    task = f"task: t\nprompt: {{user: x}}\nexpected: {{{named}}}\n"
    data = json.dumps(body | {"task": task}).encode()
    asked = urllib.request.Request(f"{served.url}/v1/batches", data, {"Content-Type": "application/json"})
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(lambda: urllib.request.urlopen(asked, timeout=60).close())
        began, longest = time.monotonic(), 0.0
        while not made.done():
            asked_at = time.monotonic()
            served.get("/healthz")
            longest = max(longest, time.monotonic() - asked_at)
        made.result()
    assert longest < (time.monotonic() - began) / 2


def test_a_line_that_is_nested_without_end_is_an_error_of_its_own(client: openai.OpenAI) -> None:
    line = json.loads(batch_lines(1)) | {"custom_id": "deep"}
    line["body"]["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": "HERE"}}
    deep = '{"properties": {"a": ' * 480 + "{}" + "}}" * 480
    batch = run_batch(client, batch_lines(1) + json.dumps(line).replace('"HERE"', deep).encode())
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
    (line,) = lines_of(client, batch.error_file_id)
    assert line["response"]["status_code"] == 400


def test_nothing_answered_leaves_no_output_file(client: openai.OpenAI) -> None:
    record = json.loads(batch_lines(1))
    record["body"]["nonsense"] = 1
    batch = run_batch(client, json.dumps(record).encode())
    assert (batch.status, batch.output_file_id, batch.request_counts.failed) == ("completed", None, 1)


LINE = json.loads(batch_lines(1))


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        ("{no json", "invalid_json_line", None),
        (json.dumps([1]), "invalid_request", None),
        (json.dumps(LINE | {"method": None}), "missing_required_parameter", "method"),
        (json.dumps(LINE | {"custom_id": None}), "missing_required_parameter", "custom_id"),
        (json.dumps(LINE | {"custom_id": ""}), "invalid_value", "custom_id"),
        (json.dumps(LINE | {"custom_id": "twice"})[:-1] + ', "method": "POST"}', "invalid_json_line", None),
        (json.dumps(LINE).replace('"max_tokens": 16', '"seed": 1, "seed": 2'), "invalid_json_line", None),
        (json.dumps(LINE).replace('"max_tokens": 16', '"temperature": 1e999'), "invalid_json_line", None),
        (json.dumps(LINE | {"url": "/v1/completions"}), "invalid_url", "url"),
        (json.dumps(LINE | {"body": LINE["body"] | {"stream": True}}), "streaming_unsupported", "body.stream"),
        (json.dumps(LINE | {"body": LINE["body"] | {"model": None}}), "invalid_request", "body.model"),
        (json.dumps(LINE | {"body": {"model": ECHO}}), "invalid_request", "body.messages"),
        (json.dumps(LINE | {"body": LINE["body"] | {"model": "other"}}), "model_mismatch", "body.model"),
        (json.dumps(LINE), "duplicate_custom_id", "custom_id"),
    ],
)  # fmt: skip
def test_every_bad_line_is_named_and_nothing_runs(
    client: openai.OpenAI, line: str, code: str, param: str | None
) -> None:
    batch = run_batch(client, batch_lines(1) + line.encode() + b"\n\n" + line.encode())
    assert batch.status == "failed"
    assert batch.failed_at >= batch.created_at
    assert [(each.code, each.line, each.param) for each in batch.errors.data] == [(code, 2, param), (code, 4, param)]
    assert (batch.output_file_id, batch.error_file_id, batch.request_counts.total) == (None, None, 0)


def test_an_unknown_model_or_file_fails_the_batch_and_not_the_call(client: openai.OpenAI) -> None:
    batch = run_batch(client, batch_lines(1, "gpt-none"))
    assert (batch.status, batch.errors.data[0].code) == ("failed", "model_not_found")
    batch = client.batches.create(input_file_id="file-none", endpoint="/v1/chat/completions", completion_window="24h")
    batch = finished(client, batch.id)
    assert batch.errors.data[0].code == "invalid_request"
    assert batch.errors.data[0].param == "file_id"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input_file_id": openai.omit}, "missing_required_parameter", "input_file_id"),
        ({"endpoint": "/v1/x"}, "invalid_value", "endpoint"),
        ({"completion_window": "soon"}, "invalid_value", "completion_window"),
        ({"metadata": {"tags": ["a"]}}, "invalid_type", "metadata.tags"),
        ({"extra_body": {"nonsense": 1}}, "unknown_parameter", "nonsense"),
        ({"extra_body": {"task": "prompt: {"}}, "invalid_value", "task"),
        ({"extra_body": {"priority": 12}}, "invalid_value", "priority"),
        ({"extra_body": {"output_expires_after": {"anchor": "x"}}}, "invalid_value", "output_expires_after.anchor"),
    ],
)  # fmt: skip
def test_a_creation_that_makes_no_sense_is_refused(
    client: openai.OpenAI, changes: dict[str, Any], code: str, param: str
) -> None:
    asked = {"input_file_id": "file-x", "endpoint": "/v1/chat/completions", "completion_window": "24h"} | changes
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**asked)
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert caught.value.request_id is not None


def test_the_message_of_a_missing_parameter_is_the_real_one(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Missing required parameter: 'input_file_id'"):
        client.post("/batches", body={"endpoint": "/v1/chat/completions"}, cast_to=object)


@pytest.mark.parametrize(("name", "content"), [("b.txt", batch_lines(1)), ("b.jsonl", b"no json"), ("b.jsonl", b"")])
def test_a_file_of_another_format_is_refused(client: openai.OpenAI, name: str, content: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match=r"Invalid file format for Batch API. Must be .jsonl"):
        upload(client, content, name)


def test_a_purpose_that_does_not_exist_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("a.jsonl", b"{}"), purpose="vision")
    assert (caught.value.param, caught.value.code) == ("purpose", "invalid_value")


def test_batches_are_listed_newest_first_in_pages(client: openai.OpenAI) -> None:
    file = upload(client, batch_lines(1))
    made = [
        client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h").id
        for _ in range(5)
    ]
    listed = [each.id for each in client.batches.list(limit=2)]
    assert listed[:5] == made[::-1]
    assert len(listed) == len(set(listed))
    with pytest.raises(openai.BadRequestError):
        client.batches.list(limit=0)
    for each in made:
        finished(client, each)


def test_unknown_and_ended_batches_cannot_be_cancelled(client: openai.OpenAI, served: Server) -> None:
    with pytest.raises(openai.NotFoundError, match=r"No batch found with id 'batch_none'."):
        client.batches.cancel("batch_none")
    batch = run_batch(client, batch_lines(1))
    patient = served.client(max_retries=2)
    with pytest.raises(openai.ConflictError, match=r"Cannot cancel a batch with status 'completed'.") as caught:
        patient.batches.cancel(batch.id)
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_idempotency_key_makes_one_batch(client: openai.OpenAI) -> None:
    file = upload(client, batch_lines(1))
    asked: dict[str, Any] = {
        "input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h",
        "extra_body": {"idempotency_key": "once"},
    }  # fmt: skip
    first, second = client.batches.create(**asked), client.batches.create(**asked)
    assert first.id == second.id
    with pytest.raises(openai.ConflictError):
        client.batches.create(**asked, metadata={"a": "b"})
    with pytest.raises(openai.ConflictError):
        client.batches.create(**asked, output_expires_after={"anchor": "created_at", "seconds": 3600})
    finished(client, first.id)


def test_an_idempotency_key_makes_one_batch_of_calls_at_the_same_time(database: sa.Engine) -> None:
    parts: Any = SimpleNamespace(db=database)
    values = {
        "input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h", "metadata": None,
        "priority": 5, "task_text": None, "idempotency_key": "once", "api_key_id": None,
        "output_expires_after_s": None,
    }  # fmt: skip
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: batches._create(parts, values, 3600.0).id, range(24)))
    assert len(set(made)) == 1


def test_a_cancelled_batch_keeps_what_was_answered(start: Starter) -> None:
    start.worker(SLOW, slots=2)
    client = start.server().client()
    file = upload(client, batch_lines(300, SLOW))
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    wait_until(lambda: answered(client, batch.id) > 5, "some rows are answered", 60)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    ended = finished(client, batch.id)
    assert ended.status == "cancelled"
    assert ended.cancelling_at <= ended.cancelled_at
    done, rest = lines_of(client, ended.output_file_id), lines_of(client, ended.error_file_id)
    assert len(done) + len(rest) == 300
    assert rest[-1]["error"]["code"] == "batch_cancelled"
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_expires_and_a_killed_keeper_is_replaced(start: Starter) -> None:
    import psutil

    start.worker(SLOW, slots=1)
    server = start.server()
    client = server.client()
    file = upload(client, batch_lines(4000, SLOW))
    window: Any = "1m"
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=window)
    (keeper,) = [
        each for each in psutil.Process(server.process.pid).children() if "batches.worker" in " ".join(each.cmdline())
    ]
    keeper.kill()
    wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", "the batch runs", 100)
    # The end of its window, moved here.
    db = connect(server.command.environment["JOBS_DATABASE_URL"])
    with writing(db) as connection:
        connection.execute(sa.update(jobs).values(deadline_at=1.0))
    db.dispose()
    ended = finished(client, batch.id)
    assert ended.status == "expired"
    rest = lines_of(client, ended.error_file_id)
    done = lines_of(client, ended.output_file_id) if ended.output_file_id else []
    assert len(done) + len(rest) == 4000
    assert rest[-1]["error"]["code"] == "batch_expired"


def test_completions_and_embeddings_have_their_own_bodies(client: openai.OpenAI) -> None:
    for url, body in (("/v1/completions", {"prompt": "say it"}), ("/v1/embeddings", {"input": "a text"})):
        line = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": ECHO, **body}}
        batch = run_batch(client, json.dumps(line).encode(), endpoint=url)
        (answer,) = lines_of(client, batch.output_file_id)
        assert answer["response"]["body"]["object"] == {"/v1/completions": "text_completion"}.get(url, "list")


def test_models_are_those_of_live_workers(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (ECHO, "model")
    assert client.models.retrieve(ECHO).id == ECHO
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-none")
    assert caught.value.code == "model_not_found"


def test_health_tells_what_is_there(served: Server) -> None:
    assert served.get("/readyz") == {
        "status": "ok", "checks": {"database": "ok", "schema": "ok", "redis": "ok", "worker": "ok"},
    }  # fmt: skip
    assert served.get("/health")["model_loaded"] is True
