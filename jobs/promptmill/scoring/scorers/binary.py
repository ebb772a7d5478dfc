"""Yes or no made of a score or of a label, and what the model's own probabilities are worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from promptmill.scoring.scorers import Item, JsonObject, ScoreVerdict, as_label
from promptmill.scoring.scorers.closeness import number
from promptmill.scoring.scorers.exact import same
from promptmill.scoring.scorers.scorer import BINARY, FieldScorer
from promptmill.types import JsonValue


class Binary(FieldScorer):
    """``{binary: FIELD, threshold: T}``: yes when the number is at least T; ``positive: LABEL``: when it is the label.

    The probability of yes is the sum over the request's choices that mean yes. Without choices the number itself
    ranks the answers, which is enough for AUC and average precision.
    """

    figures = BINARY
    labels = "binary"

    threshold: float | None = Field(None, description="a number")
    positive: str | int | float | None = Field(None, description="a text or a number")

    @model_validator(mode="after")
    def _says_what_is_yes(self) -> Self:
        if self.threshold is None and self.positive is None:
            raise ValueError("binary needs 'threshold' or 'positive'")
        if self.threshold is not None and self.positive is not None:
            raise ValueError("give 'threshold' or 'positive', not both")
        return self

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> ScoreVerdict | None:
        wanted = self._means_yes(expected[self.field])
        if wanted is None:
            return None
        given = self._means_yes(output[self.field])
        if given is None:
            # An answer that is no number says neither yes nor no: wrong, whatever was expected.
            return ScoreVerdict(False, predicted=None, expected=wanted)
        confidence, is_probability = self._confidence(output[self.field], item.choice_probs)
        return ScoreVerdict(given is wanted, given, wanted, confidence, is_probability)

    def expected_label(self, expected: JsonObject) -> str | None:
        wanted = self._means_yes(expected[self.field])
        return None if wanted is None else as_label(wanted)

    def _means_yes(self, value: JsonValue) -> bool | None:
        if self.positive is not None:
            return same(value, self.positive) or str(value) == str(self.positive)
        found = number(value)
        assert self.threshold is not None
        return None if found is None else found >= self.threshold

    def _confidence(self, value: JsonValue, probs: Mapping[str, float] | None) -> tuple[float | None, bool]:
        """How sure the answer is of yes, and whether that is a probability."""
        if probs:
            meant = [(self._means_yes(_field_of(choice, self.field)), share) for choice, share in probs.items()]
            if all(yes is not None for yes, _ in meant):
                return min(1.0, sum(share for yes, share in meant if yes)), True
        given = number(value) if self.positive is None else None
        # A number between 0 and 1 that is judged by a threshold between them is meant as a probability.
        is_share = given is not None and 0.0 <= given <= 1.0 and self.threshold is not None and 0 < self.threshold < 1
        return given, is_share


class ChoiceProbability(FieldScorer):
    """``{choice_probability: FIELD}``: the probability that the model gave to the expected one of its choices."""

    figures = ("choice_probability", "brier", "ece", "ece_debiased")
    labels = "choices"
    right = None

    def __call__(self, output: JsonObject, expected: JsonObject, item: Item) -> ScoreVerdict | None:
        if not item.choice_probs:
            return None
        wanted = expected[self.field]
        shares = {choice: _field_of(choice, self.field) for choice in item.choice_probs}
        found = [item.choice_probs[choice] for choice, meant in shares.items() if _equal(meant, wanted)]
        likeliest = max(item.choice_probs, key=item.choice_probs.__getitem__)
        return ScoreVerdict(
            float(sum(found)), shares[likeliest], wanted, item.choice_probs[likeliest], is_probability=True
        )


def _equal(one: JsonValue, other: JsonValue) -> bool:
    return same(one, other) or str(one) == str(other)


def _field_of(choice: str, field: str) -> JsonValue:
    """What a choice means: the field of the object it is, else the choice itself."""
    if choice.startswith("{"):
        try:
            value = json.loads(choice)
        except ValueError:
            return choice
        return value.get(field, choice)
    return choice
