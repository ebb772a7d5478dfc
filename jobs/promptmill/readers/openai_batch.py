"""Lines of OpenAI's batch format. The job's own model answers: ``body.model`` is not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from promptmill.readers.fields import BadLine, as_id, kind, take_object
from promptmill.readers.jsonl import messages_of, read_objects, text_of
from promptmill.readers.source import TextLine
from promptmill.tasks.openai import CHAT, COMPLETIONS, EMBEDDINGS, translate
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout

KEYS = ("custom_id", "method", "url", "body")

#: What a body of each address asks with.
QUESTIONS = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}


def read(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    parameters = _Parameters()
    return read_objects(lines, lambda number, record: _line(number, record, parameters))


class _Parameters:
    """Translates the parameters of bodies. Most files ask the same in each line: such lines share what was found."""

    def __init__(self) -> None:
        self._asked = ""
        self._found: dict[str, Any] = {}

    def of(self, body: dict[str, Any], url: str) -> dict[str, Any]:
        # Not by equality, to which true is 1.
        asked = f"{url} {body!r}"
        if asked != self._asked:
            self._found, self._asked = translate(body, url), asked
        return self._found


def _line(number: int, record: dict[str, Any], parameters: _Parameters) -> DatasetLine:
    missing = [key for key in KEYS if record.get(key) is None]
    if missing:
        raise BadLine(f"missing '{missing[0]}': a batch line has custom_id, method, url and body")
    extra = record.keys() - {*KEYS, "expected", "meta"}
    if extra:
        raise BadLine(f"unknown key '{sorted(extra)[0]}' in a batch line")
    if record["method"] != "POST":
        raise BadLine("method is not POST")
    if not isinstance(record["url"], str) or record["url"] not in QUESTIONS:
        raise BadLine(f"url is none of {', '.join(QUESTIONS)}")
    if not isinstance(record["custom_id"], str):
        raise BadLine(f"custom_id is {kind(record['custom_id'])}, not a text")
    if not isinstance(record["body"], dict):
        raise BadLine(f"'body' is {kind(record['body'])}, not an object")
    return _request(number, as_id(record["custom_id"]), record, parameters)


def _request(number: int, custom_id: str, record: dict[str, Any], parameters: _Parameters) -> DatasetLine:
    body = dict(record["body"])
    question = QUESTIONS[record["url"]]
    if question not in body:
        raise BadLine(f"missing 'body.{question}'")
    asked = body.pop(question)
    if not isinstance(body.pop("model", ""), str | None):
        raise BadLine("'body.model' is not a text")
    sampling = parameters.of(body, record["url"])
    expected, meta = record.get("expected"), take_object(record, "meta")
    if question == "messages":
        turns = messages_of(asked)
        return DatasetLine(number, custom_id, messages=turns, expected=expected, meta=meta, sampling=sampling)
    if isinstance(asked, list) and len(asked) == 1:
        asked = asked[0]
    if isinstance(asked, list):
        raise BadLine(
            f"unsupported 'body.{question}': give one text, not a list of texts or token ids; a row has one answer"
        )
    if asked == "" and sampling.get("continuations"):
        # What is scored from the start of a text follows nothing.
        return DatasetLine(number, custom_id, prompt="", raw=True, expected=expected, meta=meta, sampling=sampling)
    return DatasetLine(
        number, custom_id, prompt=text_of(asked), raw=True, expected=expected, meta=meta, sampling=sampling
    )
