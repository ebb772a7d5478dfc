"""Counts of one scorer's verdicts over any number of rows, and the score they add up to."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from promptmill.scoring.scorers import Item, JsonObject, ScoreOutcome, ScoreVerdict, Unreadable, as_label
from promptmill.scoring.scorers.aggregates import (
    MOST_CLASSES,
    Figures,
    Labelled,
    Pair,
    of_calibration,
    of_classes,
    of_ranking,
    of_threshold,
    of_yes_or_no,
)
from promptmill.scoring.scorers.repeats import REDUCERS, reduced
from promptmill.scoring.statistics.clusters import Clusters, Floats
from promptmill.scoring.statistics.means import effective_rows, mean_interval, share_interval
from promptmill.tasks.normalising import STEPS, normalised

if TYPE_CHECKING:
    from promptmill.scoring.scorers.scorer import Scorer

#: Outcomes in the denominator: an answer that cannot be read is a wrong answer.
COUNTED = (ScoreOutcome.SCORED, ScoreOutcome.UNPARSED, ScoreOutcome.TRUNCATED, ScoreOutcome.SCORER_ERROR)

#: Most classes whose confusion matrix is shown.
MOST_SHOWN = 20

#: Share of answers that were cut off from which on it is told.
MOST_CUT = 0.02

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
    #: Whether the value was true or false before it became a number; decides between a rate and a mean.
    is_truth: bool = False
    is_probability: bool = False
    #: None where nothing is right or wrong by this score.
    is_right: bool | None = None


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
        unread = scorer.unanswered_worth if outcome is ScoreOutcome.INFRA_ERROR else scorer.unread
        return Judgement(unread, None, wanted, outcome, is_right=None if unread is None else False)
    try:
        found = scorer(output, expected, item)
        verdict = found if isinstance(found, ScoreVerdict) else ScoreVerdict(found)
        value = _number(verdict.value)
    except Unreadable:
        right = None if scorer.unread is None else False
        return Judgement(scorer.unread, None, wanted, ScoreOutcome.UNPARSED, is_right=right)
    except (Exception, SystemExit) as problem:
        # The user's own code may raise anything, and may ask to exit; the other rows are scored all the same.
        return Judgement(0.0, None, wanted, ScoreOutcome.SCORER_ERROR, error=_said(problem), is_right=False)
    if verdict is found and (verdict.expected is not None or verdict.predicted is not None):
        given: str | None = as_label(verdict.predicted)
        wanted = as_label(verdict.expected)
    else:
        given = as_label(output[name]) if name is not None else None
    outcome = ScoreOutcome.ABSTAIN if value is None else outcome
    is_truth = isinstance(verdict.value, bool)
    right = verdict.value if isinstance(verdict.value, bool) else _is_right(scorer, value)
    return Judgement(value, given, wanted, outcome, verdict.confidence, None, is_truth, verdict.is_probability, right)


def _is_right(scorer: Scorer, value: float | None) -> bool | None:
    return None if value is None or scorer.right is None else value == scorer.right


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
    #: As many rows that are no copies of each other would tell as much.
    n_effective: float
    #: Rows that are right; None where nothing is right or wrong by this score.
    correct: int | None
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
    def has_copies(self) -> bool:
        """Whether the rows tell less than their number says."""
        return self.n_effective < self.n - 0.5

    @property
    def majority_baseline(self) -> float | None:
        """What always giving the commonest label would reach."""
        return self.majority / self.n if self.n and self.majority is not None else None

    @property
    def all_figures(self) -> dict[str, float | None]:
        """The value under its metric's name, and every other figure under its own."""
        return {self.metric: self.value, **self.figures.values}

    def interval(self, figure: str) -> tuple[float, float] | None:
        """The 95 % interval of one of ``all_figures``."""
        return self.ci95 if figure == self.metric else self.figures.intervals.get(figure)

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "value": self.value, "ci95": list(self.ci95) if self.ci95 else None, "n": self.n,
            "n_effective": round(self.n_effective, 3),
            "correct": self.correct, "unparsed": self.unparsed, "truncated": self.truncated, "abstain": self.abstain,
            "infra_error": self.infra_error, "scorer_errors": self.scorer_errors, "scorer_error": self.scorer_error,
            "unlabelled": self.unlabelled, "left_out": self.left_out,
            "majority_baseline": self.majority_baseline, "classes": dict(self.classes),
            "macro_f1": self.figures.values.get("macro_f1"),
            "confusion": {label: dict(row) for label, row in self.confusion.items()},
            "figures": self.all_figures, "figure_ci95": {n: list(v) for n, v in self.figures.intervals.items()},
            "no_interval": self.figures.reasons,
            "per_class": self.figures.classes, "calibration": self.figures.bins, "note": self.note,
        }  # fmt: skip


@dataclass(slots=True)
class Tally:
    """One scorer's verdicts over the rows so far: of each row that is counted, some 30 bytes."""

    scorer: Scorer
    outcomes: Counter[ScoreOutcome] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0
    left_out: int = 0
    right: int = 0
    error: str | None = None
    #: Whether the values of all scored rows were true or false, and all confidences probabilities.
    all_truths: bool = True
    all_probabilities: bool = True
    #: Columns of counted rows: worth, key of the input, place of the pair of labels (-1: it has none), and
    #: confidence (NaN: it has none).
    worth: array[float] = field(default_factory=lambda: array("d"))
    keys: array[int] = field(default_factory=lambda: array("q"))
    cells: array[int] = field(default_factory=lambda: array("i"))
    confidences: array[float] = field(default_factory=lambda: array("d"))
    #: Whether its answer was cut off before it could be read.
    cut: array[int] = field(default_factory=lambda: array("b"))
    #: Pairs of labels by their places, until there are too many to be classes.
    pairs: dict[Pair, int] = field(default_factory=dict)

    def add(self, judgement: Judgement | None, key: int) -> None:
        """Count one row. ``key``: equal for rows of one input, which are copies of each other."""
        if judgement is None:
            self.unlabelled += 1
            return
        value, predicted, expected, outcome, confidence, error, is_truth, is_probability, is_right = judgement
        self.outcomes[outcome] += 1
        self.error = self.error or error
        if value is None:
            self.left_out += outcome in COUNTED
            return
        self.right += is_right is True
        if outcome is ScoreOutcome.SCORED:
            self.all_truths = self.all_truths and is_truth
        if confidence is not None:
            self.all_probabilities = self.all_probabilities and is_probability
        self.worth.append(value)
        self.keys.append(key)
        self.cut.append(outcome is ScoreOutcome.TRUNCATED)
        self.confidences.append(math.nan if confidence is None else confidence)
        self.cells.append(-1 if expected is None else self._cell(expected, predicted or ""))

    def _cell(self, expected: str, predicted: str) -> int:
        # Past the limit the labels are counted no further than to know that they are too many.
        if len(self.labels) <= MOST_CLASSES or expected in self.labels:
            self.labels[expected] += 1
        if len(self.pairs) <= MOST_CLASSES**2:
            return self.pairs.setdefault((expected, predicted), len(self.pairs))
        return self.pairs.get((expected, predicted), -1)

    @property
    def metric(self) -> str:
        """That of the scorer; a function of the user's that says right or wrong makes an accuracy."""
        made = self.scorer.metric
        if self.scorer.reducer:
            return REDUCERS[self.scorer.reducer][0]
        return "accuracy" if made == "mean" and self.outcomes[ScoreOutcome.SCORED] and self.all_truths else made

    def score(self, name: str) -> Score:
        worth, clusters = np.array(self.worth), Clusters.of(np.array(self.keys, dtype=np.int64))
        left_out = self.left_out
        if self.scorer.reducer:
            worth, few_repeats = reduced(self.scorer.repeats, worth, clusters)
            clusters, left_out = Clusters.alone(len(worth)), left_out + few_repeats
        n, is_rate = len(worth), self.metric == "accuracy"
        bounds = (0.0, 1.0) if is_rate or self.scorer.reducer else self._bounds(worth)
        few = len(self.labels) <= MOST_CLASSES and len(self.pairs) <= MOST_CLASSES**2
        figures = Figures() if self.scorer.reducer else self._figures(is_rate and few, clusters)
        interval = mean_interval(worth, clusters, bounds)
        cut = np.array(self.cut, dtype=bool)
        if is_rate and cut.any() and not cut.all():
            figures.add("accuracy_uncut", float(worth[~cut].mean()), share_interval(worth[~cut], clusters.at(~cut)))
        if n and interval is None:
            figures.reasons[self.metric] = "equal values" if clusters.count > 1 else "fewer than two independent rows"
        return Score(
            name=name,
            metric=self.metric,
            value=float(worth.sum()) / n if n else None,
            n=n,
            n_effective=_effective(worth, clusters, bounds),
            correct=self.right if self._has_right() and not self.scorer.reducer else None,
            unparsed=self.outcomes[ScoreOutcome.UNPARSED],
            truncated=self.outcomes[ScoreOutcome.TRUNCATED],
            abstain=self.outcomes[ScoreOutcome.ABSTAIN],
            infra_error=self.outcomes[ScoreOutcome.INFRA_ERROR],
            scorer_errors=self.outcomes[ScoreOutcome.SCORER_ERROR],
            scorer_error=self.error,
            unlabelled=self.unlabelled,
            left_out=left_out,
            classes=dict(sorted(self.labels.items())) if len(self.labels) <= MOST_CLASSES else {},
            majority=max(self.labels.values(), default=0) if few and self._kind() in ("classes", "binary") else None,
            ci95=interval,
            confusion=self._confusion() if is_rate and few else {},
            figures=figures,
            note=self._note(is_rate, few),
        )

    def _bounds(self, worth: Floats) -> tuple[float, float]:
        """Those of the scorer, where its values keep to them."""
        low, high = self.scorer.limits
        return (low, high if not len(worth) or worth.max() <= high else math.inf)

    def _note(self, is_rate: bool, few: bool) -> str | None:
        """What readers of the figures must know, in a line."""
        notes, cut = [], sum(self.cut)
        if cut > MOST_CUT * len(self.cut):
            notes.append(f"{cut:,} of {len(self.cut):,} answers were cut off at max_tokens: raise it")
        if is_rate and not few:
            notes.append(f"more than {MOST_CLASSES} different labels: no figures of classes")
        elif is_rate and self._kind() == "classes":
            counts = Counter(self.cells)
            alike = sum(counts[place] for pair, place in self.pairs.items() if _differ_in_spelling(*pair))
            if alike:
                notes.append(f"{alike:,} wrong answers would be right with normalise: [{', '.join(STEPS)}]")
        return "; ".join(notes) or None

    def _figures(self, of_labels: bool, clusters: Clusters) -> Figures:
        found, kind = Figures(), self._kind()
        cell = np.array(self.cells, dtype=np.int64)
        labelled = cell >= 0
        if not labelled.any():
            return found
        if of_labels and kind in ("classes", "binary"):
            rows = Labelled.of(list(self.pairs), cell[labelled], clusters.at(labelled))
            found.update(of_classes(rows) if kind == "classes" else of_yes_or_no(rows))
        if kind in ("binary", "choices") and not np.isnan(np.array(self.confidences)).all():
            truth = np.array([self._is_yes(pair, kind) for pair in self.pairs], dtype=bool)[cell[labelled]]
            self._add_confidence(found, kind, truth, np.array(self.confidences)[labelled], clusters.at(labelled))
        return found

    def _has_right(self) -> bool:
        """Whether a row is right or wrong. Functions of the user's say so by what they return, where they return."""
        return self.scorer.right is not None or self.metric == "accuracy" or not self.outcomes[ScoreOutcome.SCORED]

    def _kind(self) -> str | None:
        """What the labels are. Those of a function of the user's are what they look like, where there are any."""
        if self.scorer.labels != "any":
            return self.scorer.labels
        if not any(given for _, given in self.pairs):
            return None
        is_sure = any(each == each for each in self.confidences)
        return "binary" if self.labels.keys() <= {"true", "false"} and is_sure else "classes"

    def _is_yes(self, pair: Pair, kind: str) -> bool:
        """Whether what the confidence is about was the case: yes was expected, or the choice made was right."""
        return pair[0] == pair[1] if kind == "choices" else pair[0] == "true"

    def _add_confidence(self, found: Figures, kind: str, truth: Any, confidence: Floats, clusters: Clusters) -> None:
        """What could not be read counts as being as sure as can be of the wrong thing."""
        known = ~np.isnan(confidence)
        low, high = (0.0, 1.0) if self.all_probabilities else (confidence[known].min() - 1, confidence[known].max() + 1)
        confidence = np.where(known, confidence, np.where(truth, low, high))
        if kind == "binary":
            found.update(of_ranking(confidence, truth, clusters))
        if not self.all_probabilities:
            return
        found.update(of_calibration(confidence, truth, clusters))
        if kind == "binary":
            found.update(of_threshold(confidence, truth, clusters, self.scorer.costs))

    def _confusion(self) -> dict[str, dict[str, int]]:
        """Empty where the classes are too many for a table."""
        if not 0 < len(self.labels) <= MOST_SHOWN or len({given for _, given in self.pairs}) > MOST_SHOWN + 1:
            return {}
        counts = Counter(self.cells)
        found: dict[str, dict[str, int]] = {label: {} for label in sorted(self.labels)}
        for (label, given), place in sorted(self.pairs.items()):
            found[label][given] = counts[place]
        return found


def _differ_in_spelling(expected: str, predicted: str) -> bool:
    """Whether two labels, as JSON, are different texts and would be one in another spelling."""
    if expected == predicted or not (expected.startswith('"') and predicted.startswith('"')):
        return False
    one, two = (normalised(json.loads(label), tuple(STEPS)) for label in (expected, predicted))
    return one == two


def _effective(worth: Floats, clusters: Clusters, bounds: tuple[float, float]) -> float:
    if clusters.count == len(worth):
        return float(len(worth))
    low, high = bounds
    if not math.isfinite(high - low):
        return clusters.effective
    # Copies whose answers differ tell more of their question, and of no other one.
    return min(float(clusters.count), effective_rows((worth - low) / (high - low), clusters))
