"""Scorers: whether an answer is right. They run where the report is made, never on a worker, and only read rows.

A scorer is one class (``scorer.Scorer``): built once per entry of a task's ``scores``, then called for each row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from promptmill.types import JsonValue

#: A JSON object.
JsonObject = Mapping[str, JsonValue]

#: A value as the JSON that stands for it as a label. One encoder: making one takes longer than using it.
as_label = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


class ScoreOutcome(StrEnum):
    """What became of one labelled row. All but ``abstain`` and ``infra_error`` are counted, the unread as wrong."""

    SCORED = "scored"
    #: An answer came, and holds nothing that can be scored.
    UNPARSED = "unparsed"
    #: The same, and the answer was cut off at ``max_tokens``.
    TRUNCATED = "truncated"
    #: The scorer raised an error on this row.
    SCORER_ERROR = "scorer_error"
    #: The scorer has no opinion.
    ABSTAIN = "abstain"
    #: No answer came: that is the success rate's matter.
    INFRA_ERROR = "infra_error"


@dataclass(frozen=True, slots=True)
class Item:
    """One row beside its answer and its expected object. What no scorer asked for is not set."""

    #: The answer as it was written.
    text: str
    #: Probability of each of the request's choices.
    choice_probs: Mapping[str, float] | None = None
    #: What each of the choices says, read as an answer is, with its probability; for scorers that ask for it.
    choices: tuple[tuple[JsonObject, float], ...] = ()
    id: str | None = None
    row: int | None = None
    input: JsonValue = None
    meta: JsonValue = None


@dataclass(frozen=True, slots=True)
class ScoreVerdict:
    """What a scorer has to say where right or wrong is not all. ``value`` None abstains."""

    value: bool | float | None
    #: The class that was given and the one that was expected, where they are not the fields themselves.
    predicted: JsonValue = None
    expected: JsonValue = None
    #: How sure the answer is of yes; for ``choice_probability``, of the choice it made.
    confidence: float | None = None
    #: Whether ``confidence`` is a probability, and not only something that grows with it.
    is_probability: bool = False


class Unreadable(Exception):
    """A scorer finds nothing in the answer that it could judge: the answer is unparsed."""
