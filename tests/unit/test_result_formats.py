"""Results as files: what each format says of an answer and of an error."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from promptmill.api.interactive.pending_request import failure
from promptmill.cli.look.inspect import answer_parts
from promptmill.database.engine import connect, writing
from promptmill.database.tables import jobs, metadata, requests, results
from promptmill.queue.interactive_wire import LiveRequest
from promptmill.store.result_lines import CSV_COLUMNS, FORMATS, write

JOB = "01JOB"

#: A text that every format must carry unharmed.
TEXT = 'Yes, "это" is\r\na line 🙂\u2028'


@pytest.fixture
def db() -> Iterator[sa.Engine]:
    engine = connect("sqlite://")
    metadata.create_all(engine)
    with writing(engine) as connection:
        connection.execute(
            sa.insert(jobs).values(
                id=JOB, state="completed", mode="queue", dataset_name="d", dataset_sha256="0", dataset_format="f",
                model="echo", sampling="{}", priority=5, rows=0, env="{}", submitted_at=0.0,
            )
        )  # fmt: skip
    yield engine
    engine.dispose()


def add(db: sa.Engine, row: int, body: dict[str, Any] | None = None, **values: Any) -> None:
    """A request and its result: an answer, unless ``error_class`` is given."""
    stored = None if body is None else json.dumps(body)
    answer = {
        "state": "ok", "text": TEXT, "finish_reason": "stop", "prompt_tokens": 7, "cached_tokens": 3,
        "output_tokens": 5, "enqueued_at": 99.0, "admitted_at": 100.0, "first_token_at": 100.25,
        "finished_at": 101.5, "worker_id": "w1",
    }  # fmt: skip
    outcome = {"state": "error"} if "error_class" in values else answer
    with writing(db) as connection:
        connection.execute(sa.insert(requests).values(job_id=JOB, row=row, custom_id=f"q{row}", input=stored))
        connection.execute(
            sa.insert(results).values(job_id=JOB, row=row, committed_at=102.0, attempt=1, **(outcome | values))
        )


def written(db: sa.Engine, format_: str, failed_only: bool = False) -> tuple[int, str]:
    stream = io.StringIO(newline="")
    return write(db, JOB, "org/model:Q4", format_, stream, failed_only), stream.getvalue()


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


def openai_line(db: sa.Engine) -> dict[str, Any]:
    count, text = written(db, "openai")
    assert count == 1
    return json_lines(text)[0]


def test_jsonl_has_a_line_for_each_result_in_the_order_of_rows(db: sa.Engine) -> None:
    for row in (2, 0, 1):
        add(db, row, {"prompt": "p"})
    count, text = written(db, "jsonl")
    assert count == 3
    assert [line["id"] for line in json_lines(text)] == ["q0", "q1", "q2"]
    first = json_lines(text)[0]
    assert (first["text"], first["latency_s"], first["ttft_s"], first["queue_s"]) == (TEXT, 1.5, 0.25, 1.0)


def test_csv_has_a_column_for_what_a_row_of_the_job_asked_for(db: sa.Engine) -> None:
    add(db, 0, reasoning="so", reasoning_tokens=1, choices='[{"text": "b"}]', deduplicated=True)
    add(db, 1, embedding="[0.5, 1.0]")

    first, second = csv.DictReader(io.StringIO(written(db, "csv")[1], newline=""))

    assert tuple(first) == (*CSV_COLUMNS, "reasoning", "reasoning_tokens", "choices", "embedding", "deduplicated")
    assert (first["reasoning"], first["reasoning_tokens"], first["deduplicated"]) == ("so", "1", "true")
    assert json.loads(first["choices"]) == [{"text": "b"}]
    assert (second["choices"], json.loads(second["embedding"])) == ("", [0.5, 1.0])


def test_csv_carries_every_text_and_both_parts_of_an_error(db: sa.Engine) -> None:
    add(db, 0, {"prompt": "p"})
    add(db, 1, {"prompt": "p"}, error_class="timeout", error_message='over "1 s", ended')
    count, text = written(db, "csv")
    answer, error = csv.DictReader(io.StringIO(text, newline=""))
    assert count == 2
    assert tuple(answer) == CSV_COLUMNS
    assert (answer["text"], answer["error_class"]) == (TEXT, "")
    assert (error["text"], error["error_class"], error["error_message"]) == ("", "timeout", 'over "1 s", ended')


def test_an_answer_to_a_chat_is_a_chat_completion(db: sa.Engine) -> None:
    add(db, 0, {"messages": [{"role": "user", "content": "p"}]})
    line = openai_line(db)
    body = line["response"]["body"]
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("q0", None, 200)
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "org/model:Q4", 101)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip


def test_an_answer_to_a_raw_prompt_is_a_text_completion(db: sa.Engine) -> None:
    add(db, 0, {"prompt": "p", "raw": True})
    body = openai_line(db)["response"]["body"]
    assert body["object"] == "text_completion"
    assert (body["choices"][0]["text"], "message" in body["choices"][0]) == (TEXT, False)


@pytest.mark.parametrize(
    ("error_class", "status", "code", "kind"),
    [
        ("context_overflow", 400, "context_length_exceeded", "invalid_request_error"),
        ("invalid_request", 400, "invalid_request", "invalid_request_error"),
        ("tokenize", 400, "tokenize", "invalid_request_error"),
        ("model_not_found", 404, "model_not_found", "invalid_request_error"),
        ("engine_crash", 500, "engine_crash", "server_error"),
        ("worker_lost", 500, "worker_lost", "server_error"),
    ],
)
def test_an_error_is_the_status_that_a_server_would_give(
    db: sa.Engine, error_class: str, status: int, code: str, kind: str
) -> None:
    add(db, 0, error_class=error_class, error_message="why")
    response = openai_line(db)["response"]
    assert response["status_code"] == status
    param = "messages" if error_class == "context_overflow" else None
    assert response["body"]["error"] == {"message": "why", "type": kind, "param": param, "code": code}


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ("'temperature' must be a number from 0 to 2", "temperature", "invalid_value"),
        ("unsupported parameter 'body.foo'. Known: a, b.", "foo", "unsupported_parameter"),
        ("'tools' are not supported: the chat template of this model knows no tools", "tools", "unsupported_parameter"),
        ("the answer said 'temperature'", None, "invalid_request"),
    ],
)
def test_a_refused_line_names_its_field_as_the_same_request_alone_would(
    db: sa.Engine, message: str, param: str | None, code: str
) -> None:
    add(db, 0, error_class="invalid_request", error_message=message)
    problem = openai_line(db)["response"]["body"]["error"]
    assert (problem["param"], problem["code"]) == (param, code)


def test_a_grammar_that_could_not_be_followed_is_no_fault_of_the_client(db: sa.Engine) -> None:
    add(db, 0, {"prompt": "p"}, error_class="grammar", error_message="the grammar came to a dead end")
    response = openai_line(db)["response"]
    assert (response["status_code"], response["body"]["error"]["type"]) == (500, "server_error")
    request = LiveRequest("1", "server", "echo", {}, [("user", "Hi")])
    told = failure(request, "grammar", "the grammar came to a dead end")
    assert (told.status, told.code, told.message) == (500, "grammar", "the grammar came to a dead end")


@pytest.mark.parametrize(("error_class", "code"), [("timeout", "request_timeout"), ("cancelled", "batch_cancelled")])
def test_a_request_that_was_never_answered_has_no_response(db: sa.Engine, error_class: str, code: str) -> None:
    add(db, 0, {"prompt": "p"}, error_class=error_class, error_message="why")
    line = openai_line(db)
    assert (line["response"], line["error"]) == (None, {"code": code, "message": "why"})


@pytest.mark.parametrize("format_", FORMATS)
def test_failed_rows_can_be_written_alone(db: sa.Engine, format_: str) -> None:
    add(db, 0, {"prompt": "p"})
    add(db, 1, error_class="grammar", error_message="why")
    count, text = written(db, format_, failed_only=True)
    assert count == 1
    assert "q1" in text
    assert "q0" not in text


@pytest.mark.parametrize("format_", FORMATS)
def test_a_job_without_results_is_an_empty_file_or_a_header(db: sa.Engine, format_: str) -> None:
    count, text = written(db, format_)
    assert count == 0
    assert text == (",".join(CSV_COLUMNS) + "\r\n" if format_ == "csv" else "")


def test_what_only_some_requests_ask_for_is_in_their_responses(db: sa.Engine) -> None:
    tokens = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -0.5}]}]
    further = [{"text": "b", "finish_reason": "length"}]
    add(db, 0, {"prompt": "p"}, logprobs=json.dumps(tokens), choices=json.dumps(further), reasoning="hm")
    add(db, 1, {"prompt": "p", "raw": True}, logprobs=json.dumps(tokens))
    add(db, 2, {"prompt": "p", "raw": True}, embedding="[0.6, 0.8]")
    add(db, 3, {"prompt": "p"}, deduplicated=True, admitted_at=None, first_token_at=None, finished_at=None)

    chat, text, vector, copy = [line["response"]["body"] for line in json_lines(written(db, "openai")[1])]

    assert chat["choices"][0]["logprobs"]["content"] == tokens
    assert chat["choices"][0]["message"]["reasoning_content"] == "hm"
    assert chat["choices"][1]["message"]["content"] == "b"
    assert text["choices"][0]["logprobs"] == {
        "tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}], "text_offset": [0],
    }  # fmt: skip
    assert vector["data"] == [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
    assert copy["created"] == 102


def test_show_has_all_that_a_row_was_answered_with() -> None:
    line = {"text": "yes", "reasoning": "so", "reasoning_tokens": 1, "choices": [{"text": "no", "reasoning": None}],
            "choice_probs": {"no": 0.25, "yes": 0.75}, "logprobs": [{"token": "yes", "logprob": -0.5}]}  # fmt: skip

    assert answer_parts(line) == [
        ("reasoning, 1 tokens", "so"), ("answer 1 of 2", "yes"), ("answer 2 of 2", "no"),
        ("choice probs", "0.7500  yes\n0.2500  no"), ("logprobs", "'yes' -0.500"),
    ]  # fmt: skip
    scored = [{"text": " a", "logprob": -1.5, "tokens": 2, "greedy": True}]
    assert answer_parts({"text": "", "continuations": scored}) == [
        ("continuations", "-1.5000 nats (2 tokens, what the model would say)   a")
    ]
    assert answer_parts({"text": "", "embedding": [0.5] * 9}) == [
        ("embedding", f"9 dimensions: {', '.join(['0.500000'] * 8)}, ...")
    ]
