"""What of a batch evaluates a client's texts: functions for a child with limits, and what is bounded in time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from promptmill import catalog
from promptmill.database import opened
from promptmill.errors import DatabaseError, TaskFileError
from promptmill.preparing import gauge_of
from promptmill.readers import open_dataset
from promptmill.score_runs import keep_scores
from promptmill.settings import Settings
from promptmill.submission import JobOrder, submit
from promptmill.task_file import parse_task
from promptmill.tool_calls import Call, Offer, read_calls

#: Seconds of computing in which the calls of a batch are read; what is left then is shown as the text that it is.
READ_CALLS_S = 60.0


def store(settings: Settings, path: str, file_name: str, task_text: str | None, wanted: dict[str, Any]) -> str:
    """Store the job of a batch; returns its id. ``wanted``: fields of :class:`JobOrder`."""
    task = parse_task(task_text, wanted["name"]) if task_text else None
    order = JobOrder(
        mode="queue", task=task, sampling=dict(task.generate) if task else {}, max_errors="100%", skip_invalid=True,
        queue_limit=settings.max_queued_requests, **wanted,
    )  # fmt: skip
    mapping = task.mapping if task else {}
    with (
        _passing(),
        opened(settings.database_url) as db,
        open_dataset(path, format="openai_batch", has_template=task is not None, **mapping) as dataset,
    ):
        dataset.name = file_name
        return submit(db, dataset, order, gauge_of(order.model, settings))


def score(settings: Settings, job_id: str) -> None:
    """Keep the scores of an ended job; a task whose scores cannot be computed has none."""
    with _passing(), opened(settings.database_url) as db, contextlib.suppress(TaskFileError):
        keep_scores(db, catalog.find_job(db, job_id))


@contextlib.contextmanager
def _passing() -> Iterator[None]:
    """A database that is away is told in an error that reaches the parent."""
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as problem:
        raise DatabaseError(str(problem).splitlines()[0][:200]) from None


class Reading:
    """Reads the calls of a batch's answers, by schemas of a client's, while there is time."""

    def __init__(self, seconds: float = READ_CALLS_S) -> None:
        self._left_s = seconds

    def read(self, text: str, offer: Offer) -> tuple[str, list[Call]]:
        if self._left_s <= 0 and offer.is_strict:
            return text, []
        started = time.thread_time()
        try:
            return read_calls(text, offer)
        finally:
            self._left_s -= time.thread_time() - started
