"""Jobs from Python: the functions that the command line calls, for pipelines and notebooks.

import promptmill

job = promptmill.run("comments.jsonl", model="demo", task="ads.task.yaml")
print(job.scores()["is_ad"].value)
frame = job.to_pandas()
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from sqlalchemy.engine import Engine

from promptmill.core.settings import Settings, load_settings
from promptmill.database.engine import reading
from promptmill.database.revision import open_database
from promptmill.errors import JobError
from promptmill.service import local_run, service
from promptmill.service.job_options import JobOptions
from promptmill.service.local_run import ledger_of
from promptmill.service.selection import Selection
from promptmill.store import catalog
from promptmill.tasks.task_file import Task
from promptmill.types import JobState

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

    from promptmill.ledger import Progress
    from promptmill.reports.compare.comparison import Comparison
    from promptmill.scoring.runs import ScoreRun
    from promptmill.scoring.scorers.tally import Score

#: A file, a folder, a pattern, ``hf:OWNER/NAME``, or the lines themselves as they would stand in a JSONL file.
DatasetLike = str | Path | Iterable[Mapping[str, Any]]

#: Seconds between two looks at a job that is waited for.
POLL_S = 0.5


class Job:
    """A stored job. Nothing is kept in memory: every method asks the database."""

    def __init__(self, job_id: str, settings: Settings, db: Engine) -> None:
        self.id = job_id
        self._settings, self._db = settings, db

    def __repr__(self) -> str:
        return f"<promptmill.Job {self.id} {self.state.value}>"

    @property
    def state(self) -> JobState:
        return JobState(catalog.find_job(self._db, self.id).state)

    def status(self) -> dict[str, Any]:
        """What ``promptmill status --json`` prints."""
        return service.status(self._db, catalog.find_job(self._db, self.id))

    def wait(self, timeout_s: float | None = None, on_progress: Callable[[Progress], None] | None = None) -> Job:
        """Return when the job has ended, whatever way; the scores of its task are kept then.

        Raises :class:`TimeoutError` after ``timeout_s`` seconds.
        """
        ledger = ledger_of(self._db, self._settings)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            progress = ledger.progress(self.id)
            if on_progress is not None:
                on_progress(progress)
            if progress.state.is_final:
                service.keep_scores(self.id, self._db)
                return self
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"job {self.id} is {progress.state.value} after {timeout_s} s")
            time.sleep(POLL_S)

    def results(self, failed_only: bool = False) -> Iterator[dict[str, Any]]:
        """One dict for each result, in the order of the rows, streamed; the lines of ``promptmill results``."""
        return catalog.result_lines(self._db, self.id, failed_only)

    def to_arrow(self, prompts: bool = False) -> pyarrow.Table:
        """The results as an Arrow table; ``prompts``: with input, expected and meta, as JSON."""
        import pyarrow as pa

        from promptmill.store.parquet import record_batches, schema_of

        return pa.Table.from_batches(record_batches(self._db, self.id, prompts=prompts), schema_of(prompts))

    def to_pandas(self, prompts: bool = False) -> pandas.DataFrame:
        """The same as a DataFrame of pandas, which must be installed."""
        return self.to_arrow(prompts).to_pandas()

    def to_polars(self, prompts: bool = False) -> polars.DataFrame:
        """The same as a DataFrame of polars, which must be installed."""
        import polars as pl

        found = pl.from_arrow(self.to_arrow(prompts))
        assert isinstance(found, pl.DataFrame)
        return found

    def scores(self) -> dict[str, Score]:
        """The scores that the job's task asks for, over the results there are; none without a task."""
        from promptmill.scoring.stored_scores import scores_of

        with reading(self._db) as connection:
            return scores_of(connection, catalog.find_job(self._db, self.id))

    def score(self, task: str | Path | None = None, by: str | None = None) -> ScoreRun:
        """Score the stored answers by another task file, or by the job's own, and keep that as a score run."""
        from promptmill.scoring.runs import append_score_run
        from promptmill.tasks.task_file import load_task

        job = catalog.find_job(self._db, self.id)
        if task is None and job.task_text is None:
            raise JobError(f"job {job.id} has no task", hint="Give the path of a task file.")
        chosen = load_task(task) if task is not None else service.stored_task(job)
        return append_score_run(self._db, job, chosen, by)

    def report(self) -> dict[str, Any]:
        """The report as ``promptmill report --format json`` has it."""
        from promptmill.reports.figures.summary import summarise

        return summarise(self._db, self.id).to_json()

    def compare(self, before: Job | str, force: bool = False) -> Comparison:
        """This job against an earlier one: changes with intervals and tests, and the rows that flipped.

        ``force``: figures of different work are compared too. Raises :class:`promptmill.PromptmillError`.
        """
        from promptmill.reports.compare.compare import compare

        return compare(self._db, catalog.find_job(self._db, str(getattr(before, "id", before))).id, self.id, force)

    def cancel(self) -> bool:
        """End the job; False when it had ended already."""
        return service.cancel(self.id, self._settings, self._db)[1]


class _Opened:
    """Settings and database, opened when first needed."""

    def __init__(self, database_url: str | None) -> None:
        self._url = database_url

    @cached_property
    def settings(self) -> Settings:
        found = load_settings()
        return found.model_copy(update={"database_url": self._url}) if self._url else found

    @cached_property
    def db(self) -> Engine:
        return open_database(self.settings.database_url)


class JobKeywords(TypedDict, total=False):
    """Fields of :class:`JobOptions` that ``run`` and ``submit`` take beside the dataset, for editors and checkers."""

    model: str | None
    task: str | Path | Task | None
    template: str | None
    system: str | None
    expected: Sequence[str]
    sampling: Mapping[str, Any] | None
    selection: Selection | None
    format: str | None
    name: str | None
    priority: int
    slots: int | None
    context_tokens: int | None
    device: str
    max_errors: str | None
    store: Literal["full", "hash", "none"]
    skip_invalid: bool
    deadline: str | None
    expires: str | None
    time_limit: str | None
    if_exists: Literal["new", "attach", "fail"]
    use_cache: bool


def run(
    dataset: DatasetLike,
    *,
    database_url: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options: Unpack[JobKeywords],
) -> Job:
    """Run a job in this process, and return when it has ended. Raises :class:`promptmill.errors.PromptmillError`.

    ``options`` are those of :class:`promptmill.JobOptions`. ``database_url``: where the job is stored; without it
    ``JOBS_DATABASE_URL`` or the default.
    """
    opened = _Opened(database_url)
    with _as_file(dataset) as path:
        asked = JobOptions.of({**options, "dataset": path})
        outcome = local_run.run(asked, opened.settings, opened.db, on_progress)
    service.keep_scores(outcome.job_id, opened.db)
    return Job(outcome.job_id, opened.settings, opened.db)


def submit(dataset: DatasetLike, *, database_url: str | None = None, **options: Unpack[JobKeywords]) -> Job:
    """Store a job for the workers and return at once; ``Job.wait()`` follows it. Parameters are those of ``run``."""
    opened = _Opened(database_url)
    with _as_file(dataset) as path:
        asked = JobOptions.of({**options, "dataset": path})
        job_id = service.submit(asked, opened.settings, opened.db)
    return Job(job_id, opened.settings, opened.db)


def job(reference: str = "@last", database_url: str | None = None) -> Job:
    """A stored job: by its id, a unique prefix of one, its name, or ``@last``."""
    opened = _Opened(database_url)
    return Job(catalog.find_job(opened.db, reference).id, opened.settings, opened.db)


@contextmanager
def _as_file(dataset: DatasetLike) -> Iterator[str]:
    """The dataset's path; lines that are given themselves are written to a temporary file."""
    if isinstance(dataset, str | Path):
        yield str(dataset)
        return
    with tempfile.TemporaryDirectory(prefix="promptmill-") as folder:
        path = Path(folder) / "lines.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for line in dataset:
                file.write(json.dumps(dict(line), ensure_ascii=False) + "\n")
        yield str(path)
