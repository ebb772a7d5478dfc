"""Scores of jobs whose texts are gone: as a score run stored them."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.database.tables import jobs, score_runs
from promptmill.scoring.scorers.aggregates import Figures
from promptmill.scoring.scorers.tally import Score

#: Counts that a score and its JSON share.
COUNTS = (
    "metric", "n", "correct", "unparsed", "truncated", "abstain", "infra_error", "scorer_errors", "scorer_error",
    "unlabelled", "left_out", "classes", "confusion", "note",
)  # fmt: skip


def kept_run(db: Connection, job_id: str) -> str | None:
    """The score run that speaks for a job without texts: the newest by its own task, else the newest; None for none."""
    runs = score_runs.c
    query = (
        sa.select(runs.id)
        .join_from(score_runs, jobs, jobs.c.id == runs.job_id)
        .where(runs.job_id == job_id, runs.figures.is_not(None))
    )
    own = sa.case((runs.task_sha256 == jobs.c.task_sha256, 0), else_=1)
    found: str | None = db.execute(query.order_by(own, runs.number.desc()).limit(1)).scalar()
    return found


def kept_scores(db: Connection, job_id: str) -> dict[str, Score]:
    """The figures of that score run; none where there is none."""
    run_id = kept_run(db, job_id)
    text = db.execute(sa.select(score_runs.c.figures).where(score_runs.c.id == run_id)).scalar()
    return {name: _score(name, values) for name, values in json.loads(text or "{}").items()}


def _score(name: str, values: dict[str, Any]) -> Score:
    n = values["n"]
    figures = Figures(
        values={each: value for each, value in values["figures"].items() if each != values["metric"]},
        intervals={each: (low, high) for each, (low, high) in values["figure_ci95"].items()},
        classes=values["per_class"],
        bins=values["calibration"],
    )
    return Score(
        name=name,
        majority=round((values["majority_baseline"] or 0.0) * n),
        ci95=tuple(values["ci95"]) if values["ci95"] else None,
        points=(values["value"] or 0.0) * n,
        figures=figures,
        **{each: values[each] for each in COUNTS},
    )
