"""The rows of two jobs, paired by ``custom_id``: what a comparison computes from, as columns of numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from promptmill.database.tables import jobs, requests, results, scores
from promptmill.reports.figures.columns import Floats, Ints, Truths
from promptmill.scoring.scorers import ScoreOutcome
from promptmill.scoring.scorers.scoring import Answer, answers_query, judge_of
from promptmill.scoring.stored_scores import figures_of, run_of
from promptmill.types import WITHOUT_TEXTS

#: Rows fetched at a time.
FETCH_ROWS = 20_000

#: Chunks from which on they are the clusters; of fewer, the rows in the order of their admission make so many blocks.
#: Smaller blocks would share a load of the machine with their neighbours, and promise more than they know.
ENOUGH_CHUNKS = 20

#: Fewest rows of a block.
LEAST_BLOCK = 8

#: An odd number with bits everywhere (2^64 by the golden ratio): tells the second of two equal ids from the first.
AGAIN = 0x9E3779B97F4A7C15


@dataclass(slots=True)
class PairedRows:
    """Columns of a job's results, of one length. Seconds are NaN for rows that had no slot."""

    row: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    #: 64 bits of each id: texts of a million rows would take hundreds of megabytes.
    key: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    ok: Truths = field(default_factory=lambda: np.empty(0, dtype=bool))
    admitted_at: Floats = field(default_factory=lambda: np.empty(0))
    latency_s: Floats = field(default_factory=lambda: np.empty(0))
    ttft_s: Floats = field(default_factory=lambda: np.empty(0))
    tpot_s: Floats = field(default_factory=lambda: np.empty(0))
    finished_at: Floats = field(default_factory=lambda: np.empty(0))
    output_tokens: Floats = field(default_factory=lambda: np.empty(0))
    batches: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    #: Score -> what the row is worth by it (1 right, 0 wrong, or between, or a distance), NaN not counted.
    worth: dict[str, Floats] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.key)

    @property
    def right(self) -> dict[str, Floats]:
        """Score -> 1 wholly right, 0 not, NaN not counted."""
        return {name: np.where(np.isnan(worth), np.nan, worth == 1.0) for name, worth in self.worth.items()}


def read_rows(db: Connection, job_id: str, score_run: str | None = None) -> PairedRows:
    """A job's results with what scores say of each row: its task's, or those of a stored score run."""
    each = results.c
    query = (
        sa.select(
            each.row, requests.c.custom_id, each.state, each.chunk, each.worker_id, each.admitted_at,
            each.first_token_at, each.finished_at, each.output_tokens,
        )
        .join(requests, sa.and_(requests.c.job_id == each.job_id, requests.c.row == each.row))
        .where(each.job_id == job_id)
        .order_by(each.row)
    )  # fmt: skip
    origins: dict[tuple[Any, Any], int] = {}
    parts: list[list[NDArray[Any]]] = []
    for page in db.execute(query, execution_options={"yield_per": FETCH_ROWS}).partitions():
        parts.append(_columns(list(zip(*page, strict=True)), origins))
    if not parts:
        return PairedRows()
    row, key, chunk, ok, admitted, first, finished, tokens = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    gaps = np.where(ok & (tokens >= 2), tokens - 1, np.nan)
    return PairedRows(
        row=row,
        key=_told_apart(key),
        ok=ok,
        admitted_at=admitted,
        latency_s=np.where(ok, finished - admitted, np.nan),
        ttft_s=np.where(ok, first - admitted, np.nan),
        tpot_s=(finished - first) / gaps,
        finished_at=finished,
        output_tokens=np.where(ok, tokens, np.nan),
        batches=_batches(chunk, len(origins), admitted),
        worth=_worth(db, job_id, row) if score_run is None else _stored(db, score_run, row),
    )


def _columns(page: list[tuple[Any, ...]], origins: dict[tuple[Any, Any], int]) -> list[NDArray[Any]]:
    """Some rows as numbers. ``origins``: (worker, chunk) -> its number, which grows."""
    rows, names, states, chunks, workers, *stamps = page
    origin = [origins.setdefault(each, len(origins)) for each in zip(workers, chunks, strict=True)]
    return [
        np.array(rows, dtype=np.int64),
        # Python's hash of a text has 64 bits and is the same all through this process.
        np.fromiter(map(hash, names), np.int64, len(names)),
        np.array(origin, dtype=np.int64),
        np.array([state == "ok" for state in states]),
        *(np.array(column, dtype=np.float64) for column in stamps),
    ]


def _told_apart(key: Ints) -> Ints:
    """Ids that occur twice are told apart by how often they occurred before."""
    order = np.argsort(key, kind="stable")
    ranked = key[order]
    begins = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    places = np.arange(len(key))
    before = np.empty(len(key), dtype=np.uint64)
    before[order] = (places - np.maximum.accumulate(np.where(begins, places, 0))).astype(np.uint64)
    return (key.view(np.uint64) ^ (before * np.uint64(AGAIN))).view(np.int64)


def _batches(chunk: Ints, chunks: int, admitted: Floats) -> Ints:
    """Clusters of rows that share their fate: chunks, or blocks of consecutive admissions where chunks are few."""
    if chunks >= ENOUGH_CHUNKS:
        return chunk
    place = np.argsort(np.argsort(admitted, kind="stable"), kind="stable")
    return (place * min(ENOUGH_CHUNKS, max(1, len(admitted) // LEAST_BLOCK)) // len(admitted)).astype(np.int64)


def _worth(db: Connection, job_id: str, places: Ints) -> dict[str, Floats]:
    """What each row is worth by each score of the job's task; NaN for rows that are not counted."""
    job = db.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()
    run_id = run_of(db, job)
    if run_id is not None:
        stored = _stored(db, run_id, places)
        return {name: stored[name] for name in figures_of(db, run_id) if name in stored}
    judge = None if job.store in WITHOUT_TEXTS else judge_of(job)
    if judge is None:
        return {}
    query = answers_query(job_id, whole=judge.needs_item).order_by(results.c.row)
    known: dict[Any, list[float]] = {}
    verdicts = []
    for row in db.execute(query, execution_options={"yield_per": FETCH_ROWS}):
        answer = Answer(*row)
        if answer not in known:
            worth = [each.value if each is not None else None for each in judge(answer)]
            known[answer] = [np.nan if value is None else float(value) for value in worth]
        verdicts.append(known[answer])
    block = np.array(verdicts, dtype=np.float64).reshape(-1, len(judge.scorers))
    return {name: block[:, index] for index, name in enumerate(judge.scorers)}


def _stored(db: Connection, score_run: str, row: Ints) -> dict[str, Floats]:
    """What a score run holds of the rows."""
    place = {int(each): index for index, each in enumerate(row)}
    found: dict[str, Floats] = {}
    query = sa.select(scores.c.row, scores.c.metric, scores.c.value, scores.c.outcome)
    for number, name, value, outcome in db.execute(query.where(scores.c.score_run_id == score_run)):
        column = found.setdefault(name, np.full(len(row), np.nan))
        if number in place and value is not None and outcome not in (ScoreOutcome.ABSTAIN, ScoreOutcome.INFRA_ERROR):
            column[place[number]] = float(value)
    return found


def ids_of(db: Connection, job_id: str, rows: Ints) -> tuple[str, ...]:
    """The ids of some rows, in their order."""
    query = sa.select(requests.c.custom_id).where(requests.c.job_id == job_id, requests.c.row.in_(rows.tolist()))
    return tuple(db.execute(query.order_by(requests.c.row)).scalars())


@dataclass(frozen=True, slots=True)
class Pairing:
    """Places of the common rows in the one and in the other; ``aligned``: their batches hold the same rows."""

    before: Ints
    after: Ints
    aligned: bool


def pair(before: PairedRows, after: PairedRows) -> Pairing:
    """The rows that both jobs have, in the order of the first one."""
    _, own, other = np.intersect1d(before.key, after.key, assume_unique=True, return_indices=True)
    order = np.argsort(own)
    own, other = own[order], other[order]
    if not len(own):
        return Pairing(own, other, False)
    of_before, of_after = before.batches[own], after.batches[other]
    of_pairs = len(np.unique(of_before * (int(of_after.max()) + 1) + of_after))
    aligned = of_pairs == len(np.unique(of_before)) == len(np.unique(of_after))
    return Pairing(own, other, aligned)
