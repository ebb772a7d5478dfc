"""Reading jobs, workers and results for people: by name, as lists, as result lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from promptmill.database.engine import epoch, reading
from promptmill.database.tables import attempts, chunks, jobs, requests, results, score_runs, worker_samples, workers
from promptmill.errors import UnknownName

#: Rows fetched at a time where all of a job's rows are read.
FETCH_ROWS = 2_000


def find_job(db: Engine, reference: str) -> Row[Any]:
    """The job that ``reference`` names: an id, a unique prefix of one, a name, or ``@last``.

    Raises :class:`UnknownName` when there is none, or more than one.
    """
    with reading(db) as connection:
        found = _matching(connection, reference)
    if not found:
        raise UnknownName(f"there is no job '{reference}'", hint="'promptmill list' shows the jobs.")
    if len(found) > 1:
        names = ", ".join(f"{row.id}{f' ({row.name})' if row.name else ''}" for row in found[:5])
        raise UnknownName(f"'{reference}' names more than one job: {names}", hint="Give more of the id.")
    return found[0]


def _matching(db: Connection, reference: str) -> list[Row[Any]]:
    newest_first = sa.select(jobs).order_by(jobs.c.id.desc())
    if reference == "@last":
        return list(db.execute(newest_first.limit(1)))
    exact = list(db.execute(newest_first.where(sa.or_(jobs.c.id == reference.upper(), jobs.c.name == reference))))
    if exact or not reference.isalnum():
        return exact
    return list(db.execute(newest_first.where(jobs.c.id.startswith(reference.upper())).limit(6)))


def find_scored(db: Engine, reference: str) -> tuple[Row[Any], str | None]:
    """The job that ``JOB`` names, or the job and the score run that ``JOB@s2`` names: its second one.

    Raises :class:`UnknownName`.
    """
    name, mark, number = reference.rpartition("@s")
    if not (mark and name and number.isdigit()):
        return find_job(db, reference), None
    job = find_job(db, name)
    # A run without figures did not end.
    each = score_runs.c
    query = sa.select(each.number, each.id).where(each.job_id == job.id, each.figures.is_not(None))
    with reading(db) as connection:
        known = {found.number: str(found.id) for found in connection.execute(query.order_by(each.number))}
    if int(number) not in known:
        there = ", ".join(f"@s{each}" for each in known) or "none; 'promptmill score JOB' appends one"
        raise UnknownName(f"job {job.id} has no score run @s{number}", hint=f"Its runs: {there}.")
    return job, known[int(number)]


def list_jobs(db: Engine, limit: int) -> list[dict[str, Any]]:
    """The newest jobs with their counts."""
    with reading(db) as connection:
        found = connection.execute(sa.select(jobs).order_by(jobs.c.id.desc()).limit(limit)).all()
        return [job_summary(connection, row) for row in found]


def job_status(db: Engine, job: Row[Any]) -> dict[str, Any]:
    """One job with its counts and chunks."""
    with reading(db) as connection:
        states = connection.execute(
            sa.select(chunks.c.state, sa.func.count()).where(chunks.c.job_id == job.id).group_by(chunks.c.state)
        ).all()
        fresh = connection.execute(sa.select(jobs).where(jobs.c.id == job.id)).one()
        return job_summary(connection, fresh) | {"chunks": dict(states)}


def job_summary(db: Connection, job: Row[Any]) -> dict[str, Any]:
    """What lists show of a job. Counts come from its chunks, so they cost the same for any number of rows."""
    ok, errors, tokens = db.execute(
        sa.select(
            sa.func.coalesce(sa.func.sum(chunks.c.ok), 0),
            sa.func.coalesce(sa.func.sum(chunks.c.errors), 0),
            sa.func.coalesce(sa.func.sum(chunks.c.output_tokens), 0),
        ).where(chunks.c.job_id == job.id)
    ).one()
    return {
        "job_id": job.id, "name": job.name, "state": job.state, "mode": job.mode, "dataset": job.dataset_name,
        "model": job.model, "priority": job.priority, "rows": job.rows, "ok": int(ok), "errors": int(errors),
        "output_tokens": int(tokens), "stop_reason": job.stop_reason, "submitted_at": job.submitted_at,
        "started_at": job.started_at, "finished_at": job.finished_at,
    }  # fmt: skip


def with_newest_samples() -> sa.FromClause:
    """Each worker with its newest sample, found at the end of its part of the primary key: others are not read."""
    each = worker_samples.alias()
    newest = sa.select(sa.func.max(each.c.at)).where(each.c.worker_id == workers.c.id).scalar_subquery()
    is_newest = sa.and_(worker_samples.c.worker_id == workers.c.id, worker_samples.c.at == newest)
    return workers.outerjoin(worker_samples, is_newest)


def list_workers(db: Engine, alive_s: float) -> list[dict[str, Any]]:
    """Workers with a heartbeat within ``alive_s`` that have not said goodbye, with their latest sample."""
    query = (
        sa.select(
            workers, (epoch() - workers.c.heartbeat_at).label("age_s"), worker_samples.c.output_tps,
            worker_samples.c.active_sequences, worker_samples.c.memory_bytes, worker_samples.c.cpu_ratio,
        )
        .select_from(with_newest_samples())
        .where(workers.c.state != "stopped", workers.c.heartbeat_at > epoch() - alive_s)
        .order_by(workers.c.id)
    )  # fmt: skip
    with reading(db) as connection:
        found = connection.execute(query).mappings().all()
    return [{**row, "versions": json.loads(row["versions"] or "{}")} for row in found]


def serving(db: Connection, model: str, alive_s: float, *such: sa.ColumnElement[bool]) -> list[Any]:
    """Workers with a heartbeat within ``alive_s`` that are such and serve ``model``, whichever they have loaded."""
    each = workers.c
    alive = sa.select(each.id, each.models, each.model, each.model_fingerprint)
    found = db.execute(alive.where(each.heartbeat_at > epoch() - alive_s, *such).order_by(each.id))
    return [worker for worker in found if model in json.loads(worker.models)]


def may_have(worker: Row[Any], model: str, fingerprint: str | None) -> bool:
    """Whether a worker that serves ``model`` has the one with ``fingerprint``, for all that is known."""
    known = worker.model_fingerprint if worker.model == model else None
    return None in (known, fingerprint) or known == fingerprint


def waiting_for_models(db: Engine, alive_s: float, job_id: str | None = None) -> dict[str, str]:
    """Open jobs, or this one, that wait because all workers have another model under the name of theirs.

    Job -> what it waits for.
    """
    query = sa.select(jobs).where(jobs.c.state.in_(("queued", "running")), jobs.c.model_fingerprint.is_not(None))
    if job_id is not None:
        query = query.where(jobs.c.id == job_id)
    with reading(db) as connection:
        found = {job.id: _waits_for(connection, job, alive_s) for job in connection.execute(query).all()}
    return {each: words for each, words in found.items() if words is not None}


def _waits_for(db: Connection, job: Row[Any], alive_s: float) -> str | None:
    if job.mode != "queue":
        return None
    found = serving(db, job.model, alive_s, workers.c.state != "stopped")
    if not found or any(may_have(each, job.model, job.model_fingerprint) for each in found):
        return None
    others = ", ".join(f"{each.id} has {each.model_fingerprint[:12]}" for each in found)
    return f"a worker whose {job.model} has the fingerprint {job.model_fingerprint[:12]} ({others})"


def models_once_served(db: Engine) -> set[str]:
    """Models of workers, gone ones too, and of jobs of the queue."""
    with reading(db) as connection:
        served = connection.execute(sa.select(workers.c.models).distinct()).scalars().all()
        asked = connection.execute(sa.select(jobs.c.model).where(jobs.c.mode == "queue").distinct()).scalars().all()
    return {name for models in served for name in json.loads(models)} | set(asked)


def result_lines(db: Engine, job_id: str, failed_only: bool = False) -> Iterator[dict[str, Any]]:
    """One line per result, in the order of the rows, streamed."""
    for row in result_rows(db, job_id, failed_only):
        yield result_line(row)


def result_rows(db: Engine, job_id: str, failed_only: bool = False) -> Iterator[Row[Any]]:
    """Rows of ``results`` with the ``custom_id`` and ``input`` of their requests, streamed."""
    query = (
        sa.select(results, requests.c.custom_id, requests.c.input, requests.c.sampling)
        .join(requests, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
        .where(results.c.job_id == job_id)
        .order_by(results.c.row)
    )
    if failed_only:
        query = query.where(results.c.state == "error")
    with reading(db) as connection:
        yield from connection.execution_options(yield_per=FETCH_ROWS).execute(query)


#: Columns of ``results`` that hold JSON.
EXTRAS = ("choices", "logprobs", "choice_probs", "continuations", "embedding")


def result_line(row: Row[Any]) -> dict[str, Any]:
    """A result as programs read it; these keys stay."""
    line = {
        "row": row.row, "id": row.custom_id, "state": row.state, "text": row.text, "finish_reason": row.finish_reason,
        "prompt_tokens": row.prompt_tokens, "cached_tokens": row.cached_tokens, "output_tokens": row.output_tokens,
        "latency_s": _between(row.admitted_at, row.finished_at),
        "ttft_s": _between(row.admitted_at, row.first_token_at),
        "queue_s": _between(row.enqueued_at, row.admitted_at), "attempt": row.attempt, "worker": row.worker_id,
    }  # fmt: skip
    # What only some requests ask for is only in their lines.
    if row.reasoning is not None:
        line |= {"reasoning": row.reasoning, "reasoning_tokens": row.reasoning_tokens}
    line |= {name: json.loads(text) for name in EXTRAS if (text := getattr(row, name)) is not None}
    if row.deduplicated:
        line["deduplicated"] = True
    if row.state == "error":
        line["error"] = {"class": row.error_class, "message": row.error_message}
    return line


def _between(start: float | None, end: float | None) -> float | None:
    """Seconds, not negative: a reading of the database's clock may be off by more than the time between."""
    return None if start is None or end is None else round(max(0.0, end - start), 6)


def row_with_id(db: Engine, job_id: str, custom_id: str) -> int | None:
    """The number of the row with that id."""
    query = sa.select(requests.c.row).where(requests.c.job_id == job_id, requests.c.custom_id == custom_id)
    with reading(db) as connection:
        return connection.execute(query.order_by(requests.c.row).limit(1)).scalar()


def numbered_ids(db: Engine, job_id: str, most: int) -> list[str]:
    """Ids such as ``a#2``, the first ``most`` of them."""
    query = sa.select(requests.c.custom_id).where(requests.c.job_id == job_id, requests.c.custom_id.like("%#%"))
    with reading(db) as connection:
        found = connection.execute(query.order_by(requests.c.row)).scalars()
        numbered = (each for each in found if re.search(r"#\d+$", each))
        return list(islice(numbered, most))


def read_row(db: Engine, job: Row[Any], row: int) -> dict[str, Any]:
    """Everything stored about one row. Raises :class:`UnknownName` when the job has no such row."""
    with reading(db) as connection:
        request = connection.execute(
            sa.select(requests).where(requests.c.job_id == job.id, requests.c.row == row)
        ).one_or_none()
        if request is None:
            raise UnknownName(f"job {job.id} has no row {row}", hint=f"Its rows are 0 to {job.rows - 1}.")
        result = connection.execute(
            sa.select(results, requests.c.custom_id)
            .join(requests, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
            .where(results.c.job_id == job.id, results.c.row == row)
        ).one_or_none()
        tries = connection.execute(_attempts_on(job.id, row)).mappings().all()
    return {
        "row": row,
        "id": request.custom_id,
        "input": json.loads(request.input) if request.input else None,
        "meta": json.loads(request.meta) if request.meta else None,
        "sampling": json.loads(request.sampling) if request.sampling else {},
        "expected": json.loads(request.expected) if request.expected else None,
        "result": result_line(result) if result else None,
        "attempts": [dict(each) for each in tries],
    }


def _attempts_on(job_id: str, row: int) -> sa.Select[Any]:
    return (
        sa.select(
            attempts.c.number.label("chunk"), attempts.c.attempt, attempts.c.worker_id, attempts.c.started_at,
            attempts.c.ended_at, attempts.c.outcome,
        )
        .join(chunks, sa.and_(chunks.c.job_id == attempts.c.job_id, chunks.c.number == attempts.c.number))
        .where(chunks.c.job_id == job_id, chunks.c.first_row <= row, row < chunks.c.first_row + chunks.c.rows)
        .order_by(attempts.c.started_at)
    )  # fmt: skip
