"""JSONL of our own: lines with ``prompt``, ``messages`` or ``input``, or flat records for a template."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from promptmill.core.registry import suggestion
from promptmill.readers.fields import (
    BadLine,
    from_fields,
    kind,
    peek_id,
    split_named,
    take_id,
    take_object,
)
from promptmill.readers.source import MARK, TextLine
from promptmill.tasks.sampling import ALIASES, PARAMETERS, BadParameter, check_parameters, is_empty
from promptmill.tasks.tools import turn_extra
from promptmill.types import DatasetLine, Message

if TYPE_CHECKING:
    from promptmill.readers import Layout

ROLES = {"system", "developer", "user", "assistant", "tool"}

#: One of these says what the line asks.
QUESTIONS = ("prompt", "messages", "input")

#: Most messages of a chat: a model that remembers a million tokens has room for no more.
MOST_MESSAGES = 10_000

KNOWN = {*QUESTIONS, "id", "custom_id", "expected", "meta", *PARAMETERS, *ALIASES}

#: What is read key by key, and no data of the line: in it a key that some library filled with null is none.
STRUCTURED = {"messages", *PARAMETERS, *ALIASES}

#: Escapes that may stand for what no database takes: NUL, and halves of surrogate pairs.
SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")

Convert = Callable[[int, dict[str, Any]], DatasetLine]


def read(lines: Iterator[TextLine], layout: Layout) -> Iterator[DatasetLine]:
    return read_objects(lines, lambda number, record: line_of(number, record, layout))


def read_objects(lines: Iterator[TextLine], convert: Convert) -> Iterator[DatasetLine]:
    """Parse each line as a JSON object and convert it; what cannot be becomes a line with an error."""
    decode = decoder().decode
    for line in lines:
        # A byte order mark is left where files were put together.
        text = line.text.removeprefix(MARK)
        if line.error:
            yield DatasetLine(line.number, error=line.error)
        elif text and not text.isspace():
            yield _parsed(line.number, text, decode, convert)


def decoder() -> json.JSONDecoder:
    """JSON as its standard has it: no NaN, no Infinity, no key twice. Raises BadLine for them."""
    return json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)


def _parsed(number: int, text: str, decode: Callable[[str], Any], convert: Convert) -> DatasetLine:
    try:
        record = decode(text)
    except json.JSONDecodeError as problem:
        error = f"broken JSON at column {problem.colno}: {problem.msg}"
    except RecursionError:
        error = "broken JSON: nested too deeply"
    except BadLine as problem:
        error = str(problem)
    except ValueError:
        # Python reads no whole number of more than 4,300 digits.
        error = "broken JSON: a number with too many digits"
    else:
        return converted(number, record, text, convert)
    return DatasetLine(number, error=error)


def converted(number: int, record: Any, text: str, convert: Convert) -> DatasetLine:
    """The line of a ``record`` that was written as ``text``; one with an error for what cannot be used."""
    try:
        if not isinstance(record, dict):
            raise BadLine(f"the line is {kind(record)}, not a JSON object")
        if "\\u" in text and SUSPECT.search(text):
            _refuse_unstorable(record)
        return convert(number, record)
    except RecursionError:
        error = "broken JSON: nested too deeply"
    except BadParameter as problem:
        error = f"{problem.message}. {problem.hint}" if problem.hint else problem.message
    except BadLine as problem:
        error = str(problem)
    return DatasetLine(number, peek_id(record), error=error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as an object. A key that is there twice is an error: either value may be meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, _ in pairs if counts[name] > 1)
        raise BadLine(f"the key '{twice[:40]}' is there twice")
    return found


def _no_constant(name: str) -> None:
    raise BadLine(f"broken JSON: {name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise BadLine(f"the number {digits[:40]} is out of range")
    return number


def _refuse_unstorable(record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadLine("half of a surrogate pair: its \\u escape stands for no character") from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise BadLine("a NUL character (\\u0000)")


def line_of(number: int, record: dict[str, Any], layout: Layout) -> DatasetLine:
    """Raises BadLine or BadParameter for a record that cannot be used.

    With a template a record is flat, whatever its keys are called, unless its ``input`` is an object.
    """
    has_input = isinstance(record.get("input"), dict)
    if layout.has_template and (layout.input or not has_input):
        return from_fields(number, record, layout)
    asked = [name for name in QUESTIONS if record.get(name) is not None]
    if not asked or (asked == ["input"] and not has_input):
        asked = [name for name in QUESTIONS[:2] if name in record]
    if not asked:
        raise BadLine("neither 'prompt' nor 'messages' in the line; give --template or --task to use other fields")
    if len(asked) > 1:
        raise BadLine(f"both '{asked[0]}' and '{asked[1]}' in the line: give one")
    return _structured(number, record, layout, asked[0])


def _structured(number: int, record: dict[str, Any], layout: Layout, question: str) -> DatasetLine:
    record = {name: each for name, each in record.items() if each is not None or name not in QUESTIONS}
    if layout.is_filled:
        record = {name: without_null(each) if name in STRUCTURED else each for name, each in record.items()}
    value = record.pop(question, None)
    # Fields that the task expects are not parameters, and a line may carry them beside its prompt.
    expected = record.pop("expected", None)
    if layout.expected:
        value, expected, record = _apart(question, value, expected, record, layout)
    custom_id = take_id(record)
    meta = take_object(record, "meta")
    if not record.keys() <= KNOWN:
        unknown = min(record.keys() - KNOWN)
        raise BadLine(f"unknown parameter '{unknown[:40]}'. {suggestion(unknown, KNOWN)}")
    sampling = check_parameters(record) if record else {}
    if question == "prompt":
        return DatasetLine(number, custom_id, text_of(value), expected=expected, meta=meta, sampling=sampling)
    if question == "messages":
        turns = messages_of(value)
        return DatasetLine(number, custom_id, messages=turns, expected=expected, meta=meta, sampling=sampling)
    if not layout.has_template:
        raise BadLine("the line has 'input' fields and there is no template: give --template or --task")
    return DatasetLine(number, custom_id, fields=value, expected=expected, meta=meta, sampling=sampling)


def without_null(value: Any) -> Any:
    """Without the keys of objects that are null."""
    if isinstance(value, dict):
        return {name: without_null(each) for name, each in value.items() if each is not None}
    return [without_null(each) for each in value] if isinstance(value, list) else value


def _apart(
    question: str, value: Any, expected: Any, record: dict[str, Any], layout: Layout
) -> tuple[Any, Any, dict[str, Any]]:
    """What is asked, what is expected, and the rest of a record. No template may see what is expected."""
    named, record = split_named(record, layout.expected)
    if isinstance(value, dict):
        # A field of the object may be named from the outside too: ``input.answer``.
        inner = {name: path.removeprefix(f"{question}.") for name, path in layout.expected.items()}
        for paths in (layout.expected, inner):
            inside, value = split_named(value, paths)
            named = inside | named
    if named:
        expected = {**expected, **named} if isinstance(expected, dict) else named
    return value, expected, record


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
    if len(value) > MOST_MESSAGES:
        raise BadLine(f"'messages' are {len(value):,}: at most {MOST_MESSAGES:,} can be used")
    return tuple(_message(index, each) for index, each in enumerate(value))


#: Keys of a message that say nothing to a model: a client keeps them when it sends an answer back.
PASSED_OVER = {"name", "annotations"}

#: What an assistant thought, under the names that servers give it. Ours is the first.
REASONING = ("reasoning_content", "reasoning")


def _message(index: int, value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadLine(f"messages[{index}] is {kind(value)}, not an object")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadLine(f"messages[{index}].role is not one of {', '.join(sorted(ROLES))}")
    # What clients send back of an answer has many keys with nothing in them.
    extra = {name for name, each in value.items() if not is_empty(each)} - {"role", "content"} - PASSED_OVER
    if not extra:
        return Message(role, _content(index, value.get("content")))
    allowed = {"tool_calls", "tool_call_id", *(REASONING if role == "assistant" else ())}
    if unknown := extra - allowed:
        raise BadLine(f"unsupported key '{min(unknown)[:40]}' in messages[{index}]")
    try:
        more = turn_extra({name: value[name] for name in extra | ({"role", "name"} & value.keys())})
    except ValueError as problem:
        raise BadLine(f"messages[{index}]: {problem}") from None
    content = value.get("content")
    # An assistant that calls something, or only thought so far, need not say anything.
    said = "" if is_empty(content) and more else _content(index, content)
    return Message(role, said, more)


def _content(index: int, value: Any) -> str:
    """Text, or a list of text parts, which stand on lines of their own, as llama.cpp's server and vLLM join them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        if texts and all(isinstance(text, str) for text in texts):
            return "\n".join(str(text) for text in texts)
    raise BadLine(f"messages[{index}].content is neither a text nor a list of text parts")
