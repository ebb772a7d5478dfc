"""``sweep``: one dataset under several settings, run in turns so that a drift of the machine meets all alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from sqlalchemy.engine import Engine, Row

from promptmill.core.registry import suggestion
from promptmill.core.settings import Settings
from promptmill.errors import PromptmillError, UnknownName
from promptmill.readers.stdin import readable_again
from promptmill.reports.compare.sweep import ENGINE, Setting, Sweep
from promptmill.reports.figures.summary import Summary, summarise
from promptmill.service.job_options import JobOptions
from promptmill.service.local_run import run
from promptmill.service.prepare import prepare
from promptmill.service.submission import job_columns
from promptmill.store.tags import add_tags, checked, set_engine_settings, tagged

if TYPE_CHECKING:
    from promptmill.ledger import Progress

#: Names that people know settings by.
ALIASES = {"n_batch": "batch_tokens", "n_threads": "threads", "n_ctx": "context_tokens"}

#: Most runs of one sweep: a typing error must not take a week.
MOST_RUNS = 1000

#: Columns of a job by which it is the same work as another, beside what was swept.
WORK = (
    "dataset_sha256", "selection", "model", "model_fingerprint", "task_sha256", "system_prompt", "sampling",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of a sweep. ``axes``: setting -> its values, ``model`` and ``slots`` among them."""

    options: JobOptions
    axes: Mapping[str, Sequence[Any]]
    repeat_runs: int
    tag: str

    def combinations(self) -> list[dict[str, Any]]:
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]

    def order(self) -> Iterator[tuple[int, int]]:
        """(run, place of the combination): there and back again, so that no setting is always the first."""
        places = list(range(len(self.combinations())))
        for turn in range(self.repeat_runs):
            yield from ((turn, place) for place in (places if turn % 2 == 0 else places[::-1]))


def axis(text: str) -> tuple[str, list[Any]]:
    """``NAME=V1,V2`` with values as JSON where they are JSON. Raises PromptmillError."""
    from promptmill.tasks.sampling import PARAMETERS

    name, equals, values = text.partition("=")
    name = ALIASES.get(name.strip(), name.strip())
    parsed = [_value(each) for each in values.split(",") if each.strip()]
    if not equals or not parsed:
        raise PromptmillError(f"--set {text}: not NAME=VALUE,VALUE", hint="For instance --set n_batch=256,512.")
    if name not in ENGINE and name not in PARAMETERS:
        known = (*ENGINE, *ALIASES, *PARAMETERS)
        raise PromptmillError(f"--set {text}: there is no setting '{name}'", hint=suggestion(name, known))
    return name, list(dict.fromkeys(parsed))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def sweep(
    plan: Plan,
    settings: Settings,
    db: Engine,
    on_run: Callable[[int, int, str], None] = lambda number, total, label: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Sweep, bool]:
    """Run what is missing of the plan; False when Ctrl-C stopped it. Completed runs of the tag count.

    Raises PromptmillError before anything is run for what cannot be run at all, and for a tag of other work.
    """
    combinations = plan.combinations()
    if len(combinations) * plan.repeat_runs > MOST_RUNS:
        raise PromptmillError(
            f"{len(combinations)} settings times {plan.repeat_runs} are more than {MOST_RUNS:,} runs",
            hint="Give fewer values, or sweep one setting after the other.",
        )
    checked(plan.tag)
    chosen = [_chosen(plan, settings, values) for values in combinations]
    known = [_completed(db, plan, values) for values in combinations]
    done: list[list[str]] = [[job.id for job in jobs] for jobs in known]
    failures: list[list[str]] = [[] for _ in combinations]
    finished = True
    with readable_again(plan.options.dataset) as dataset:
        chosen = [(options.changed(dataset=dataset, name=None), own) for options, own in chosen]
        _refuse_other_work(plan, chosen, known)
        for number, (turn, place) in enumerate(plan.order(), 1):
            if len(done[place]) > turn:
                continue
            label = Setting(combinations[place], ()).label
            on_run(number, len(combinations) * plan.repeat_runs, label)
            options, own = chosen[place]
            try:
                outcome = run(options, own, db, on_progress)
            except PromptmillError as problem:
                failures[place].append(problem.message)
                continue
            add_tags(db, outcome.job_id, [plan.tag])
            set_engine_settings(db, outcome.job_id, combinations[place])
            if not outcome.finished:
                finished = False
                break
            done[place].append(outcome.job_id)
    if not any(done) and any(failures):
        raise PromptmillError(f"no setting could be run: {next(each[0] for each in failures if each)}")
    return Sweep(plan.tag, _settings(db, combinations, done, failures)), finished


def _settings(
    db: Engine, combinations: list[dict[str, Any]], done: list[list[str]], failures: list[list[str]]
) -> tuple[Setting, ...]:
    """Each combination with the summaries of its jobs, from their rows."""
    found = []
    for values, ids, messages in zip(combinations, done, failures, strict=True):
        runs: list[Summary] = [summarise(db, job_id) for job_id in ids]
        found.append(Setting(values, tuple(runs), tuple(messages)))
    return tuple(found)


def _chosen(plan: Plan, settings: Settings, values: Mapping[str, Any]) -> tuple[JobOptions, Settings]:
    """Options and settings of one combination. Raises PromptmillError for a value that is none."""
    engine = {name: value for name, value in values.items() if name in ENGINE}
    sampling = {name: value for name, value in values.items() if name not in (*ENGINE, "model", "slots")}
    try:
        own = Settings(**(settings.model_dump() | engine))
    except ValidationError as problem:
        first = problem.errors()[0]
        raise PromptmillError(f"--set {first['loc'][0]}={first['input']}: {first['msg']}") from None
    options = plan.options.changed(
        model=values.get("model", plan.options.model),
        slots=values.get("slots", plan.options.slots),
        sampling=dict(plan.options.sampling) | sampling,
    )
    return options, own


def _completed(db: Engine, plan: Plan, values: Mapping[str, Any]) -> list[Row[Any]]:
    """Jobs of the tag that ran this combination to the end: a sweep that was stopped goes on."""
    try:
        known: list[Row[Any]] = tagged(db, plan.tag)
    except UnknownName:
        return []
    wanted = json.dumps(dict(values), sort_keys=True)
    return [job for job in known if job.engine_settings == wanted and job.state == "completed"]


def _refuse_other_work(
    plan: Plan, chosen: Sequence[tuple[JobOptions, Settings]], known: Sequence[Sequence[Row[Any]]]
) -> None:
    """Raises PromptmillError for jobs of the tag that did other work: their figures are no answer to this plan."""
    asked: dict[Any, dict[str, Any]] = {}
    for (options, settings), jobs in zip(chosen, known, strict=True):
        for job in jobs:
            # A model's files and its tokeniser are looked at once, however many combinations have it.
            if options.model not in asked:
                with prepare(options, settings, "embedded") as prepared:
                    asked[options.model] = _work(job_columns(prepared), plan)
            found = _work(job._asdict(), plan)
            differing = [name for name in WORK if found[name] != asked[options.model][name]]
            if differing:
                raise PromptmillError(
                    f"tag '{plan.tag}' holds runs of other work (job {job.id}: {', '.join(differing)} differs)",
                    hint="Take another --tag.",
                )


def _work(job: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The columns WORK of a job; of its sampling what is not swept."""
    sampling = {name: value for name, value in json.loads(job["sampling"]).items() if name not in plan.axes}
    return {name: job[name] for name in WORK} | {"sampling": sampling}
