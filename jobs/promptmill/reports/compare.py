"""Two jobs side by side: what differs, by how much, how sure that is, and whether it may be compared at all."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.errors import JobError
from promptmill.metrics import METRICS, Better, Metric
from promptmill.reports.pairs import Pairing, Rows, pair, read_rows
from promptmill.reports.rows import consistent
from promptmill.reports.scan import Floats
from promptmill.reports.statistics import ALPHA, Change, holm, paired_rates, paired_ratio, unpaired_ratio
from promptmill.reports.summary import Summary, summarise
from promptmill.tables import jobs

#: Seconds of a slice of a run's output, and fewest slices of a run.
SLICE_S = 10.0
SLICES = 20

#: Change of the mean answer's length from which on two jobs did different work.
LENGTH_SHIFT = 0.05

#: Flipped rows that are listed.
FLIPS_SHOWN = 20

#: Figures of work done in a time: other prompts or limits make them figures of other work.
WORK = ("wall_s", "items_per_s", "output_tps", "latency_s", "ttft_s")

SERVICE = ("latency_s", "ttft_s", "tpot_s")

#: Differences of two jobs' configuration that make WORK incomparable.
SAME_WORK = ("dataset_sha256", "task_sha256", "system_prompt", "max_tokens", "thinking", "ignore_eos", "limit")


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of two jobs. Shares change by points, all else relatively; ``ci95`` and ``p`` None: cannot be told."""

    name: str
    metric: Metric
    before: float | None
    after: float | None
    change: float | None = None
    ci95: tuple[float, float] | None = None
    #: Corrected for the family of all lines that are tested (Holm).
    p: float | None = None
    #: 'better', 'worse', '≈' (no detectable difference), or '' where nothing was tested.
    word: str = ""
    note: str = ""

    @property
    def in_points(self) -> bool:
        return self.metric.unit == "%"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "unit": str(self.metric.unit), "before": self.before, "after": self.after,
            "change": self.change, "change_unit": "points" if self.in_points else "share", "ci95": self.ci95,
            "p_holm": self.p, "word": self.word, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flips:
    """Rows that one job has right and the other wrong, by one score."""

    name: str
    lost: int
    won: int
    lost_keys: tuple[str, ...]
    won_keys: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Comparison:
    """``after`` against ``before``, over their common rows where rows are compared."""

    before: Summary
    after: Summary
    common: int
    differences: tuple[tuple[str, Any, Any], ...]
    warnings: tuple[str, ...]
    lines: tuple[Line, ...]
    flips: tuple[Flips, ...]

    @property
    def verdict(self) -> str:
        """One sentence; a difference is only one that its interval and its corrected p-value tell."""
        parts = [
            f"{line.name} {shown_change(line)} ({line.word})" for line in self.lines if line.word in ("better", "worse")
        ]
        return "; ".join(parts) if parts else "no detectable difference"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1, "before": self.before.job_id, "after": self.after.job_id, "common_rows": self.common,
            "verdict": self.verdict, "warnings": list(self.warnings),
            "differences": [{"name": name, "before": one, "after": two} for name, one, two in self.differences],
            "figures": [line.to_json() for line in self.lines], "flips": [each.to_json() for each in self.flips],
        }  # fmt: skip


def shown_change(line: Line) -> str:
    """The signed change: ``+3.1 %`` of the value, or ``+3.1 pp`` of a share."""
    return "–" if line.change is None else f"{100 * line.change:+.1f} {'pp' if line.in_points else '%'}"


def compare(db: Engine | Connection, before: str, after: str, force: bool = False) -> Comparison:
    """Job ``after`` against job ``before``. Raises :class:`JobError` when they have no row in common."""
    with consistent(db) as connection:
        own, other = read_rows(connection, before), read_rows(connection, after)
        common = pair(own, other)
        if not len(common.before):
            raise JobError(
                f"jobs {before} and {after} have no common rows",
                hint="Rows are paired by id: compare jobs over the same dataset that have results.",
            )
        summaries = summarise(connection, before), summarise(connection, after)
        differences = _differences(connection, before, after)
    reasons = {} if force else _reasons(differences)
    lines = [*_service_lines(own, other, common, reasons), *_run_lines(summaries, own, other, reasons)]
    scored, flips = _rate_lines(own, other, common, _other_lines(differences))
    corrected = holm([line.p for line in [*lines, *scored]])
    return Comparison(
        before=summaries[0],
        after=summaries[1],
        common=len(common.before),
        differences=differences,
        warnings=_warnings(own, other, common, summaries),
        lines=tuple(_worded(line, p) for line, p in zip([*lines, *scored], corrected, strict=True)),
        flips=flips,
    )


def _worded(line: Line, p: float | None) -> Line:
    if line.note.startswith("not comparable") or line.change is None:
        return replace(line, p=None, ci95=None)
    if p is None:
        return replace(line, p=None, note=line.note or "too few rows to tell")
    if p >= ALPHA or line.change == 0:
        return replace(line, p=p, word="≈")
    good = (line.change > 0) == (line.metric.better is Better.HIGHER)
    return replace(line, p=p, word="better" if good else "worse")


def _config(job: sa.Row[Any]) -> dict[str, Any]:
    names = (
        "dataset_name", "dataset_sha256", "model", "model_fingerprint", "task_name", "task_sha256", "system_prompt",
        "slots", "mode", "rows",
    )  # fmt: skip
    sampling: dict[str, Any] = json.loads(job.sampling)
    env: dict[str, Any] = json.loads(job.env or "{}")
    return {name: getattr(job, name) for name in names} | sampling | {f"env.{key}": env[key] for key in env}


def _differences(db: Connection, before: str, after: str) -> tuple[tuple[str, Any, Any], ...]:
    one, two = (_config(db.execute(sa.select(jobs).where(jobs.c.id == each)).one()) for each in (before, after))
    return tuple(
        (name, one.get(name), two.get(name)) for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)
    )


def _reasons(differences: tuple[tuple[str, Any, Any], ...]) -> dict[str, str]:
    """Figure -> why it may not be compared."""
    changed = [name for name, _, _ in differences if name in SAME_WORK]
    return {name: f"not comparable ({', '.join(changed)} differs)" for name in WORK} if changed else {}


def _other_lines(differences: tuple[tuple[str, Any, Any], ...]) -> str:
    return "" if all(name != "dataset_sha256" for name, _, _ in differences) else "over the common rows"


def _service_lines(own: Rows, other: Rows, common: Pairing, reasons: dict[str, str]) -> list[Line]:
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
    """The change of a mean over the same rows; batches that hold the same rows are resampled together."""
    if aligned:
        return paired_ratio(before, after, of_before)
    return unpaired_ratio(before, of_before, after, of_after)


def _filled(line: Line, change: Change) -> Line:
    value = None if math.isnan(change.value) else change.value
    return replace(line, change=value, ci95=change.ci95, p=change.p)


def _run_lines(summaries: tuple[Summary, Summary], own: Rows, other: Rows, reasons: dict[str, str]) -> list[Line]:
    """Figures that a run has one of: an interval only for the output rate, within the run."""
    lines = []
    for name in ("output_tps", "items_per_s", "wall_s", "prefill_tps", "decode_tps"):
        one, two = (getattr(each, name) for each in summaries)
        line = Line(name, METRICS[name], one, two, note=reasons.get(name, "one observation a run"))
        if one and two is not None:
            line = replace(line, change=two / one - 1)
        if name == "output_tps" and line.change is not None:
            note = reasons.get(name, "within-run")
            line = replace(_filled(line, _rate_change(own, other, line.change)), note=note)
        lines.append(line)
    return lines


def _rate_change(own: Rows, other: Rows, value: float) -> Change:
    """The interval of a rate's change, by blocks of time of either run."""
    one, two = _slices(own), _slices(other)
    found = unpaired_ratio(one, np.arange(len(one)), two, np.arange(len(two)))
    return Change(value, found.ci95, found.p)


def _slices(rows: Rows) -> Floats:
    """Output tokens in equal slices of the run, by when they were finished; the drained tail belongs to the run."""
    ok = np.isfinite(rows.output_tokens) & np.isfinite(rows.finished_at) & np.isfinite(rows.admitted_at)
    if not ok.any():
        return np.empty(0)
    begin, end = float(rows.admitted_at[ok].min()), float(rows.finished_at[ok].max())
    count = max(SLICES, int((end - begin) / SLICE_S))
    counts, edges = np.histogram(rows.finished_at[ok], bins=count, range=(begin, end), weights=rows.output_tokens[ok])
    return counts / max(float(edges[1] - edges[0]), 1e-9)


def _rate_lines(own: Rows, other: Rows, common: Pairing, note: str) -> tuple[list[Line], tuple[Flips, ...]]:
    """Success, and each score that both jobs have."""
    success, _, _ = paired_rates(own.ok[common.before], other.ok[common.after])
    rates = own.ok[common.before].mean(), other.ok[common.after].mean()
    line = Line("success_rate", METRICS["success_rate"], float(rates[0]), float(rates[1]), note=note)
    lines, flips = [_filled(line, success)], []
    for name in own.right.keys() & other.right.keys():
        one, two = own.right[name][common.before], other.right[name][common.after]
        both = np.isfinite(one) & np.isfinite(two)
        if not both.any():
            continue
        before, after = one[both] > 0, two[both] > 0
        change, lost, won = paired_rates(before, after)
        score = Line(f"{name}.accuracy", METRICS["accuracy"], float(before.mean()), float(after.mean()), note=note)
        lines.append(_filled(score, change))
        keys = np.array([own.keys[place] for place in common.before[both]], dtype=object)
        shown = [tuple(keys[rows][:FLIPS_SHOWN].tolist()) for rows in (before & ~after, ~before & after)]
        flips.append(Flips(name, lost, won, shown[0], shown[1]))
    return lines, tuple(flips)


def _warnings(own: Rows, other: Rows, common: Pairing, summaries: tuple[Summary, Summary]) -> tuple[str, ...]:
    found = []
    for summary in summaries:
        if not summary.complete:
            found.append(f"job {summary.job_id} is {summary.completeness}")
    missing = len(own) + len(other) - 2 * len(common.before)
    if missing:
        found.append(f"{missing:,} rows are in one of the jobs only and are left out of paired figures")
    lengths = [each.mean_output_tokens for each in summaries]
    if lengths[0] and lengths[1] and abs(lengths[1] / lengths[0] - 1) > LENGTH_SHIFT:
        found.append(f"answers have another length: {lengths[0]:.1f} and {lengths[1]:.1f} tokens, which is other work")
    return tuple(found)
