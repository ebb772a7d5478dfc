"""Append-only score runs: a job's stored answers scored by a task, row by row. Results are never touched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from ulid import ULID

from promptmill.database import copy_rows, epoch, writing
from promptmill.errors import JobError
from promptmill.scorers import JsonObject, Outcome, Scorer
from promptmill.scorers.scoring import BATCH_ROWS, Score, build, read_answer, required_keys, score_rows
from promptmill.tables import requests, results, score_runs, scores
from promptmill.task_file import Task

COLUMNS = ("score_run_id", "row", "metric", "value", "predicted", "expected", "outcome")


def append_score_run(db: Engine, job: sa.Row[Any], task: Task) -> tuple[str, dict[str, Score]]:
    """Score the job's answers by ``task`` and store a run of it; returns its id and the figures.

    Raises :class:`JobError` for a task without scores.
    """
    scorers = build(task.scores)
    if not scorers:
        raise JobError(f"the task '{task.name}' has no scores", hint="Add 'scores:' to the task file.")
    run_id, required = str(ULID()), required_keys(task, scorers)
    with writing(db) as connection:
        _store_run(connection, run_id, job.id, task)
        for page in _pages(connection, job.id):
            stored = [
                (run_id, answer.row, name, *judged)
                for answer in page
                for output in [read_answer(tuple(answer)[1:], required, task.output.aliases)]
                for name, scorer in scorers.items()
                if (judged := _judged(scorer, *output)) is not None
            ]
            copy_rows(connection, scores, COLUMNS, stored)
        answers = (tuple(answer)[1:] for page in _pages(connection, job.id) for answer in page)
        return run_id, score_rows(answers, scorers, required, task.output.aliases)


def _store_run(db: Connection, run_id: str, job_id: str, task: Task) -> None:
    parent = db.execute(sa.select(sa.func.max(score_runs.c.id)).where(score_runs.c.job_id == job_id)).scalar()
    now = db.execute(sa.select(epoch())).scalar()
    made = {"id": run_id, "job_id": job_id, "task_sha256": task.sha256, "parent_id": parent, "created_at": now}
    db.execute(sa.insert(score_runs).values(**made))


def _pages(db: Connection, job_id: str) -> Iterator[list[sa.Row[Any, Any, Any, Any, Any]]]:
    """The job's answers in the order of their rows, BATCH_ROWS at a time; no cursor stays open between two."""
    query = (
        sa.select(results.c.row, results.c.state, results.c.text, results.c.finish_reason, requests.c.expected)
        .join(requests, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
        .where(results.c.job_id == job_id)
        .order_by(results.c.row)
        .limit(BATCH_ROWS)
    )
    last = -1
    while page := list(db.execute(query.where(results.c.row > last))):
        yield page
        last = page[-1].row


def _judged(
    scorer: Scorer, outcome: Outcome, output: JsonObject, expected: JsonObject
) -> tuple[float | None, str | None, str, str] | None:
    """Value, predicted and expected label, and outcome of one row; None for a row without a label."""
    if scorer.field not in expected:
        return None
    wanted = json.dumps(expected[scorer.field], ensure_ascii=False)
    if outcome is Outcome.SCORED and scorer.field not in output:
        outcome = Outcome.UNPARSED
    if outcome is not Outcome.SCORED:
        return (None if outcome is Outcome.INFRA_ERROR else 0.0), None, wanted, outcome.value
    found = scorer(output, expected)
    given = json.dumps(output[scorer.field], ensure_ascii=False)
    if found is None:
        return None, given, wanted, Outcome.ABSTAIN.value
    return float(found), given, wanted, outcome.value
