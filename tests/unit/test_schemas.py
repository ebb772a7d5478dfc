"""Schemas and patterns of others are bounded, lead nowhere, and are tried in a bounded time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from promptmill.errors import TaskFileError
from promptmill.readers.fields import BadLine
from promptmill.readers.jsonl import MOST_MESSAGES, decoder, messages_of
from promptmill.tasks import json_schemas, patterns
from promptmill.tasks.patterns import SearchTime, compiled, is_found
from promptmill.tasks.sampling import BadParameter, check_parameter
from promptmill.tasks.task_file import parse_task

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
def test_a_slow_pattern_of_a_schema_takes_a_moment(monkeypatch: pytest.MonkeyPatch, schema: Any, pattern: str) -> None:
    monkeypatch.setattr(patterns, "SEARCH_S", 0.2)
    started = time.process_time()
    text = "a" * 60 + "!"
    assert not json_schemas.is_valid(schema(pattern), {text: text, "a": text})
    assert time.process_time() - started < 5


def test_patterns_mean_what_they_did() -> None:
    assert is_found("^[a-z]+$", "abc")
    assert is_found("评", "好评")
    assert is_found(r"(.)\1", "abba")
    assert not is_found("^(?!a)", "abba")
    assert is_found("a", "\ud800a")
    with pytest.raises(ValueError, match="no regular expression"):
        is_found("(", "a")


def test_a_schema_with_more_ways_than_steps_is_given_up() -> None:
    started = time.process_time()
    assert not json_schemas.is_valid(BRANCHES, 1)
    assert time.process_time() - started < 10
    assert json_schemas.is_valid({"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}}, 1)


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
    assert not json_schemas.is_valid(schema, {"a": 1})


def test_what_is_called_like_a_reference_is_none() -> None:
    assert json_schemas.problem_of({"properties": {"$ref": {"type": "string"}}, "enum": [{"$ref": "http://x"}]}) is None


def test_schemas_have_bounds() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"items": deep}
    assert "levels deep" in str(json_schemas.problem_of(deep))
    assert "more than 50,000 values" in str(json_schemas.problem_of({"enum": list(range(60_000))}))
    many = {"properties": {f"p{n}": {"pattern": "a"} for n in range(1_001)}}
    assert "more than 1,000 patterns" in str(json_schemas.problem_of(many))


DRAFT_4, DRAFT_7 = "http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema#"
LATEST = "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"$schema": DRAFT_4, "enum": [{"a": number} for number in range(10_000)]},
        {"$schema": DRAFT_4, "enum": [number if number % 2 else str(number) for number in range(40_000)]},
        {"required": [str(number) for number in range(40_000)]},
        {"enum": [str(number) for number in range(40_000)]},
    ],
    ids=["enum of objects", "enum of all kinds", "required", "enum of texts"],
)  # fmt: skip
def test_a_schema_with_a_huge_list_is_checked_in_a_moment(schema: dict[str, Any]) -> None:
    started = time.process_time()
    json_schemas.check(schema)
    assert time.process_time() - started < 5


def test_a_schema_that_takes_too_long_to_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_schemas, "MOST_CHECKS", 10_000)
    json_schemas.check({"properties": {f"p{n}": {"type": "string"} for n in range(100)}})
    with pytest.raises(json_schemas.BadSchema, match="it takes too long to check"):
        json_schemas.check({"properties": {f"p{n}": {"type": "string"} for n in range(1_000)}})


LIST = list(range(490))


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"items": {"not": {"enum": [[*LIST, -n] for n in range(1, 90)]}}}, [[*LIST, 0]] * 2_000),
        ({"anyOf": [{"type": "string"}] * 10_000}, {"a": [1] * 40_000}),
        ({"anyOf": [{"required": [str(n) for n in range(10_000)]}] * 4_000}, {str(n): 1 for n in range(9_999)}),
        ({"anyOf": [{"additionalProperties": False}] * 5_000}, {str(n): 1 for n in range(5_000)}),
        ({"items": {"properties": {str(n): {} for n in range(20_000)}}}, [{}] * 20_000),
    ],
    ids=["enum", "messages", "required", "additionalProperties", "properties"],
)  # fmt: skip
def test_a_value_that_takes_too_long_to_compare_is_given_up(schema: dict[str, Any], value: Any) -> None:
    started = time.process_time()
    assert not json_schemas.is_valid(schema, value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("draft", [DRAFT_4, DRAFT_7, LATEST])
def test_a_part_that_names_its_draft_is_bounded_like_the_rest(draft: str) -> None:
    started = time.process_time()
    text = "a" * 60 + "!"
    assert not json_schemas.is_valid({"properties": {"a": {"$schema": draft, "pattern": "^(a|aa)+$"}}}, {"a": text})
    assert json_schemas.is_valid({"properties": {"a": {"$schema": draft, "pattern": "^(a|aa)+!$"}}}, {"a": text})
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("items", "are_unique"),
    [
        ([1, 1.0], False), ([1, True], True), ([0, False], True), ([1, "1"], True), ([[1], [1.0]], False),
        ([{"a": 1, "b": 2}, {"b": 2.0, "a": 1}], False), ([{"a": 1}, {"a": None}], True), (["é", "e\u0301"], True),
        ([], True), ([None, None], False), ([0.5, 0.5], False),
    ],
    ids=str,
)  # fmt: skip
def test_items_are_equal_as_the_standard_has_it(items: list[Any], are_unique: bool) -> None:
    from jsonschema import Draft202012Validator

    assert json_schemas.is_valid({"uniqueItems": True}, items) is are_unique
    assert Draft202012Validator({"uniqueItems": True}).is_valid(items) is are_unique
    assert json_schemas.is_valid({"uniqueItems": False}, items)


def test_ordinary_values_are_judged_as_before() -> None:
    schema = {"type": "array", "items": {"type": "object", "required": ["a"], "properties": {"a": {"enum": ["x", 1]}}}}
    assert json_schemas.is_valid(schema, [{"a": "x"}, {"a": 1.0}] * 1_000)
    assert not json_schemas.is_valid(schema, [{"a": "y"}])
    assert not json_schemas.is_valid(schema, [{"b": "x"}])


def test_a_slow_regular_expression_is_given_up_after_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SEARCH_S", 0.2)
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
    started = time.process_time()
    with pytest.raises(BadLine, match="the key 'k199999' is there twice"):
        decoder().decode(line)
    assert time.process_time() - started < 5


def test_a_schema_that_was_checked_is_not_checked_again_and_a_bad_one_always_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = {"type": "object", "properties": {"seen_once": {"type": "string"}}}
    json_schemas.check(good)
    monkeypatch.setattr(json_schemas, "MOST_CHECKS", 0)
    json_schemas.check(json.loads(json.dumps(good)))
    for other in ({**good, "title": "another"}, {"properties": {"a": {"minLength": 1}}}):
        with pytest.raises(json_schemas.BadSchema, match="it takes too long"):
            json_schemas.check(other)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(json_schemas.BadSchema):
            json_schemas.check({"type": "no type"})
