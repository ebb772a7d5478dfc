"""Lines of a comparison about answers: requests that were answered, and each score that both jobs have."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from sqlalchemy.engine import Connection

from promptmill.reports.compare.comparison import UNPAIRED, Flips, Tested, not_comparable
from promptmill.reports.compare.pairs import JobRows, Pairing, ScoredRows, ids_of
from promptmill.reports.figures.columns import Floats, Ints, Truths
from promptmill.reports.figures.metrics import METRICS, Unit
from promptmill.scoring.scorers.aggregates import MOST_CLASSES, binary_figures, figures_of, kind_of, scale_of
from promptmill.scoring.statistics import paired, ranking, unpaired
from promptmill.scoring.statistics.clusters import Clusters
from promptmill.scoring.statistics.paired import Change

#: Flipped rows that are listed.
FLIPS_SHOWN = 20

#: Figures of labels that are tested beside the accuracy.
OF_CLASSES = ("macro_f1", "kappa", "quadratic_kappa")
OF_YES_OR_NO = ("precision", "recall", "f1")


@dataclass(frozen=True, slots=True)
class FlipPlaces:
    """Flips by their places among the common rows."""

    name: str
    lost: Ints
    won: Ints
    p: float | None

    def named(self, db: Connection, job_id: str, own: JobRows, common: Pairing) -> Flips:
        found = [ids_of(db, job_id, own.row[common.before[each[:FLIPS_SHOWN]]]) for each in (self.lost, self.won)]
        return Flips(self.name, len(self.lost), len(self.won), self.p, *found)


def lines(own: JobRows, other: JobRows, common: Pairing, note: str) -> tuple[list[Tested], list[FlipPlaces]]:
    """Over the common rows; where there are none, over all rows of either, unpaired."""
    if not len(common.before):
        return _unpaired(own, other), []
    answered = own.ok[common.before], other.ok[common.after]
    # Rows that ask the same in one of the jobs are one observation, though the other job's prompts tell them apart.
    clusters = Clusters.of(min(own.asked[common.before], other.asked[common.after], key=lambda of: np.unique(of).size))
    found = [
        _line(
            "success_rate",
            "success_rate",
            _mean(answered[0]),
            _mean(answered[1]),
            paired.rates(*answered, clusters),
            note,
        )
    ]
    flips = []
    for name in (name for name in own.scores if name in other.scores):
        one, two = (_taken(rows.scores[name], places) for rows, places in
                    ((own, common.before), (other, common.after)))  # fmt: skip
        if (reason := _differ(one, two)) is not None:
            found.append(_refused(name, one, two, reason))
            continue
        both = np.isfinite(one.worth) & np.isfinite(two.worth)
        if not both.any():
            continue
        both &= expect_the_same(one, two)
        if not both.any():
            found.append(_refused(name, one, two, "no row expects the same answer"))
            continue
        own_lines, own_flips = _of_score(name, one, two, both, clusters, note)
        found += own_lines
        flips += own_flips
    return found, flips


def expect_the_same(one: ScoredRows, two: ScoredRows) -> Truths:
    """Which rows have the same expected label in both; those without labels have."""
    # The last place is that of -1, for none.
    meant = np.array([*(one.labels.get(label, -2) for label in two.labels), -1])
    given: Truths = (one.wanted == meant[two.wanted]) | (one.wanted < 0) | (two.wanted < 0)
    return given


def relabelled(own: JobRows, other: JobRows, common: Pairing) -> int:
    """Common rows that expect another answer in the other job, by any score."""
    changed = np.zeros(len(common.before), dtype=bool)
    for name in own.scores.keys() & other.scores.keys():
        one, two = _taken(own.scores[name], common.before), _taken(other.scores[name], common.after)
        if _differ(one, two) is None:
            changed |= ~expect_the_same(one, two)
    return int(changed.sum())


def _of_score(
    name: str, one: ScoredRows, two: ScoredRows, both: Truths, clusters: Clusters, note: str
) -> tuple[list[Tested], list[FlipPlaces]]:
    at, worth = clusters.at(both), (one.worth[both], two.worth[both])
    if not all(_are_truths(each) for each in (one, two)):
        change = paired.means(*worth, at)
        metric = "mean" if one.metric == "accuracy" else one.metric
        return [_mean_line(f"{name}.{metric}", metric, _mean(worth[0]), _mean(worth[1]), change, note)], []
    before, after = (each == 1 for each in worth)
    change = paired.rates(before, after, at)
    found = [_line(f"{name}.accuracy", "accuracy", _mean(before), _mean(after), change, note)]
    lost, won = paired.flips(one.worth, two.worth)
    labelled = both & (one.wanted >= 0) & (two.wanted >= 0)
    if labelled.any():
        found += _of_labels(name, one, two, labelled, clusters.at(labelled), note)
        found += _of_confidence(name, one, two, labelled, clusters.at(labelled), note)
    return found, [FlipPlaces(name, lost, won, change.p)]


def _of_labels(
    name: str, one: ScoredRows, two: ScoredRows, chosen: Truths, clusters: Clusters, note: str
) -> list[Tested]:
    labels = sorted({*one.labels, *two.labels} - {""})
    kind = one.kind if one.kind != "any" else "classes"
    if kind not in ("classes", "binary") or not labels or len(labels) > MOST_CLASSES:
        return []
    pairs: dict[tuple[str, str], int] = {}
    cells = [_cells(each, chosen, pairs) for each in (one, two)]
    if kind == "binary":
        kinds = np.array([kind_of(*pair) for pair in pairs])
        cells, count, of, names = [kinds[each] for each in cells], 4, binary_figures, OF_YES_OR_NO
    else:
        of, count, names = figures_of(list(pairs), labels, scale_of(labels)), len(pairs), OF_CLASSES
    changes = paired.figures(cells[0], cells[1], count, clusters, of)
    values = [of(np.bincount(each, minlength=count).astype(np.float64)[None]) for each in cells]
    return [
        _line(f"{name}.{each}", each, float(values[0][each][0]), float(values[1][each][0]), changes[each], note)
        for each in names if each in changes
    ]  # fmt: skip


def _cells(rows: ScoredRows, chosen: Truths, pairs: dict[tuple[str, str], int]) -> Ints:
    """The place of each row's pair of labels among ``pairs``, which grows."""
    names = list(rows.labels)
    codes, index = np.unique(rows.wanted[chosen] * len(names) + rows.given[chosen], return_inverse=True)
    places = [
        pairs.setdefault((names[code // len(names)], names[code % len(names)]), len(pairs)) for code in codes.tolist()
    ]
    return np.array(places, dtype=np.int64)[index]


def _of_confidence(
    name: str, one: ScoredRows, two: ScoredRows, chosen: Truths, clusters: Clusters, note: str
) -> list[Tested]:
    """The AUC of yes, where every row of both has a confidence and both classes are expected."""
    sure = one.confidence[chosen], two.confidence[chosen]
    truth = one.wanted[chosen] == one.labels.get("true", -2)
    known = all(np.isfinite(each).all() for each in sure)
    if one.kind == "choices" or not known or truth.all() or not truth.any():
        return []
    change = paired.areas(*sure, truth, clusters)
    areas = ranking.auc(sure[0], truth), ranking.auc(sure[1], truth)
    return [_line(f"{name}.auc", "auc", areas[0], areas[1], change, note)]


def _unpaired(own: JobRows, other: JobRows) -> list[Tested]:
    """The same of jobs that have no row in common."""
    answered = own.ok.astype(np.float64), other.ok.astype(np.float64)
    of = Clusters.of(own.asked), Clusters.of(other.asked)
    found = [
        _line(
            "success_rate",
            "success_rate",
            _mean(answered[0]),
            _mean(answered[1]),
            unpaired.shares(*answered, *of),
            UNPAIRED,
        )
    ]
    for name in (name for name in own.scores if name in other.scores):
        one, two = own.scores[name], other.scores[name]
        if (reason := _differ(one, two)) is not None:
            found.append(_refused(name, one, two, reason))
            continue
        counted = np.isfinite(one.worth), np.isfinite(two.worth)
        worth = one.worth[counted[0]], two.worth[counted[1]]
        if not len(worth[0]) or not len(worth[1]):
            continue
        are_truths = _are_truths(one) and _are_truths(two)
        metric = "accuracy" if are_truths else "mean" if one.metric == "accuracy" else one.metric
        test = unpaired.shares if are_truths else unpaired.means
        change = test(*worth, of[0].at(counted[0]), of[1].at(counted[1]))
        found.append(_mean_line(f"{name}.{metric}", metric, _mean(worth[0]), _mean(worth[1]), change, UNPAIRED))
    return found


def _taken(rows: ScoredRows, places: Ints) -> ScoredRows:
    return replace(
        rows, worth=rows.worth[places], right=rows.right[places], wanted=rows.wanted[places], given=rows.given[places],
        confidence=rows.confidence[places],
    )  # fmt: skip


def _are_truths(rows: ScoredRows) -> bool:
    """Whether its values are right or wrong, and nothing between."""
    known = rows.worth[np.isfinite(rows.worth)]
    return rows.metric in ("accuracy", "mean") and bool(np.isin(known, (0.0, 1.0)).all())


def _differ(one: ScoredRows, two: ScoredRows) -> str | None:
    """Why two scores of one name are not the same score; None where they are."""
    if one.definition == two.definition or not one.definition or not two.definition:
        return None
    return not_comparable(f"{one.definition} and {two.definition}")


def _refused(name: str, one: ScoredRows, two: ScoredRows, reason: str) -> Tested:
    metric = one.metric if one.metric == two.metric else "mean"
    return Tested(f"{name}.{metric}", METRICS[metric], _known_mean(one), _known_mean(two), Change(float("nan")), reason)


def _known_mean(rows: ScoredRows) -> float | None:
    known = rows.worth[np.isfinite(rows.worth)]
    return float(known.mean()) if len(known) else None


def _line(name: str, metric: str, before: float, after: float, change: Change, note: str) -> Tested:
    return Tested(name, METRICS[metric], before, after, change, note)


def _mean_line(name: str, metric: str, before: float, after: float, change: Change, note: str) -> Tested:
    """A figure of any unit: what is no share and no index changes relatively."""
    line = _line(name, metric, before, after, change, note)
    if line.metric.unit in (Unit.SHARE, Unit.INDEX):
        return line
    if before <= 0:
        return replace(line, change=Change(math.nan))
    return replace(line, change=change.scaled(1 / before))


def _mean(values: Floats | Truths) -> float:
    return float(np.mean(values))
