"""How near a number comes to the expected one. Numbers written as texts are read as numbers; truth values are none."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from promptmill.scoring.scorers import Item, JsonObject, Unreadable
from promptmill.scoring.scorers.scorer import FieldScorer, NotNegative, Positive
from promptmill.types import JsonValue


class Closeness(FieldScorer):
    """``{closeness: FIELD, span: S}``: 1 - |answer - expected| / S, not below 0. An answer that is no number gets 0."""

    span: Positive

    figures = ("closeness",)

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> float | None:
        off = distance(output[self.field], expected[self.field])
        if off is None:
            return None if number(expected[self.field]) is None else 0.0
        return max(0.0, 1.0 - off / self.span)


class Within(FieldScorer):
    """``{within: FIELD, tolerance: T}``: right when |answer - expected| <= T."""

    tolerance: Positive

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> bool | None:
        off = distance(output[self.field], expected[self.field])
        if off is None:
            return None if number(expected[self.field]) is None else False
        return off <= self.tolerance


class Numeric(FieldScorer):
    """``{numeric: FIELD, tolerance: T, relative: R}``: right when |answer - expected| <= max(T, R * |expected|)."""

    tolerance: NotNegative = 0.0
    relative: NotNegative = 0.0

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if not self.model_fields_set & {"tolerance", "relative"}:
            raise ValueError("numeric needs 'tolerance' or 'relative'")
        return self

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> bool | None:
        wanted = number(expected[self.field])
        if wanted is None:
            return None
        off = distance(output[self.field], wanted)
        return off is not None and off <= max(self.tolerance, self.relative * abs(wanted))


class AbsError(FieldScorer):
    """``{abs_error: FIELD, worst: W}``: |answer - expected|, in the field's unit.

    An answer without a number has no error that could be measured: it counts as ``worst``, and where no worst error
    is named, its row is left out and shown as such.
    """

    worst: float | None = Field(None, gt=0, description="a number above 0")

    figures = ("abs_error",)
    bounds = (0.0, float("inf"))
    right = 0.0

    @property
    def unread(self) -> float | None:
        """What an answer that cannot be read counts as."""
        return self.worst

    @property
    def limits(self) -> tuple[float, float]:
        return (0.0, float("inf") if self.worst is None else self.worst)

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> float | None:
        if number(expected[self.field]) is None:
            return None
        off = distance(output[self.field], expected[self.field])
        if off is None:
            raise Unreadable
        return off


def distance(one: JsonValue, other: JsonValue) -> float | None:
    """|one - other|, or None when one of them is no number."""
    a, b = number(one), number(other)
    return None if a is None or b is None else abs(a - b)


def number(value: JsonValue) -> float | None:
    """The finite number that ``value`` is or spells, else None. Whole numbers stay exact, however large."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
        if abs(found) == float("inf") or found != found:
            return None
        return int(value) if found.is_integer() and not isinstance(value, float) else found
    except (ValueError, OverflowError):
        # A text such as 1e3 or 5.0 is a number and no whole one as it is written.
        return found if isinstance(value, str) and _spells(value) else None


def _spells(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
