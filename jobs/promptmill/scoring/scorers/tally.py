"""Counts of one scorer's verdicts over any number of rows, and the score they add up to."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from promptmill.scoring.scorers import Item, JsonObject, ScoreOutcome, ScoreVerdict, Unreadable, as_label
from promptmill.scoring.scorers.aggregates import (
    MOST_CLASSES,
    Figures,
    of_calibration,
    of_classes,
    of_ranking,
    of_yes_or_no,
)
from promptmill.scoring.scorers.intervals import mean_interval, wilson

if TYPE_CHECKING:
    from promptmill.scoring.scorers.scorer import Scorer

#: Outcomes in the denominator: an answer that cannot be read is a wrong answer.
COUNTED = (ScoreOutcome.SCORED, ScoreOutcome.UNPARSED, ScoreOutcome.TRUNCATED, ScoreOutcome.SCORER_ERROR)

#: Most classes whose confusion matrix is shown.
MOST_SHOWN = 20

#: Characters of a scorer's error that are kept.
LONGEST_ERROR = 200


class Judgement(NamedTuple):
    """What a scorer says of one row, as it is stored. Labels are JSON."""

    value: float | None
    predicted: str | None
    expected: str | None
    outcome: ScoreOutcome
    confidence: float | None = None
    error: str | None = None
    #: Of the value, before it became a number; decides between a rate and a mean.
    is_truth: bool = False
    is_probability: bool = False


def judge(
    scorer: Scorer, outcome: ScoreOutcome, output: JsonObject, expected: JsonObject, item: Item
) -> Judgement | None:
    """The judgement on one row, or None for a row that expects nothing of the scorer's field.

    An error that the scorer raises is the row's outcome, and counts as a wrong answer.
    """
    name = scorer.field
    if scorer.needs_label and name not in expected:
        return None
    wanted = scorer.expected_label(expected)
    if outcome is ScoreOutcome.SCORED and name is not None and name not in output:
        outcome = ScoreOutcome.UNPARSED
    if outcome is not ScoreOutcome.SCORED:
        unread = None if outcome is ScoreOutcome.INFRA_ERROR else scorer.unread
        return Judgement(unread, None, wanted, outcome)
    try:
        found = scorer(output, expected, item)
        verdict = found if isinstance(found, ScoreVerdict) else ScoreVerdict(found)
        value = _number(verdict.value)
    except Unreadable:
        return Judgement(scorer.unread, None, wanted, ScoreOutcome.UNPARSED)
    except (Exception, SystemExit) as problem:
        # The user's own code may raise anything, and may ask to exit; the other rows are scored all the same.
        return Judgement(0.0, None, wanted, ScoreOutcome.SCORER_ERROR, error=_said(problem))
    if verdict is found and (verdict.expected is not None or verdict.predicted is not None):
        given: str | None = as_label(verdict.predicted)
        wanted = as_label(verdict.expected)
    else:
        given = as_label(output[name]) if name is not None else None
    outcome = ScoreOutcome.ABSTAIN if value is None else outcome
    is_truth = isinstance(verdict.value, bool)
    return Judgement(value, given, wanted, outcome, verdict.confidence, None, is_truth, verdict.is_probability)


def _number(value: bool | float | None) -> float | None:
    """Raises ValueError for what is no finite number: it would make the sum of all rows none."""
    found = None if value is None else float(value)
    if found is not None and not math.isfinite(found):
        raise ValueError(f"the scorer gave {found}")
    return found


def _said(problem: BaseException) -> str:
    try:
        text = str(problem)
    except Exception:
        text = "(its message cannot be read)"
    return f"{type(problem).__name__}: {text}"[:LONGEST_ERROR]


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of quality. ``n`` = all counted outcomes; ``value``: what the rows are worth / n, None of nothing."""

    name: str
    metric: str
    value: float | None
    n: int
    correct: int
    unparsed: int
    truncated: int
    abstain: int
    infra_error: int
    #: Rows on which the scorer itself failed, and the first error.
    scorer_errors: int
    scorer_error: str | None
    #: Rows that expect nothing of this field.
    unlabelled: int
    #: Rows left out because they have no worth that could be counted.
    left_out: int
    #: Expected label, as JSON -> rows of ``n``; empty where there are too many to be classes.
    classes: Mapping[str, int]
    #: Rows of ``n`` with the commonest expected label; None where right is not to give the expected label.
    majority: int | None
    ci95: tuple[float, float] | None
    #: Expected label, as JSON -> predicted label -> rows; an answer that could not be read was predicted ''.
    confusion: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    figures: Figures = field(default_factory=Figures)
    #: Why figures of classes are missing.
    note: str | None = None

    @property
    def readable(self) -> int | None:
        """Answers in which it could be read, of rows that expect something; None where no row does."""
        if not self.n + self.left_out + self.abstain + self.infra_error:
            return None
        return self.n + self.left_out + self.abstain - self.unparsed - self.truncated

    @property
    def is_rate(self) -> bool:
        return self.metric == "accuracy"

    @property
    def macro_f1(self) -> float | None:
        return self.figures.values.get("macro_f1")

    @property
    def majority_baseline(self) -> float | None:
        """What always giving the commonest label would reach."""
        return self.majority / self.n if self.n and self.majority is not None else None

    @property
    def all_figures(self) -> dict[str, float | None]:
        """The value under its metric's name, and every other figure under its own."""
        return {self.metric: self.value, **self.figures.values}

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "value": self.value, "ci95": list(self.ci95) if self.ci95 else None, "n": self.n,
            "correct": self.correct, "unparsed": self.unparsed, "truncated": self.truncated, "abstain": self.abstain,
            "infra_error": self.infra_error, "scorer_errors": self.scorer_errors, "scorer_error": self.scorer_error,
            "unlabelled": self.unlabelled, "left_out": self.left_out,
            "majority_baseline": self.majority_baseline, "classes": dict(self.classes),
            "macro_f1": self.macro_f1, "confusion": {label: dict(row) for label, row in self.confusion.items()},
            "figures": self.all_figures, "figure_ci95": {n: list(v) for n, v in self.figures.intervals.items()},
            "per_class": self.figures.classes, "calibration": self.figures.bins, "note": self.note,
        }  # fmt: skip


@dataclass(slots=True)
class Tally:
    """Counts of one scorer over the rows so far. Memory grows only by 16 bytes for each row with a confidence."""

    scorer: Scorer
    outcomes: Counter[ScoreOutcome] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    correct: int = 0
    points: float = 0.0
    squares: float = 0.0
    counted: int = 0
    unlabelled: int = 0
    left_out: int = 0
    error: str | None = None
    #: Of the scored rows with a value: whether all were true or false, and all confidences probabilities.
    all_truths: bool = True
    all_probabilities: bool = True
    confidences: array[float] = field(default_factory=lambda: array("d"))
    truths: array[int] = field(default_factory=lambda: array("b"))
    weights: array[int] = field(default_factory=lambda: array("l"))
    #: Counted rows without a confidence: expected yes, and expected no.
    unsure: Counter[bool] = field(default_factory=Counter)

    def add(self, judgement: Judgement | None, times: int) -> None:
        """Count ``times`` equal rows."""
        if judgement is None:
            self.unlabelled += times
            return
        self.outcomes[judgement.outcome] += times
        self.error = self.error or judgement.error
        if judgement.outcome not in COUNTED:
            return
        value = judgement.value
        if value is None:
            self.left_out += times
            return
        self.counted += times
        self.correct += times * (value == 1.0)
        self.points += times * value
        self.squares += times * value * value
        if judgement.outcome is ScoreOutcome.SCORED:
            self.all_truths = self.all_truths and judgement.is_truth
        if judgement.expected is not None:
            self._count_labels(judgement, judgement.expected, times)

    def _count_labels(self, judgement: Judgement, expected: str, times: int) -> None:
        # Past the limit the labels are counted no further than to know that they are too many.
        if len(self.labels) <= MOST_CLASSES or expected in self.labels:
            self.labels[expected] += times
        pair = (expected, judgement.predicted or "")
        if len(self.pairs) <= MOST_CLASSES**2 or pair in self.pairs:
            self.pairs[pair] += times
        truth = judgement.predicted == expected if self.scorer.labels == "choices" else expected == "true"
        if judgement.confidence is None:
            self.unsure[truth] += times
            return
        self.confidences.append(judgement.confidence)
        self.truths.append(truth)
        self.weights.append(times)
        self.all_probabilities = self.all_probabilities and judgement.is_probability

    @property
    def metric(self) -> str:
        """That of the scorer; a function of the user's that says right or wrong makes an accuracy."""
        made = self.scorer.metric
        return "accuracy" if made == "mean" and self.outcomes[ScoreOutcome.SCORED] and self.all_truths else made

    def score(self, name: str) -> Score:
        n, metric = self.counted, self.metric
        is_rate = metric == "accuracy"
        few = len(self.labels) <= MOST_CLASSES and len(self.pairs) <= MOST_CLASSES**2
        return Score(
            name=name,
            metric=metric,
            value=self.points / n if n else None,
            n=n,
            correct=self.correct,
            unparsed=self.outcomes[ScoreOutcome.UNPARSED],
            truncated=self.outcomes[ScoreOutcome.TRUNCATED],
            abstain=self.outcomes[ScoreOutcome.ABSTAIN],
            infra_error=self.outcomes[ScoreOutcome.INFRA_ERROR],
            scorer_errors=self.outcomes[ScoreOutcome.SCORER_ERROR],
            scorer_error=self.error,
            unlabelled=self.unlabelled,
            left_out=self.left_out,
            classes=dict(sorted(self.labels.items())) if len(self.labels) <= MOST_CLASSES else {},
            majority=max(self.labels.values(), default=0) if few and self._kind() in ("classes", "binary") else None,
            ci95=wilson(self.correct, n)
            if is_rate
            else mean_interval(self.points, self.squares, n, self.scorer.bounds),
            confusion=self._confusion() if is_rate and few else {},
            figures=self._figures(is_rate and few),
            note=None if few or not is_rate else f"more than {MOST_CLASSES} different labels: no figures of classes",
        )

    def _figures(self, of_labels: bool) -> Figures:
        found = Figures()
        kind = self._kind()
        # Sorted, so that the order of the rows changes nothing.
        pairs = dict(sorted(self.pairs.items()))
        if of_labels and pairs and kind == "classes":
            found.update(of_classes(pairs))
        if of_labels and pairs and kind == "binary":
            found.update(of_yes_or_no(pairs))
        if self.confidences and kind in ("binary", "choices"):
            self._add_confidence(found, kind)
        return found

    def _kind(self) -> str | None:
        """What the labels are. Those of a function of the user's are what they look like, where there are any."""
        if self.scorer.labels != "any":
            return self.scorer.labels
        if not any(given for _, given in self.pairs):
            return None
        return "binary" if self.labels.keys() <= {"true", "false"} and self.confidences else "classes"

    def _add_confidence(self, found: Figures, kind: str) -> None:
        """What could not be read counts as being as sure as can be of the wrong thing."""
        import numpy as np

        low, high = (0.0, 1.0) if self.all_probabilities else (min(self.confidences) - 1, max(self.confidences) + 1)
        unsure = [(low if truth else high, truth, times) for truth, times in self.unsure.items() if times]
        confidence = np.array([*self.confidences, *(each[0] for each in unsure)])
        truth = np.array([*self.truths, *(each[1] for each in unsure)], dtype=bool)
        weight = np.array([*self.weights, *(each[2] for each in unsure)], dtype=np.float64)
        if kind == "binary":
            found.update(of_ranking(confidence, truth, weight))
        if self.all_probabilities:
            found.update(of_calibration(confidence, truth, weight))

    def _confusion(self) -> dict[str, dict[str, int]]:
        """Empty where the classes are too many for a table."""
        if not 0 < len(self.labels) <= MOST_SHOWN or len({given for _, given in self.pairs}) > MOST_SHOWN + 1:
            return {}
        found: dict[str, dict[str, int]] = {label: {} for label in sorted(self.labels)}
        for (label, given), times in sorted(self.pairs.items()):
            found[label][given] = times
        return found
