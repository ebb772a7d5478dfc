"""Scores of jobs whose texts are gone: as the last score run stored them."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from promptmill.scorers.aggregates import Figures
from promptmill.scorers.tally import Score
from promptmill.tables import score_runs

#: Counts that a score and its JSON share.
COUNTS = (
    "metric", "n", "correct", "unparsed", "truncated", "abstain", "infra_error", "scorer_errors", "scorer_error",
    "unlabelled", "left_out", "classes", "confusion", "note",
)  # fmt: skip


def kept_scores(db: Connection, job_id: str) -> dict[str, Score]:
    """The figures of the newest score run of the job; none where there is none."""
    query = sa.select(score_runs.c.figures).where(score_runs.c.job_id == job_id, score_runs.c.figures.is_not(None))
    text = db.execute(query.order_by(score_runs.c.number.desc()).limit(1)).scalar()
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
