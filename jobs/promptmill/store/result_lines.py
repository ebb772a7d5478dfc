"""Results as files: JSONL and CSV lines of our own, and the output lines of OpenAI's batch interface."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from promptmill.database.engine import reading
from promptmill.database.tables import jobs, results
from promptmill.store.catalog import EXTRAS, result_line, result_rows
from promptmill.store.spreadsheets import inert
from promptmill.tasks.openai import refusal_of
from promptmill.tasks.tools import Offer, ToolCall, read_calls, shown_calls

#: No parameters.
NOTHING: Mapping[str, Any] = MappingProxyType({})

FORMATS = ("jsonl", "csv", "openai")

#: Columns of every CSV: the keys of a result line, the error spread over two.
CSV_COLUMNS = (
    "row", "id", "state", "text", "finish_reason", "prompt_tokens", "cached_tokens", "output_tokens", "latency_s",
    "ttft_s", "queue_s", "attempt", "worker", "error_class", "error_message",
)  # fmt: skip

#: Columns that a CSV has after these where a row of the job has them. What is no text or number is JSON.
CSV_EXTRAS = ("reasoning", "reasoning_tokens", *EXTRAS, "deduplicated")

#: Our error classes as the HTTP statuses that a server would have answered with; others are 500.
HTTP_STATUS = {"context_overflow": 400, "invalid_request": 400, "tokenize": 400, "model_not_found": 404}

#: Classes of requests that were never answered at all: they have no response.
NEVER_EXECUTED = {"timeout": "request_timeout", "cancelled": "batch_cancelled"}


def write(
    db: Engine,
    job_id: str,
    model: str,
    format_: str,
    stream: IO[str],
    failed_only: bool = False,
    spreadsheet: bool = False,
) -> int:
    """Write the job's results to ``stream``, one line each; returns how many. ``spreadsheet``: no cell is a formula."""
    rows = result_rows(db, job_id, failed_only)
    if format_ == "csv":
        lines = _csv(rows, csv_extras(db, job_id), spreadsheet)
    else:
        lines = _jsonl(rows) if format_ == "jsonl" else _openai(rows, model, common_sampling(db, job_id))
    count = 0
    for text in lines:
        stream.write(text)
        count += 1
    return count - 1 if format_ == "csv" else count


def csv_extras(db: Engine, job_id: str) -> tuple[str, ...]:
    """The columns of :data:`CSV_EXTRAS` that a row of the job has."""
    # NULL is not counted, and neither is what is false.
    known = [sa.func.count(sa.func.nullif(results.c[name], False) if name == "deduplicated" else results.c[name])
             for name in CSV_EXTRAS if name != "reasoning_tokens"]  # fmt: skip
    with reading(db) as connection:
        counts = connection.execute(sa.select(*known).where(results.c.job_id == job_id)).one()
    # Every answer has a number of them; it is of use beside a reasoning.
    reasoning, *others = counts
    return tuple(name for name, count in zip(CSV_EXTRAS, (reasoning, reasoning, *others), strict=True) if count)


def _jsonl(rows: Iterator[Row[Any]]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(result_line(row), ensure_ascii=False) + "\n"


class _Line:
    """What csv.writer writes to: hands the line back."""

    def write(self, text: str) -> str:
        return text


def _csv(rows: Iterator[Row[Any]], extras: tuple[str, ...], spreadsheet: bool) -> Iterator[str]:
    writer: Any = csv.writer(_Line())
    yield writer.writerow((*CSV_COLUMNS, *extras))
    for row in rows:
        line = result_line(row) | {"error_class": row.error_class, "error_message": row.error_message}
        cells = [line[name] for name in CSV_COLUMNS] + [_cell(line.get(name)) for name in extras]
        yield writer.writerow(inert(cells) if spreadsheet else cells)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else value


def _openai(rows: Iterator[Row[Any]], model: str, common: Mapping[str, Any]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(openai_line(row, model, common), ensure_ascii=False) + "\n"


def common_sampling(db: Engine, job_id: str) -> dict[str, Any]:
    """The sampling parameters of a job, which those of a line go before."""
    with reading(db) as connection:
        text = connection.execute(sa.select(jobs.c.sampling).where(jobs.c.id == job_id)).scalar()
    found: dict[str, Any] = json.loads(text or "{}")
    return found


def openai_line(
    row: Row[Any],
    model: str,
    common: Mapping[str, Any] = NOTHING,
    question: str | None = None,
    read: Callable[[str, Offer], tuple[str, list[ToolCall]]] = read_calls,
) -> dict[str, Any]:
    """A line of a batch output file (2xx) or error file (the rest).

    ``common``: sampling parameters of the job; ``question``: the field that a row asks with, where that is known;
    ``read``: what finds the calls in an answer.
    """
    name = f"{row.job_id}-{row.row}"
    line: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": row.custom_id, "response": None, "error": None}
    if row.state == "ok":
        line["response"] = {
            "status_code": 200,
            "request_id": f"req_{name}",
            "body": _completion(row, model, name, common, read),
        }
    elif row.error_class in NEVER_EXECUTED:
        line["error"] = {"code": NEVER_EXECUTED[row.error_class], "message": row.error_message}
    else:
        status = HTTP_STATUS.get(row.error_class, 500)
        kind = "invalid_request_error" if status < 500 else "server_error"
        param, code = _param_and_code(row, question)
        problem = {"message": row.error_message, "type": kind, "param": param, "code": code}
        line["response"] = {"status_code": status, "request_id": f"req_{name}", "body": {"error": problem}}
    return line


def _param_and_code(row: Row[Any], question: str | None) -> tuple[str | None, str]:
    """What the same request alone would be told."""
    if row.error_class == "context_overflow":
        return question or ("prompt" if _is_raw(row) else "messages"), "context_length_exceeded"
    if row.error_class == "invalid_request":
        return refusal_of(row.error_message or "")
    return None, row.error_class


def _completion(row: Row[Any], model: str, name: str, common: Mapping[str, Any], read: Any) -> dict[str, Any]:
    """The body of a response: a chat completion, a text completion of a raw prompt, or an embedding."""
    if row.embedding is not None:
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": json.loads(row.embedding)}],
            "model": model,
            "usage": {"prompt_tokens": row.prompt_tokens, "total_tokens": row.prompt_tokens},
        }
    raw = _is_raw(row)
    first = {
        "text": row.text, "finish_reason": row.finish_reason, "reasoning": row.reasoning,
        "logprobs": json.loads(row.logprobs) if row.logprobs else None,
    }  # fmt: skip
    # Few lines have tools: the parameters of the others need not be read.
    own = json.loads(row.sampling) if row.sampling and '"tools"' in row.sampling else NOTHING
    offer = Offer.of(own, common)
    answers = [first, *(json.loads(row.choices) if row.choices else ())]
    if offer is not None:
        answers = [each | {"calls": read(each["text"], offer)} for each in answers]
    return {
        "id": f"{'cmpl' if raw else 'chatcmpl'}-{name}",
        "object": "text_completion" if raw else "chat.completion",
        "created": int(row.finished_at if row.finished_at is not None else row.committed_at),
        "model": model,
        "choices": [openai_choice(index, each, raw, offer, name) for index, each in enumerate(answers)],
        "usage": openai_usage(row),
    }


def _is_raw(row: Row[Any]) -> bool:
    return bool(json.loads(row.input or "{}").get("raw"))


def openai_usage(counts: Any) -> dict[str, Any]:
    """Token counts of a row, or of :class:`promptmill.types.Usage`."""
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.output_tokens,
        "total_tokens": counts.prompt_tokens + counts.output_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning_tokens or 0},
    }


def openai_choice(
    index: int, answer: dict[str, Any], raw: bool, offer: Offer | None = None, name: str = ""
) -> dict[str, Any]:
    """One of a response's choices, of a text completion where ``raw``.

    ``offer``: the tools that it may call; ``name``: of the response, from which calls have their ids.
    """
    choice: dict[str, Any] = {"index": index, "finish_reason": answer["finish_reason"]}
    logprobs = shown_logprobs(answer.get("logprobs"), raw)
    if raw:
        return choice | {"text": answer["text"], "logprobs": logprobs}
    message: dict[str, Any] = {"role": "assistant", "content": answer["text"], "refusal": None}
    if offer is not None:
        # Read already where a schema of a client's was needed for it.
        content, calls = answer.get("calls") or read_calls(answer["text"], offer)
        if calls:
            message |= {"content": content or None, "tool_calls": shown_calls(calls, f"{name}/{index}")}
            choice["finish_reason"] = why_ended(answer["finish_reason"], bool(calls))
    if answer.get("reasoning") is not None:
        # Where servers of reasoning models put it.
        message["reasoning_content"] = answer["reasoning"]
    return choice | {"message": message, "logprobs": logprobs}


def shown_logprobs(tokens: list[dict[str, Any]] | None, raw: bool, offset: int = 0) -> dict[str, Any] | None:
    """Log-probabilities in the shape of a chat, or of a text completion; ``offset``: characters before them."""
    if not tokens:
        return None
    return _text_logprobs(tokens, offset) if raw else {"content": tokens, "refusal": None}


def why_ended(finish_reason: str, has_calls: bool) -> str:
    """An answer that calls something ended to have it called."""
    return "tool_calls" if has_calls and finish_reason == "stop" else finish_reason


def _text_logprobs(tokens: list[dict[str, Any]], offset: int) -> dict[str, Any]:
    """The shape of ``/v1/completions``: lists side by side."""
    offsets, position = [], offset
    for each in tokens:
        offsets.append(position)
        position += len(each["token"])
    return {
        "tokens": [each["token"] for each in tokens],
        "token_logprobs": [each["logprob"] for each in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in tokens],
        "text_offset": offsets,
    }
