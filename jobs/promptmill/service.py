"""What the command line, and programs, call: run, submit, resume, cancel, and the pieces they share."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine, Row
from sqlalchemy.exc import SQLAlchemyError

from promptmill import catalog
from promptmill.dataset_lint import Lint
from promptmill.errors import (
    BrokerError,
    DatabaseError,
    DatasetError,
    JobError,
    JobExists,
    ModelError,
    PromptmillError,
    TaskFileError,
)
from promptmill.ledger import Ledger, Progress
from promptmill.preflight import Gauge, Preflight
from promptmill.prompts import Template, resolve_sampling, to_request, turn_of
from promptmill.readers import Dataset, open_dataset
from promptmill.registry import suggestion
from promptmill.selection import Selection
from promptmill.settings import Settings, load_settings
from promptmill.submission import JobOrder, Preparer, prepared_rows, refuse_bad
from promptmill.submission import submit as store
from promptmill.task_file import Task, load_task, parse_task
from promptmill.times import moment, span_s
from promptmill.types import ErrorClass, JobState, Request

if TYPE_CHECKING:
    from promptmill_workers.checkpoints import Checkpoint
    from promptmill_workers.devices import Device

log = logging.getLogger("promptmill.service")

#: Called while a job runs.
OnProgress = Callable[[Progress], None]

#: Told in a sentence or two what did not go well and was no error.
OnWarning = Callable[[str], None]

#: Called once, before any device is used.
OnPreflight = Callable[[Preflight | None], None]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What ``run`` and ``submit`` are given. Paths may be ``-`` for standard input."""

    dataset: str | None = None
    #: One prompt instead of a dataset.
    prompt: str | None = None
    model: str | None = None
    task: str | None = None
    #: Text of a template, or ``@FILE``.
    template: str | None = None
    system: str | None = None
    #: Sampling parameters by the names of SamplingParams.
    sampling: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    name: str | None = None
    priority: int = 5
    selection: Selection = field(default_factory=Selection)
    slots: int | None = None
    context_tokens: int | None = None
    device: str = "auto"
    max_errors: str | None = None
    #: What stays of prompts and answers once the job has ended: 'full', 'hash' or 'none'.
    store: str = "full"
    skip_invalid: bool = False
    #: A span such as 2h30m, or a time such as 2026-12-24T18:00.
    deadline: str | None = None
    expires: str | None = None
    time_limit: str | None = None
    #: 'new', 'attach' or 'fail', for a job that asks the same as an earlier one.
    if_exists: str = "new"
    #: Take greedy answers that other jobs had, and keep those of this one.
    use_cache: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that could be looked at before the dataset is read."""

    dataset: Dataset
    order: JobOrder
    checkpoint: Checkpoint | None
    gauge: Gauge | None


def ledger_of(db: Engine, settings: Settings) -> Ledger:
    return Ledger(db, lease_s=settings.lease_s, max_attempts=settings.max_attempts)


# --- before a device is used -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def prepare(options: RunOptions, settings: Settings, mode: str) -> Iterator[Prepared]:
    """Find the model, the task and the dataset. Raises PromptmillError for what cannot be used."""
    task = _task(options)
    _check_scorers(task)
    check_max_errors(options.max_errors)
    check_name(options.name)
    checkpoint, gauge = _model(options, settings, must_be_here=mode == "embedded")
    if checkpoint is not None:
        _check_engine(checkpoint, options, settings, mode)
    model = checkpoint.name if checkpoint else _canonical(_model_name(options, settings))
    sampling = (dict(task.generate) if task else {}) | options.sampling
    order = JobOrder(
        model=model, mode=mode, task=task, system=None if task else options.system, sampling=sampling,
        name=options.name, priority=options.priority, selection=options.selection, max_errors=options.max_errors,
        store=options.store,
        skip_invalid=options.skip_invalid, slots=options.slots or settings.slots,
        model_fingerprint=_fingerprint(checkpoint), deadline_at=moment(options.deadline, "--deadline"),
        expires_at=moment(options.expires, "--expires"), time_limit_s=span_s(options.time_limit, "--time-limit"),
        if_exists=options.if_exists, queue_limit=settings.max_queued_requests, use_cache=options.use_cache,
    )  # fmt: skip
    with _dataset(options, task) as dataset:
        yield Prepared(dataset, order, checkpoint, gauge)


def dry_run(options: RunOptions, settings: Settings, mode: str) -> Preflight | None:
    """Read and check everything, store nothing. None when the model is not on this machine."""
    with prepare(options, settings, mode) as prepared:
        preparer = Preparer(prepared.order, prepared.gauge)
        rows = sum(1 for _ in prepared_rows(prepared.dataset, prepared.order, preparer))
        refuse_bad(prepared.dataset, preparer.tally, options.skip_invalid, rows)
        return prepared.gauge.findings() if prepared.gauge else None


def validate_dataset(
    path: str, task_path: str | None, format_: str | None, model: str | None = None, settings: Settings | None = None
) -> dict[str, Any]:
    """Read every line as a job would, and look for what would spoil its scores.

    With ``model``, prompts are measured with its tokeniser. Raises BadLines and its kin for what a job would refuse.
    """
    task = load_task(task_path) if task_path else None
    _check_scorers(task)
    gauge = None
    if model is not None:
        gauge = _model(RunOptions(model=model), settings or load_settings(), must_be_here=True)[1]
    order = JobOrder(model="none", mode="embedded", task=task, sampling=dict(task.generate) if task else {})
    mapping = task.mapping if task else {}
    with open_dataset(path, format=format_, has_template=task is not None, **mapping) as dataset:
        preparer = Preparer(order, gauge)
        lint = Lint(task, resolve_sampling(order.sampling, {}).max_tokens, gauge.tokens_of if gauge else None)
        rows = 0
        for row in prepared_rows(dataset, order, preparer):
            lint.add(row.custom_id, row.input, row.expected)
            rows += 1
        refuse_bad(dataset, preparer.tally, False, rows, submitting=False)
        return {
            "name": dataset.name, "format": dataset.format, "sha256": dataset.sha256, "rows": rows,
            **lint.findings(), "tokens": gauge.findings().to_json() if gauge else None,
        }  # fmt: skip


def score_again(
    reference: str,
    task_path: str | None,
    db: Engine,
    by: str | None = None,
    on_rows: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Append a score run to a job, by its own task or by another one, and judge that task's gates."""
    from promptmill.gates import judge
    from promptmill.reports.summary import summarise
    from promptmill.score_runs import append_score_run

    job = catalog.find_job(db, reference)
    if task_path is None and job.task_text is None:
        raise JobError(f"job {job.id} has no task", hint="Give --task FILE.")
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


def forget(db: Engine, job_id: str, how: str) -> None:
    """Keep the job's figures and scores, and of its prompts and answers their hashes ('hash') or nothing ('none')."""
    from promptmill.privacy import DONE, redact
    from promptmill.score_runs import append_score_run
    from promptmill.scorers.scoring import Judge

    job = catalog.find_job(db, job_id)
    if job.store in DONE.values():
        return
    if job.task_text is not None:
        task = parse_task(job.task_text, job.task_name or "task", job.task_folder)
        if Judge(task).scorers:
            append_score_run(db, job, task)
    redact(db, job_id, how)


def _check_scorers(task: Task | None) -> None:
    """Build the scorers, of which some are files of the user's: what is wrong with them must not wait for the end."""
    if task is not None and task.scores:
        from promptmill.scorers.scoring import build

        build(task.scores, task.folder)


def _task(options: RunOptions) -> Task | None:
    if options.task and (options.template or options.system):
        raise TaskFileError("--task and --template/--system exclude each other", hint="A task file holds its prompts.")
    if options.task:
        return load_task(options.task)
    if options.template is None:
        return None
    text = options.template
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise TaskFileError(f"cannot read the template {text[1:]}: {problem}") from None
    return Task.from_template(text, options.system)


def check_max_errors(spec: str | None) -> None:
    if spec is not None and not (
        re.fullmatch(r"\d+", spec) or (re.fullmatch(r"\d+(\.\d+)?%", spec) and float(spec[:-1]) <= 100)
    ):
        raise JobError(f"--max-errors {spec} is neither a number nor a share", hint="Examples: 10, 2.5%.")


def check_name(name: str | None) -> None:
    """A name must never be taken for an id or for a reference such as @last. Two jobs may share one."""
    if name is None:
        return
    is_id = re.fullmatch(r"[0-9A-Za-z]{26}", name)
    if is_id or name.startswith("@") or name != name.strip() or not name.isprintable() or not 0 < len(name) <= 100:
        raise JobError(
            f"--name {name[:100]!r} cannot name a job",
            hint="Up to 100 printable characters, not beginning with @, and not of the form of a job's id.",
        )


def _model_name(options: RunOptions, settings: Settings) -> str:
    name = options.model or settings.model
    if name is None:
        from promptmill_workers.checkpoints import available

        here = ", ".join(checkpoint.name for checkpoint in available())
        raise ModelError("no model was named", hint=f"Give --model or set JOBS_MODEL. At hand: {here}.")
    return name


def _canonical(name: str) -> str:
    from promptmill_workers.checkpoints import canonical

    return canonical(name)


def gauge_of(model: str, settings: Settings) -> Gauge | None:
    """What measures the prompts of a job for ``model`` before it is stored, as :func:`submit` does.

    None where only the workers have the model; nothing is fetched. Raises ModelError for files that are no model.
    """
    if model.startswith("hf:"):
        return None
    return _model(RunOptions(model=model), settings, must_be_here=False)[1]


def _model(options: RunOptions, settings: Settings, must_be_here: bool) -> tuple[Checkpoint | None, Gauge | None]:
    """The model's files and a gauge with its tokeniser; neither where only the workers have the model."""
    from promptmill_workers.checkpoints import locate, token_counter
    from promptmill_workers.engines.contract import EngineRequest

    name = _model_name(options, settings)
    try:
        checkpoint = locate(name)
    except ModelError:
        if must_be_here or not _may_be_elsewhere(name):
            raise
        return None, None
    with _interrupts_later():
        counter = token_counter(checkpoint)
    limit = options.context_tokens or settings.context_tokens or counter.context_tokens

    def count(request: Request) -> int:
        return counter.count(EngineRequest(request.row, request.sampling, request.messages, request.prompt))

    return checkpoint, Gauge(count, min(limit, counter.context_tokens), counter.vocabulary)


def _check_engine(checkpoint: Checkpoint, options: RunOptions, settings: Settings, mode: str) -> None:
    """Raises ModelError for what the model's engine would refuse when it loads: nothing is stored then."""
    from promptmill_workers.checkpoints import check_options
    from promptmill_workers.engines.contract import EngineOptions

    # The workers of a queue keep their KV cache by settings of their own.
    kv_type = settings.kv_type if mode == "embedded" else EngineOptions().kv_type
    check_options(checkpoint, EngineOptions(slots=options.slots or settings.slots, kv_type=kv_type))


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Let Ctrl-C count after this: a KeyboardInterrupt inside a library's callback into Python is swallowed there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


def _may_be_elsewhere(name: str) -> bool:
    """Workers on other machines may have a file that this one lacks, or fetch a repository."""
    canonical = _canonical(name)
    return canonical.startswith(("hf:", "/")) and not Path(canonical).exists()


def _fingerprint(checkpoint: Checkpoint | None) -> str | None:
    if checkpoint is None:
        return None
    from promptmill_workers.checkpoints import fingerprint

    return fingerprint(checkpoint)


@contextlib.contextmanager
def _dataset(options: RunOptions, task: Task | None) -> Iterator[Dataset]:
    if (options.dataset is None) == (options.prompt is None):
        raise DatasetError("give a dataset or -p TEXT, and only one of them", hint="promptmill run --help")
    with contextlib.ExitStack() as stack:
        path = options.dataset
        if path is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmill-")))
            (folder / "prompt.jsonl").write_text(json.dumps({"prompt": options.prompt}), encoding="utf-8")
            path = str(folder / "prompt.jsonl")
        mapping = task.mapping if task else {}
        yield stack.enter_context(open_dataset(path, format=options.format, has_template=task is not None, **mapping))


# --- running and submitting ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command that ran a job ended."""

    job_id: str
    state: JobState
    #: False when Ctrl-C stopped it before its end.
    finished: bool = True


def run(
    options: RunOptions,
    settings: Settings,
    db: Engine,
    on_progress: OnProgress = lambda progress: None,
    on_preflight: OnPreflight = lambda findings: None,
    on_stored: Callable[[str], None] = lambda job_id: None,
    on_loaded: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Store the job and run it in this process; returns when it has ended or was interrupted.

    ``on_loaded`` is told in a sentence which engine was chosen, why, and what it set up.
    """
    device = _one_device(options.device, options, settings)
    # The device first: a job that cannot run now is not stored either.
    with _holding(device):
        with prepare(options, settings, "embedded") as prepared:
            try:
                job_id = _store(prepared, db)
            except JobExists as twin:
                if options.if_exists != "attach":
                    raise
                return _go_on_with(twin.job_id, settings, db, device, on_progress)

        def started() -> None:
            on_stored(job_id)
            on_preflight(prepared.gauge.findings() if prepared.gauge else None)

        with _owning(job_id):
            return _run_embedded(job_id, settings, db, device, on_progress, options.context_tokens, started, on_loaded)


def resume(
    reference: str,
    settings: Settings,
    db: Engine,
    device: str = "auto",
    on_progress: OnProgress = lambda progress: None,
    warn: OnWarning = log.warning,
) -> Outcome:
    """Go on with an interrupted job. An embedded one is run here; one of the queue is handed to the workers."""
    job = catalog.find_job(db, reference)
    ledger = ledger_of(db, settings)
    if job.mode == "queue":
        ledger.resume(job.id)
        dispatch(job, settings, db, warn)
        return _handed_over(job.id, ledger)
    chosen = _one_device(device, RunOptions(model=job.model), settings)
    with _holding(chosen):
        return _go_on_here(job.id, settings, db, chosen, on_progress)


def _handed_over(job_id: str, ledger: Ledger) -> Outcome:
    """Of a job that the workers go on with; few rows may be done before one looks."""
    state = ledger.progress(job_id).state
    return Outcome(job_id, state, finished=state.is_final)


def _go_on_with(job_id: str, settings: Settings, db: Engine, device: Device, on_progress: OnProgress) -> Outcome:
    """The twin of a job: what it has when it has ended, else the rest of it. The caller holds the device."""
    job = catalog.find_job(db, job_id)
    if JobState(job.state).is_final:
        return Outcome(job_id, JobState(job.state))
    if job.mode == "queue":
        raise JobError(f"job {job_id} asks the same and is {job.state} in the queue", hint="Use: promptmill watch")
    return _go_on_here(job_id, settings, db, device, on_progress)


def _go_on_here(job_id: str, settings: Settings, db: Engine, device: Device, on_progress: OnProgress) -> Outcome:
    ledger = ledger_of(db, settings)
    with _owning(job_id):
        ledger.resume(job_id)
        ledger.abandon_leases(job_id)
        return _run_embedded(job_id, settings, db, device, on_progress, None)


def submit(
    options: RunOptions,
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
            job_id = _store(prepared, db)
        except JobExists as twin:
            if options.if_exists != "attach":
                raise
            return twin.job_id
    on_preflight(prepared.gauge.findings() if prepared.gauge else None)
    dispatch(catalog.find_job(db, job_id), settings, db, warn)
    return job_id


def dispatch(job: Row[Any], settings: Settings, db: Engine, warn: OnWarning = log.warning) -> None:
    """Publish the job's first chunks. ``warn`` is told when Redis is away: the workers publish them later then."""
    from promptmill.broker import Broker
    from promptmill.dispatch import Dispatcher

    try:
        Dispatcher(ledger_of(db, settings), Broker(settings.redis_url)).dispatch(job.id, job.model, job.priority)
    except BrokerError as problem:
        # What was asked for is done: the ledger has the job, and any worker publishes it.
        warn(
            f"{problem.message}. Job {job.id} is stored, and nothing of it is lost: the workers publish it as soon as "
            f"Redis is back. {problem.hint or ''}".rstrip()
        )


def _store(prepared: Prepared, db: Engine) -> str:
    return store(db, prepared.dataset, prepared.order, prepared.gauge)


def _one_device(asked: str, options: RunOptions, settings: Settings) -> Device:
    """The device of an embedded job. Raises DeviceError."""
    from promptmill_workers.checkpoints import engine_of
    from promptmill_workers.devices import parse_devices, require_offload, usable

    engine = engine_of(_canonical(_model_name(options, settings)))
    if asked == "auto":
        return usable(parse_devices("auto")[:1], engine)[0]
    device = parse_devices(asked)[0]
    require_offload(device, engine)
    return device


def _run_embedded(
    job_id: str,
    settings: Settings,
    db: Engine,
    device: Device,
    on_progress: OnProgress,
    context_tokens: int | None,
    started: Callable[[], None] = lambda: None,
    on_loaded: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run the job here. However this ends before the job does, the job is paused and the person told how to go on."""
    ledger = ledger_of(db, settings)
    try:
        started()
        return _run_here(job_id, settings, db, device, on_progress, context_tokens, on_loaded)
    except KeyboardInterrupt:
        return Outcome(job_id, JobState.PAUSED, finished=False)
    except PromptmillError as problem:
        # Where the database itself is the trouble nothing can be paused, and resume works from 'running' too.
        paused = None
        with contextlib.suppress(SQLAlchemyError, DatabaseError):
            paused = ledger.pause(job_id)
        if paused is not False:
            state = "The job is paused" if paused else "What was done is kept"
            problem.hint = f"{state}; go on with: promptmill resume {job_id}. {problem.hint or ''}".rstrip()
        raise
    finally:
        with contextlib.suppress(SQLAlchemyError, DatabaseError):
            ledger.pause(job_id)


def _run_here(
    job_id: str,
    settings: Settings,
    db: Engine,
    device: Device,
    on_progress: OnProgress,
    context_tokens: int | None,
    on_loaded: Callable[[str], None],
) -> Outcome:
    from promptmill_workers.checkpoints import locate
    from promptmill_workers.embedded import EmbeddedWorker
    from promptmill_workers.host import HostConfig

    ledger = ledger_of(db, settings)
    job = catalog.find_job(db, job_id)
    if JobState(job.state).is_final:
        return Outcome(job_id, JobState(job.state))
    config = HostConfig.of(
        settings, job.model, device, slots=job.slots or settings.slots,
        context_tokens=context_tokens or settings.context_tokens,
    )  # fmt: skip
    with EmbeddedWorker(ledger, config, settings.grace_s) as worker:
        try:
            info = worker.load(job.context_tokens)
            on_loaded(
                f"{info.engine} {info.version} ({locate(job.model).why}) on {info.device_got}: {info.slots} slots, "
                f"context {info.context_tokens:,}, {info.kv_cells:,} KV cells"
            )
        except PromptmillError as problem:
            ledger.stop(job_id, problem.message)
            raise
        finished = worker.run(job_id, on_progress)
    return Outcome(job_id, ledger.progress(job_id).state, finished)


@contextlib.contextmanager
def _holding(device: Device) -> Iterator[None]:
    """Keep workers off a GPU that is in use. CPUs may be shared: the operating system divides them."""
    from promptmill_workers.devices import DeviceLock

    if device.engine_device == "cpu":
        yield
        return
    lock = DeviceLock(device)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _owning(job_id: str) -> Iterator[None]:
    """Keep a second process from running the same embedded job. The kernel frees the lock of a dead one."""
    from promptmill_workers.devices import FileLock

    lock = FileLock(f"job-{job_id}")
    owner = lock.acquire()
    if owner is not None:
        raise JobError(f"job {job_id} is being run by process {owner}", hint="Wait for it, or stop it first.")
    try:
        yield
    finally:
        lock.release()


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
) -> tuple[int, Outcome]:
    """Run the errors of an ended job again, here or by the workers as it ran before. Returns how many there were."""
    job = catalog.find_job(db, reference)
    only, ledger = _error_class(error_class), ledger_of(db, settings)
    if job.mode == "queue":
        if (rows := ledger.retry(job.id, only)) == 0:
            return 0, Outcome(job.id, JobState(job.state))
        dispatch(job, settings, db, warn)
        return rows, _handed_over(job.id, ledger)
    chosen = _one_device(device, RunOptions(model=job.model), settings)
    # The locks first: a job that cannot run now is not opened again either.
    with _holding(chosen), _owning(job.id):
        if (rows := ledger.retry(job.id, only)) == 0:
            return 0, Outcome(job.id, JobState(job.state))
        return rows, _run_embedded(job.id, settings, db, chosen, on_progress, None)


def _error_class(name: str | None) -> ErrorClass | None:
    if name is None:
        return None
    try:
        return ErrorClass(name)
    except ValueError:
        raise JobError(f"there is no error class '{name}'", hint=suggestion(name, list(ErrorClass))) from None


def reconcile(settings: Settings, db: Engine) -> tuple[int, int]:
    """Take back chunks without a live lease and publish what has no message; returns how many of each.

    Every worker does this all the time; it helps where none is alive, or where one wants to see it done.
    """
    from promptmill.broker import Broker
    from promptmill.dispatch import Dispatcher

    ledger = ledger_of(db, settings)
    taken_back = len(ledger.requeue_expired())
    return taken_back, Dispatcher(ledger, Broker(settings.redis_url)).reconcile()


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
        return shown | {"prompt": None, "messages": None}
    template = _stored_template(job)
    # With its parameters: a reasoning that is asked for is opened in the prompt.
    sampling = resolve_sampling(json.loads(job.sampling), shown["sampling"])
    request = to_request(row, shown["id"], shown["input"], shown["meta"], sampling, template, job.system_prompt)
    messages = [turn_of(each) for each in request.messages or ()] or None
    return shown | {"prompt": _rendered(job.model, request), "messages": messages}


def _stored_template(job: Row[Any]) -> Template | None:
    return stored_task(job).template if job.task_text else None


def stored_task(job: Row[Any]) -> Task:
    """The task of a job that has one, as it was stored."""
    return parse_task(job.task_text, job.task_name or "task", job.task_folder)


def _rendered(model: str, request: Request) -> str | None:
    """The prompt with the model's chat template applied; None when the model is not on this machine."""
    from promptmill_workers.checkpoints import locate, token_counter
    from promptmill_workers.engines.contract import EngineRequest

    if request.prompt is not None:
        return request.prompt
    try:
        counter = token_counter(locate(model))
        return counter.render(EngineRequest(request.row, request.sampling, request.messages, request.prompt))
    except PromptmillError:
        return None
