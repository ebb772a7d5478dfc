"""Scorers: whether an answer is right. They run where the report is made, never on a worker, and only read rows.

A scorer is built once per entry of a task's ``scores`` from the field it looks at, and is then called for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from promptmill.types import JsonValue

#: A JSON object.
JsonObject = Mapping[str, JsonValue]

#: Name in a task file -> what makes the scorer of its field and options.
SCORERS = {
    "exact": "promptmill.scoring.scorers.exact:Exact",
    "json_match": "promptmill.scoring.scorers.exact:JsonMatch",
    "closeness": "promptmill.scoring.scorers.closeness:Closeness",
    "within": "promptmill.scoring.scorers.closeness:Within",
    "abs_error": "promptmill.scoring.scorers.closeness:AbsError",
    "numeric": "promptmill.scoring.scorers.closeness:Numeric",
    "binary": "promptmill.scoring.scorers.binary:Binary",
    "choice_probability": "promptmill.scoring.scorers.binary:ChoiceProbability",
    "contains": "promptmill.scoring.scorers.texts:Contains",
    "regex": "promptmill.scoring.scorers.texts:Regex",
    "set_f1": "promptmill.scoring.scorers.texts:SetF1",
    "python": "promptmill.scoring.scorers.python_scorer:PythonScorer",
}


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
    """One row beside its answer and its expected object. Of ``id`` to ``meta`` only what a scorer asked for is set."""

    #: The answer as it was written.
    text: str
    #: Probability of each of the request's choices.
    choice_probs: Mapping[str, float] | None = None
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
    #: For yes or no: how sure the answer is of yes. Of ``choice_probability``: of the choice it made.
    confidence: float | None = None
    #: Whether ``confidence`` is a probability, and not only something that grows with it.
    is_probability: bool = False


class Unreadable(Exception):
    """A scorer finds nothing in the answer that it could judge: the answer is unparsed."""


class Scorer(Protocol):
    """Deterministic and pure. Says whether ``output`` is right, or how right it is; None abstains."""

    @property
    def metric(self) -> str:
        """The figure of ``promptmill.reports.figures.metrics`` that the verdicts of all rows add up to."""
        ...

    @property
    def field(self) -> str | None:
        """The field of the answer that is looked at; None for one that looks at the answer as a whole."""
        ...

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> ScoreVerdict | bool | float | None: ...
