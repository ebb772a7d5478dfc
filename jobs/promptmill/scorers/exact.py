"""Equality of one field."""

from __future__ import annotations

from dataclasses import dataclass

from promptmill.scorers import JsonObject
from promptmill.types import JsonValue


@dataclass(frozen=True, slots=True)
class Exact:
    """``{exact: FIELD}``: the answer's field equals the expected one, as JSON values."""

    field: str

    @property
    def metric(self) -> str:
        return "accuracy"

    def __call__(self, output: JsonObject, expected: JsonObject) -> bool:
        return same(output[self.field], expected[self.field])


def same(one: JsonValue, other: JsonValue) -> bool:
    """Equality of JSON values: 5 is 5.0, but true is not 1, which Python's own ``==`` says it is."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
