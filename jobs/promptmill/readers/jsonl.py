"""JSONL of our own: lines with ``prompt``, ``messages`` or ``input``, or flat records for a template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from promptmill.readers.fields import BadLine, from_fields, kind, take_id, take_object
from promptmill.readers.source import TextLine
from promptmill.registry import suggestion
from promptmill.sampling import PARAMETERS, check_parameter
from promptmill.types import DatasetLine, Message

if TYPE_CHECKING:
    from promptmill.readers import Layout

ROLES = {"system", "developer", "user", "assistant", "tool"}

#: One of these says what the line asks.
QUESTIONS = ("prompt", "messages", "input")

#: Another name that servers use for ``max_tokens``.
ALIASES = {"max_completion_tokens": "max_tokens"}

KNOWN = {*QUESTIONS, "id", "custom_id", "expected", "meta", *PARAMETERS, *ALIASES}


def read(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    return read_objects(lines, lambda number, record: line_of(number, record, layout))


def read_objects(
    lines: Iterator[TextLine], convert: Callable[[int, dict[str, Any]], DatasetLine]
) -> Iterator[DatasetLine]:
    """Parse each line as a JSON object and convert it; what cannot be becomes a line with an error."""
    decode = json.JSONDecoder(parse_constant=_no_constant).decode
    for line in lines:
        if line.error:
            yield DatasetLine(line.number, error=line.error)
            continue
        if not line.text or line.text.isspace():
            continue
        try:
            record = decode(line.text)
            if not isinstance(record, dict):
                raise BadLine(f"the line is {kind(record)}, not a JSON object")
            yield convert(line.number, record)
        except json.JSONDecodeError as problem:
            yield DatasetLine(line.number, error=f"broken JSON at column {problem.colno}: {problem.msg}")
        except RecursionError:
            yield DatasetLine(line.number, error="broken JSON: nested too deeply")
        except (BadLine, ValueError) as problem:
            yield DatasetLine(line.number, error=str(problem))


def _no_constant(name: str) -> None:
    raise BadLine(f"broken JSON: {name} is no JSON number")


def line_of(number: int, record: dict[str, Any], layout: Layout) -> DatasetLine:
    """Raises BadLine or ValueError for a record that cannot be used."""
    if layout.has_template and "input" not in record:
        return from_fields(number, record, layout)
    asked = [name for name in QUESTIONS if name in record]
    if not asked:
        raise BadLine("neither 'prompt' nor 'messages' in the line; give --template or --task to use other fields")
    if len(asked) > 1:
        raise BadLine(f"both '{asked[0]}' and '{asked[1]}' in the line: give one")
    return _structured(number, record, layout, asked[0])


def _structured(number: int, record: dict[str, Any], layout: Layout, question: str) -> DatasetLine:
    # Fields that the task expects are not parameters, and a line may carry them beside its prompt.
    named = {name: record.pop(field) for name, field in layout.expected.items() if field in record}
    if record.keys() - KNOWN:
        unknown = sorted(record.keys() - KNOWN)[0]
        raise BadLine(f"unknown parameter '{unknown}'. {suggestion(unknown, KNOWN)}")
    value = record.pop(question)
    custom_id = take_id(record)
    meta = take_object(record, "meta")
    expected = record.pop("expected", None)
    if named:
        expected = {**(expected if isinstance(expected, dict) else {}), **named}
    sampling = {ALIASES.get(name, name): check_parameter(ALIASES.get(name, name), v) for name, v in record.items()}
    if question == "prompt":
        return DatasetLine(number, custom_id, prompt=text_of(value), expected=expected, meta=meta, sampling=sampling)
    if question == "messages":
        turns = messages_of(value)
        return DatasetLine(number, custom_id, messages=turns, expected=expected, meta=meta, sampling=sampling)
    if not isinstance(value, dict):
        raise BadLine(f"'input' is {kind(value)}, not an object")
    if not layout.has_template:
        raise BadLine("the line has 'input' fields and there is no template: give --template or --task")
    return DatasetLine(number, custom_id, fields=value, expected=expected, meta=meta, sampling=sampling)


def text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise BadLine(f"'prompt' is {kind(value)}, not a text")
    if not value:
        raise BadLine("the prompt is empty")
    return value


def messages_of(value: Any) -> tuple[Message, ...]:
    """A chat: a list of objects with ``role`` and ``content``."""
    if not isinstance(value, list) or not value:
        raise BadLine("'messages' is not a list with at least one message")
    return tuple(_message(index, each) for index, each in enumerate(value))


def _message(index: int, value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadLine(f"messages[{index}] is {kind(value)}, not an object")
    if value.get("role") not in ROLES:
        raise BadLine(f"messages[{index}].role is not one of {', '.join(sorted(ROLES))}")
    extra = value.keys() - {"role", "content", "name"}
    if extra:
        raise BadLine(f"unsupported key '{sorted(extra)[0]}' in messages[{index}]")
    return Message(value["role"], _content(index, value.get("content")))


def _content(index: int, value: Any) -> str:
    """Text, or a list of text parts, which are joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        if texts and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise BadLine(f"messages[{index}].content is neither a text nor a list of text parts")
