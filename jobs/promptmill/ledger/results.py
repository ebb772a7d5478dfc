"""Results: the rows a worker reads, and the rows it writes. Errors that may go better are tried again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.clock import DatabaseClock
from promptmill.database.counting import counting
from promptmill.database.engine import copy_rows, reading, writing
from promptmill.database.tables import attempts, chunks, jobs, requests, results, retries
from promptmill.errors import JobError
from promptmill.ledger.base import held_by, in_range, log, storable
from promptmill.ledger.jobs import Jobs
from promptmill.ledger.values import RETRYABLE, JobSpec, StoredRequest
from promptmill.types import EngineCounters, Extras, Failed, JobState, Lease, Ok, Result

RESULT_COLUMNS = (
    "job_id", "row", "state", "text", "finish_reason", "error_class", "error_message", "prompt_tokens", "cached_tokens",
    "output_tokens", "max_tokens", "enqueued_at", "received_at", "admitted_at", "first_token_at", "finished_at",
    "committed_at", "attempt", "worker_id", "chunk", "reasoning_tokens", "reasoning", "choices", "logprobs",
    "choice_probs", "continuations", "embedding", "deduplicated",
)  # fmt: skip

#: Columns of ``retries`` that a result fills; ``retried_at`` follows.
RETRY_COLUMNS = (
    "job_id", "row", "chunk", "attempt", "worker_id", "error_class", "error_message", "prompt_tokens", "output_tokens",
    "admitted_at", "finished_at",
)  # fmt: skip


class Results(Jobs):
    """What a worker asks and answers while it holds a lease."""

    def job_spec(self, job_id: str) -> JobSpec:
        """The parts of a job that turn its rows into requests."""
        with reading(self.db) as db:
            columns = (
                jobs.c.model, jobs.c.task_text, jobs.c.task_name, jobs.c.system_prompt, jobs.c.sampling,
                jobs.c.use_cache, jobs.c.api_key_id,
            )  # fmt: skip
            job = db.execute(sa.select(*columns).where(jobs.c.id == job_id)).one_or_none()
        if job is None:
            raise JobError(f"there is no job {job_id}")
        return JobSpec(
            job_id, job.model, job.task_text, job.task_name, job.system_prompt, json.loads(job.sampling),
            job.use_cache, job.api_key_id or "",
        )  # fmt: skip

    def pending(self, lease: Lease) -> list[StoredRequest]:
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
        with reading(self.db) as db:
            done = {*db.execute(answered).scalars(), *db.execute(moved).scalars()}
            rows = [row for row in db.execute(asked) if row.row not in done]
        return [
            StoredRequest(
                row,
                custom_id,
                json.loads(text),
                json.loads(meta) if meta else None,
                json.loads(sampling) if sampling else {},
            )
            for row, custom_id, text, meta, sampling in rows
        ]

    def record(
        self,
        lease: Lease,
        batch: Sequence[tuple[Result, int]],
        counters: EngineCounters | None = None,
        *,
        maybe_stored: bool = False,
    ) -> int:
        """Store results, each with the ``max_tokens`` it ran under, in one transaction. Returns how many are stored.

        ``counters``: what the engine did since the last record of this lease. Nothing is stored when the lease was
        overtaken, or when its job has ended meanwhile. ``maybe_stored``: an earlier call with this batch may have been
        committed although it raised; what is there is not stored again.
        """
        if not batch:
            return 0
        with writing(self.db) as db:
            left = self._unstored(db, lease, batch) if maybe_stored else batch
            return len(batch) - len(left) + self._record(db, lease, left, counters)

    def _unstored(
        self, db: Connection, lease: Lease, batch: Sequence[tuple[Result, int]]
    ) -> Sequence[tuple[Result, int]]:
        job_id, rows = lease.chunk.job_id, [each.row for each, _ in batch]
        stored = sa.select(results.c.row).where(results.c.job_id == job_id, results.c.row.in_(rows))
        moved = sa.select(retries.c.row).where(
            retries.c.job_id == job_id, retries.c.row.in_(rows), retries.c.chunk == lease.chunk.number
        )
        there = {*db.execute(stored).scalars(), *db.execute(moved).scalars()}
        return [(each, limit) for each, limit in batch if each.row not in there]

    def _record(
        self,
        db: Connection,
        lease: Lease,
        batch: Sequence[tuple[Result, int]],
        counters: EngineCounters | None = None,
    ) -> int:
        if not batch:
            return 0
        if not self._hold(db, lease):
            log.warning(
                "chunk %s/%d: attempt %d of %s has lost its lease, or its job has ended: %d results are not stored",
                lease.chunk.job_id, lease.chunk.number, lease.attempt, lease.worker_id, len(batch),
            )  # fmt: skip
            return 0
        now, clock = self.read_clock(db)
        again = self._worth_retrying(db, lease, [each for each, _ in batch])
        final = [(each, limit) for each, limit in batch if each.row not in again]
        rows = [_result_row(lease, each, limit, now, clock) for each, limit in final]
        copy_rows(db, results, RESULT_COLUMNS, rows)
        answers = [each for each, _ in final if isinstance(each, Ok)]
        failures = len(final) - len(answers)
        counts = counting(db, lease.model, lease.worker_id)
        counts.results([each for each, _ in final], lease.enqueued_at, clock.at)
        counts.add("retries", len(again))
        db.execute(
            sa.update(chunks)
            .where(held_by(lease))
            .values(
                ok=chunks.c.ok + len(answers),
                errors=chunks.c.errors + failures,
                moved=chunks.c.moved + len(again),
                output_tokens=chunks.c.output_tokens + sum(generated(each) for each in answers),
                leased_until=now + self.lease_s,
            )
        )
        self._add_counters(db, lease, counters)
        if again:
            failed = [each for each, _ in batch if each.row in again]
            self._retry_later(db, lease, failed, again, now, clock)
        if failures:
            self._judge_guard(db, lease.chunk.job_id)
        return len(batch)

    def _hold(self, db: Connection, lease: Lease) -> bool:
        """Lock the leased chunk for this transaction; False when the lease was overtaken or the job has ended.

        A paused job still takes the results of what was running.
        """
        held = db.execute(sa.select(chunks.c.number).where(held_by(lease)).with_for_update()).scalar()
        state = db.execute(sa.select(jobs.c.state).where(jobs.c.id == lease.chunk.job_id)).scalar()
        return held is not None and state is not None and not JobState(state).is_final

    def _add_counters(self, db: Connection, lease: Lease, counters: EngineCounters | None) -> None:
        """Add to the attempt's counters: if its worker is lost, what it did up to here is known."""
        if counters is None:
            return
        more = {f"more_{each.name}": getattr(counters, each.name) for each in fields(EngineCounters)}
        of = {"of_job": lease.chunk.job_id, "of_number": lease.chunk.number, "of_attempt": lease.attempt}
        db.execute(self._counters_query, of | more)
        counting(db, lease.model, lease.worker_id).engine(counters)

    @cached_property
    def _counters_query(self) -> sa.Update:
        """Put together once: for each batch of results that costs more than all other measuring."""
        each = attempts.c
        values: dict[str, sa.ColumnElement[Any]] = {}
        for name in (field.name for field in fields(EngineCounters)):
            before: sa.ColumnElement[Any] = sa.func.coalesce(each[name], 0)
            more = sa.bindparam(f"more_{name}", type_=each[name].type)
            values[name] = sa.case((before > more, before), else_=more) if name.startswith("peak_") else before + more
        is_attempt = sa.and_(
            each.job_id == sa.bindparam("of_job"), each.number == sa.bindparam("of_number"),
            each.attempt == sa.bindparam("of_attempt"),
        )  # fmt: skip
        return sa.update(attempts).where(is_attempt).values(values)

    # --- trying again ------------------------------------------------------------------------------------------------

    def _worth_retrying(self, db: Connection, lease: Lease, batch: Sequence[Result]) -> dict[int, int]:
        """Rows of the batch that failed in a way that may go better, and how often each was tried before."""
        failed = [each.row for each in batch if isinstance(each, Failed) and each.error_class in RETRYABLE]
        if not failed:
            return {}
        # A retry by hand begins anew.
        again = retries.alias()
        begun = (
            sa.select(sa.func.max(again.c.retried_at))
            .where(again.c.job_id == retries.c.job_id, again.c.row == retries.c.row, again.c.by_hand)
            .scalar_subquery()
        )
        query = (
            sa.select(retries.c.row, sa.func.count())
            .where(retries.c.job_id == lease.chunk.job_id, retries.c.row.in_(failed), ~retries.c.by_hand)
            .where(retries.c.retried_at > sa.func.coalesce(begun, 0.0))
            .group_by(retries.c.row)
        )
        before: dict[int, int] = {each.row: each[1] for each in db.execute(query)}
        return {row: before.get(row, 0) for row in failed if before.get(row, 0) + 1 < self._max_attempts}

    def _retry_later(
        self,
        db: Connection,
        lease: Lease,
        batch: Sequence[Result],
        tried: dict[int, int],
        now: float,
        clock: DatabaseClock,
    ) -> None:
        """Keep the errors in ``retries`` and give their rows to new chunks, to be run after a wait."""
        columns = (*RETRY_COLUMNS, "retried_at", "by_hand")
        copy_rows(db, retries, columns, [(*_retry_row(lease, each, clock), now, False) for each in batch])
        self._lock_job(db, lease.chunk.job_id)
        for failures in sorted({tried[each.row] + 1 for each in batch}):
            rows = sorted(each.row for each in batch if tried[each.row] + 1 == failures)
            self._add_chunks(
                db, lease.chunk.job_id, rows, most=len(rows), failures=0, not_before=self._not_before(failures)
            )


def is_attempt(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(
        attempts.c.job_id == lease.chunk.job_id,
        attempts.c.number == lease.chunk.number,
        attempts.c.attempt == lease.attempt,
    )


def generated(answer: Ok) -> int:
    """Tokens that were computed for this answer: none of one that was copied."""
    return 0 if answer.extras is not None and answer.extras.deduplicated else answer.usage.output_tokens


def _result_row(lease: Lease, result: Result, max_tokens: int, now: float, clock: DatabaseClock) -> tuple[Any, ...]:
    """A row of ``results`` in the order of RESULT_COLUMNS, its times by the database's clock."""
    usage, timing = result.usage, result.timing.by(clock.at) if result.timing else None
    outcome: tuple[str | None, ...]
    if isinstance(result, Ok):
        outcome = ("ok", storable(result.text), result.finish_reason.value, None, None)
    else:
        outcome = ("error", None, None, result.error_class.value, storable(result.message))
    tokens = (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) if usage else (None, None, None)
    extras = result.extras if isinstance(result, Ok) else None
    times = (
        (timing.received_at, timing.admitted_at, timing.first_token_at, timing.finished_at)
        if timing
        else (None, None, None, None)
    )
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


def _retry_row(lease: Lease, result: Result, clock: DatabaseClock) -> tuple[Any, ...]:
    """A row of ``retries`` in the order of RETRY_COLUMNS."""
    assert isinstance(result, Failed)
    usage, timing = result.usage, result.timing.by(clock.at) if result.timing else None
    return (
        lease.chunk.job_id, result.row, lease.chunk.number, lease.attempt, lease.worker_id, result.error_class.value,
        storable(result.message), usage.prompt_tokens if usage else None, usage.output_tokens if usage else None,
        timing.admitted_at if timing else None, timing.finished_at if timing else None,
    )  # fmt: skip
