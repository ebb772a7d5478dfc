"""Lines of OpenAI's batch format. The job's own model answers: ``body.model`` is not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from promptmill.readers.fields import BadLine, as_id, kind, take_object
from promptmill.readers.jsonl import messages_of, read_objects, text_of
from promptmill.readers.source import TextLine
from promptmill.registry import suggestion
from promptmill.sampling import ALIASES, PARAMETERS, check_parameters
from promptmill.types import DatasetLine

if TYPE_CHECKING:
    from promptmill.readers import Layout

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

KEYS = ("custom_id", "method", "url", "body")

#: Parameters that change nothing about an answer of ours: with these values they may stand in a line.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1, None), "stream": (False, None), "store": (False, None), "echo": (False, None), "best_of": (1, None),
    "logprobs": (False, None), "presence_penalty": (0, None), "frequency_penalty": (0, None),
    "response_format": ({"type": "text"}, None),
}  # fmt: skip

#: Notes of the client to itself.
NOTES = {"user", "metadata"}

KNOWN = {*PARAMETERS, *ALIASES}

#: Highest temperature of that format; lines of our own may go higher.
HOTTEST = 2


def read(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    return read_objects(lines, _line)


def _line(number: int, record: dict[str, Any]) -> DatasetLine:
    missing = [key for key in KEYS if record.get(key) is None]
    if missing:
        raise BadLine(f"missing '{missing[0]}': a batch line has custom_id, method, url and body")
    extra = record.keys() - {*KEYS, "expected", "meta"}
    if extra:
        raise BadLine(f"unknown key '{sorted(extra)[0]}' in a batch line")
    if record["method"] != "POST":
        raise BadLine("method is not POST")
    if record["url"] not in (CHAT, COMPLETIONS):
        raise BadLine(f"url is neither {CHAT} nor {COMPLETIONS}")
    if not isinstance(record["custom_id"], str):
        raise BadLine(f"custom_id is {kind(record['custom_id'])}, not a text")
    if not isinstance(record["body"], dict):
        raise BadLine(f"'body' is {kind(record['body'])}, not an object")
    return _request(number, as_id(record["custom_id"]), record)


def _request(number: int, custom_id: str, record: dict[str, Any]) -> DatasetLine:
    body = dict(record["body"])
    question = "messages" if record["url"] == CHAT else "prompt"
    if question not in body:
        raise BadLine(f"missing 'body.{question}'")
    asked = body.pop(question)
    sampling = _sampling(body)
    expected, meta = record.get("expected"), take_object(record, "meta")
    if question == "messages":
        turns = messages_of(asked)
        return DatasetLine(number, custom_id, messages=turns, expected=expected, meta=meta, sampling=sampling)
    if isinstance(asked, list) and len(asked) == 1:
        asked = asked[0]
    if isinstance(asked, list):
        raise BadLine("unsupported 'body.prompt': give one text, not a list of texts or token ids")
    return DatasetLine(
        number, custom_id, prompt=text_of(asked), raw=True, expected=expected, meta=meta, sampling=sampling
    )


def _sampling(body: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters of a body. Refuses whatever would change the answer and cannot be obeyed."""
    if not isinstance(body.pop("model", ""), str | None):
        raise BadLine("'body.model' is not a text")
    asked: dict[str, Any] = {}
    for name, value in body.items():
        if name in HARMLESS:
            if value not in HARMLESS[name]:
                raise BadLine(f"unsupported parameter 'body.{name}': it would change the answer")
        elif name not in NOTES and value is not None:
            if name not in KNOWN:
                raise BadLine(f"unsupported parameter 'body.{name[:40]}'. {suggestion(name, KNOWN)}")
            asked[name] = value
    found = check_parameters(asked)
    if found.get("temperature", 0) > HOTTEST:
        raise BadLine(f"'temperature' must be a number from 0 to {HOTTEST}")
    return found
