"""What the command line and programs call beside ``local_run.run``: submit, resume, cancel, and what looks at jobs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Engine, Row

from promptmill.core.registry import suggestion
from promptmill.core.settings import Settings
from promptmill.errors import (
    BrokerError,
    JobError,
    JobExists,
    PromptmillError,
)
from promptmill.ledger import Ledger
from promptmill.queue.dispatcher import waits_for
from promptmill.service.job_options import JobOptions
from promptmill.service.local_run import (
    LocalRun,
    OnPreflight,
    OnProgress,
    RunOutcome,
    holding,
    ledger_of,
    one_device,
    owning,
)
from promptmill.service.preflight import Preflight
from promptmill.service.prepare import prepare
from promptmill.service.rows import Rows
from promptmill.service.submission import submit as store
from promptmill.store import catalog
from promptmill.tasks.task_file import Task, load_task, parse_task
from promptmill.tasks.templates import Template, resolve_sampling, to_request, turn_of
from promptmill.types import WITHOUT_TEXTS, ErrorClass, JobState, Request

log = logging.getLogger("promptmill.service.service")

#: Told in a sentence or two what did not go well and was no error.
OnWarning = Callable[[str], None]


def score_again(
    reference: str,
    task_path: str | None,
    db: Engine,
    by: str | None = None,
    on_rows: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Append a score run to a job, by its own task or by another one, and judge that task's gates."""
    from promptmill.reports.figures.summary import summarise
    from promptmill.scoring.gates import judge
    from promptmill.scoring.runs import append_score_run

    job = catalog.find_job(db, reference)
    if task_path is None and job.task_text is None:
        raise JobError(f"job {job.id} has no task", hint="Give --task FILE.")
    if job.store in WITHOUT_TEXTS:
        raise JobError(
            f"job {job.id} keeps no prompts or answers: there is nothing to score",
            hint=f"The scores it had stay: promptmill report {job.id}.",
        )
    task = load_task(task_path) if task_path else stored_task(job)
    run = append_score_run(db, job, task, by, on_rows)
    scores = run.figures
    gates = task.model.gates
    verdicts = judge(gates, summarise(db, job.id).to_json() | {"scores": scores}) if gates else []
    return {
        "job_id": job.id, "score_run_id": run.id, "score_run": run.number, "task_sha256": task.sha256,
        "rows": job.rows, "scores": scores,
        "groups": {value: {n: each.to_json() for n, each in found.items()} for value, found in run.groups.items()},
        "gates": [each.to_json() for each in verdicts],
    }  # fmt: skip


def keep_scores(job_id: str, db: Engine) -> None:
    """Keep what the scores of a completed job's task say of each row, once: as :func:`score_again` does."""
    job = catalog.find_job(db, job_id)
    if job.task_text is not None and job.state == JobState.COMPLETED and job.store not in WITHOUT_TEXTS:
        from promptmill.scoring import runs

        runs.keep_scores(db, job)


def dry_run(options: JobOptions, settings: Settings, mode: str) -> Preflight | None:
    """Read and check everything, store nothing. None when the model is not on this machine."""
    with prepare(options, settings, mode) as prepared:
        rows = Rows(prepared)
        for _ in rows:
            pass
        rows.refuse_bad()
        return prepared.gauge.findings() if prepared.gauge else None


def resume(
    reference: str,
    settings: Settings,
    db: Engine,
    device: str = "auto",
    on_progress: OnProgress = lambda progress: None,
    warn: OnWarning = log.warning,
) -> RunOutcome:
    """Go on with an interrupted job. An embedded one is run here; one of the queue is handed to the workers."""
    job = catalog.find_job(db, reference)
    ledger = ledger_of(db, settings)
    if job.mode == "queue":
        before = ledger.resume(job.id)
        dispatch(job, settings, db, warn)
        return _handed_over(job.id, ledger, was_open=before in (JobState.QUEUED, JobState.RUNNING))
    here = LocalRun(settings, db, one_device(device, job.model), on_progress)
    with holding(here.device):
        return here.go_on(job.id)


def _handed_over(job_id: str, ledger: Ledger, was_open: bool = False) -> RunOutcome:
    """Follow a job that the workers go on with; few rows may be done before one looks."""
    state = ledger.progress(job_id).state
    return RunOutcome(job_id, state, finished=state.is_final, was_open=was_open)


def submit(
    options: JobOptions,
    settings: Settings,
    db: Engine,
    on_preflight: OnPreflight = lambda findings: None,
    warn: OnWarning = log.warning,
) -> str:
    """Store the job for the workers and publish its first chunks; returns its id.

    ``warn`` is told when Redis is away. The job is stored all the same, and any worker publishes it later.
    """
    with prepare(options, settings, "queue") as prepared:
        try:
            job_id = store(db, prepared)
        except JobExists as twin:
            if options.if_exists != "attach":
                raise
            return _attach(twin, db, warn)
    on_preflight(prepared.gauge.findings() if prepared.gauge else None)
    job = catalog.find_job(db, job_id)
    dispatch(job, settings, db, warn)
    if waits := waits_for(db, job):
        warn(waits)
    return job_id


def status(db: Engine, job: Row[Any]) -> dict[str, Any]:
    """One job with its counts and chunks, and what it waits for when no worker runs it."""
    found = catalog.job_status(db, job)
    return found | {"waits_for": waits_for(db, catalog.find_job(db, job.id))}


def _attach(twin: JobExists, db: Engine, warn: OnWarning) -> str:
    """Take a job that is there for the one that was to be submitted."""
    job_id = twin.job_id
    job = catalog.find_job(db, job_id)
    if job.mode == "embedded" and not JobState(job.state).is_final:
        raise JobError(
            f"job {job_id} asks the same and is {job.state} on one machine: no worker will run it",
            hint=f"Go on with it there: promptmill resume {job_id}. Or give --if-exists new.",
        )
    warn(f"{twin.message}: nothing new is submitted")
    return job_id


def dispatch(job: Row[Any], settings: Settings, db: Engine, warn: OnWarning = log.warning) -> None:
    """Publish the job's first chunks. ``warn`` is told when Redis is away: the workers publish them later then."""
    from promptmill.queue.broker import Broker
    from promptmill.queue.dispatcher import Dispatcher

    try:
        Dispatcher(ledger_of(db, settings), Broker(settings.redis_url)).dispatch(
            job.id, job.model, job.priority, job.model_fingerprint
        )
    except BrokerError as problem:
        # What was asked for is done: the ledger has the job, and any worker publishes it.
        warn(
            f"{problem.message}. Job {job.id} is stored, and nothing of it is lost: the workers publish it as soon as "
            f"they reach Redis. {problem.hint or ''}".rstrip()
        )


def pause(reference: str, settings: Settings, db: Engine) -> tuple[str, bool]:
    """Start nothing more of a job; what runs may end. Returns its id, and False when it was paused already.

    Raises :class:`JobError` for a job that has ended.
    """
    job = catalog.find_job(db, reference)
    ledger = ledger_of(db, settings)
    if ledger.pause(job.id):
        return job.id, True
    state = ledger.progress(job.id).state
    if state is not JobState.PAUSED:
        raise JobError(f"job {job.id} is {state.value}: there is nothing to pause")
    return job.id, False


def retry(
    reference: str,
    error_class: str | None,
    settings: Settings,
    db: Engine,
    device: str = "auto",
    on_progress: OnProgress = lambda progress: None,
    warn: OnWarning = log.warning,
) -> tuple[int, RunOutcome]:
    """Run the errors of an ended job again, here or by the workers as it ran before. Returns how many there were."""
    job = catalog.find_job(db, reference)
    only, ledger = _error_class(error_class), ledger_of(db, settings)
    if job.mode == "queue":
        if (rows := ledger.retry(job.id, only)) == 0:
            return 0, RunOutcome(job.id, JobState(job.state))
        dispatch(job, settings, db, warn)
        return rows, _handed_over(job.id, ledger)
    here = LocalRun(settings, db, one_device(device, job.model), on_progress)
    # The locks first: a job that cannot run now is not opened again either.
    with holding(here.device), owning(job.id):
        if (rows := ledger.retry(job.id, only)) == 0:
            return 0, RunOutcome(job.id, JobState(job.state))
        return rows, here.run(job.id)


def _error_class(name: str | None) -> ErrorClass | None:
    if name is None:
        return None
    try:
        return ErrorClass(name)
    except ValueError:
        raise JobError(f"there is no error class '{name}'", hint=suggestion(name, list(ErrorClass))) from None


def reconcile(settings: Settings, db: Engine) -> tuple[int, int]:
    """Take back chunks without a live lease and publish what has no message; returns how many of each.

    Every worker does this all the time; it helps where none is alive, or where one wants to see it done. Scores of
    texts that are to go are kept here, which workers do not do.
    """
    from promptmill.queue.broker import Broker
    from promptmill.queue.dispatcher import Dispatcher
    from promptmill.queue.housekeeping import Housekeeping

    ledger = ledger_of(db, settings)
    taken_back = 0
    while expired := ledger.requeue_expired():
        taken_back += len(expired)
    published = Dispatcher(ledger, Broker(settings.redis_url)).reconcile()
    house = Housekeeping(db, settings.samples_days, scoring=True)
    while house.step():
        pass
    return taken_back, published


def cancel(reference: str, settings: Settings, db: Engine) -> tuple[str, bool]:
    """End a job. Returns its id, and False when it had ended already."""
    job = catalog.find_job(db, reference)
    return job.id, ledger_of(db, settings).cancel(job.id)


def row_of(reference: str, asked: str, db: Engine) -> int:
    """The number of a row that is named by its id, or by its number. Raises :class:`UnknownName`."""
    from promptmill.errors import UnknownName

    job = catalog.find_job(db, reference)
    found = catalog.row_with_id(db, job.id, asked)
    if found is not None:
        return found
    if not asked.isdecimal():
        raise UnknownName(f"job {job.id} has no row with the id '{asked[:80]}'", hint=f"Its rows: 0 to {job.rows - 1}.")
    return int(asked)


def numbered_ids(reference: str, db: Engine, most: int = 10) -> list[str]:
    """The first ids that a job gave to lines whose own ids were used before."""
    job = catalog.find_job(db, reference)
    if not job.task_text or stored_task(job).model.duplicate_ids != "number":
        return []
    return catalog.numbered_ids(db, job.id, most)


def show(reference: str, row: int, db: Engine) -> dict[str, Any]:
    """Everything about one row, with the prompt as the model saw it where the model is at hand."""
    job = catalog.find_job(db, reference)
    shown = catalog.read_row(db, job, row)
    if shown["input"] is None:
        return shown | {"prompt": None, "prompt_parts": None, "messages": None}
    template = _stored_template(job)
    # With its parameters: a reasoning that is asked for is opened in the prompt.
    sampling = resolve_sampling(json.loads(job.sampling), shown["sampling"])
    request = to_request(row, shown["id"], shown["input"], shown["meta"], sampling, template, job.system_prompt)
    messages = [turn_of(each) for each in request.messages or ()] or None
    parts = _parts(job, request)
    prompt = "".join(text for text, _ in parts) if parts else request.prompt
    return shown | {"prompt": prompt, "prompt_parts": parts, "messages": messages}


def _stored_template(job: Row[Any]) -> Template | None:
    return stored_task(job).template if job.task_text else None


def stored_task(job: Row[Any]) -> Task:
    """The task of a job that has one, as it was stored."""
    return parse_task(job.task_text, job.task_name or "task", job.task_folder)


def _parts(job: Row[Any], request: Request) -> list[tuple[str, str]] | None:
    """The prompt with the model's chat template applied: texts, each ``text``, a ``control`` token, or one that is only
    ``spelled``. None when the job's model is not on this machine."""
    from promptmill_workers.checkpoints import fingerprint, locate
    from promptmill_workers.engines.contract import EngineRequest
    from promptmill_workers.limited_counter import token_counter

    try:
        checkpoint = locate(job.model)
        if job.model_fingerprint not in (None, fingerprint(checkpoint)):
            return None
        return token_counter(checkpoint).parts(EngineRequest.of(request))
    except PromptmillError:
        return None
