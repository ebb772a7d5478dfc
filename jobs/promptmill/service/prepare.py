"""What is looked at before a job is stored: its options, model, task and dataset."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmill.core.settings import Settings, load_settings
from promptmill.core.spans import moment, span_s
from promptmill.core.text_files import read_text
from promptmill.errors import DatasetError, JobError, ModelError, TaskFileError
from promptmill.readers import Dataset, open_dataset
from promptmill.service.lint import Lint
from promptmill.service.preflight import Preflight, PromptGauge
from promptmill.service.selection import Selection
from promptmill.service.submission import JobOrder, Preparer, prepared_rows, refuse_bad
from promptmill.tasks.task_file import Task, load_task
from promptmill.tasks.templates import resolve_sampling
from promptmill.types import Request

if TYPE_CHECKING:
    from promptmill_workers.checkpoints import Checkpoint


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
    #: Fields of the dataset that hold the answers, beside ``template``: no prompt may see them.
    expected: tuple[str, ...] = ()
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
    gauge: PromptGauge | None


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
    model = checkpoint.name if checkpoint else canonical_name(model_name(options, settings))
    sampling = (dict(task.generate) if task else {}) | options.sampling
    order = JobOrder(
        model=model, mode=mode, task=task, system=None if task else options.system, sampling=sampling,
        name=options.name, priority=options.priority, selection=options.selection, max_errors=options.max_errors,
        store=options.store,
        skip_invalid=options.skip_invalid, slots=options.slots or settings.slots,
        model_fingerprint=_fingerprint(checkpoint), deadline=moment(options.deadline, "--deadline"),
        expires=moment(options.expires, "--expires"), time_limit_s=span_s(options.time_limit, "--time-limit"),
        must_expect=options.expected, if_exists=options.if_exists,
        queue_limit=settings.max_queued_requests, use_cache=options.use_cache,
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


def _check_scorers(task: Task | None) -> None:
    """Build the scorers, of which some are files of the user's: what is wrong with them must not wait for the end."""
    if task is not None and task.scores:
        from promptmill.scoring.scorers.scoring import build

        build(task.scores, task.folder)


def _task(options: RunOptions) -> Task | None:
    if options.task and (options.template or options.system):
        raise TaskFileError("--task and --template/--system exclude each other", hint="A task file holds its prompts.")
    if options.task:
        return load_task(options.task)
    if options.expected and options.template is None:
        raise TaskFileError("--expected needs --template", hint="A task file says itself what is expected.")
    if options.template is None:
        return None
    text = options.template
    if text.startswith("@"):
        try:
            text = read_text(text[1:])
        except (OSError, UnicodeDecodeError) as problem:
            raise TaskFileError(f"cannot read the template {text[1:]}: {problem}") from None
    return Task.from_template(text, options.system, options.expected)


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


def model_name(options: RunOptions, settings: Settings) -> str:
    """The model that was asked for. Raises :class:`ModelError` where none was."""
    name = options.model or settings.model
    if name is None:
        from promptmill_workers.checkpoints import available

        here = ", ".join(checkpoint.name for checkpoint in available())
        raise ModelError("no model was named", hint=f"Give --model or set JOBS_MODEL. At hand: {here}.")
    return name


def canonical_name(name: str) -> str:
    """The name by which workers know a model."""
    from promptmill_workers.checkpoints import canonical

    return canonical(name)


def gauge_of(model: str, settings: Settings) -> PromptGauge | None:
    """What measures the prompts of a job for ``model`` before it is stored, as :func:`submit` does.

    None where only the workers have the model; nothing is fetched. Raises ModelError for files that are no model.
    """
    if model.startswith("hf:"):
        return None
    return _model(RunOptions(model=model), settings, must_be_here=False)[1]


def _model(options: RunOptions, settings: Settings, must_be_here: bool) -> tuple[Checkpoint | None, PromptGauge | None]:
    """The model's files and a gauge with its tokeniser; neither where only the workers have the model."""
    from promptmill_workers.checkpoints import locate
    from promptmill_workers.engines.contract import EngineRequest
    from promptmill_workers.limited_counter import token_counter

    name = model_name(options, settings)
    try:
        checkpoint = locate(name)
    except ModelError:
        if must_be_here or not _may_be_elsewhere(name):
            raise
        return None, None
    counter = token_counter(checkpoint)
    limit = options.context_tokens or settings.context_tokens or counter.context_tokens

    def count(request: Request) -> int:
        return counter.count(EngineRequest.of(request))

    def has_two_starts(request: Request) -> bool:
        return counter.has_two_starts(EngineRequest.of(request))

    return checkpoint, PromptGauge(count, min(limit, counter.context_tokens), counter.vocabulary, has_two_starts)


def _check_engine(checkpoint: Checkpoint, options: RunOptions, settings: Settings, mode: str) -> None:
    """Raises ModelError for what the model's engine would refuse when it loads: nothing is stored then."""
    from promptmill_workers.checkpoints import check_options
    from promptmill_workers.engines.contract import EngineOptions

    # The workers of a queue keep their KV cache by settings of their own.
    kv_type = settings.kv_type if mode == "embedded" else EngineOptions().kv_type
    check_options(checkpoint, EngineOptions(slots=options.slots or settings.slots, kv_type=kv_type))


def _may_be_elsewhere(name: str) -> bool:
    """Workers on other machines may have a file that this one lacks, or fetch a repository."""
    canonical = canonical_name(name)
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
