"""Schemas and patterns of others are bounded, lead nowhere, and are tried in a bounded time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from promptmill import schemas
from promptmill.errors import TaskFileError
from promptmill.patterns import SearchTime, compiled, is_found
from promptmill.readers.fields import BadLine
from promptmill.readers.jsonl import MOST_MESSAGES, decoder, messages_of
from promptmill.sampling import BadParameter, check_parameter
from promptmill.task_file import parse_task

#: As many ways through it as 2 to the 40th.
BRANCHES: dict[str, Any] = {
    "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)} | {"d40": {"type": "null"}},
    "$ref": "#/$defs/d0",
}

#: Slow for engines that go back in the text.
SLOW_PATTERNS = ["^(a|aa)+$", "^((a|aa)+c|a*b)$", "(a+)+$", "^(?=(a|aa)+$)x", r"^(a|aa)+\1$"]


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
@pytest.mark.parametrize(
    "schema",
    [
        lambda pattern: {"properties": {"a": {"pattern": pattern}}},
        lambda pattern: {"additionalProperties": {"pattern": pattern}},
        lambda pattern: {"patternProperties": {pattern: {}}, "additionalProperties": False},
        lambda pattern: {"propertyNames": {"pattern": pattern}},
    ],
)
def test_a_slow_pattern_of_a_schema_takes_a_moment(schema: Any, pattern: str) -> None:
    started = time.monotonic()
    text = "a" * 60 + "!"
    assert not schemas.is_valid(schema(pattern), {text: text, "a": text})
    assert time.monotonic() - started < 5


def test_patterns_mean_what_they_did() -> None:
    assert is_found("^[a-z]+$", "abc")
    assert is_found("评", "好评")
    assert is_found(r"(.)\1", "abba")
    assert not is_found("^(?!a)", "abba")
    assert is_found("a", "\ud800a")
    with pytest.raises(ValueError, match="no regular expression"):
        is_found("(", "a")


def test_a_schema_with_more_ways_than_steps_is_given_up() -> None:
    started = time.monotonic()
    assert not schemas.is_valid(BRANCHES, 1)
    assert time.monotonic() - started < 10
    assert schemas.is_valid({"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}}, 1)


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/x", "file:///etc/passwd", "sec.json", "/etc/x", "other#/a"])
@pytest.mark.parametrize("name", ["$ref", "$dynamicRef"])
def test_a_reference_out_of_the_schema_is_refused_wherever_a_schema_is_taken(name: str, target: str) -> None:
    schema = {"type": "object", "properties": {"a": {name: target}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    for parameter, value in (("json_schema", schema), ("tools", [tool])):
        with pytest.raises(BadParameter, match="leads out of the schema"):
            check_parameter(parameter, value)
    for mode in ("free", "constrain", "validate"):
        task = {"task": "t", "prompt": {"user": "x"}, "output": {"mode": mode, "schema": schema}}
        with pytest.raises(TaskFileError, match="leads out of the schema"):
            parse_task(json.dumps(task), "t")
    # Stored by an earlier version: nothing is fetched, and nothing keeps to it.
    assert not schemas.is_valid(schema, {"a": 1})


def test_what_is_called_like_a_reference_is_none() -> None:
    assert schemas.problem_of({"properties": {"$ref": {"type": "string"}}, "enum": [{"$ref": "http://x"}]}) is None


def test_schemas_have_bounds() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"items": deep}
    assert "levels deep" in str(schemas.problem_of(deep))
    assert "more than 50,000 values" in str(schemas.problem_of({"enum": list(range(60_000))}))
    many = {"properties": {f"p{n}": {"pattern": "a"} for n in range(1_001)}}
    assert "more than 1,000 patterns" in str(schemas.problem_of(many))


def test_a_slow_regular_expression_is_given_up_after_some_rows() -> None:
    searches, pattern = SearchTime(0.5), compiled("^(a|aa)+$")
    started = time.process_time()
    for _ in range(1_000):
        with pytest.raises(TimeoutError):
            searches.search(pattern, "a" * 60 + "!")
    assert time.process_time() - started < 5
    # Another scorer's time is its own, and ordinary searches cost nothing of it.
    assert SearchTime().search(pattern, "aaa")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ["x"] * 65), ("stop", "x" * 1_001), ("logit_bias", {str(n): 1 for n in range(10_001)}),
    ],
)  # fmt: skip
def test_lists_of_parameters_have_an_end(name: str, value: Any) -> None:
    with pytest.raises(BadParameter, match="at most"):
        check_parameter(name, value)


def test_messages_have_an_end() -> None:
    with pytest.raises(BadLine, match="at most 10,000"):
        messages_of([{"role": "user", "content": "x"}] * (MOST_MESSAGES + 1))


def test_a_key_that_is_there_twice_among_many_is_found_at_once() -> None:
    line = "{" + ",".join(f'"k{n}":1' for n in range(200_000)) + ',"k199999":2}'
    started = time.monotonic()
    with pytest.raises(BadLine, match="the key 'k199999' is there twice"):
        decoder().decode(line)
    assert time.monotonic() - started < 5
