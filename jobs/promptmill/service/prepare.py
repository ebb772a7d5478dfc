"""What a job needs beside its options, found and looked at before anything is stored: model, task and dataset."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmill.core.settings import Settings
from promptmill.core.text_files import read_text
from promptmill.errors import ModelError, TaskFileError
from promptmill.readers import Dataset, open_dataset
from promptmill.service.job_options import JobOptions
from promptmill.service.preflight import PromptGauge
from promptmill.tasks.task_file import Task, load_task
from promptmill.types import Request

if TYPE_CHECKING:
    from promptmill_workers.checkpoints import Checkpoint


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that can be stored: what was asked, and what was found for it."""

    options: JobOptions
    #: ``embedded`` or ``queue``.
    mode: str
    dataset: Dataset
    task: Task | None
    #: The name by which workers know the model.
    model: str
    #: None where the model is not on this machine, or its files say nothing about those of the workers.
    fingerprint: str | None = None
    gauge: PromptGauge | None = None
    slots: int | None = None
    #: Waiting requests that the queue holds at most; None sets no limit.
    queue_limit: int | None = None
    #: The API key that the job belongs to, and the waiting requests that all jobs of that key may have.
    api_key_id: str | None = None
    key_limit: int | None = None

    @property
    def system(self) -> str | None:
        """A system message that is in no template."""
        return None if self.task else self.options.system

    @property
    def sampling(self) -> dict[str, Any]:
        """What every line is sampled with that sets nothing of its own."""
        return (dict(self.task.generate) if self.task else {}) | dict(self.options.sampling)


@contextlib.contextmanager
def prepare(options: JobOptions, settings: Settings, mode: str) -> Iterator[Prepared]:
    """Find the model, the task and the dataset. Raises PromptmillError for what cannot be used."""
    task = _task(options)
    check_scorers(task)
    name = model_name(options.model, settings)
    checkpoint, gauge = find_model(name, options.context_tokens, settings, must_be_here=mode == "embedded")
    slots = options.slots or settings.slots
    if checkpoint is not None:
        _check_engine(checkpoint, slots, settings, mode)
    with _dataset(options, task) as dataset:
        yield Prepared(
            options, mode, dataset, task, checkpoint.name if checkpoint else canonical_name(name),
            _fingerprint(checkpoint), gauge, slots, settings.max_queued_requests,
        )  # fmt: skip


def check_scorers(task: Task | None) -> None:
    """Build the scorers, of which some are files of the user's: what is wrong with them must not wait for the end."""
    if task is not None and task.scores:
        from promptmill.scoring.scorers.scoring import build

        build(task.scores, task.folder, task.said)


def _task(options: JobOptions) -> Task | None:
    if options.task is not None:
        return options.task if isinstance(options.task, Task) else load_task(options.task)
    if options.template is None:
        return None
    text = options.template
    if text.startswith("@"):
        try:
            text = read_text(text[1:])
        except (OSError, UnicodeDecodeError) as problem:
            raise TaskFileError(f"cannot read the template {text[1:]}: {problem}") from None
    return Task.from_template(text, options.system, options.expected)


def model_name(asked: str | None, settings: Settings) -> str:
    """The model that was asked for. Raises :class:`ModelError` where none was."""
    name = asked or settings.model
    if name is None:
        from promptmill_workers.checkpoints import available

        here = ", ".join(checkpoint.name for checkpoint in available())
        raise ModelError("no model was named", hint=f"Give --model or set JOBS_MODEL. At hand: {here}.")
    return name


def canonical_name(name: str) -> str:
    """The name by which workers know a model."""
    from promptmill_workers.checkpoints import canonical

    return canonical(name)


def find_model(
    name: str, context_tokens: int | None, settings: Settings, must_be_here: bool = False
) -> tuple[Checkpoint | None, PromptGauge | None]:
    """The model's files and a gauge with its tokeniser; neither where only the workers have the model."""
    from promptmill_workers.checkpoints import locate
    from promptmill_workers.engines.contract import EngineRequest
    from promptmill_workers.limited_counter import token_counter

    try:
        checkpoint = locate(name)
    except ModelError:
        if must_be_here or not _may_be_elsewhere(name):
            raise
        return None, None
    counter = token_counter(checkpoint)
    limit = context_tokens or settings.context_tokens or counter.context_tokens

    def count(request: Request) -> int:
        return counter.count(EngineRequest.of(request))

    def has_two_starts(request: Request) -> bool:
        return counter.has_two_starts(EngineRequest.of(request))

    return checkpoint, PromptGauge(count, min(limit, counter.context_tokens), counter.vocabulary, has_two_starts)


def _check_engine(checkpoint: Checkpoint, slots: int | None, settings: Settings, mode: str) -> None:
    """Raises ModelError for what the model's engine would refuse when it loads: nothing is stored then."""
    from promptmill_workers.checkpoints import check_options
    from promptmill_workers.engines.contract import EngineOptions

    # The workers of a queue keep their KV cache by settings of their own.
    kv_type = settings.kv_type if mode == "embedded" else EngineOptions().kv_type
    check_options(checkpoint, EngineOptions(slots=slots, kv_type=kv_type))


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
def _dataset(options: JobOptions, task: Task | None) -> Iterator[Dataset]:
    with contextlib.ExitStack() as stack:
        path = options.dataset
        if path is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmill-")))
            (folder / "prompt.jsonl").write_text(json.dumps({"prompt": options.prompt}), encoding="utf-8")
            path = str(folder / "prompt.jsonl")
        yield stack.enter_context(open_with(path, options.format, task))


def open_with(path: str | Path, format_: str | None, task: Task | None, name: str | None = None) -> Dataset:
    """The dataset as a task reads it; ``name``: what its file is called, if not as its path says."""
    mapping = task.mapping if task else {}
    return open_dataset(path, name=name, format=format_, has_template=task is not None, **mapping)
