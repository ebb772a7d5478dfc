"""What the HTML report shows beyond the summary: values to plot, slow rows, configuration, samples of workers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.tables import attempts, job_tags, jobs, requests, results, worker_samples
from promptmill.reports.compare.pairs import read_rows
from promptmill.reports.figures.columns import Floats
from promptmill.reports.figures.timeline import Phase, read_phases
from promptmill.scoring.scorers.aggregates import Figures, of_calibration
from promptmill.scoring.statistics.calibration import BINS
from promptmill.scoring.statistics.clusters import Clusters
from promptmill.scoring.stored_scores import own_runs

#: Slowest rows that are listed.
SLOWEST = 10

#: Points of each worker's samples.
SAMPLES = 400


@dataclass(frozen=True, slots=True)
class SlowRow:
    """One of the slowest answers. ``text`` is what the model wrote: untrusted."""

    row: int
    custom_id: str
    latency_s: float
    output_tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class PhaseUse:
    """What a worker used while it was loading, idle or busy. None: not measured."""

    worker_id: str
    state: str
    samples: int
    memory_bytes: int | None
    device_memory_bytes: int | None
    cpu_ratio: float | None
    device_use_ratio: float | None


@dataclass(frozen=True, slots=True)
class Details:
    """Seconds count from the first admission."""

    slow: tuple[SlowRow, ...]
    #: (worker, start, end, outcome) of each attempt.
    spans: tuple[tuple[str, float, float, str], ...]
    #: What each worker was at, and (worker, second) of each that was started anew.
    phases: tuple[Phase, ...]
    restarts: tuple[tuple[str, float], ...]
    #: Worker -> state -> most memory, most device memory, mean CPU, mean device use of its samples.
    resources: tuple[PhaseUse, ...]
    #: The first score that is right or wrong, by how sure the model was of its answers; None: there is none.
    calibration: tuple[str, Figures] | None
    note: str | None
    tags: tuple[str, ...]
    #: Worker -> its samples, as columns by name.
    samples: dict[str, dict[str, Floats]]
    config: dict[str, Any]
    env: dict[str, Any]
    #: The score run by the job's own task; None where there is none.
    score_run: str | None


def read_details(db: Connection, job_id: str, begin: float, end: float) -> Details:
    """What lies beside the rows that were folded. ``begin`` and ``end``: of the time that plots show."""
    job = db.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()
    phases, restarts = read_phases(db, job_id, begin, end)
    return Details(
        slow=_slow(db, job_id),
        spans=_spans(db, job_id, begin, end),
        phases=phases,
        restarts=restarts,
        resources=_resources(db, job_id, end),
        calibration=_calibration(db, job_id),
        note=job.note,
        tags=tuple(
            db.execute(sa.select(job_tags.c.tag).where(job_tags.c.job_id == job_id).order_by(job_tags.c.tag)).scalars()
        ),
        samples=_samples(db, job_id, begin, end),
        config=_config(job),
        env=json.loads(job.env or "{}"),
        score_run=next(iter(own_runs(db, job_id, job.task_sha256)), None),
    )


def _slow(db: Connection, job_id: str) -> tuple[SlowRow, ...]:
    each = results.c
    latency = each.finished_at - each.admitted_at
    # The slowest first, then their texts: a sort of whole answers would need their memory.
    slowest = (
        sa.select(each.row, latency.label("latency_s"))
        .where(each.job_id == job_id, each.state == "ok", each.finished_at.is_not(None))
        .order_by(latency.desc(), each.row)
        .limit(SLOWEST)
        .subquery()
    )
    query = (
        sa.select(
            each.row, requests.c.custom_id, slowest.c.latency_s, each.output_tokens,
            sa.func.substr(each.text, 1, 300).label("text"),
        )
        .join(slowest, slowest.c.row == each.row)
        .join(requests, sa.and_(requests.c.job_id == each.job_id, requests.c.row == each.row))
        .where(each.job_id == job_id)
        .order_by(slowest.c.latency_s.desc())
    )  # fmt: skip
    return tuple(
        SlowRow(each.row, each.custom_id, each.latency_s, each.output_tokens, each.text or "")
        for each in db.execute(query)
    )


def _spans(db: Connection, job_id: str, begin: float, end: float) -> tuple[tuple[str, float, float, str], ...]:
    each = attempts.c
    query = sa.select(each.worker_id, each.started_at, each.ended_at, each.outcome).where(each.job_id == job_id)
    return tuple(
        (worker, started - begin, (ended or end) - begin, outcome or "running")
        for worker, started, ended, outcome in db.execute(query.order_by(each.worker_id, each.started_at))
    )


def _resources(db: Connection, job_id: str, end: float) -> tuple[PhaseUse, ...]:
    """Use by each worker of the job, from its start to the job's end."""
    each = worker_samples.c
    own = sa.select(attempts.c.worker_id).where(attempts.c.job_id == job_id)
    query = (
        sa.select(
            each.worker_id, each.state, sa.func.count(), sa.func.max(each.memory_bytes),
            sa.func.max(each.device_memory_bytes), sa.func.avg(each.cpu_ratio), sa.func.avg(each.device_use_ratio),
        )
        .where(each.worker_id.in_(own), each.at <= end + 10, each.state.is_not(None))
        .group_by(each.worker_id, each.state)
        .order_by(each.worker_id, each.state)
    )  # fmt: skip
    return tuple(PhaseUse(*row) for row in db.execute(query))


def _calibration(db: Connection, job_id: str) -> tuple[str, Figures] | None:
    """Calibration by the first score that is right or wrong; None where no answer came with probabilities."""
    each = results.c
    query = sa.select(each.row, each.choice_probs).where(each.job_id == job_id, each.choice_probs.is_not(None))
    sure = {row: max(json.loads(text).values(), default=0.0) for row, text in db.execute(query)}
    if len(sure) < BINS:
        return None
    rows = read_rows(db, job_id)
    confidence = np.array([sure.get(int(row), np.nan) for row in rows.row])
    for name, score in rows.scores.items():
        known = np.isfinite(confidence) & np.isfinite(score.right)
        if known.sum() >= BINS:
            clusters = Clusters.of(rows.input).at(known)
            return name, of_calibration(confidence[known], score.right[known] == 1, clusters)
    return None


def _samples(db: Connection, job_id: str, begin: float, end: float) -> dict[str, dict[str, Floats]]:
    each = worker_samples.c
    names = ("at", "cpu_ratio", "memory_bytes", "device_memory_bytes", "device_use_ratio", "active_sequences", "slots")
    own = sa.select(attempts.c.worker_id).where(attempts.c.job_id == job_id)
    query = sa.select(each.worker_id, *(each[name] for name in names)).where(
        each.worker_id.in_(own), each.at.between(begin - 10, end + 10)
    )
    found: dict[str, list[tuple[float, ...]]] = {}
    for worker, *values in db.execute(query.order_by(each.worker_id, each.at)):
        found.setdefault(worker, []).append(tuple(np.nan if value is None else float(value) for value in values))
    columns: dict[str, dict[str, Floats]] = {}
    for worker, rows in found.items():
        block = np.array(rows[:: max(1, len(rows) // SAMPLES)])
        columns[worker] = {name: block[:, index] for index, name in enumerate(names)}
        columns[worker]["at"] = columns[worker]["at"] - begin
    return columns


def _config(job: sa.Row[Any]) -> dict[str, Any]:
    """Everything that was asked of the job."""
    names = ("model", "model_fingerprint", "task_name", "task_sha256", "priority", "slots", "context_tokens", "mode")
    known = {name: getattr(job, name) for name in names if getattr(job, name) is not None}
    sampling: dict[str, Any] = json.loads(job.sampling)
    return known | sampling
