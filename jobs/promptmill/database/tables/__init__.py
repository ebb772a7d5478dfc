"""The tables. Names explain themselves to people who query them; all ``*_at`` are seconds since the epoch (UTC)."""

from promptmill.database.tables.api import api_keys, batches, files, installation
from promptmill.database.tables.jobs import (
    FAILED,
    answers,
    attempts,
    chunks,
    job_tags,
    jobs,
    requests,
    results,
    retries,
)
from promptmill.database.tables.schema import metadata
from promptmill.database.tables.scores import score_runs, scores, verifications
from promptmill.database.tables.workers import counters, worker_samples, workers

__all__ = [
    "FAILED", "answers", "api_keys", "attempts", "batches", "chunks", "counters", "files", "installation",
    "job_tags", "jobs", "metadata", "requests", "results", "retries", "score_runs", "scores", "verifications",
    "worker_samples", "workers",
]  # fmt: skip
