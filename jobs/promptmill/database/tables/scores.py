"""What answers were judged to be."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Double, ForeignKey, Index, Integer, PrimaryKeyConstraint, String, Table, Text

from promptmill.database.tables.schema import JobId, metadata

score_runs = Table(
    "score_runs",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("job_id", JobId, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("task_sha256", String(64), nullable=False),
    Column("scorer_sha256", String(64)),
    # The run before it.
    Column("parent_id", String(26)),
    # Counts from 1 in each job: JOB@s2 is the second.
    Column("number", Integer),
    Column("task_text", Text),
    # The figures that it came to, as JSON.
    Column("figures", Text),
    Column("created_at", Double, nullable=False),
    Index("ix_score_runs_job_id", "job_id"),
)

scores = Table(
    "scores",
    metadata,
    Column("score_run_id", String(26), ForeignKey("score_runs.id", ondelete="CASCADE"), nullable=False),
    Column("row", Integer, nullable=False),
    Column("metric", Text, nullable=False),
    Column("value", Double),
    Column("predicted", Text),
    Column("expected", Text),
    # 'scored', 'unparsed', 'truncated', 'scorer_error', 'abstain' or 'infra_error'.
    Column("outcome", String(16), nullable=False),
    # How sure the answer is of yes, or of the choice it made.
    Column("confidence", Double),
    # NULL where nothing is right or wrong by the score, and in runs of older versions.
    Column("is_right", Boolean),
    # What the scorer raised.
    Column("error", Text),
    PrimaryKeyConstraint("score_run_id", "row", "metric"),
    # The key is most of the row: a tree of rows and one of keys beside it would take twice the time and the space.
    sqlite_with_rowid=False,
)

# What ``promptmill verify`` found. ``examples`` and ``sums`` are JSON.
verifications = Table(
    "verifications",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("job_id", JobId, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("compared", Integer, nullable=False),
    Column("left_out", Integer, nullable=False),
    Column("mismatches", Integer, nullable=False),
    Column("examples", Text, nullable=False),
    Column("sums", Text, nullable=False),
    Column("verified_at", Double, nullable=False),
)
