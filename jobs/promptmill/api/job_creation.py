"""A job from a file or from lines that came with the call. Large ones, and all with templates or for real models, in a
process of their own, which ends when its time is over: neither a million lines nor a template holds the server up.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import zstandard
from sqlalchemy.engine import Engine

from promptmill import errors
from promptmill.api.client_tasks import task_of
from promptmill.api.errors import ApiError
from promptmill.database import open_database
from promptmill.errors import BadLines, DatasetError, PromptmillError
from promptmill.preparing import gauge_of
from promptmill.readers import READERS, open_dataset
from promptmill.service import dispatch
from promptmill.settings import Settings, load_settings
from promptmill.submission import JobOrder, submit
from promptmill.task_file import Task
from promptmill.times import Moment

#: Bytes of lines that the server itself takes in: a fraction of a second.
SMALL_BYTES = 256 * 1024

#: Seconds that a submission may take, and seconds more for each MiB of its lines: a tenth of the usual speed.
LONGEST_S, LONGEST_S_PER_MIB = 30.0, 5.0

#: Times that a compressed dataset may be larger than its file, and how large any may be.
MOST_UNPACKED_RATIO = 100
MOST_UNPACKED_BYTES = 8 * 2**30
BLOCK = 2**20


async def create(settings: Settings, db: Engine, wanted: dict[str, Any]) -> str:
    """Store the job and publish it; returns its id.

    ``wanted``: ``path`` and ``name`` of the dataset, ``format``, ``model``, ``task``, ``template``, ``system`` and the
    rest of :class:`JobOrder`. Raises PromptmillError for what cannot be used; nothing is stored then.
    """
    size = Path(wanted["path"]).stat().st_size
    # The tokeniser of a real model is native code, and takes a while to load.
    is_quick = size <= SMALL_BYTES and wanted["model"].partition(":")[0] == "echo"
    if is_quick and not (wanted.get("task") or wanted.get("template")):
        return await asyncio.get_running_loop().run_in_executor(None, _create, settings, db, wanted)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "promptmill.api.job_creation", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    limit_s = LONGEST_S + LONGEST_S_PER_MIB * size / 2**20
    try:
        out, _ = await asyncio.wait_for(process.communicate(json.dumps(wanted).encode()), limit_s)
    except TimeoutError:
        raise ApiError(400, f"The dataset was not read within {limit_s:.0f} s: is there an endless template?") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    answer = json.loads(out or b"{}")
    if "job_id" in answer:
        return str(answer["job_id"])
    if "error" not in answer:
        raise ApiError(500, "The server had an error while processing your request.")
    kind = getattr(errors, answer["error"], PromptmillError)
    if not issubclass(kind, PromptmillError) or kind in (BadLines, errors.JobExists):
        kind = DatasetError
    raise kind(answer["message"], hint=answer["hint"])


def _create(settings: Settings, db: Engine, wanted: dict[str, Any]) -> str:
    task = _task(wanted)
    order = JobOrder(
        mode="queue", task=task, sampling=(dict(task.generate) if task else {}) | wanted["sampling"],
        system=None if task else wanted["system"], queue_limit=settings.max_queued_requests, slots=settings.slots,
        **{name: wanted[name] for name in ("model", "name", "priority", "max_errors", "skip_invalid", "api_key_id",
                                           "key_limit")},
        deadline=None if wanted["deadline_at"] is None else Moment(wanted["deadline_at"]),
    )  # fmt: skip
    _refuse_bomb(wanted["path"], wanted["name_of_file"])
    with tempfile.TemporaryDirectory(prefix="promptmill-") as folder:
        # A path that ends as the file was called: the ending tells format and compression.
        path = Path(folder) / f"dataset{_ending(wanted['name_of_file'])}"
        path.symlink_to(Path(wanted["path"]).absolute())
        mapping = task.mapping if task else {}
        with open_dataset(path, format=wanted["format"], has_template=task is not None, **mapping) as dataset:
            dataset.name = wanted["name_of_file"]
            job_id = submit(db, dataset, order, gauge_of(order.model, settings))
    from promptmill import catalog

    dispatch(catalog.find_job(db, job_id), settings, db)
    return job_id


def _task(wanted: dict[str, Any]) -> Task | None:
    if wanted["task"]:
        return task_of(wanted["task"], "task")
    return Task.from_template(wanted["template"], wanted["system"]) if wanted["template"] else None


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


def main() -> None:
    """Entry point of the process: one order on stdin, its answer on stdout."""
    wanted = json.loads(sys.stdin.buffer.read())
    try:
        settings = load_settings()
        db = open_database(settings.database_url)
        answer: dict[str, Any] = {"job_id": _create(settings, db, wanted)}
        db.dispose()
    except PromptmillError as problem:
        answer = problem.to_json()
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
