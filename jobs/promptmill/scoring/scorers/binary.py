"""Yes or no made of a score or of a label, and what the model's own probabilities are worth."""

from __future__ import annotations

import json
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from promptmill.scoring.scorers import Item, JsonObject, ScoreVerdict, as_label
from promptmill.scoring.scorers.closeness import number
from promptmill.scoring.scorers.scorer import BINARY, FieldScorer
from promptmill.types import JsonValue

#: What each of the request's choices says, with its probability.
Choices = tuple[tuple[JsonObject, float], ...]


class Cost(BaseModel):
    """What mistakes cost, in any unit: the best threshold has the least of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    false_yes: float = Field(ge=0)
    missed: float = Field(ge=0)


class Binary(FieldScorer):
    """``{binary: FIELD, threshold: T}``: yes when the number is at least T; ``positive: LABEL``: when it is the label.

    The probability of yes is the sum over the request's choices that mean yes. Without choices the number itself
    ranks the answers, which is enough for AUC and average precision.
    """

    figures = BINARY
    labels = "binary"
    needs_choices = True

    threshold: float | None = Field(None, description="a number")
    positive: str | bool | int | float | None = Field(None, description="a text, a number, true or false")

    cost: Cost | None = Field(None, description="{false_yes: N, missed: N}, each a number from 0")

    @property
    def costs(self) -> tuple[float, float] | None:
        return None if self.cost is None else (self.cost.false_yes, self.cost.missed)

    @model_validator(mode="after")
    def _says_what_is_yes(self) -> Self:
        if self.threshold is None and self.positive is None:
            raise ValueError("binary needs 'threshold' or 'positive'")
        if self.threshold is not None and self.positive is not None:
            raise ValueError("give 'threshold' or 'positive', not both")
        return self

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> ScoreVerdict | None:
        wanted = self.means_yes(expected[self.field])
        if wanted is None:
            return None
        given = self.means_yes(output[self.field])
        if given is None:
            # An answer that is no number says neither yes nor no: wrong, whatever was expected.
            return ScoreVerdict(False, predicted=None, expected=wanted)
        confidence, is_probability = self._confidence(output[self.field], item.choices)
        return ScoreVerdict(given is wanted, given, wanted, confidence, is_probability)

    def expected_label(self, expected: JsonObject) -> str | None:
        wanted = self.means_yes(expected[self.field])
        return None if wanted is None else as_label(wanted)

    def means_yes(self, value: JsonValue) -> bool | None:
        """What a label or a number comes to; None for neither. Truth values are 1 and 0 to a threshold."""
        if self.positive is not None:
            return None if value is None else self._like_positive(value) == self._like_positive(self.positive)
        found = float(value) if isinstance(value, bool) else number(value)
        assert self.threshold is not None
        return None if found is None else found >= self.threshold

    def _like_positive(self, value: JsonValue) -> str:
        """A label's text; where yes is a truth value, or 1 or 0, either is written for the other."""
        is_truth = label_text(self.positive) in ("true", "false", "1", "0")
        return {"1": "true", "0": "false"}.get(label_text(value), label_text(value)) if is_truth else label_text(value)

    def _confidence(self, value: JsonValue, choices: Choices) -> tuple[float | None, bool]:
        """How sure the answer is of yes, and whether that is a probability."""
        meant = [(self.means_yes(said.get(self.field)), share) for said, share in choices]
        if meant and all(yes is not None for yes, _ in meant):
            return min(1.0, sum(share for yes, share in meant if yes)), True
        given = number(value) if self.positive is None else None
        # A number between 0 and 1 that is judged by a threshold between them is meant as a probability.
        is_share = given is not None and 0.0 <= given <= 1.0 and self.threshold is not None and 0 < self.threshold < 1
        return given, is_share


class ChoiceProbability(FieldScorer):
    """``{choice_probability: FIELD}``: the probability that the model gave to the expected one of its choices."""

    figures = ("choice_probability", "brier", "ece", "ece_debiased")
    labels = "choices"
    needs_choices = True
    right = None

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> ScoreVerdict | None:
        if not item.choices:
            return None
        wanted = expected[self.field]
        shares = [(said.get(self.field), share) for said, share in item.choices]
        found = sum(share for meant, share in shares if label_text(meant) == label_text(wanted))
        likeliest, confidence = max(shares, key=lambda each: each[1])
        return ScoreVerdict(found, likeliest, wanted, confidence, is_probability=True)


def label_text(value: JsonValue) -> str:
    """A label as a text, by which labels are compared: true is ``true``, however it is written."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    folded = text.strip().casefold()
    return folded if folded in ("true", "false") else text
