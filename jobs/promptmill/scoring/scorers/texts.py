"""Scores of texts and of lists."""

from __future__ import annotations

import json
import re

from pydantic import Field, PrivateAttr, field_validator

from promptmill.scoring.scorers import Item, JsonObject
from promptmill.scoring.scorers.scorer import FieldScorer, Truth
from promptmill.tasks.patterns import SearchTime, compiled
from promptmill.types import JsonValue


class Contains(FieldScorer):
    """``{contains: FIELD}``: the expected text is part of the answer's; of a list, each of its texts is."""

    ignore_case: Truth = False

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> bool | None:
        wanted = expected[self.field]
        parts = wanted if isinstance(wanted, list) else [wanted]
        given = self._folded(output[self.field])
        return all(self._folded(part) in given for part in parts) if parts else None

    def _folded(self, value: JsonValue) -> str:
        text = as_text(value)
        return text.casefold() if self.ignore_case else text


class Regex(FieldScorer):
    """``{regex: FIELD, pattern: P}``: P is found in the answer's field. Without a pattern the expected text is one."""

    pattern: str | None = Field(None, description="a regular expression of Python")
    _searches: SearchTime = PrivateAttr(default_factory=SearchTime)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, RecursionError, OverflowError) as problem:
            raise ValueError(str(problem)) from None
        return pattern

    @property
    def needs_label(self) -> bool:
        return self.pattern is None

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> bool:
        pattern = self.pattern if self.pattern is not None else as_text(expected[self.field])
        # Raises TimeoutError, which is the row's outcome: some expressions take for ever on some texts.
        return self._searches.search(compiled(pattern), as_text(output[self.field])) is not None


class SetF1(FieldScorer):
    """``{set_f1: FIELD}``: F1 of two lists as sets: 2 |both| / (|answer| + |expected|); of two empty ones it is 1."""

    figures = ("set_f1",)

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> float:
        given, wanted = _members(output[self.field]), _members(expected[self.field])
        total = len(given) + len(wanted)
        return 2.0 * len(given & wanted) / total if total else 1.0


def as_text(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _members(value: JsonValue) -> set[str]:
    """The members of a list by their JSON; anything else is a list of one."""
    members = value if isinstance(value, list) else [value]
    return {json.dumps(each, ensure_ascii=False, sort_keys=True) for each in members}
