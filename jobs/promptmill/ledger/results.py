"""Results: the rows a worker reads, and the rows it writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.clock import DatabaseClock
from promptmill.database.counting import counting
from promptmill.database.engine import copy_rows
from promptmill.database.tables import attempts, chunks, jobs, requests, results, retries
from promptmill.ledger.conditions import change_locked, in_range, lock_held
from promptmill.ledger.jobs import judge_guard
from promptmill.ledger.retries import retry_later, worth_retrying
from promptmill.ledger.values import StoredRequest, Terms, storable
from promptmill.types import EngineCounters, Extras, JobState, Lease, Ok, Result

log = logging.getLogger("promptmill.ledger")

RESULT_COLUMNS = (
    "job_id", "row", "state", "text", "finish_reason", "error_class", "error_message", "prompt_tokens", "cached_tokens",
    "output_tokens", "max_tokens", "enqueued_at", "received_at", "admitted_at", "first_token_at", "finished_at",
    "committed_at", "attempt", "worker_id", "chunk", "reasoning_tokens", "reasoning", "choices", "logprobs",
    "choice_probs", "continuations", "embedding", "deduplicated",
)  # fmt: skip


def pending(db: Connection, lease: Lease) -> list[StoredRequest]:
    """The leased rows that have no result and were not handed to another chunk, in order."""
    job_id = lease.chunk.job_id
    asked = (
        sa.select(requests.c.row, requests.c.custom_id, requests.c.input, requests.c.meta, requests.c.sampling)
        .where(requests.c.job_id == job_id, in_range(requests.c.row, lease))
        .order_by(requests.c.row)
    )
    # Ranges of primary keys, one by one: planners of databases without statistics get a join of them wrong.
    answered = sa.select(results.c.row).where(results.c.job_id == job_id, in_range(results.c.row, lease))
    moved = sa.select(retries.c.row).where(
        retries.c.job_id == job_id, in_range(retries.c.row, lease), retries.c.chunk == lease.chunk.number
    )
    done = {*db.execute(answered).scalars(), *db.execute(moved).scalars()}
    return [
        StoredRequest(
            row, custom_id, json.loads(text), json.loads(meta) if meta else None,
            json.loads(sampling) if sampling else {},
        )
        for row, custom_id, text, meta, sampling in db.execute(asked)
        if row not in done
    ]  # fmt: skip


def record(
    db: Connection,
    terms: Terms,
    lease: Lease,
    batch: Sequence[tuple[Result, int]],
    counters: EngineCounters | None = None,
    *,
    maybe_stored: bool = False,
) -> int:
    """Store results, each with the ``max_tokens`` it ran under. Returns how many are stored.

    ``counters``: what the engine did since the last record of this lease. Nothing is stored when the lease was
    overtaken, or when its job has ended meanwhile. ``maybe_stored``: an earlier call with this batch may have been
    committed although it raised; what is there is not stored again.
    """
    left = unstored(db, lease, batch) if maybe_stored else batch
    if not left:
        return len(batch)
    if not _takes_results(db, lease):
        log.warning(
            "chunk %s/%d: attempt %d of %s has lost its lease, or its job has ended: %d results are not stored",
            lease.chunk.job_id, lease.chunk.number, lease.attempt, lease.worker_id, len(left),
        )  # fmt: skip
        return len(batch) - len(left)
    now = terms.clock.read(db)
    again = worth_retrying(db, terms, lease, [each for each, _ in left])
    final = [(each, limit) for each, limit in left if each.row not in again]
    copy_rows(db, results, RESULT_COLUMNS, [_result_row(lease, each, limit, now, terms.clock) for each, limit in final])
    answers = [each for each, _ in final if isinstance(each, Ok)]
    counts = counting(db, lease.model, lease.worker_id)
    counts.results([each for each, _ in final], lease.enqueued_at, terms.clock.at)
    counts.add("retries", len(again))
    change_locked(
        db,
        lease.chunk,
        ok=chunks.c.ok + len(answers),
        errors=chunks.c.errors + len(final) - len(answers),
        moved=chunks.c.moved + len(again),
        output_tokens=chunks.c.output_tokens + sum(generated(each) for each in answers),
        leased_until=now + terms.lease_s,
    )
    add_counters(db, lease, counters)
    if again:
        retry_later(db, lease, [each for each, _ in left if each.row in again], again, now, terms.clock)
    if len(answers) < len(final):
        judge_guard(db, lease.chunk.job_id)
    return len(batch)


def unstored(db: Connection, lease: Lease, batch: Sequence[tuple[Result, int]]) -> Sequence[tuple[Result, int]]:
    """Those of the batch that are neither stored nor handed to another chunk."""
    job_id, rows = lease.chunk.job_id, [each.row for each, _ in batch]
    stored = sa.select(results.c.row).where(results.c.job_id == job_id, results.c.row.in_(rows))
    moved = sa.select(retries.c.row).where(
        retries.c.job_id == job_id, retries.c.row.in_(rows), retries.c.chunk == lease.chunk.number
    )
    there = {*db.execute(stored).scalars(), *db.execute(moved).scalars()}
    return [(each, limit) for each, limit in batch if each.row not in there]


def _takes_results(db: Connection, lease: Lease) -> bool:
    """Lock the leased chunk; False when the lease was overtaken or the job has ended.

    A paused job still takes the results of what was running.
    """
    if not lock_held(db, lease):
        return False
    state = db.execute(sa.select(jobs.c.state).where(jobs.c.id == lease.chunk.job_id)).scalar()
    return state is not None and not JobState(state).is_final


def _more_counters() -> sa.Update:
    each = attempts.c
    values: dict[str, sa.ColumnElement[Any]] = {}
    for name in (field.name for field in fields(EngineCounters)):
        before: sa.ColumnElement[Any] = sa.func.coalesce(each[name], 0)
        more = sa.bindparam(f"more_{name}", type_=each[name].type)
        values[name] = sa.case((before > more, before), else_=more) if name.startswith("peak_") else before + more
    of_lease = (
        each.job_id == sa.bindparam("of_job"), each.number == sa.bindparam("of_number"),
        each.attempt == sa.bindparam("of_attempt"),
    )  # fmt: skip
    return sa.update(attempts).where(*of_lease).values(values)


#: Put together once: for each batch of results that costs more than all other measuring.
MORE_COUNTERS = _more_counters()


def add_counters(db: Connection, lease: Lease, counters: EngineCounters | None) -> None:
    """Add to the attempt's counters: if its worker is lost, what it did up to here is known."""
    if counters is None:
        return
    more = {f"more_{each.name}": getattr(counters, each.name) for each in fields(EngineCounters)}
    of_lease = {"of_job": lease.chunk.job_id, "of_number": lease.chunk.number, "of_attempt": lease.attempt}
    db.execute(MORE_COUNTERS, of_lease | more)
    counting(db, lease.model, lease.worker_id).engine(counters)


def generated(answer: Ok) -> int:
    """Tokens that were computed for this answer: none of one that was copied."""
    return 0 if answer.extras is not None and answer.extras.deduplicated else answer.usage.output_tokens


def _result_row(lease: Lease, result: Result, max_tokens: int, now: float, clock: DatabaseClock) -> tuple[Any, ...]:
    """A row of ``results`` in the order of RESULT_COLUMNS, its times by the database's clock."""
    usage, times = result.usage, result.timing.by(clock.at) if result.timing else (None, None, None, None)
    outcome: tuple[str | None, ...]
    if isinstance(result, Ok):
        outcome = ("ok", storable(result.text), result.finish_reason.value, None, None)
    else:
        outcome = ("error", None, None, result.error_class.value, storable(result.message))
    tokens = (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) if usage else (None, None, None)
    extras = result.extras if isinstance(result, Ok) else None
    return (
        lease.chunk.job_id, result.row, *outcome, *tokens, max_tokens, lease.enqueued_at, *times, now, lease.attempt,
        lease.worker_id, lease.chunk.number, usage.reasoning_tokens if usage else None,
        *(NO_EXTRAS if extras is None else _extras_row(extras)),
    )  # fmt: skip


#: The last columns of most results.
NO_EXTRAS = (None, None, None, None, None, None, False)


def _extras_row(extras: Extras) -> tuple[Any, ...]:
    reasoning = None if extras.reasoning is None else storable(extras.reasoning)
    parts = (extras.choices, extras.logprobs, extras.choice_probs, extras.continuations, extras.embedding)
    return (reasoning, *(None if part is None else json.dumps(part, ensure_ascii=False) for part in parts),
            extras.deduplicated)  # fmt: skip
