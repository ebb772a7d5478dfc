"""What the HTML report shows beyond the summary: values to plot, slow rows, configuration, samples of workers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.reports.scan import Floats
from promptmill.tables import attempts, jobs, requests, results, worker_samples

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
class Details:
    """Seconds count from the first admission."""

    slow: tuple[SlowRow, ...]
    #: (worker, start, end, outcome) of each attempt.
    spans: tuple[tuple[str, float, float, str], ...]
    #: Worker -> its samples, as columns by name.
    samples: dict[str, dict[str, Floats]]
    config: dict[str, Any]
    env: dict[str, Any]


def read_details(db: Connection, job_id: str, begin: float, end: float) -> Details:
    """What lies beside the rows that were folded. ``begin`` and ``end``: of the time that plots show."""
    job = db.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()
    return Details(
        slow=_slow(db, job_id),
        spans=_spans(db, job_id, begin, end),
        samples=_samples(db, job_id, begin, end),
        config=_config(job),
        env=json.loads(job.env or "{}"),
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
        for worker, started, ended, outcome in db.execute(query.order_by(each.worker_id, each.started_at).limit(2000))
    )


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
