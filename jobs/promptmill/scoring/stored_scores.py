"""Scores of a job: as the score run at its end stored them, so that its answers are judged once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.tables import jobs, score_runs
from promptmill.scoring.scorers.aggregates import Figures
from promptmill.scoring.scorers.scoring import score_job
from promptmill.scoring.scorers.tally import Score
from promptmill.types import WITHOUT_TEXTS, JobState

#: Counts that a score and its JSON share.
COUNTS = (
    "metric", "value", "n", "n_effective", "correct", "unparsed", "truncated", "abstain", "infra_error",
    "scorer_errors", "scorer_error", "unlabelled", "left_out", "classes", "confusion", "note",
)  # fmt: skip


#: A finished run over the answers that a job has: a retry ends the job anew, and gives it others.
SINCE_END = sa.and_(
    score_runs.c.job_id == jobs.c.id, score_runs.c.figures.is_not(None),
    score_runs.c.created_at >= sa.func.coalesce(jobs.c.finished_at, 0.0),
)  # fmt: skip


def own_runs(db: Connection, job_id: str, task_sha256: str | None) -> list[str]:
    """Score runs of a job by its own task over the answers that it has, the first one first."""
    query = sa.select(score_runs.c.id).join_from(score_runs, jobs, SINCE_END)
    query = query.where(jobs.c.id == job_id, score_runs.c.task_sha256 == task_sha256)
    return list(db.execute(query.order_by(score_runs.c.number, score_runs.c.id)).scalars())


def run_of(db: Connection, job: sa.Row[Any]) -> str | None:
    """The score run that speaks for an ended job: the one that was made at its end; None: its answers are to be judged.

    For a job without texts it is the newest by its own task, else the newest.
    """
    if job.store not in WITHOUT_TEXTS:
        ended = job.task_text is not None and JobState(job.state).is_final
        return next(iter(own_runs(db, job.id, job.task_sha256)), None) if ended else None
    runs = score_runs.c
    query = sa.select(runs.id).where(runs.job_id == job.id, runs.figures.is_not(None))
    own = sa.case((runs.task_sha256 == job.task_sha256, 0), else_=1)
    found: str | None = db.execute(query.order_by(own, runs.number.desc()).limit(1)).scalar()
    return found


def figures_of(db: Connection, run_id: str) -> dict[str, Any]:
    """Score -> its figures, in the order of the task."""
    text = db.execute(sa.select(score_runs.c.figures).where(score_runs.c.id == run_id)).scalar()
    found: dict[str, Any] = json.loads(text or "{}")
    return found


def scores_of(db: Connection, job: sa.Row[Any]) -> dict[str, Score]:
    """The scores that a job's task asks for, over the results that are there; none without a task.

    Raises :class:`promptmill.errors.TaskFileError` for a task whose scores cannot be computed.
    """
    run_id = run_of(db, job)
    stored = {} if run_id is None else figures_of(db, run_id)
    # Runs of early versions have fewer counts.
    if job.store in WITHOUT_TEXTS or (stored and all(values.keys() >= set(COUNTS) for values in stored.values())):
        found = {name: _score(name, values) for name, values in stored.items()}
        return found if run_id is None else _with_changes_told(db, job, run_id, found)
    return score_job(db, job)


def _with_changes_told(db: Connection, job: sa.Row[Any], run_id: str, found: dict[str, Score]) -> dict[str, Score]:
    """The stored scores speak; where a file of a scorer is another one by now, its score says so."""
    before = db.execute(sa.select(score_runs.c.scorer_sha256).where(score_runs.c.id == run_id)).scalar()
    if before is None or job.task_folder is None:
        return found
    from promptmill.scoring.scorers.python_scorer import changed_since
    from promptmill.tasks.scores import entry_kind, names_of
    from promptmill.tasks.task_file import parse_task

    entries = parse_task(job.task_text, job.task_name or "task", job.task_folder).scores
    own = [name for name, entry in zip(names_of(entries), entries, strict=True) if entry_kind(entry) == "python"]
    files = [str(entry["python"]) for entry in entries if entry_kind(entry) == "python"]
    what = changed_since(before, files, job.task_folder)
    if what is None:
        return found
    told = f"{what} since; a new run: promptmill score {job.id}"
    return found | {
        name: replace(score, note="; ".join(filter(None, (score.note, told))))
        for name, score in found.items() if name in own
    }  # fmt: skip


def _score(name: str, values: dict[str, Any]) -> Score:
    n = values["n"]
    figures = Figures(
        values={each: value for each, value in values["figures"].items() if each != values["metric"]},
        intervals={each: (low, high) for each, (low, high) in values["figure_ci95"].items()},
        reasons=values["no_interval"],
        classes=values["per_class"],
        bins=values["calibration"],
    )
    return Score(
        name=name,
        majority=None if values["majority_baseline"] is None else round(values["majority_baseline"] * n),
        ci95=tuple(values["ci95"]) if values["ci95"] else None,
        figures=figures,
        **{each: values[each] for each in COUNTS},
    )
