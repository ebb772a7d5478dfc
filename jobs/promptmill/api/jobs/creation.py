"""A job from a file or from lines that came with the call, stored by a child with limits: neither a million lines nor a
template holds the server up.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import zstandard

from promptmill.api.dependencies import Services
from promptmill.api.http.errors import bad
from promptmill.api.jobs.client_tasks import task_of
from promptmill.api.keys import Principal
from promptmill.core.child_processes import ChildLimits, OverLimit
from promptmill.core.settings import Settings
from promptmill.core.spans import Moment
from promptmill.core.text_files import without_marks
from promptmill.database.revision import opened
from promptmill.errors import DatasetError
from promptmill.readers import READERS, open_dataset
from promptmill.service.prepare import gauge_of
from promptmill.service.service import dispatch
from promptmill.service.submission import JobOrder, submit
from promptmill.store import catalog
from promptmill.tasks.task_file import Task

#: Seconds that a submission may take, and seconds more for each MiB of its lines: a tenth of the usual speed.
LONGEST_S, LONGEST_S_PER_MIB = 30.0, 5.0

#: MiB of memory that it may use.
MEGABYTES = 1_024

#: Times that a compressed dataset may be larger than its file, and how large any may be.
MOST_UNPACKED_RATIO = 100
MOST_UNPACKED_BYTES = 8 * 2**30
BLOCK = 2**20


def limits_for(size: int) -> ChildLimits:
    """Of a submission whose lines have so many bytes."""
    return ChildLimits(LONGEST_S + LONGEST_S_PER_MIB * size / 2**20, MEGABYTES)


async def create(parts: Services, principal: Principal, wanted: dict[str, Any]) -> str:
    """Store the job and publish it; returns its id.

    ``wanted``: ``path`` and ``name`` of the dataset, ``format``, ``model``, ``task``, ``template``, ``system`` and the
    rest of :class:`JobOrder`. Raises PromptmillError for what cannot be used; nothing is stored then.
    """
    limits = limits_for(Path(wanted["path"]).stat().st_size)
    try:
        return await parts.slow.run(principal, limits, create_here, parts.settings, wanted)
    except OverLimit as problem:
        raise bad(f"The dataset was not read: {problem.message}. Is there an endless template?") from None


def create_here(settings: Settings, wanted: dict[str, Any]) -> str:
    """In a child: the same."""
    task = _task(wanted)
    order = JobOrder(
        mode="queue", task=task, sampling=(dict(task.generate) if task else {}) | wanted["sampling"],
        system=None if task else wanted["system"], queue_limit=settings.max_queued_requests, slots=settings.slots,
        **{name: wanted[name] for name in ("model", "name", "priority", "max_errors", "skip_invalid", "api_key_id",
                                           "key_limit")},
        deadline=None if wanted["deadline_at"] is None else Moment(wanted["deadline_at"]),
    )  # fmt: skip
    _refuse_bomb(wanted["path"], wanted["name_of_file"])
    # The ending of the name tells format and compression.
    name = f"dataset{_ending(wanted['name_of_file'])}"
    layout = {"has_template": task is not None, **(task.mapping if task else {})}
    with opened(settings.database_url) as db:
        with open_dataset(wanted["path"], name=name, format=wanted["format"], **layout) as dataset:
            dataset.name = wanted["name_of_file"]
            job_id = submit(db, dataset, order, gauge_of(order.model, settings))
        dispatch(catalog.find_job(db, job_id), settings, db)
    return job_id


def _task(wanted: dict[str, Any]) -> Task | None:
    if wanted["task"]:
        return task_of(wanted["task"], "task")
    return Task.from_template(without_marks(wanted["template"]), wanted["system"]) if wanted["template"] else None


def _ending(name: str) -> str:
    """``.csv.gz`` and the like, of endings that readers know; nothing else of a client's name reaches the disk."""
    known = {".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".json", ".gz", ".zst"}
    endings = [each.lower() for each in Path(name).suffixes[-2:] if each.lower() in known]
    return "".join(endings) or ".jsonl"


def _refuse_bomb(path: str, name: str) -> None:
    """Raises DatasetError for a compressed file that is far larger inside."""
    openers: dict[str, Any] = {".gz": gzip.open, ".zst": zstandard.open}
    opener = openers.get(Path(name).suffix.lower())
    if opener is None:
        return
    most = min(MOST_UNPACKED_BYTES, max(64 * 2**20, MOST_UNPACKED_RATIO * Path(path).stat().st_size))
    size = 0
    try:
        with opener(path, "rb") as file:
            while block := file.read(BLOCK):
                size += len(block)
                if size > most:
                    raise DatasetError(f"{name} is more than {most:,} bytes inside", hint="Send it in parts.")
    except (OSError, EOFError, zstandard.ZstdError) as problem:
        raise DatasetError(f"{name} is damaged: {problem}", hint="Compress it again.") from None


FORMATS = tuple(READERS)
