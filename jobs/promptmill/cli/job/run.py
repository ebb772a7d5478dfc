"""``run`` and ``resume``: jobs in this process; and the options that ``submit`` has too."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from promptmill.cli.common import (
    OptionsCommand,
    check_outputs,
    force_option,
    json_option,
    open_all,
    print_json,
    stderr_console,
)
from promptmill.cli.job.ending import end, forget_texts
from promptmill.cli.job.messages import report_dry_run, show_numbered, show_preflight, show_warning
from promptmill.core.terminal import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from promptmill.service.job_options import JobOptions

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of ``run`` and ``submit``, called as the fields of JobOptions or the parameters that they set."""
    options: list[Decorator] = [
        click.argument("dataset", required=False),
        click.option("-p", "--prompt", help="One prompt instead of a dataset."),
        click.option("-m", "--model", help="GGUF file, MLX folder, demo, or hf:owner/repo[:file].  [env: JOBS_MODEL]"),
        click.option("--task", type=click.Path(), help="Task file (YAML): prompts, sampling, scores."),
        click.option("--template", help="Jinja2 template of the user's message, or @FILE."),
        click.option("--system", help="System message."),
        click.option(
            "--expected", multiple=True, help="Field that holds the answer, beside --template; may be repeated."
        ),
        click.option("--format", help="Format of the dataset where its name does not tell."),
        click.option("--max-tokens", type=click.IntRange(1), help="Most tokens of an answer.  [default: 256]"),
        click.option("--temperature", type=float, help="0 is greedy.  [default: 0]"),
        click.option("--top-k", type=click.IntRange(0), help="Keep the k likeliest tokens; 0 keeps all."),
        click.option("--top-p", type=float, help="Keep the likeliest tokens of this summed probability."),
        click.option("--min-p", type=float, help="Drop tokens less likely than this share of the likeliest."),
        click.option("--seed", type=int, help="Seed of each request's random stream."),
        click.option("--stop", multiple=True, help="End an answer before this text; may be repeated."),
        click.option("--timeout", "timeout_s", type=float, help="Seconds a request may run."),
        click.option("--ignore-eos", is_flag=True, default=None, help="Do not stop at end tokens (benchmarks)."),
        click.option(
            "--schema", "json_schema", type=click.Path(), help="JSON schema that every answer keeps to: a file, or -."
        ),
        click.option("--regex", help="Regular expression that every answer matches as a whole."),
        click.option("--choice", "choices", multiple=True, help="One of the possible answers; may be repeated."),
        click.option("--thinking", help="Reasoning: on, off, or a budget in tokens.  [default: the model's]"),
        click.option("-n", "n", type=click.IntRange(1), help="Answers to each prompt.  [default: 1]"),
        click.option("--param", multiple=True, help="Any sampling parameter: NAME=VALUE, such as logprobs=true."),
        click.option("--where", multiple=True, help="Take lines with FIELD=VALUE only; may be repeated."),
        click.option("--sample", type=click.IntRange(1), help="Draw N of the lines."),
        click.option("--shuffle", is_flag=True, help="Take the lines in random order."),
        click.option("--selection-seed", type=int, default=0, help="Seed of --sample and --shuffle.  [default: 0]"),
        click.option("--limit", type=click.IntRange(1), help="Take the first N lines only."),
        click.option("--repeat", type=click.IntRange(1), default=1, help="Ask each line N times.  [default: 1]"),
        click.option(
            "--repeat-runs",
            type=click.IntRange(1, 100),
            default=1,
            help="Run the whole job N times: 'compare' needs three to judge a speed.  [default: 1]",
        ),
        click.option("--slots", type=click.IntRange(1), help="Sequences decoded together.  [env: JOBS_SLOTS]"),
        click.option("--name", help="A name for the job."),
        click.option("--max-errors", help="Stop when more rows fail: N or x%.  [default: the first 50 all fail]"),
        click.option("--skip-invalid", is_flag=True, help="Record bad lines as errors and run the rest."),
        click.option("--deadline", help="End the job then: 2h30m from now, or a time such as 2026-12-24T18:00."),
        click.option("--time-limit", help="End the job when it has run so long, such as 45m."),
        click.option(
            "--if-exists",
            type=click.Choice(["new", "attach", "fail"]),
            help="When a job that asks the same is there.  [default: new; on a terminal 'submit' asks]",
        ),
        click.option(
            "--cache",
            "use_cache",
            is_flag=True,
            help="Take greedy answers that other jobs had, and keep those of this one.",
        ),
        click.option(
            "--store",
            type=click.Choice(["full", "hash", "none"]),
            default="full",
            show_default=True,
            help="What stays of prompts and answers when the job has ended.",
        ),
        click.option("--junit", type=click.Path(), help="Write the task's gates there as JUnit XML."),
        force_option,
        click.option("--dry-run", is_flag=True, help="Check everything, measure the prompts, store nothing."),
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def options_of(values: dict[str, Any]) -> JobOptions:
    """The options of :func:`job_options` as one value. Raises PromptmillError that names the option."""
    from promptmill.service.job_options import JobOptions
    from promptmill.service.selection import Selection, parse_where

    given = {name: values.get(name) for name in JobOptions.model_fields}
    selection = Selection(
        where=parse_where(values["where"]), shuffle=values["shuffle"], sample=values["sample"], limit=values["limit"],
        repeat=values["repeat"], seed=values["selection_seed"],
    )  # fmt: skip
    return JobOptions.of(given | {"sampling": _sampling(values), "selection": selection})


@contextmanager
def repeated_runs(options: JobOptions, count: int) -> Iterator[list[JobOptions]]:
    """The options of each of ``count`` runs of one job. Raises BadOption where they would be no runs."""
    from promptmill.errors import BadOption
    from promptmill.readers.stdin import readable_again

    if count == 1:
        yield [options]
        return
    if options.if_exists in ("attach", "fail"):
        raise BadOption("--repeat-runs makes jobs that ask the same: leave out --if-exists", option="if_exists")
    if options.use_cache:
        raise BadOption("--repeat-runs measures an engine: leave out --cache", option="use_cache")
    with readable_again(options.dataset) as dataset:
        yield [options.changed(dataset=dataset, if_exists="new")] * count


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    from promptmill.errors import BadOption
    from promptmill.tasks.sampling import PARAMETERS

    found = {name: values[name] for name in PARAMETERS if values.get(name) not in (None, ())}
    if found.get("json_schema"):
        found["json_schema"] = _schema_text(found["json_schema"])
    for name, value in map(_parameter, values["param"]):
        if name in found:
            raise BadOption(f"--param {name} says again what '{name}' says: give one of them", option=name)
        found[name] = value
    return found


def _schema_text(path: str) -> str:
    """The text of a schema file. Raises PromptmillError."""
    from promptmill.core.text_files import read_text, without_marks
    from promptmill.errors import RequestError

    try:
        return without_marks(sys.stdin.read()) if path == "-" else read_text(path)
    except (OSError, UnicodeDecodeError) as problem:
        raise RequestError(f"--schema {path}: {getattr(problem, 'strerror', None) or 'not UTF-8'}") from None


def _parameter(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; the value as JSON where it is JSON, else as text. Raises PromptmillError."""
    from promptmill.errors import RequestError

    name, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--param {text}: not NAME=VALUE", hint="For instance --param repetition_penalty=1.1.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def job_inputs(values: dict[str, Any]) -> list[str]:
    """The files that ``run``, ``submit`` and ``sweep`` read by their options, and those that the task file names."""
    found = [values["dataset"], values["task"], values.get("json_schema"), *(values["model"] or "").split(",")]
    if (template := values["template"] or "").startswith("@"):
        found.append(template[1:])
    if values["task"] and os.path.isfile(values["task"]):
        folder, text = os.path.split(values["task"])[0], Path(values["task"]).read_bytes().decode(errors="replace")
        # Whatever is named like a file is one: scorers, few-shot examples.
        found += [path for word in re.findall(r"[\w./-]+", text) if os.path.isfile(path := os.path.join(folder, word))]
    return [each for each in found if each]


@click.command(
    cls=OptionsCommand,
    epilog="""\b
Examples:
  promptmill run prompts.txt --model demo
  promptmill run comments.jsonl --model model.gguf --task ads.task.yaml -o results.jsonl
  promptmill run -p "Is this an advertisement?" --model hf:owner/repo:file.gguf
""",
)
@job_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cpu:0-3, cuda:0 or metal.")
@click.option(
    "--context",
    "context_tokens",
    type=click.IntRange(16),
    help="Most tokens of a request.  [default: what the job needs, and 4096]",
)
@click.option("-o", "--output", type=click.Path(), help="Write the results here: .jsonl or .csv; - is stdout.")
def run(output: str | None, force: bool, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Run DATASET through a model on this machine; no server and no broker is needed.

    DATASET is JSONL, OpenAI batch lines, CSV, TSV or plain text (a prompt a line), also .gz or .zst; - is stdin.
    """
    from promptmill.cli.look.results import write_results
    from promptmill.cli.progress import ProgressView
    from promptmill.core.outputs import discard, is_stdout
    from promptmill.service import local_run
    from promptmill.types import JobState

    options = options_of(values)
    if dry_run:
        report_dry_run(options, "embedded", as_json)
        return
    check_outputs(force, output, values["junit"], inputs=job_inputs(values))
    discard(values["junit"])
    settings, db = open_all()
    with repeated_runs(options, values["repeat_runs"]) as runs, ProgressView() as view:
        for each in runs:
            outcome = local_run.run(each, settings, db, view.update, show_preflight, show_job, show_job_engine)
            if not outcome.finished or outcome.state is not JobState.COMPLETED:
                break
    show_numbered(outcome.job_id, db)
    if output:
        write_results(db, outcome.job_id, output)
    try:
        quiet = as_json or (output is not None and is_stdout(output))
        end(outcome, db, quiet, as_json, one=options.prompt is not None, junit=values["junit"])
    finally:
        forget_texts(db, outcome)


@click.command(epilog="Example: promptmill resume @last")
@click.argument("job")
@click.option("--device", default="auto", show_default=True, help="Where an embedded job goes on.")
@json_option
def resume(job: str, device: str, as_json: bool) -> None:
    """Go on with JOB: an id, a unique prefix of one, a name, or @last. No row that has a result is run again."""
    from promptmill.cli.progress import ProgressView
    from promptmill.service import service

    settings, db = open_all()
    with ProgressView() as view:
        outcome = service.resume(job, settings, db, device, view.update, show_warning)
    if outcome.state.is_final or (not outcome.finished and _is_embedded(db, outcome.job_id)):
        try:
            end(outcome, db, as_json, as_json)
        finally:
            forget_texts(db, outcome)
    elif as_json:
        print_json({"job_id": outcome.job_id, "state": outcome.state.value})
    elif outcome.was_open:
        say(f"job {outcome.job_id} is {outcome.state.value} already; follow it with: promptmill watch {outcome.job_id}")
    else:
        say(f"job {outcome.job_id} is handed to the workers; follow it with: promptmill watch {outcome.job_id}")


def _is_embedded(db: Engine, job_id: str) -> bool:
    from promptmill.store.catalog import find_job

    return bool(find_job(db, job_id).mode == "embedded")


def show_job(job_id: str) -> None:
    stderr_console().print(f"job {job_id}", soft_wrap=True)


def show_job_engine(text: str) -> None:
    stderr_console().print(text, soft_wrap=True)
