"""Rows by what their scores say: the wrong ones, those that could not be read, and those that two runs judge apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.core.registry import suggestion
from promptmill.database.engine import reading
from promptmill.database.tables import requests, results, scores
from promptmill.errors import JobError, UnknownName
from promptmill.scoring.scorers import ScoreOutcome
from promptmill.scoring.scorers.pairs import flips
from promptmill.scoring.scorers.scoring import Answer, answers_query, judge_of
from promptmill.scoring.stored_scores import figures_of, run_of
from promptmill.store import catalog

#: Rows fetched at a time.
FETCH_ROWS = 2_000

#: Outcomes of answers in which nothing was found.
UNREAD = (ScoreOutcome.UNPARSED, ScoreOutcome.TRUNCATED)


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One row as one score has it. Labels are JSON; ``value`` is None where the row is not counted."""

    row: int
    id: str
    score: str
    value: float | None
    predicted: str | None
    expected: str | None
    outcome: str
    text: str | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Flip:
    """A row that the one has right and the other wrong."""

    id: str
    score: str
    expected: str | None
    before: JudgedRow
    after: JudgedRow

    @property
    def is_loss(self) -> bool:
        """Whether the second one is the wrong one."""
        return self.before.value == 1.0


def judged_rows(db: Engine, reference: str, score: str | None = None) -> Iterator[JudgedRow]:
    """Every row of a job by each of its scores: those of the run ``JOB@sN``, else those of its own task.

    Raises :class:`UnknownName` for an unknown run or score, :class:`JobError` for a job without scores.
    """
    job, run_id = catalog.find_scored(db, reference)
    if run_id is None:
        with reading(db) as connection:
            run_id = run_of(connection, job)
    if run_id is not None:
        yield from _of_run(db, job.id, run_id, score)
    else:
        yield from _of_task(db, job, score)


def _of_task(db: Engine, job: sa.Row[Any], score: str | None) -> Iterator[JudgedRow]:
    judge = judge_of(job)
    if judge is None:
        raise JobError(f"job {job.id} has no scores", hint="Score it by a task: promptmill score JOB --task FILE.")
    _check_score(score, list(judge.scorers))
    query = answers_query(job.id, whole=True).order_by(results.c.row)
    with reading(db) as connection:
        for found in connection.execution_options(yield_per=FETCH_ROWS).execute(query):
            answer = Answer(*found)
            for name, judged in zip(judge.scorers, judge(answer), strict=True):
                if judged is not None and score in (None, name):
                    assert answer.row is not None
                    yield JudgedRow(
                        answer.row, str(answer.id), name, judged.value, judged.predicted, judged.expected,
                        judged.outcome.value, answer.text, judged.error,
                    )  # fmt: skip


def _of_run(db: Engine, job_id: str, run_id: str, score: str | None) -> Iterator[JudgedRow]:
    each = scores.c
    query = (
        sa.select(
            each.row, requests.c.custom_id, each.metric, each.value, each.predicted, each.expected, each.outcome,
            results.c.text, each.error,
        )
        .join_from(scores, requests, sa.and_(requests.c.job_id == job_id, requests.c.row == each.row))
        .join(results, sa.and_(results.c.job_id == job_id, results.c.row == each.row))
        .where(each.score_run_id == run_id)
    )  # fmt: skip
    with reading(db) as connection:
        names = list(figures_of(connection, run_id))
        _check_score(score, names)
        places = {name: place for place, name in enumerate(names)}
        query = query.order_by(each.row, sa.case(places, value=each.metric, else_=len(names)))
        if score is not None:
            query = query.where(each.metric == score)
        for found in connection.execution_options(yield_per=FETCH_ROWS).execute(query):
            yield JudgedRow(*found)


def _check_score(score: str | None, known: list[str]) -> None:
    if score is not None and score not in known:
        raise UnknownName(f"there is no score '{score}'", hint=suggestion(score, known))


def wrong_rows(db: Engine, reference: str, score: str | None, unread_only: bool) -> Iterator[JudgedRow]:
    """Rows that count and are not right; ``unread_only``: of these, the ones whose answer could not be read."""
    for each in judged_rows(db, reference, score):
        unread = each.outcome in UNREAD
        if unread if unread_only else (each.value is not None and each.value < 1.0):
            yield each


def flipped_rows(db: Engine, before: str, after: str, score: str | None) -> list[Flip]:
    """Rows, by their ids, that one of two jobs or score runs has right and the other wrong.

    Raises :class:`JobError` where the two have no row and score in common.
    """
    first = {(each.id, each.score): each for each in judged_rows(db, before, score)}
    second = judged_rows(db, after, score)
    pairs = [(other, each) for each in second if (other := first.get((each.id, each.score))) is not None]
    values = np.array([(one.value, other.value) for one, other in pairs], dtype=np.float64).reshape(-1, 2)
    found = flips(values[:, 0], values[:, 1])
    common = np.isfinite(values).all(axis=1).any()
    if not common:
        raise JobError(f"{before} and {after} have no scored row in common", hint="Rows are compared by their ids.")
    rows = sorted(np.concatenate(found).tolist())
    return [Flip(pairs[row][1].id, pairs[row][1].score, pairs[row][1].expected, *pairs[row]) for row in rows]
