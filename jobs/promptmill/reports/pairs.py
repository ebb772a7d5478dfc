"""The rows of two jobs, paired by ``custom_id``: what a comparison computes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from promptmill.reports.scan import Floats
from promptmill.reports.statistics import LEAST_CLUSTERS, Ints
from promptmill.scorers.scoring import build, required_keys, score_rows
from promptmill.tables import jobs, requests, results

Truths = NDArray[np.bool_]

#: Rows fetched at a time.
FETCH_ROWS = 20_000

#: Rows of one batch where chunks are too few to be clusters.
BLOCK_ROWS = 16

#: Chunks from which on they are the clusters.
ENOUGH_CHUNKS = 20


@dataclass(slots=True)
class Rows:
    """Columns of a job's results, of one length. Seconds are NaN for rows that had no slot."""

    keys: list[str] = field(default_factory=list)
    ok: Truths = field(default_factory=lambda: np.empty(0, dtype=bool))
    admitted_at: Floats = field(default_factory=lambda: np.empty(0))
    latency_s: Floats = field(default_factory=lambda: np.empty(0))
    ttft_s: Floats = field(default_factory=lambda: np.empty(0))
    tpot_s: Floats = field(default_factory=lambda: np.empty(0))
    finished_at: Floats = field(default_factory=lambda: np.empty(0))
    output_tokens: Floats = field(default_factory=lambda: np.empty(0))
    batches: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    #: Score -> 1 right, 0 wrong, NaN not counted.
    right: dict[str, Floats] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)


def read_rows(db: Connection, job_id: str) -> Rows:
    """A job's results with what its task's scores say of each row."""
    each = results.c
    query = (
        sa.select(
            requests.c.custom_id, each.state, each.admitted_at, each.first_token_at, each.finished_at,
            each.output_tokens, each.worker_id, each.chunk,
        )
        .join(requests, sa.and_(requests.c.job_id == each.job_id, requests.c.row == each.row))
        .where(each.job_id == job_id)
        .order_by(each.row)
    )  # fmt: skip
    found = [tuple(row) for row in db.execute(query, execution_options={"yield_per": FETCH_ROWS})]
    if not found:
        return Rows()
    names, states, *stamps, workers, chunks = zip(*found, strict=True)
    admitted, first, finished, tokens = (np.array(column, dtype=np.float64) for column in stamps)
    ok = np.array(states) == "ok"
    gaps = np.where(ok & (tokens >= 2), tokens - 1, np.nan)
    return Rows(
        keys=_unique(names),
        ok=ok,
        admitted_at=admitted,
        latency_s=np.where(ok, finished - admitted, np.nan),
        ttft_s=np.where(ok, first - admitted, np.nan),
        tpot_s=(finished - first) / gaps,
        finished_at=finished,
        output_tokens=np.where(ok, tokens, np.nan),
        batches=_batches(list(zip(workers, chunks, strict=True)), admitted),
        right=_right(db, job_id),
    )


def _unique(names: tuple[str, ...]) -> list[str]:
    """Ids that occur twice are told apart by their place."""
    seen: dict[str, int] = {}
    keys = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        keys.append(name if seen[name] == 1 else f"{name}\0{seen[name]}")
    return keys


def _batches(origins: list[tuple[Any, Any]], admitted: Floats) -> Ints:
    """Clusters of rows that share their fate: chunks, or blocks of consecutive admissions where chunks are few."""
    numbers = {origin: number for number, origin in enumerate(dict.fromkeys(origins))}
    if len(numbers) >= ENOUGH_CHUNKS:
        return np.array([numbers[origin] for origin in origins], dtype=np.int64)
    place = np.argsort(np.argsort(admitted, kind="stable"), kind="stable")
    return (place // max(1, min(BLOCK_ROWS, len(admitted) // LEAST_CLUSTERS))).astype(np.int64)


def _right(db: Connection, job_id: str) -> dict[str, Floats]:
    """Whether each row is right, by each score of the job's task."""
    from promptmill.task_file import parse_task

    job = db.execute(sa.select(jobs.c.task_text, jobs.c.task_name).where(jobs.c.id == job_id)).one()
    task = parse_task(job.task_text, job.task_name or "task") if job.task_text else None
    scorers = build(task.scores) if task else {}
    if task is None or not scorers:
        return {}
    required = required_keys(task, scorers)
    query = (
        sa.select(results.c.state, results.c.text, results.c.finish_reason, requests.c.expected)
        .join(requests, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
        .where(results.c.job_id == job_id)
        .order_by(results.c.row)
    )
    known: dict[tuple[Any, ...], list[float]] = {}
    verdicts = []
    for row in db.execute(query, execution_options={"yield_per": FETCH_ROWS}):
        key = tuple(row)
        if key not in known:
            judged = score_rows([row], scorers, required)
            known[key] = [judged[name].correct if judged[name].n else np.nan for name in scorers]
        verdicts.append(known[key])
    block = np.array(verdicts, dtype=np.float64).reshape(-1, len(scorers))
    return {name: block[:, index] for index, name in enumerate(scorers)}


@dataclass(frozen=True, slots=True)
class Pairing:
    """Places of the common rows in the one and in the other; ``aligned``: their batches hold the same rows."""

    before: Ints
    after: Ints
    aligned: bool


def pair(before: Rows, after: Rows) -> Pairing:
    """The rows that both jobs have."""
    places = {key: place for place, key in enumerate(after.keys)}
    common = [(place, places[key]) for place, key in enumerate(before.keys) if key in places]
    own = np.array([one for one, _ in common], dtype=np.int64)
    other = np.array([two for _, two in common], dtype=np.int64)
    if not common:
        return Pairing(own, other, False)
    of_pairs = len(set(zip(before.batches[own].tolist(), after.batches[other].tolist(), strict=True)))
    aligned = of_pairs == len(np.unique(before.batches[own])) == len(np.unique(after.batches[other]))
    return Pairing(own, other, aligned)
