"""What the pages show, read from rows: cheap enough to be asked every two seconds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from promptmill.api.dependencies import Services
from promptmill.api.jobs.routes import newest
from promptmill.api.keys import Principal
from promptmill.database.engine import epoch, reading
from promptmill.database.tables import attempts, jobs, requests, results, worker_samples
from promptmill.reports.figures.row_sources import began_and_ended
from promptmill.store.catalog import job_summary
from promptmill.types import JobState

#: Jobs on the first page, rows of a sample, and characters of a text in it.
SHOWN_JOBS = 50
SHOWN_ROWS = 5
SHOWN_CHARS = 400

#: Jobs of up to so many rows get their throughput from rows; larger ones from their workers' samples.
COUNTED_ROWS = 50_000

#: Most steps of the throughput's time axis, which are whole seconds: shorter ones hold an answer or none, and a step
#: stays where it is while the job grows. And the newest results that the histogram looks at.
STEPS = 60
NEWEST_RESULTS = 2_000

#: Upper bounds of the latency histogram, in seconds: each 1.5 times the last.
BOUNDS_S = tuple(round(0.001 * 1.5**step, 6) for step in range(34))

VERBS = {
    JobState.QUEUED: ("pause", "cancel"),
    JobState.RUNNING: ("pause", "cancel"),
    JobState.PAUSED: ("resume", "cancel"),
    JobState.COMPLETED: ("retry",),
    JobState.FAILED: ("retry",),
}


def job_view(db: Engine, summary: dict[str, Any], now: float) -> dict[str, Any]:
    """A job with its progress, rate and time left. The rates of one that has ended are those of its report."""
    done = summary["ok"] + summary["errors"]
    started, ended = summary["started_at"], summary["finished_at"]
    running_s = max(0.0, (ended or now) - started) if started else 0.0
    rate, tps = _per_second(done, running_s), _per_second(summary["output_tokens"], running_s)
    if ended:
        wall_s = _wall_s(db, summary["job_id"], ended)
        rate, tps = _per_second(summary["ok"], wall_s), _per_second(summary["output_tokens"], wall_s)
    open_ = summary["state"] in (JobState.QUEUED, JobState.RUNNING)
    left = summary["rows"] - done
    verbs = VERBS.get(JobState(summary["state"]), ())
    if not summary["errors"]:
        verbs = tuple(each for each in verbs if each != "retry")
    return summary | {
        "done": done, "percent": round(100 * done / summary["rows"], 1) if summary["rows"] else 0.0,
        "rate": rate, "left_s": left / rate if rate and left and open_ else None, "running_s": running_s,
        "verbs": verbs if summary["mode"] == "queue" else (), "is_final": JobState(summary["state"]).is_final,
        "tps": tps,
    }  # fmt: skip


def _per_second(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 and count else None


@lru_cache(maxsize=1000)
def _wall_s(db: Engine, job_id: str, ended_at: float) -> float:
    """``wall_s`` of a job that ended then, as reports have it; 0 where no row had a slot."""
    with reading(db) as connection:
        span = began_and_ended(connection, job_id)
    return span[1] - span[0] if span else 0.0


def job_views(parts: Services, principal: Principal) -> list[dict[str, Any]]:
    found = newest(parts, principal, SHOWN_JOBS)
    with reading(parts.db) as db:
        now = _now(db)
    return [job_view(parts.db, each, now) for each in found]


def worker_views(parts: Services, principal: Principal) -> list[dict[str, Any]]:
    """Workers with what they do now; the name of a job that is another key's is not told."""
    parts.models.refresh()
    with reading(parts.db) as db:
        busy = db.execute(
            sa.select(attempts.c.worker_id, jobs.c.name, jobs.c.id)
            .join(jobs, jobs.c.id == attempts.c.job_id)
            .where(
                attempts.c.ended_at.is_(None), jobs.c.state == JobState.RUNNING.value,
                principal.owned(jobs.c.api_key_id),
            )
        ).all()  # fmt: skip
    doing = {row.worker_id: row.name or row.id for row in busy}
    return [dict(each) | {"doing": doing.get(each["id"])} for each in parts.models.workers]


def detail(parts: Services, job: Row[Any]) -> dict[str, Any]:
    """One job: its counts, errors by class with examples, and samples of answers."""
    with reading(parts.db) as db:
        fresh = db.execute(sa.select(jobs).where(jobs.c.id == job.id)).one()
        view = job_view(parts.db, job_summary(db, fresh), _now(db))
        by_class = db.execute(
            sa.select(results.c.error_class, sa.func.count(), sa.func.min(results.c.error_message))
            .where(results.c.job_id == job.id, results.c.state == "error")
            .group_by(results.c.error_class)
            .order_by(sa.func.count().desc())
        ).all() if view["errors"] else []  # fmt: skip
        samples = _samples(db, job.id)
        older = db.execute(
            sa.select(jobs.c.id, jobs.c.name)
            .where(
                jobs.c.id < job.id, jobs.c.dataset_sha256 == job.dataset_sha256,
                jobs.c.state == JobState.COMPLETED.value, jobs.c.api_key_id.is_not_distinct_from(job.api_key_id),
            )
            .order_by(jobs.c.id.desc())
            .limit(5)
        ).all()  # fmt: skip
    errors = [{"class": row[0], "count": row[1], "message": row[2]} for row in by_class]
    return view | {"by_class": errors, "samples": samples, "comparable": older, "task": job.task_name}


def _samples(db: Connection, job_id: str) -> list[dict[str, Any]]:
    rows = db.execute(
        sa.select(
            results.c.row, requests.c.custom_id, requests.c.input, results.c.text, results.c.finish_reason,
            results.c.output_tokens,
        )
        .join(requests, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
        .where(results.c.job_id == job_id, results.c.state == "ok")
        .order_by(results.c.row.desc())
        .limit(SHOWN_ROWS)
    ).all()  # fmt: skip
    return [
        {
            "row": row.row, "id": row.custom_id, "asked": _asked(row.input), "text": _cut(row.text or ""),
            "finish_reason": row.finish_reason, "tokens": row.output_tokens,
        }
        for row in rows
    ]  # fmt: skip


def _asked(text: str | None) -> str:
    value = json.loads(text or "{}")
    if "messages" in value:
        return _cut(value["messages"][-1]["content"])
    return _cut(value.get("prompt") or json.dumps(value.get("fields", value), ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} …"


def series(parts: Services, job: Row[Any]) -> dict[str, Any]:
    """Points of the live plots: tokens a second, active sequences of each worker, latencies."""
    with reading(parts.db) as db:
        now = _now(db)
        start, end = job.started_at or now, job.finished_at or now
        samples = db.execute(
            sa.select(worker_samples)
            .where(worker_samples.c.worker_id.in_(sa.select(attempts.c.worker_id).where(attempts.c.job_id == job.id)))
            .where(worker_samples.c.at.between(start - 1, end + 6))
            .order_by(worker_samples.c.at.desc())
            .limit(2_000)
        ).all()[::-1]  # fmt: skip
        counted = job.rows <= COUNTED_ROWS
        throughput = _by_rows(db, job.id, start, end) if counted else _by_samples(samples, start)
        latency = _histogram(db, job.id)
    return {"throughput": throughput, "active": _active(samples, start), "latency": latency}


def _by_rows(db: Connection, job_id: str, start: float, end: float) -> dict[str, list[float]]:
    width = max(1, math.ceil((end - start) / STEPS))
    step = sa.cast(sa.func.floor((results.c.finished_at - start) / width), sa.Integer)
    rows = db.execute(
        sa.select(step, sa.func.sum(results.c.output_tokens), sa.func.count())
        .where(results.c.job_id == job_id, results.c.finished_at.is_not(None))
        .group_by(step)
    ).all()
    found = {int(row[0]): (float(row[1] or 0) / width, row[2] / width) for row in rows if row[0] is not None}
    steps = range(max(0, math.ceil((end - start) / width)) + 1)
    return {
        "at": [float(each * width) for each in steps],
        "tokens": [round(found.get(each, (0.0, 0.0))[0], 2) for each in steps],
        "requests": [round(found.get(each, (0.0, 0.0))[1], 2) for each in steps],
    }


def _by_samples(samples: Sequence[Row[Any]], start: float) -> dict[str, list[float]]:
    sums: Counter[float] = Counter()
    for each in samples:
        sums[round((each.at - start) / 5) * 5.0] += each.output_tps or 0
    at = sorted(sums)
    return {"at": at, "tokens": [round(sums[each], 2) for each in at], "requests": []}


def _active(samples: Sequence[Row[Any]], start: float) -> list[dict[str, Any]]:
    lines: dict[str, dict[str, Any]] = {}
    for each in samples:
        line = lines.setdefault(each.worker_id, {"worker": each.worker_id, "at": [], "active": [], "slots": each.slots})
        line["at"].append(round(each.at - start, 2))
        line["active"].append(each.active_sequences)
    return list(lines.values())


def _histogram(db: Connection, job_id: str) -> dict[str, list[float]]:
    newest_ = (
        sa.select((results.c.finished_at - results.c.admitted_at).label("latency"))
        .where(results.c.job_id == job_id, results.c.state == "ok", results.c.finished_at.is_not(None))
        .order_by(results.c.row.desc())
        .limit(NEWEST_RESULTS)
    )
    counts: Counter[int] = Counter()
    for (latency,) in db.execute(newest_):
        counts[next((place for place, bound in enumerate(BOUNDS_S) if latency <= bound), len(BOUNDS_S) - 1)] += 1
    places = range(min(counts), max(counts) + 1) if counts else range(0)
    return {"bound": [BOUNDS_S[each] for each in places], "count": [counts[each] for each in places]}


def _now(db: Connection) -> float:
    return float(db.execute(sa.select(epoch())).scalar() or 0.0)
