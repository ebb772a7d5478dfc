"""Figures of many verdicts, by scikit-learn and SciPy: of classes, of yes or no, of probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptmill.scoring.scorers.intervals import mean_interval, wilson

Floats = NDArray[np.float64]
Interval = tuple[float, float]

#: Rows by (expected label, predicted label), each as JSON; an answer that could not be read was predicted ''.
Pairs = Mapping[tuple[str, str], int]

#: Most classes whose figures are computed: with more, the field is a text or a number.
MOST_CLASSES = 200

#: Largest distance between two labels that are whole numbers on one scale.
LONGEST_SCALE = 100

#: Draws of a bootstrap, and the quantiles of its 95 % interval.
DRAWS = 1000
QUANTILES = (2.5, 97.5)

#: Bins of the calibration error, of equal mass (Nixon et al. 2019, "Measuring Calibration in Deep Learning").
BINS = 10


@dataclass(slots=True)
class Figures:
    """Figures by name with their 95 % intervals, and the tables they come from."""

    values: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    #: Label -> precision, recall, f1 and n.
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    #: Mean confidence, share of yes, and rows of each bin.
    bins: list[dict[str, float]] = field(default_factory=list)

    def update(self, other: Figures) -> None:
        self.values |= other.values
        self.intervals |= other.intervals
        self.classes |= other.classes
        self.bins += other.bins


def of_classes(pairs: Pairs) -> Figures:
    """Macro and weighted F1, precision and recall, kappa; on a scale of whole numbers also quadratic kappa."""
    from sklearn.metrics import cohen_kappa_score, f1_score, precision_recall_fscore_support

    labels = _labels(pairs)
    if not labels or len(labels) > MOST_CLASSES:
        return Figures()
    wanted, given, weight = _columns(pairs)
    said: dict[str, Any] = {"labels": labels, "sample_weight": weight, "zero_division": 0}
    precision, recall, f1, _ = precision_recall_fscore_support(wanted, given, **said)
    counts = {label: sum(times for (want, _), times in pairs.items() if want == label) for label in labels}
    found = Figures(
        values={
            "macro_f1": float(np.mean(f1)),
            "weighted_f1": float(f1_score(wanted, given, average="weighted", **said)),
            "macro_precision": float(np.mean(precision)),
            "macro_recall": float(np.mean(recall)),
            # Of one class there is no agreement beyond chance, and no kappa.
            "kappa": _finite(cohen_kappa_score(wanted, given, labels=[*labels, ""], sample_weight=weight))
            if len({*wanted, *given}) > 1
            else None,
        },
        classes={
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "n": counts[label]}
            for label, p, r, f in zip(labels, precision, recall, f1, strict=True)
        },
    )
    scale = _scale(labels)
    if scale is not None:
        found.values["quadratic_kappa"] = _quadratic_kappa(pairs, scale)
    found.intervals = _bootstrapped(pairs, labels, scale)
    return found


def of_yes_or_no(pairs: Pairs) -> Figures:
    """Precision, recall and F1 of yes. What could not be read is a no where yes was expected, and a yes otherwise."""
    right = pairs.get(("true", "true"), 0)
    missed = sum(times for (want, given), times in pairs.items() if want == "true" and given != "true")
    false = sum(times for (want, given), times in pairs.items() if want != "true" and given != "false")
    found = Figures()
    for name, total in (("precision", right + false), ("recall", right + missed)):
        found.values[name] = right / total if total else None
        interval = wilson(right, total)
        if interval:
            found.intervals[name] = interval
    total = 2 * right + false + missed
    found.values["f1"] = 2 * right / total if total else None
    counts = np.array([right, false, missed, sum(pairs.values()) - right - false - missed], dtype=np.float64)
    span = _quantiles(counts, lambda drawn: _ratio(2 * drawn[:, 0], 2 * drawn[:, 0] + drawn[:, 1] + drawn[:, 2]))
    if span:
        found.intervals["f1"] = span
    return found


def of_ranking(confidence: Floats, truth: NDArray[np.bool_], weight: Floats) -> Figures:
    """AUC and average precision. Both need a yes and a no among what was expected."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if truth.all() or not truth.any():
        return Figures(values={"auc": None, "average_precision": None})
    found = Figures(
        values={
            "auc": float(roc_auc_score(truth, confidence, sample_weight=weight)),
            "average_precision": float(average_precision_score(truth, confidence, sample_weight=weight)),
        }
    )
    interval = _delong(np.repeat(confidence, weight.astype(int)), np.repeat(truth, weight.astype(int)))
    if interval:
        found.intervals["auc"] = interval
    return found


def of_calibration(confidence: Floats, truth: NDArray[np.bool_], weight: Floats) -> Figures:
    """Brier score, and the expected calibration error with bins of equal mass."""
    squares = (confidence - truth) ** 2
    n = float(weight.sum())
    found = Figures(values={"brier": float((squares * weight).sum() / n)})
    span = mean_interval(float((squares * weight).sum()), float((squares**2 * weight).sum()), int(n))
    if span:
        found.intervals["brier"] = span
    found.bins = _bins(confidence, truth, weight)
    found.values["ece"] = sum(abs(each["confidence"] - each["share"]) * each["n"] for each in found.bins) / n
    return found


def _bins(confidence: Floats, truth: NDArray[np.bool_], weight: Floats) -> list[dict[str, float]]:
    """Rows of one confidence are never divided, so that their order cannot matter."""
    order = np.argsort(confidence, kind="stable")
    levels, first = np.unique(confidence[order], return_index=True)
    rows, yes = np.add.reduceat(weight[order], first), np.add.reduceat((weight * truth)[order], first)
    place = np.minimum(((np.cumsum(rows) - rows / 2) / rows.sum() * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float((levels * rows)[inside].sum() / rows[inside].sum()),
            "share": float(yes[inside].sum() / rows[inside].sum()),
            "n": float(rows[inside].sum()),
        }
        for bin_ in np.unique(place)
        for inside in [place == bin_]
    ]


def _delong(confidence: Floats, truth: NDArray[np.bool_]) -> Interval | None:
    """The 95 % interval of an AUC (DeLong et al. 1988, with the ranks of Sun and Xu 2014), on the logit scale."""
    from scipy.special import expit, logit
    from scipy.stats import norm, rankdata

    yes, no = confidence[truth], confidence[~truth]
    if len(yes) < 2 or len(no) < 2:
        return None
    ranks = rankdata(np.concatenate([yes, no]))
    above = (ranks[: len(yes)] - rankdata(yes)) / len(no)
    below = 1 - (ranks[len(yes) :] - rankdata(no)) / len(yes)
    auc = float(above.mean())
    variance = float(above.var(ddof=1) / len(yes) + below.var(ddof=1) / len(no))
    if not 0.0 < auc < 1.0 or variance == 0.0:
        return None
    half = float(norm.ppf(0.975)) * variance**0.5 / (auc * (1 - auc))
    return float(expit(logit(auc) - half)), float(expit(logit(auc) + half))


def _labels(pairs: Pairs) -> list[str]:
    return sorted({label for pair in pairs for label in pair if label})


def _columns(pairs: Pairs) -> tuple[list[str], list[str], list[int]]:
    wanted, given = zip(*pairs, strict=True)
    return list(wanted), list(given), list(pairs.values())


def _scale(labels: Sequence[str]) -> range | None:
    """The scale on which all labels lie, if they are whole numbers near each other."""
    values = [json.loads(label) for label in labels]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values) or len(values) < 2:
        return None
    low, high = min(values), max(values)
    return range(low, high + 1) if high - low <= LONGEST_SCALE else None


def _on_scale(pairs: Pairs, scale: range) -> list[tuple[int, int, int]]:
    """Places on the scale; an answer that could not be read is put as far from the expected value as can be."""
    low, high = scale[0], scale[-1]
    found = []
    for (wanted, given), times in pairs.items():
        want = json.loads(wanted)
        farthest = low if want - low > high - want else high
        found.append((want - low, (json.loads(given) if given else farthest) - low, times))
    return found


def _quadratic_kappa(pairs: Pairs, scale: range) -> float | None:
    from sklearn.metrics import cohen_kappa_score

    wanted, given, weight = zip(*_on_scale(pairs, scale), strict=True)
    places = list(range(len(scale)))
    return _finite(cohen_kappa_score(wanted, given, labels=places, weights="quadratic", sample_weight=weight))


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _bootstrapped(pairs: Pairs, labels: Sequence[str], scale: range | None) -> dict[str, Interval]:
    """Percentile intervals over drawings of the rows with replacement.

    What a drawing has of each pair is multinomial, so the rows themselves need not be drawn.
    """
    counts = np.array(list(pairs.values()), dtype=np.float64)
    places = {label: place for place, label in enumerate([*labels, ""])}
    rows = np.array([places[want] for want, _ in pairs])
    columns = np.array([places[given] for _, given in pairs])

    def figures(drawn: Floats) -> dict[str, Floats]:
        return class_figures(drawn, rows, columns, len(labels))

    found = _named_quantiles(counts, figures)
    if scale is not None:
        on_scale = np.array(_on_scale(pairs, scale))
        off = (on_scale[:, 0] - on_scale[:, 1]) ** 2.0
        span = _quantiles(counts, lambda drawn: weighted_kappa(drawn, on_scale[:, 0], on_scale[:, 1], off))
        found |= {"quadratic_kappa": span} if span else {}
    return found


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


def _drawn(counts: Floats) -> Floats:
    # Seeded: the same rows have the same interval.
    rng = np.random.default_rng(0)
    return rng.multinomial(int(counts.sum()), counts / counts.sum(), size=DRAWS).astype(np.float64)


def _quantiles(counts: Floats, figure: Callable[[Floats], Floats]) -> Interval | None:
    return _named_quantiles(counts, lambda drawn: {"it": figure(drawn)}).get("it")


def _named_quantiles(counts: Floats, figures: Callable[[Floats], Mapping[str, Floats]]) -> dict[str, Interval]:
    """None of fewer than two rows, and of figures that no drawing changes."""
    if counts.sum() < 2:
        return {}
    found = {}
    for name, values in figures(_drawn(counts)).items():
        low, high = np.percentile(values, QUANTILES)
        if low < high:
            found[name] = (float(low), float(high))
    return found
