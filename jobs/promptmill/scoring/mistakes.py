"""Rows by what their scores say: the wrong ones, those that could not be read, and those that two runs judge apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.core.registry import suggestion
from promptmill.database.engine import reading
from promptmill.database.tables import requests, results, scores
from promptmill.errors import JobError, UnknownName
from promptmill.scoring.scorers import ScoreOutcome
from promptmill.scoring.scorers.scoring import DIGESTED, INPUT_KEY, OWN_INPUT, Answer, answers_query, judge_of
from promptmill.scoring.stored_scores import figures_of, run_of
from promptmill.store import catalog

#: Rows fetched at a time.
FETCH_ROWS = 2_000

#: Outcomes of answers in which nothing was found.
UNREAD = (ScoreOutcome.UNPARSED, ScoreOutcome.TRUNCATED)


class Asked(NamedTuple):
    """What a row asks: 64 bits of the dataset's line and of the prompt, where they are known."""

    line: int = 0
    prompt: int = 0
    is_known: bool = False

    def is_same(self, other: Asked) -> bool:
        return not (self.is_known and other.is_known) or self.line == other.line or self.prompt == other.prompt


UNKNOWN = Asked()

#: As columns of a query.
ASKED = (OWN_INPUT, INPUT_KEY, DIGESTED)


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
    #: None where nothing is right or wrong by the score.
    is_right: bool | None = None
    asked: Asked = UNKNOWN


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
        return self.before.is_right is True


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
    query = answers_query(job.id, whole=True).add_columns(*ASKED).order_by(results.c.row)
    with reading(db) as connection:
        for *found, line, prompt, is_known in connection.execution_options(yield_per=FETCH_ROWS).execute(query):
            answer = Answer(*found)
            for name, judged in zip(judge.scorers, judge(answer), strict=True):
                if judged is not None and score in (None, name):
                    assert answer.row is not None
                    yield JudgedRow(
                        answer.row, str(answer.id), name, judged.value, judged.predicted, judged.expected,
                        judged.outcome.value, answer.text, judged.error, judged.is_right,
                        Asked(line, prompt, is_known),
                    )  # fmt: skip


def _of_run(db: Engine, job_id: str, run_id: str, score: str | None) -> Iterator[JudgedRow]:
    each = scores.c
    query = (
        sa.select(
            each.row, requests.c.custom_id, each.metric, each.value, each.predicted, each.expected, each.outcome,
            results.c.text, each.error, each.is_right, *ASKED,
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
            *judged, line, prompt, is_known = found
            yield replace(JudgedRow(*judged), asked=Asked(line, prompt, is_known))


def _check_score(score: str | None, known: list[str]) -> None:
    if score is not None and score not in known:
        raise UnknownName(f"there is no score '{score}'", hint=suggestion(score, known))


def wrong_rows(db: Engine, reference: str, score: str | None, unread_only: bool) -> Iterator[JudgedRow]:
    """Rows that are wrong, as their score has it; ``unread_only``: those whose answer could not be read.

    Raises :class:`JobError` where nothing is right or wrong by the scores that were asked for.
    """
    asked, told = 0, False
    for each in judged_rows(db, reference, score):
        asked, told = asked + 1, told or each.is_right is not None
        if each.outcome in UNREAD if unread_only else each.is_right is False:
            yield each
    if asked and not told and not unread_only:
        raise _without_right(reference, score)


def _without_right(reference: str, score: str | None) -> JobError:
    what = f"the score '{score}'" if score else "no score"
    return JobError(
        f"by {what} of {reference} nothing is right or wrong: it says how much" if score
        else f"by {what} of {reference} anything is right or wrong: they say how much",
        hint="Runs that an older version stored are scored anew by: promptmill score JOB --task FILE.",
    )  # fmt: skip


def flipped_rows(db: Engine, before: str, after: str, score: str | None) -> tuple[list[Flip], int]:
    """Rows, by id and input, that one of two jobs or score runs has right and the other wrong.

    And how many rows of one id are not the same: they ask something else, or another answer is expected.

    Raises :class:`JobError` where the two have no row and score in common, and where nothing is right or wrong by the
    scores that were asked for.
    """
    first = {(each.id, each.score): each for each in judged_rows(db, before, score) if each.value is not None}
    second = (each for each in judged_rows(db, after, score) if each.value is not None)
    named = [(other, each) for each in second if (other := first.get((each.id, each.score))) is not None]
    pairs = [(one, two) for one, two in named if one.asked.is_same(two.asked) and one.expected == two.expected]
    if not pairs:
        raise JobError(
            f"{before} and {after} have no scored row in common",
            hint="Rows are the same by id, input and expected answer.",
        )
    told = [(one, two) for one, two in pairs if None not in (one.is_right, two.is_right)]
    if not told:
        raise _without_right(f"{before} and {after}", score)
    flips = [Flip(two.id, two.score, two.expected, one, two) for one, two in told if one.is_right is not two.is_right]
    return flips, len(named) - len(pairs)
