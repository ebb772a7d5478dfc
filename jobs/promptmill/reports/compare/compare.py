"""Two jobs side by side: what differs, by how much, how sure that is, and whether it may be compared at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.core.registry import suggestion
from promptmill.database.engine import reading
from promptmill.database.tables import jobs
from promptmill.errors import JobError, PromptmillError
from promptmill.reports.compare.comparison import ONE_RUN, TOO_FEW, WITHIN_RUN, Comparison, Flips, Line, is_rounding
from promptmill.reports.compare.environments import environment_of
from promptmill.reports.compare.pairs import PairedRows, Pairing, ids_of, pair, read_rows
from promptmill.reports.compare.statistics import (
    ALPHA,
    LEAST_RUNS,
    Change,
    crossed_ratio,
    holm,
    paired_means,
    paired_rates,
    paired_ratio,
    repeated_ratio,
    unpaired_rates,
    unpaired_ratio,
)
from promptmill.reports.figures.columns import Floats, Ints
from promptmill.reports.figures.figures import metric_of, value_of
from promptmill.reports.figures.inputs import consistent
from promptmill.reports.figures.metrics import METRICS, Better
from promptmill.reports.figures.summary import Summary, summarise
from promptmill.scoring.scorers.pairs import flips as flips_of
from promptmill.tasks.sampling import PARAMETERS, check_parameter
from promptmill.types import SamplingParams

#: Seconds of a slice of a run's output, and fewest slices of a run.
SLICE_S = 10.0
SLICES = 20

#: Change of the mean answer's length from which on two jobs did different work.
LENGTH_SHIFT = 0.05

#: Flipped rows that are listed.
FLIPS_SHOWN = 20

#: Figures of work done in a time: other prompts or limits make them figures of other work.
WORK = ("wall_s", "items_per_s", "output_tps", "latency_s", "ttft_s", "latency_s.p50", "latency_s.p95")

#: Runs of the one setting and of the other.
Runs = tuple[list[Summary], list[Summary]]

#: What a run has one of.
RUN_FIGURES = ("output_tps", "items_per_s", "wall_s", "prefill_tps", "decode_tps", "latency_s.p50", "latency_s.p95")

SERVICE = ("latency_s", "ttft_s", "tpot_s")

#: Sampling that changes nothing of what is generated.
_ASIDE = ("timeout_s", "logprobs", "top_logprobs")

#: Differences of two jobs' configuration that make WORK incomparable.
SAME_WORK = ("dataset_sha256", "task_sha256", "system_prompt", *(name for name in PARAMETERS if name not in _ASIDE))


@dataclass(frozen=True, slots=True)
class _FlipPlaces:
    """Flips by their places among the common rows."""

    name: str
    lost: int
    won: int
    p: float | None
    lost_places: Ints
    won_places: Ints

    def named(self, db: Connection, job_id: str, own: PairedRows, common: Pairing) -> Flips:
        found = [ids_of(db, job_id, own.row[common.before[each]]) for each in (self.lost_places, self.won_places)]
        return Flips(self.name, self.lost, self.won, self.p, *found)


@dataclass(frozen=True, slots=True)
class Side:
    """A job, or a job as one of its score runs judged it."""

    job_id: str
    score_run: str | None = None


def compare(db: Engine | Connection, before: str | Side, after: str | Side, force: bool = False) -> Comparison:
    """Job ``after`` against job ``before``. Raises :class:`JobError` when they have no row in common.

    ``force``: figures of different work are compared too, and rates of different rows (Newcombe's interval).
    """
    return compare_all(db, [before], [[after]], force)[0]


def compare_all(
    db: Engine | Connection, before: Sequence[str | Side], others: Sequence[Sequence[str | Side]], force: bool = False
) -> list[Comparison]:
    """Each of ``others`` against ``before``, all of them runs of one setting; p-values are corrected together.

    Rows are those of the first run of either; what a run has one of is told by all runs.
    """
    sides = [[Side(each) if isinstance(each, str) else each for each in runs] for runs in (before, *others)]
    with consistent(db) as connection:
        own = read_rows(connection, sides[0][0].job_id, sides[0][0].score_run)
        known = {side.job_id: summarise(connection, side.job_id) for runs in sides for side in runs}
        found = [_compared(connection, (sides[0], runs), own, known, force) for runs in sides[1:]]
    corrected = iter(holm([line.p for each in found for line in each.lines]))
    return [replace(each, lines=tuple(_worded(line, next(corrected)) for line in each.lines)) for each in found]


def _compared(
    db: Connection, sides: tuple[list[Side], list[Side]], own: PairedRows, known: Mapping[str, Summary], force: bool
) -> Comparison:
    """The comparison before its p-values are corrected."""
    before, after = (runs[0] for runs in sides)
    other = read_rows(db, after.job_id, after.score_run)
    common = pair(own, other)
    if not len(common.before) and not (force and len(own) and len(other)):
        raise JobError(
            f"jobs {before.job_id} and {after.job_id} have no common rows",
            hint="Rows are paired by id: compare jobs over the same dataset that have results. "
            "--force compares rates of different rows.",
        )
    runs = [known[side.job_id] for side in sides[0]], [known[side.job_id] for side in sides[1]]
    differences = _differences(db, before.job_id, after.job_id)
    reasons = {} if force else _reasons(differences)
    same = before.job_id == after.job_id
    # Two score runs of one job differ in nothing but the scores.
    lines = [] if same else _time_lines(runs, own, other, common, reasons)
    if len(common.before):
        rates, flips = _rate_lines(own, other, common, _other_lines(differences), runs[0][0])
    else:
        rates, flips = _unpaired_lines(own, other), []
    return Comparison(
        before=runs[0][0],
        after=runs[1][0],
        runs=(len(runs[0]), len(runs[1])),
        common=len(common.before),
        differences=differences,
        warnings=(*_mixed(db, runs), *_warnings(own, other, common, runs)),
        lines=(*lines, *(line for line in rates if not same or line.name != "success_rate")),
        flips=tuple(each.named(db, before.job_id, own, common) for each in flips),
    )


def _time_lines(runs: Runs, own: PairedRows, other: PairedRows, common: Pairing, reasons: dict[str, str]) -> list[Line]:
    if max(map(len, runs)) > 1:
        return [_repeated_line(name, runs, reasons) for name in ("latency_s.mean", *RUN_FIGURES)]
    return [*_service_lines(own, other, common, reasons), *_run_lines(runs, own, other, reasons)]


def _repeated_line(name: str, runs: Runs, reasons: dict[str, str]) -> Line:
    """A figure of several runs of either: its interval holds the noise between runs."""
    values = [[value for each in own if (value := value_of(each, name))] for own in runs]
    one, two = (math.exp(sum(map(math.log, own)) / len(own)) if own else None for own in values)
    note = f"{len(runs[0])} and {len(runs[1])} runs"
    if min(map(len, values)) < LEAST_RUNS:
        note += f": {LEAST_RUNS} of each tell the noise between runs"
    line = Line(name, metric_of(name), one, two, note=reasons.get(name.removesuffix(".mean"), note))
    return _filled(line, repeated_ratio(*values))


def _worded(line: Line, p: float | None) -> Line:
    if line.note.startswith("not comparable") or line.change is None:
        return replace(line, p=None, ci95=None)
    if p is None and line.in_points and line.change == 0 and line.ci95:
        return replace(line, word="=", note=line.note or "the same in every row")
    if p is None:
        return replace(line, note=line.note or TOO_FEW)
    if p >= ALPHA or line.change == 0 or is_rounding(line.metric, line.before, line.after):
        return replace(line, p=p, word="≈")
    good = (line.change > 0) == (line.metric.better is Better.HIGHER)
    return replace(line, p=p, word="better" if good else "worse")


def config_of(job: sa.Row[Any]) -> dict[str, Any]:
    """Everything by which two jobs can differ, by name."""
    names = (
        "dataset_name", "dataset_sha256", "model", "model_fingerprint", "task_name", "task_sha256", "system_prompt",
        "slots", "mode", "rows",
    )  # fmt: skip
    sampling: dict[str, Any] = json.loads(job.sampling)
    env: dict[str, Any] = json.loads(job.env or "{}")
    settings: dict[str, Any] = json.loads(job.engine_settings or "{}")
    return {name: getattr(job, name) for name in names} | settings | sampling | {f"env.{key}": env[key] for key in env}


def settings_of(db: Engine, sides: Sequence[Side], name: str) -> list[list[Side]]:
    """The jobs grouped by their value of a setting, in the order of their first one. Raises PromptmillError."""
    with reading(db) as connection:
        configs = [
            config_of(connection.execute(sa.select(jobs).where(jobs.c.id == side.job_id)).one()) for side in sides
        ]
    known = sorted({key for config in configs for key in config})
    if name not in known:
        raise PromptmillError(f"--by {name}: the jobs have no such setting", hint=suggestion(name, known))
    groups: dict[str, list[Side]] = {}
    for side, config in zip(sides, configs, strict=True):
        groups.setdefault(json.dumps(config.get(name), sort_keys=True), []).append(side)
    return list(groups.values())


def _differences(db: Connection, before: str, after: str) -> tuple[tuple[str, Any, Any], ...]:
    one, two = (config_of(db.execute(sa.select(jobs).where(jobs.c.id == each)).one()) for each in (before, after))
    known = [environment_of(db, each) for each in (before, after)]
    if all(known):
        # A job that does not tell what answered it differs in nothing that is known.
        one, two = one | known[0], two | known[1]
    return tuple(
        (name, one.get(name), two.get(name)) for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)
    )


def _reasons(differences: tuple[tuple[str, Any, Any], ...]) -> dict[str, str]:
    """Figure -> why it may not be compared."""
    changed = [name for name, one, two in differences if name in SAME_WORK and _asked(name, one) != _asked(name, two)]
    return {name: f"not comparable ({', '.join(changed)} differs)" for name in WORK} if changed else {}


def _asked(name: str, value: Any) -> Any:
    """What a value of SAME_WORK comes to: a parameter that was not given is the one that engines take then."""
    if name not in PARAMETERS:
        return value
    return getattr(SamplingParams(), name) if value is None else check_parameter(name, value)


def _other_lines(differences: tuple[tuple[str, Any, Any], ...]) -> str:
    return "" if all(name != "dataset_sha256" for name, _, _ in differences) else "over the common rows"


def _service_lines(own: PairedRows, other: PairedRows, common: Pairing, reasons: dict[str, str]) -> list[Line]:
    """Means of times of requests, over common rows that both jobs answered."""
    lines = []
    for name in SERVICE:
        one, two = getattr(own, name)[common.before], getattr(other, name)[common.after]
        both = np.isfinite(one) & np.isfinite(two)
        if not both.any():
            continue
        batches = own.batches[common.before][both], other.batches[common.after][both]
        change = service_change(one[both], two[both], *batches, common.aligned)
        line = Line(f"{name}.mean", METRICS[name], float(one[both].mean()), float(two[both].mean()))
        lines.append(replace(_filled(line, change), note=reasons.get(name, "")))
    return lines


def service_change(before: Floats, after: Floats, of_before: Any, of_after: Any, aligned: bool) -> Change:
    """The change of a mean over the same rows, which share their fate with their batch in either run."""
    if aligned:
        return paired_ratio(before, after, of_before)
    return crossed_ratio(before, after, of_before, of_after)


def _filled(line: Line, change: Change) -> Line:
    value = None if math.isnan(change.value) else change.value
    return replace(line, change=value, ci95=change.ci95, p=change.p)


def _run_lines(runs: Runs, own: PairedRows, other: PairedRows, reasons: dict[str, str]) -> list[Line]:
    """Figures that a run has one of. One run of either tells nothing of the noise between runs: there is no test."""
    lines = []
    for name in RUN_FIGURES:
        one, two = (value_of(each[0], name) for each in runs)
        line = Line(name, metric_of(name), one, two, note=reasons.get(name, ONE_RUN))
        if one and two is not None:
            line = replace(line, change=two / one - 1)
        if name == "output_tps" and line.change is not None:
            within = _rate_change(own, other, line.change)
            line = replace(line, ci95=within.ci95, note=reasons.get(name, WITHIN_RUN))
        lines.append(line)
    return lines


def _rate_change(own: PairedRows, other: PairedRows, value: float) -> Change:
    """The interval of a rate's change, by blocks of time of either run."""
    one, two = _slices(own), _slices(other)
    found = unpaired_ratio(one, np.arange(len(one)), two, np.arange(len(two)))
    return Change(value, found.ci95, found.p)


def _slices(rows: PairedRows) -> Floats:
    """Output tokens in equal slices of the run, by when they were finished; the drained tail belongs to the run."""
    ok = np.isfinite(rows.output_tokens) & np.isfinite(rows.finished_at) & np.isfinite(rows.admitted_at)
    if not ok.any():
        return np.empty(0)
    begin, end = float(rows.admitted_at[ok].min()), float(rows.finished_at[ok].max())
    count = max(SLICES, int((end - begin) / SLICE_S))
    counts, edges = np.histogram(rows.finished_at[ok], bins=count, range=(begin, end), weights=rows.output_tokens[ok])
    return counts / max(float(edges[1] - edges[0]), 1e-9)


def _rate_lines(
    own: PairedRows, other: PairedRows, common: Pairing, note: str, summary: Summary
) -> tuple[list[Line], list[_FlipPlaces]]:
    """Success, and each score that both jobs have."""
    answered = own.ok[common.before].astype(float), other.ok[common.after].astype(float)
    success = paired_rates(len(common.before), *map(len, flips_of(*answered)))
    rates = answered[0].mean(), answered[1].mean()
    line = Line("success_rate", METRICS["success_rate"], float(rates[0]), float(rates[1]), note=note)
    lines, flips = [_filled(line, success)], []
    for name in (name for name in own.worth if name in other.worth):
        one, two = own.worth[name][common.before], other.worth[name][common.after]
        both = np.isfinite(one) & np.isfinite(two)
        if not both.any():
            continue
        metric = _score_metric(summary, name, one[both], two[both])
        if metric != "accuracy":
            lines.append(_mean_line(f"{name}.{metric}", one[both], two[both], note))
            continue
        lost, won = flips_of(one, two)
        change = paired_rates(int(both.sum()), len(lost), len(won))
        before, after = (float((each[both] == 1).mean()) for each in (one, two))
        lines.append(_filled(Line(f"{name}.accuracy", METRICS["accuracy"], before, after, note=note), change))
        flips.append(_FlipPlaces(name, len(lost), len(won), change.p, lost[:FLIPS_SHOWN], won[:FLIPS_SHOWN]))
    return lines, flips


def _score_metric(summary: Summary, name: str, *worth: Floats) -> str:
    """The figure that a score adds up to: its task's; of another task's score run, as its values tell."""
    known = summary.scores[name].metric if name in summary.scores else "accuracy"
    truths = all(np.isin(each, (0.0, 1.0)).all() for each in worth)
    return "mean" if known == "accuracy" and not truths else known


def _mean_line(name: str, before: Floats, after: Floats, note: str) -> Line:
    """A score that is no rate: shares change by points, distances and other values relatively."""
    line = Line(name, metric_of(name), float(before.mean()), float(after.mean()), note=note)
    if line.in_points:
        return _filled(line, paired_means(before, after))
    if min(before.min(), after.min()) < 0:
        return line
    return _filled(line, paired_ratio(before, after, np.arange(len(before))))


def _unpaired_lines(own: PairedRows, other: PairedRows) -> list[Line]:
    """The same of jobs that have no row in common."""
    known: dict[str, tuple[Floats, Floats]] = {"success_rate": (own.ok.astype(float), other.ok.astype(float))}
    right, also = own.right, other.right
    known |= {f"{name}.accuracy": (right[name], also[name]) for name in right if name in also}
    lines = []
    for name, columns in known.items():
        one, two = (column[np.isfinite(column)] > 0 for column in columns)
        if len(one) and len(two):
            rates = float(one.mean()), float(two.mean())
            line = Line(name, metric_of(name), *rates, note="other rows: not paired")
            lines.append(_filled(line, unpaired_rates(one, two)))
    return lines


def _mixed(db: Connection, runs: Runs) -> list[str]:
    """Jobs whose own answers come from more than one environment."""
    found = []
    for job_id in dict.fromkeys(summary.job_id for summary in (*runs[0], *runs[1])):
        parts = [f"{name} {value}" for name, value in environment_of(db, job_id).items() if ", " in value]
        if parts:
            found.append(f"job {job_id} was answered in more than one environment: {'; '.join(parts)}")
    return found


def _warnings(own: PairedRows, other: PairedRows, common: Pairing, runs: Runs) -> tuple[str, ...]:
    found = []
    for summary in (*runs[0], *runs[1]):
        if not summary.complete:
            found.append(f"job {summary.job_id} is {summary.completeness}")
    missing = len(own) + len(other) - 2 * len(common.before)
    if missing:
        found.append(f"{missing:,} rows are in one of the jobs only and are left out of paired figures")
    lengths = [each[0].mean_output_tokens for each in runs]
    if lengths[0] and lengths[1] and abs(lengths[1] / lengths[0] - 1) > LENGTH_SHIFT:
        found.append(f"answers have another length: {lengths[0]:.1f} and {lengths[1]:.1f} tokens, which is other work")
    return tuple(found)
