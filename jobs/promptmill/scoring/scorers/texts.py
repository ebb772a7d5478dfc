"""Scores of texts and of lists."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from promptmill.scoring.scorers import Item, JsonObject
from promptmill.tasks.patterns import SearchTime, compiled
from promptmill.types import JsonValue


@dataclass(frozen=True, slots=True)
class Contains:
    """``{contains: FIELD}``: the expected text is part of the answer's; of a list, each of its texts is."""

    field: str
    ignore_case: bool = False

    @property
    def metric(self) -> str:
        return "accuracy"

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> bool | None:
        wanted = expected[self.field]
        parts = wanted if isinstance(wanted, list) else [wanted]
        given = self._folded(output[self.field])
        return all(self._folded(part) in given for part in parts) if parts else None

    def _folded(self, value: JsonValue) -> str:
        text = as_text(value)
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True, slots=True)
class Regex:
    """``{regex: FIELD, pattern: P}``: P is found in the answer's field. Without a pattern the expected text is one."""

    field: str
    pattern: str | None = None
    searches: SearchTime = dataclasses.field(default_factory=SearchTime, repr=False, compare=False)

    @property
    def metric(self) -> str:
        return "accuracy"

    @property
    def needs_label(self) -> bool:
        """Whether a row must expect something to be counted."""
        return self.pattern is None

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> bool:
        pattern = self.pattern if self.pattern is not None else as_text(expected[self.field])
        # Raises TimeoutError, which is the row's outcome: some expressions take for ever on some texts.
        return self.searches.search(compiled(pattern), as_text(output[self.field])) is not None


@dataclass(frozen=True, slots=True)
class SetF1:
    """``{set_f1: FIELD}``: F1 of two lists as sets: 2 |both| / (|answer| + |expected|); of two empty ones it is 1."""

    field: str

    @property
    def metric(self) -> str:
        return "set_f1"

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
