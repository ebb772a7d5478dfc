"""Figures of many verdicts, by scikit-learn and SciPy: of classes, of yes or no, of probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptmill.scoring.statistics import bootstrap, calibration, ranking
from promptmill.scoring.statistics.clusters import Clusters, Floats, Interval, Ints, Truths
from promptmill.scoring.statistics.means import mean_interval, share_interval, wilson
from promptmill.scoring.statistics.thresholds import best_threshold

#: An expected and a predicted label, each as JSON; an answer that could not be read was predicted ''.
Pair = tuple[str, str]

#: Most classes whose figures are computed: with more, the field is a text or a number.
MOST_CLASSES = 200

#: Largest distance between two labels that are whole numbers on one scale.
LONGEST_SCALE = 100

#: Why a figure has no interval.
FEW_OF_A_CLASS = "fewer than two independent rows of a class"
ONE_ROW = "fewer than two independent rows"
BIASED = "chance alone raises it: see ece_debiased"


@dataclass(slots=True)
class Figures:
    """Figures by name with their 95 % intervals, and the tables they come from."""

    values: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    #: Why a figure has no interval, for each without one.
    reasons: dict[str, str] = field(default_factory=dict)
    #: Label -> precision, recall, f1 and n.
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    #: Mean confidence, share of yes, and rows of each bin.
    bins: list[dict[str, float]] = field(default_factory=list)

    def add(self, name: str, value: float | None, interval: Interval | None = None, reason: str = ONE_ROW) -> None:
        """One figure; ``reason``: why it has no interval, where it has none."""
        self.values[name] = value
        if value is not None and interval is not None:
            self.intervals[name] = interval
        elif value is not None:
            self.reasons[name] = reason

    def update(self, other: Figures) -> None:
        self.values |= other.values
        self.intervals |= other.intervals
        self.reasons |= other.reasons
        self.classes |= other.classes
        self.bins += other.bins


@dataclass(frozen=True, slots=True)
class Labelled:
    """Rows by what was expected and predicted: ``cell`` is the place of each row's pair among ``pairs``."""

    pairs: Sequence[Pair]
    cell: Ints
    clusters: Clusters

    @classmethod
    def of(cls, pairs: Sequence[Pair], cell: Ints, clusters: Clusters) -> Labelled:
        """Sorted, so that the order of the rows changes nothing."""
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        rank = np.empty(len(pairs), dtype=np.int64)
        rank[order] = np.arange(len(pairs))
        return cls([pairs[place] for place in order], rank[cell], clusters)

    @property
    def counts(self) -> dict[Pair, int]:
        return dict(zip(self.pairs, np.bincount(self.cell, minlength=len(self.pairs)).tolist(), strict=True))

    @property
    def labels(self) -> list[str]:
        return sorted({label for pair in self.pairs for label in pair if label})


def of_classes(rows: Labelled) -> Figures:
    """Macro and weighted F1, precision and recall, kappa; on a scale of whole numbers also quadratic kappa."""
    from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

    labels, counts = rows.labels, rows.counts
    if not labels or len(labels) > MOST_CLASSES:
        return Figures()
    wanted, given, weight = _columns(counts)
    said: dict[str, Any] = {"labels": labels, "sample_weight": weight, "zero_division": 0}
    precision, recall, f1, share = precision_recall_fscore_support(wanted, given, **said)
    values = {
        "macro_f1": float(np.mean(f1)),
        "weighted_f1": float(np.average(f1, weights=share)),
        "macro_precision": float(np.mean(precision)),
        "macro_recall": float(np.mean(recall)),
        # One class has no agreement beyond chance, and no kappa.
        "kappa": _finite(cohen_kappa_score(wanted, given, labels=[*labels, ""], sample_weight=weight))
        if len({*wanted, *given}) > 1
        else None,
    }
    scale = scale_of(labels)
    if scale is not None:
        values["quadratic_kappa"] = _quadratic_kappa(counts, scale)
    found = Figures(
        classes={
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "n": float(n)}
            for label, p, r, f, n in zip(labels, precision, recall, f1, share, strict=True)
        }
    )
    intervals = _class_intervals(rows, labels, scale)
    for name, value in values.items():
        found.add(name, value, intervals.get(name))
    return found


def of_yes_or_no(rows: Labelled) -> Figures:
    """Precision, recall and F1 of yes. What could not be read is a no where yes was expected, and a yes otherwise."""
    # Right, missed, false, and rightly no.
    kind = np.array([kind_of(*pair) for pair in rows.pairs], dtype=np.int64)[rows.cell]
    found, right = Figures(), kind == 0
    for name, chosen in (("precision", right | (kind == 2)), ("recall", right | (kind == 1))):
        share = right[chosen].astype(np.float64)
        found.add(name, _mean(share), share_interval(share, rows.clusters.at(chosen)))
    counts = np.bincount(kind, minlength=4).astype(np.float64)
    spans = bootstrap.intervals(kind, 4, rows.clusters, binary_figures)
    total = 2 * counts[0] + counts[1] + counts[2]
    found.add("f1", float(2 * counts[0] / total) if total else None, spans.get("f1"))
    return found


def kind_of(wanted: str, given: str) -> int:
    if wanted == "true":
        return 0 if given == "true" else 1
    return 3 if given == "false" else 2


def binary_figures(counts: Floats) -> dict[str, Floats]:
    """F1, precision and recall of counts of shape (drawings, 4): right, missed, false, and rightly no."""
    right, missed, false = counts[:, 0], counts[:, 1], counts[:, 2]
    return {
        "f1": _ratio(2 * right, 2 * right + missed + false),
        "precision": _ratio(right, right + false),
        "recall": _ratio(right, right + missed),
    }


def of_ranking(confidence: Floats, truth: Truths, clusters: Clusters) -> Figures:
    """AUC and average precision. Both need a yes and a no among what was expected."""
    from sklearn.metrics import average_precision_score

    if truth.all() or not truth.any():
        return Figures(values={"auc": None, "average_precision": None})
    found = Figures()
    found.add("auc", ranking.auc(confidence, truth), ranking.auc_interval(confidence, truth, clusters), FEW_OF_A_CLASS)
    precision, yes = float(average_precision_score(truth, confidence)), clusters.at(truth).effective
    # The binomial interval of Boyd, Eng and Page (2013).
    found.add("average_precision", precision, wilson(precision * yes, yes))
    return found


def of_calibration(confidence: Floats, truth: Truths, clusters: Clusters) -> Figures:
    """Brier score, and the expected calibration error with bins of equal mass: as it is, and without its bias."""
    found, squares = Figures(), (confidence - truth) ** 2
    found.add("brier", _mean(squares), share_interval(squares, clusters))
    binned = calibration.bins(confidence, truth, clusters)
    found.bins = binned.to_json()
    found.add("ece", calibration.raw_error(binned), None, BIASED)
    found.add("ece_debiased", calibration.error(binned), calibration.error_interval(binned))
    return found


def of_threshold(confidence: Floats, truth: Truths, clusters: Clusters, costs: tuple[float, float] | None) -> Figures:
    """The best threshold of a probability, and what it reaches on the half of the rows on which it was not chosen."""
    found = Figures()
    best = best_threshold(confidence, truth, clusters, costs)
    if best is None:
        return found
    found.add("best_threshold", best.value, None, "chosen, not measured: see the figure beside it")
    if costs is not None:
        spent = np.choose(best.kinds, [0.0, costs[1], costs[0], 0.0])
        found.add("best_threshold_cost", _mean(spent), mean_interval(spent, best.clusters, (0.0, max(costs))))
        return found
    reached = binary_figures(np.bincount(best.kinds, minlength=4).astype(np.float64)[None])["f1"][0]
    spans = bootstrap.intervals(best.kinds, 4, best.clusters, lambda drawn: {"f1": binary_figures(drawn)["f1"]})
    found.add("best_threshold_f1", float(reached), spans.get("f1"))
    return found


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _columns(counts: Mapping[Pair, int]) -> tuple[list[str], list[str], list[int]]:
    wanted, given = zip(*counts, strict=True)
    return list(wanted), list(given), list(counts.values())


def scale_of(labels: Sequence[str]) -> range | None:
    """The scale on which all labels lie, if they are whole numbers near each other."""
    values = [json.loads(label) for label in labels]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values) or len(values) < 2:
        return None
    low, high = min(values), max(values)
    return range(low, high + 1) if high - low <= LONGEST_SCALE else None


def _on_scale(pair: Pair, scale: range) -> tuple[int, int]:
    """Places on the scale; an answer that could not be read is put as far from the expected value as can be."""
    low, high = scale[0], scale[-1]
    want = json.loads(pair[0])
    farthest = low if want - low > high - want else high
    return want - low, (json.loads(pair[1]) if pair[1] else farthest) - low


def _quadratic_kappa(counts: Mapping[Pair, int], scale: range) -> float | None:
    from sklearn.metrics import cohen_kappa_score

    wanted, given = zip(*(_on_scale(pair, scale) for pair in counts), strict=True)
    places = list(range(len(scale)))
    weight = list(counts.values())
    return _finite(cohen_kappa_score(wanted, given, labels=places, weights="quadratic", sample_weight=weight))


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _class_intervals(rows: Labelled, labels: Sequence[str], scale: range | None) -> dict[str, Interval]:
    # Beside the pairs that were seen, what might have been: a mistake in a perfect run, a right answer in one without.
    unseen = [*_a_mistake_each(labels), *((label, label) for label in labels)]
    pairs = list(dict.fromkeys([*rows.pairs, *unseen]))
    return bootstrap.intervals(rows.cell, len(pairs), rows.clusters, figures_of(pairs, labels, scale))


def _a_mistake_each(labels: Sequence[str]) -> list[Pair]:
    return [(label, labels[place - 1] if len(labels) > 1 else "") for place, label in enumerate(labels)]


def figures_of(pairs: Sequence[Pair], labels: Sequence[str], scale: range | None) -> Any:
    """What gives the figures of :func:`of_classes` for counts of shape (drawings, pairs)."""
    places = {label: place for place, label in enumerate([*labels, ""])}
    wanted, given = (np.array([places[pair[side]] for pair in pairs]) for side in (0, 1))
    on_scale = None if scale is None else np.array([_on_scale(pair, scale) for pair in pairs])

    def figures(drawn: Floats) -> dict[str, Floats]:
        found = class_figures(drawn, wanted, given, len(labels))
        if on_scale is not None:
            off = (on_scale[:, 0] - on_scale[:, 1]) ** 2.0
            found["quadratic_kappa"] = weighted_kappa(drawn, on_scale[:, 0], on_scale[:, 1], off)
        return found

    return figures


def class_figures(drawn: Floats, rows: NDArray[Any], columns: NDArray[Any], classes: int) -> dict[str, Floats]:
    """The figures of :func:`of_classes` for each drawing: counts of shape (drawings, pairs).

    ``rows`` and ``columns`` are the places of the pairs' labels; those from ``classes`` on are of no class.
    """
    expected, predicted = _sums(drawn, rows, classes + 1), _sums(drawn, columns, classes + 1)
    right = _sums(np.where(rows == columns, drawn, 0.0), rows, classes + 1)
    total = drawn.sum(axis=1)
    precision, recall = _ratio(right, predicted), _ratio(right, expected)
    f1 = _ratio(2 * right, expected + predicted)
    real = slice(0, classes)
    # A drawing without a class has no figure of it, as if the class did not exist.
    there = (expected + predicted)[:, real] > 0
    agreed, by_chance = right.sum(axis=1) / total, (expected * predicted).sum(axis=1) / total**2
    return {
        "macro_f1": _mean_where(f1[:, real], there),
        "weighted_f1": (f1 * expected)[:, real].sum(axis=1) / total,
        "macro_precision": _mean_where(precision[:, real], there),
        "macro_recall": _mean_where(recall[:, real], there),
        "kappa": _ratio(agreed - by_chance, 1 - by_chance),
    }


def weighted_kappa(drawn: Floats, rows: NDArray[Any], columns: NDArray[Any], off: Floats) -> Floats:
    """Cohen's kappa with the disagreement ``off`` of each pair, for each drawing."""
    size = int(max(rows.max(), columns.max())) + 1
    expected, predicted = _sums(drawn, rows, size), _sums(drawn, columns, size)
    steps = np.arange(size)
    weights = (steps[:, None] - steps[None, :]) ** 2.0
    by_chance = np.einsum("di,ij,dj->d", expected, weights, predicted) / drawn.sum(axis=1)
    return 1.0 - _ratio((drawn * off).sum(axis=1), by_chance)


def _sums(drawn: Floats, places: NDArray[Any], size: int) -> Floats:
    found: Floats = drawn @ np.eye(size)[places]
    return found


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _mean_where(values: Floats, there: NDArray[np.bool_]) -> Floats:
    return _ratio(np.where(there, values, 0.0).sum(axis=1), there.sum(axis=1).astype(np.float64))
