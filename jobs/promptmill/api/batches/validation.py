"""Is this file a batch? One pass in constant memory; every bad line is reported, or the batch runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from promptmill.errors import DatasetError
from promptmill.readers.fields import BadLine
from promptmill.readers.ids import IdTable
from promptmill.readers.jsonl import decoder
from promptmill.readers.source import MARK, DatasetSource
from promptmill.tasks.openai import CHAT, COMPLETIONS, EMBEDDINGS

#: Errors that a batch lists; a file of another kind altogether would have one for each line.
MOST_ERRORS = 1_000

#: Blank lines that are passed over.
MOST_BLANK = 1_000_000

#: What a body of each endpoint asks with, and how its absence is told.
QUESTIONS = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}

ENDPOINTS = tuple(QUESTIONS)


@dataclass(slots=True)
class Findings:
    """What a pass over the file found. ``errors`` are as the batch object lists them."""

    lines: int = 0
    model: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    more: int = 0

    def note(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        if len(self.errors) < MOST_ERRORS:
            self.errors.append({"code": code, "line": line, "message": message, "param": param})
        else:
            self.more += 1

    def finish(self) -> None:
        """Say how many errors are not listed."""
        if self.more:
            rest = f"{self.more:,} more lines cannot be used."
            self.errors.append({"code": "too_many_errors", "line": None, "message": rest, "param": None})


class _Bad(Exception):
    """A line that is none: code, message, param."""


def validate(path: str, endpoint: str, models: frozenset[str]) -> Findings:
    """Look at every line of the file: in a child, for a client wrote it. ``models``: their names."""
    findings, seen, decode = Findings(), IdTable(), decoder().decode
    try:
        for number, text, problem in _lines(path):
            findings.lines += 1
            try:
                if problem:
                    raise _Bad("invalid_json_line", "This line is not parseable as valid JSON.", None)
                record = orjson.loads(text)
                _refuse_what_readers_refuse(text, decode)
                _check(record, number, endpoint, models, findings, seen)
            except orjson.JSONDecodeError:
                findings.note("invalid_json_line", "This line is not parseable as valid JSON.", number)
            except _Bad as bad:
                code, message, param = bad.args
                findings.note(code, message, number, param)
    except DatasetError as problem:
        findings.note("invalid_request", f"The file cannot be read: {problem.message.rpartition(': ')[2]}.")
    if not findings.lines and not findings.errors:
        findings.note("empty_file", "The file is empty.")
    findings.finish()
    return findings


def _lines(path: str) -> Iterator[tuple[int, str, str | None]]:
    source, blank = DatasetSource.open(path), 0
    try:
        for line in source.lines():
            text = line.text.removeprefix(MARK)
            if line.error or (text and not text.isspace()):
                yield line.number, text, line.error
            else:
                blank += 1
                if blank > MOST_BLANK:
                    raise DatasetError(f"more than {MOST_BLANK:,} lines are blank")
    finally:
        source.close()


def _refuse_what_readers_refuse(text: str, decode: Callable[[str], Any]) -> None:
    """What is JSON and no reader takes, such as a key that is there twice: it would become a row without its id."""
    # The reader names what is nested too deeply, in the error file.
    with contextlib.suppress(RecursionError):
        try:
            decode(text)
        except (BadLine, ValueError) as problem:
            why = str(problem) if isinstance(problem, BadLine) else "a number is too long"
            raise _Bad("invalid_json_line", f"This line is not parseable as valid JSON: {why}.", None) from None


def _check(record: Any, number: int, endpoint: str, models: frozenset[str], findings: Findings, seen: IdTable) -> None:
    if not isinstance(record, dict):
        raise _Bad("invalid_request", "Each line must be a JSON dictionary object.", None)
    for name in ("custom_id", "method", "url", "body"):
        if record.get(name) is None:
            raise _Bad("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
    custom_id, body = record["custom_id"], record["body"]
    if not isinstance(custom_id, str):
        raise _Bad("invalid_type", "Invalid type for 'custom_id': expected a string.", "custom_id")
    if not custom_id:
        raise _Bad("invalid_value", "Invalid 'custom_id': it is empty.", "custom_id")
    if "\0" in custom_id:
        raise _Bad("invalid_value", "Invalid 'custom_id': it holds a NUL character.", "custom_id")
    if record["method"] != "POST":
        raise _Bad("invalid_method", "Invalid value for 'method': only 'POST' is supported.", "method")
    if record["url"] != endpoint:
        raise _Bad("invalid_url", "The URL provided for this request does not match the batch endpoint.", "url")
    if not isinstance(body, dict):
        raise _Bad("invalid_type", "Invalid type for 'body': expected an object.", "body")
    _check_body(body, endpoint, models, findings)
    first = seen.first_line(custom_id, number)
    if first != number:
        raise _Bad("duplicate_custom_id", f"The custom_id duplicates that of the request in line {first}.", "custom_id")


def _check_body(body: dict[str, Any], endpoint: str, models: frozenset[str], findings: Findings) -> None:
    model, question = body.get("model"), QUESTIONS[endpoint]
    if body.get("stream"):
        kind = "Chat Completions" if endpoint == CHAT else "Completions"
        raise _Bad("streaming_unsupported", f"{kind}: Streaming is not supported in the Batch API.", "body.stream")
    if not isinstance(model, str) or not model:
        raise _Bad("invalid_request", "Model parameter is required.", "body.model")
    if body.get(question) is None:
        raise _Bad("invalid_request", f"{question.capitalize()} parameter is required.", f"body.{question}")
    if findings.model is None:
        if model not in models:
            raise _Bad(
                "model_not_found",
                f"The provided model '{model[:100]}' is not supported by the Batch API.",
                "body.model",
            )
        findings.model = model
    elif model != findings.model:
        raise _Bad(
            "model_mismatch", f"All requests of a batch must use one model; the first uses '{findings.model[:100]}'.",
            "body.model",
        )  # fmt: skip
