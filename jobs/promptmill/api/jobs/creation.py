"""A job from a file or from lines that came with the call, stored by a child with limits: neither a million lines nor a
template holds the server up.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import zstandard
from sqlalchemy.engine import Engine

from promptmill.api.dependencies import Services
from promptmill.api.http.errors import bad
from promptmill.api.jobs.client_tasks import task_of
from promptmill.api.keys import Principal
from promptmill.core.child_processes import ChildLimits, OverLimit
from promptmill.core.settings import Settings
from promptmill.core.text_files import without_marks
from promptmill.database.revision import opened
from promptmill.errors import DatasetError
from promptmill.service.job_options import JobOptions
from promptmill.service.prepare import Prepared, find_model, open_with
from promptmill.service.service import dispatch
from promptmill.service.submission import submit
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
    """Limits of a submission whose lines have so many bytes."""
    return ChildLimits(LONGEST_S + LONGEST_S_PER_MIB * size / 2**20, MEGABYTES)


async def create(parts: Services, principal: Principal, options: JobOptions, path: str) -> str:
    """Store the job and publish it; returns its id. ``options.dataset`` is what the file at ``path`` was called.

    Raises PromptmillError for what cannot be used; nothing is stored then.
    """
    limit = parts.limits.of(principal, "queued_requests")
    limits = limits_for(Path(path).stat().st_size)
    whose = principal.key_id, None if limit is None else int(limit)
    try:
        return await parts.slow.run(principal, limits, create_here, parts.settings, options, path, whose)
    except OverLimit as problem:
        raise bad(f"The dataset was not read: {problem.message}. Is there an endless template?") from None


#: The id of an API key, and the waiting requests that all jobs of it may have.
Whose = tuple[str | None, int | None]


def create_here(settings: Settings, options: JobOptions, path: str, whose: Whose) -> str:
    """In a child: the same."""
    name = options.dataset or ""
    task = _task(options)
    _refuse_bomb(path, name)
    with opened(settings.database_url) as db:
        # The ending of the name tells format and compression.
        job_id = store(settings, db, options, path, task, whose, settings.slots, f"dataset{_ending(name)}")
        dispatch(catalog.find_job(db, job_id), settings, db)
    return job_id


def store(
    settings: Settings, db: Engine, options: JobOptions, path: str, task: Task | None, whose: Whose,
    slots: int | None = None, name: str | None = None,
) -> str:  # fmt: skip
    """Store the job of a client's file, which is read as ``name`` says; returns its id. No model is fetched for it."""
    model = options.model or ""
    gauge = None if model.startswith("hf:") else find_model(model, None, settings)[1]
    with open_with(path, options.format, task, name) as dataset:
        dataset.name = options.dataset or ""
        prepared = Prepared(
            options, "queue", dataset, task, model, None, gauge, slots, settings.max_queued_requests, *whose
        )
        return submit(db, prepared)


def _task(options: JobOptions) -> Task | None:
    if options.task is not None:
        return task_of(str(options.task), "task")
    template = options.template
    return Task.from_template(without_marks(template), options.system) if template else None


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
