"""Dataset and task become a job, its requests and its chunks, in one transaction: all of it, or nothing."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import pickle
import platform
import socket
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from promptmill.core.spans import Moment
from promptmill.database.counting import Counts, counting
from promptmill.database.engine import copy_rows, id_at, lock_name, now_of, refresh_statistics, writing
from promptmill.database.tables import chunks, jobs, requests, results
from promptmill.errors import BadLines, DatabaseError, DatasetError, JobExists, QueueFull, RequestError
from promptmill.ledger import RESULT_COLUMNS, waiting_requests
from promptmill.readers import Dataset
from promptmill.readers.fields import storable
from promptmill.service.preflight import PromptGauge
from promptmill.service.selection import Selection
from promptmill.tasks.sampling import refuse_repeats, repeated
from promptmill.tasks.task_file import Task
from promptmill.tasks.templates import Template, payload, resolve_sampling, to_request
from promptmill.types import ChunkState, DatasetLine, ErrorClass, Failed, JobState, SamplingParams

#: Rows of one INSERT or COPY: large enough to be cheap, small enough to keep memory flat.
BATCH_ROWS = 5_000

#: Most rows of a chunk. At 16 slots it is 16 rounds; the cost of a chunk's own statements is then under 1 %.
CHUNK_ROWS = 256

#: Most expected tokens of a chunk: 10 to 60 s of a device of 1,000 to 6,000 tokens/s.
CHUNK_TOKENS = 64_000

#: The first and last chunks are smaller: results show at once, and all devices finish together.
FIRST_CHUNK_ROWS = 64
LAST_CHUNK_ROWS = 16

#: A chunk takes at most this part of the rows that are left, so that dozens of devices end within two rounds.
TAPER = 24

#: Bytes of text a token stands for, on the safe side, where a chunk's work is estimated.
BYTES_PER_TOKEN = 4

REQUEST_COLUMNS = ("job_id", "row", "custom_id", "input", "expected", "meta", "sampling")
CHUNK_COLUMNS = (
    "job_id", "number", "first_row", "rows", "state", "attempt", "published_at", "ok", "errors", "output_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What a person asked for: everything of a job but its rows."""

    model: str
    mode: str
    task: Task | None = None
    system: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    priority: int = 5
    selection: Selection = field(default_factory=Selection)
    max_errors: str | None = None
    #: What stays of prompts and answers in the end: 'full', 'hash' or 'none'.
    store: str = "full"
    skip_invalid: bool = False
    slots: int | None = None
    model_fingerprint: str | None = None
    #: The end of everything, and the last moment to begin; seconds from the start.
    deadline: Moment | None = None
    expires: Moment | None = None
    time_limit_s: float | None = None
    #: Names of expected values that some line must have: who names a field by hand does not mean none.
    must_expect: tuple[str, ...] = ()
    #: What to do when a job that asks the same is there: 'new', 'attach' or 'fail'.
    if_exists: str = "new"
    #: Look answers up in the cache of all jobs, and keep them there.
    use_cache: bool = False
    #: Waiting requests that the queue holds at most; None sets no limit.
    queue_limit: int | None = None
    #: The API key that it belongs to, and the waiting requests that all jobs of that key may have.
    api_key_id: str | None = None
    key_limit: int | None = None


#: Names of fields that are kept for a message.
MOST_NAMES = 100


@dataclass(slots=True)
class SubmissionTally:
    """What passed through a submission: bad lines, and each row's expected cost in tokens."""

    bad: list[tuple[int, str]] = field(default_factory=list)
    bad_total: int = 0
    costs: array[int] = field(default_factory=lambda: array("I"))
    invalid_rows: list[int] = field(default_factory=list)
    #: Names of ``JobOrder.must_expect`` that no line has had yet.
    unmet: set[str] = field(default_factory=set)
    #: Fields of the first lines while there were some, for the message.
    fields: dict[str, None] = field(default_factory=dict)

    def note_names(self, line: DatasetLine) -> None:
        """Which fields the line has."""
        answers = line.expected if isinstance(line.expected, dict) else {}
        self.unmet -= answers.keys()
        if len(self.fields) < MOST_NAMES:
            self.fields |= dict.fromkeys([*(line.fields or {}), *(line.meta or {}), *answers])

    def note_bad(self, line: int, problem: str) -> None:
        self.bad_total += 1
        if len(self.bad) < BadLines.SHOWN:
            self.bad.append((line, problem))


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """One row ready to be stored. ``error`` is set for an invalid line that is kept by ``--skip-invalid``."""

    custom_id: str
    input: str | None
    expected: str | None
    meta: str | None
    sampling: str | None
    cost: int
    error: tuple[ErrorClass, str] | None = None


class Preparer:
    """Turns dataset lines into rows, checking each as far as it can be checked without a device."""

    def __init__(self, order: JobOrder, gauge: PromptGauge | None) -> None:
        self._template: Template | None = order.task.template if order.task else None
        self._system = order.system
        self._sampling = order.sampling
        self._defaults = resolve_sampling(order.sampling, {})
        #: Of the last line that had some: its parameters, the same as text, and resolved.
        self._own: tuple[Mapping[str, Any], str, SamplingParams] | None = None
        self._gauge = gauge
        self._skip_invalid = order.skip_invalid
        self.tally = SubmissionTally(unmet=set(order.must_expect))

    def prepare(self, line: DatasetLine, row: int) -> PreparedRow | None:
        """The row, or None for a bad line that stops the submission (it is noted in the tally)."""
        problem, error_class = line.error, ErrorClass.INVALID_REQUEST
        if problem is None:
            try:
                return self._valid(line, row)
            except RequestError as error:
                # Any other error is not this line's: a model whose template never ends counts no line.
                problem, error_class = error.message, getattr(error, "error_class", error_class)
        # It may quote what the line has.
        problem = storable(problem)
        self.tally.note_bad(line.line, problem)
        if not self._skip_invalid:
            return None
        self.tally.invalid_rows.append(row)
        return PreparedRow(
            line.custom_id or f"row-{row}",
            None,
            _json(line.expected),
            _json(line.meta),
            None,
            0,
            (error_class, problem),
        )

    def _valid(self, line: DatasetLine, row: int) -> PreparedRow:
        asked, sampling = self._sampling_of(line)
        if self.tally.unmet:
            self.tally.note_names(line)
        body = payload(line)
        custom_id = line.custom_id if line.custom_id is not None else f"row-{row}"
        if self._template is not None or self._gauge is not None:
            request = to_request(row, custom_id, body, line.meta, sampling, self._template, self._system)
            if self._gauge is not None:
                self._gauge(request)
        text = _encode(body)
        return PreparedRow(
            custom_id=custom_id,
            input=text,
            expected=_json(line.expected),
            meta=_json(line.meta),
            sampling=asked,
            cost=len(text) // BYTES_PER_TOKEN + sampling.max_tokens,
        )

    def _sampling_of(self, line: DatasetLine) -> tuple[str | None, SamplingParams]:
        """The line's parameters as they are stored, and resolved, with the seed of its repetition.

        The seed is stored with the row: whoever runs the row again draws the same.
        """
        asked, sampling = self._common_sampling_of(line)
        own = repeated(sampling, line.repetition)
        if own is sampling:
            return asked, sampling
        return _encode({**line.sampling, "seed": own.seed}), own

    def _common_sampling_of(self, line: DatasetLine) -> tuple[str | None, SamplingParams]:
        """The same without it, made once where lines ask the same, as in most files."""
        if not line.sampling:
            refuse_repeats(self._defaults)
            return None, self._defaults
        if self._own is None or line.sampling is not self._own[0]:
            asked = _encode(line.sampling)
            if self._own is None or asked != self._own[1]:
                sampling = resolve_sampling(self._sampling, line.sampling)
                refuse_repeats(sampling)
                self._own = (line.sampling, asked, sampling)
        return self._own[1], self._own[2]


def submit(db: Engine, dataset: Dataset, order: JobOrder, gauge: PromptGauge | None = None) -> str:
    """Store the job and return its id.

    ``gauge`` sees every request before it is stored, and refuses what cannot fit. Raises :class:`BadLines` for lines
    that cannot be used (unless ``order.skip_invalid``), :class:`DatasetError` for a dataset without a row,
    :class:`JobExists` for a job that is there already (unless ``order.if_exists`` is 'new'), and :class:`JobError` for
    a full queue; nothing is stored then.
    """
    preparer = Preparer(order, gauge)
    with _ready(prepared_rows(dataset, order, preparer), order) as prepared, writing(db) as connection:
        now = now_of(connection)
        job_id = id_at(now)
        ends = {
            "deadline_at": order.deadline.by(now) if order.deadline else None,
            "expires_at": order.expires.by(now) if order.expires else None,
        }
        columns = job_columns(dataset, order)
        connection.execute(sa.insert(jobs).values(id=job_id, submitted_at=now, **ends, **columns))
        invalid = counting(connection, order.model)
        rows = _store_requests(connection, job_id, prepared, now, invalid)
        refuse_bad(dataset, preparer.tally, order.skip_invalid, rows)
        key = _key(dataset, order)
        if order.if_exists != "new":
            lock_name(connection, f"job {key}")
            if (twin := _twin(connection, key)) is not None:
                # The transaction is rolled back, and with it all that was stored of this job.
                raise JobExists(twin.id, twin.state)
        _refuse_full_queue(connection, order, rows)
        published = now if order.mode == "embedded" else None
        _store_chunks(connection, job_id, preparer.tally, published)
        all_invalid = len(preparer.tally.invalid_rows) == rows
        connection.execute(
            sa.update(jobs)
            .where(jobs.c.id == job_id)
            .values(
                rows=rows,
                key_sha256=key,
                skipped=len(preparer.tally.invalid_rows),
                context_tokens=gauge.context_needed if gauge else None,
                state=(JobState.FAILED if all_invalid else JobState.QUEUED).value,
                stop_reason="every row failed" if all_invalid else None,
                finished_at=now if all_invalid else None,
            )
        )
    _refresh_statistics(db)
    return job_id


@contextlib.contextmanager
def _ready(rows: Iterator[PreparedRow], order: JobOrder) -> Iterator[Iterator[PreparedRow]]:
    """The rows of a job with templates for the queue, prepared before a transaction begins: a slow template would hold
    the lock of a SQLite file, for which workers wait. They lie in a file, so that memory stays flat.
    """
    if order.task is None or order.mode != "queue":
        yield rows
        return
    with tempfile.TemporaryFile(prefix="promptmill-") as file:
        while batch := list(islice(rows, BATCH_ROWS)):
            pickle.dump(batch, file, pickle.HIGHEST_PROTOCOL)
        end = file.tell()
        file.seek(0)
        yield (row for batch in iter(lambda: pickle.load(file) if file.tell() < end else None, None) for row in batch)


def _refresh_statistics(db: Engine) -> None:
    """In a transaction of its own: others wait for the locks of the submission, and the job is stored without it."""
    if db.dialect.name != "postgresql":
        return
    with contextlib.suppress(SQLAlchemyError, DatabaseError), writing(db) as connection:
        refresh_statistics(connection, requests, chunks)


def _key(dataset: Dataset, order: JobOrder) -> str:
    """SHA-256 over what the job asks: dataset, model, task and parameters; not how urgent it is, or where it runs."""
    asked = {
        "dataset": dataset.sha256, "format": dataset.format, "model": order.model,
        "fingerprint": order.model_fingerprint, "task": order.task.sha256 if order.task else None,
        "system": order.system, "sampling": order.sampling, "selection": order.selection.to_json(),
        "skip_invalid": order.skip_invalid,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _twin(db: Connection, key: str) -> sa.Row[Any, Any] | None:
    """The youngest job with the key that completed or still may."""
    useless = (JobState.FAILED.value, JobState.CANCELLED.value, JobState.EXPIRED.value)
    return db.execute(
        sa.select(jobs.c.id, jobs.c.state)
        .where(jobs.c.key_sha256 == key, jobs.c.state.not_in(useless))
        .order_by(jobs.c.id.desc())
        .limit(1)
    ).one_or_none()


def _refuse_full_queue(db: Connection, order: JobOrder, rows: int) -> None:
    if order.mode != "queue" or (order.queue_limit is None and order.key_limit is None):
        return
    # Who submits at the same time is counted too.
    lock_name(db, "queue limit")
    if order.queue_limit is not None and (waiting := waiting_requests(db, order.mode)) + rows > order.queue_limit:
        raise QueueFull(
            f"the queue is full: {waiting:,} requests wait, and {rows:,} more would exceed {order.queue_limit:,}",
            hint="Wait, cancel a job, or raise JOBS_MAX_QUEUED_REQUESTS.",
        )
    if order.key_limit is not None:
        waiting = waiting_requests(db, order.mode, order.api_key_id)
        if waiting + rows > order.key_limit:
            raise QueueFull(
                f"this key has {waiting:,} requests waiting, and {rows:,} more would exceed its {order.key_limit:,}",
                hint="Wait for them, or cancel some.",
            )


def refuse_bad(
    dataset: Dataset, tally: SubmissionTally, skip_invalid: bool, rows: int, submitting: bool = True
) -> None:
    """Raise for bad lines that were not to be skipped, and for a dataset in which nothing is left."""
    if tally.bad_total and not skip_invalid:
        raise BadLines(dataset.name, tally.bad, tally.bad_total, submitting=submitting, place=dataset.place)
    if rows == 0:
        raise DatasetError(f"{dataset.name} holds no rows", hint="Check --limit, --where and the file.")
    if tally.unmet:
        here = ", ".join(tally.fields)[:200] or "none"
        raise DatasetError(
            f"{dataset.name}: no line has a value in the field '{min(tally.unmet)[:40]}' that --expected names; "
            f"fields: {here}",
            hint="A field that is not named is a field of the prompt: the answer would be shown to the model.",
        )


def prepared_rows(dataset: Dataset, order: JobOrder, preparer: Preparer) -> Iterator[PreparedRow]:
    """The dataset's rows, checked and in order; bad lines are left out and noted in the preparer's tally."""
    row = 0
    for line in order.selection.apply(dataset.checked()):
        prepared = preparer.prepare(line, row)
        if prepared is not None:
            preparer.tally.costs.append(min(prepared.cost, 2**32 - 1))
            row += 1
            yield prepared


#: ``json.dumps`` with an option makes an encoder for each call; a million lines share this one.
_encode = json.JSONEncoder(ensure_ascii=False).encode


def _json(value: Any) -> str | None:
    return None if value is None else _encode(value)


def job_columns(dataset: Dataset, order: JobOrder) -> dict[str, Any]:
    """What a new job's row says of what was asked."""
    task = order.task
    return {
        "name": order.name, "state": JobState.QUEUED.value, "mode": order.mode,
        "dataset_name": dataset.name, "dataset_sha256": dataset.sha256, "dataset_format": dataset.format,
        "model": order.model, "model_fingerprint": order.model_fingerprint,
        "task_name": task.name if task else None, "task_text": task.text if task else None,
        "task_folder": task.folder if task else None,
        "task_sha256": task.sha256 if task else None, "system_prompt": order.system,
        "sampling": json.dumps(order.sampling, ensure_ascii=False),
        "priority": order.priority, "rows": 0, "slots": order.slots, "max_errors": order.max_errors,
        "store": order.store,
        "env": json.dumps(_environment()), "time_limit_s": order.time_limit_s, "use_cache": order.use_cache,
        "api_key_id": order.api_key_id,
        "selection": json.dumps(order.selection.to_json(), ensure_ascii=False) if order.selection.to_json() else None,
    }  # fmt: skip


def _environment() -> dict[str, str]:
    """Where the job was submitted: enough to explain a difference between two jobs."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return {
        "promptmill": version("promptmill"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": user,
    }


def _store_requests(db: Connection, job_id: str, rows: Iterator[PreparedRow], now: float, invalid: Counts) -> int:
    stored = 0
    while batch := list(islice(rows, BATCH_ROWS)):
        values = [
            (job_id, stored + index, row.custom_id, row.input, row.expected, row.meta, row.sampling)
            for index, row in enumerate(batch)
        ]
        copy_rows(db, requests, REQUEST_COLUMNS, values)
        failed = [(stored + index, row.error) for index, row in enumerate(batch) if row.error]
        copy_rows(db, results, RESULT_COLUMNS, [_invalid_result(job_id, row, *error, now) for row, error in failed])
        invalid.results([Failed(row, *error) for row, error in failed], enqueued_at=None)
        stored += len(batch)
    return stored


def _invalid_result(job_id: str, row: int, error_class: ErrorClass, problem: str, now: float) -> tuple[Any, ...]:
    outcome: dict[str, Any] = {
        "job_id": job_id, "row": row, "state": "error", "error_class": error_class.value, "error_message": problem,
        "committed_at": now, "attempt": 0, "deduplicated": False,
    }  # fmt: skip
    return tuple(outcome.get(name) for name in RESULT_COLUMNS)


def _store_chunks(db: Connection, job_id: str, tally: SubmissionTally, published_at: float | None) -> None:
    invalid = array("I", tally.invalid_rows)
    values, seen = [], 0
    for number, span in enumerate(plan_chunks(tally.costs)):
        errors = 0
        while seen < len(invalid) and invalid[seen] < span.stop:
            errors, seen = errors + 1, seen + 1
        state = ChunkState.DONE if errors == len(span) else ChunkState.QUEUED
        values.append((job_id, number, span.start, len(span), state.value, 0, published_at, 0, errors, 0))
    copy_rows(db, chunks, CHUNK_COLUMNS, values)


def plan_chunks(costs: Sequence[int]) -> Iterator[range]:
    """Runs of consecutive rows: at most CHUNK_TOKENS of summed cost each, small at both ends of the job.

    ``costs``: expected tokens of each row. Every row is in exactly one run; a row above the budget travels alone.
    """
    total = len(costs)
    start = spent = 0
    most = _most_rows(0, total)
    for row, cost in enumerate(costs):
        if row > start and (spent + cost > CHUNK_TOKENS or row - start >= most):
            yield range(start, row)
            start, spent = row, 0
            most = _most_rows(start, total)
        spent += cost
    if start < total:
        yield range(start, total)


def _most_rows(start: int, total: int) -> int:
    """Rows that a chunk starting here may have: it doubles from the first ones on, and shrinks with what is left."""
    growing = FIRST_CHUNK_ROWS if start < 2 * FIRST_CHUNK_ROWS else CHUNK_ROWS
    left = max(LAST_CHUNK_ROWS, (total - start) // TAPER)
    return min(growing, left, CHUNK_ROWS)
