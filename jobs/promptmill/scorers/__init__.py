"""Scorers: whether an answer is right. They run where the report is made, never on a worker, and only read rows.

A scorer is built once per entry of a task's ``scores`` from the field it looks at, and is then called for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

from promptmill.types import JsonValue

#: A JSON object.
JsonObject = Mapping[str, JsonValue]

#: Name in a task file -> the class that makes the scorer.
SCORERS = {
    "exact": "promptmill.scorers.exact:Exact",
    "closeness": "promptmill.scorers.closeness:Closeness",
    "within": "promptmill.scorers.closeness:Within",
}


class Outcome(StrEnum):
    """What became of one labelled row. ``unparsed`` and ``truncated`` count as wrong; the last two are not counted."""

    SCORED = "scored"
    #: An answer came, and holds nothing that can be scored.
    UNPARSED = "unparsed"
    #: The same, and the answer was cut off at ``max_tokens``.
    TRUNCATED = "truncated"
    #: The scorer has no opinion.
    ABSTAIN = "abstain"
    #: No answer came: that is the success rate's matter.
    INFRA_ERROR = "infra_error"


class Scorer(Protocol):
    """Deterministic and pure. Says whether ``output`` is right, or how right it is from 0 to 1; None abstains."""

    @property
    def metric(self) -> str:
        """The figure of ``promptmill.metrics`` that the verdicts of all rows add up to."""
        ...

    @property
    def field(self) -> str:
        """The field of the answer and of the expected object that is looked at."""
        ...

    def __call__(self, output: JsonObject, expected: JsonObject) -> bool | float | None: ...
