"""Equality of one field, and of the parts of an object that are expected."""

from __future__ import annotations

from promptmill.scoring.scorers import Item, JsonObject
from promptmill.scoring.scorers.scorer import CLASSES, FieldScorer
from promptmill.types import JsonValue


class Exact(FieldScorer):
    """``{exact: FIELD}``: the answer's field equals the expected one, as JSON values."""

    figures = CLASSES
    labels = "classes"

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> bool:
        return same(output[self.field], expected[self.field])


class JsonMatch(FieldScorer):
    """``{json_match: FIELD}``: all that is expected of an object is in the answer's; it may hold more."""

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> bool:
        return holds(output[self.field], expected[self.field])


def holds(given: JsonValue, wanted: JsonValue) -> bool:
    """Whether ``given`` has every key of the object ``wanted``, and under each what it holds; lists must be as long."""
    if isinstance(wanted, dict):
        return isinstance(given, dict) and all(
            key in given and holds(given[key], value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(given, list) and len(given) == len(wanted) and all(map(holds, given, wanted))
    return same(given, wanted)


def same(one: JsonValue, other: JsonValue) -> bool:
    """Equality of JSON values: 5 is 5.0, but true is not 1, which Python's own ``==`` says it is."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
