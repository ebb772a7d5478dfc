"""What commands share: options, settings, the database, and calm output."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from promptmill.core.terminal import nobody_reads, printable, say

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy.engine import Engine

    from promptmill.core.settings import Settings
    from promptmill.service.job_options import JobOptions

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

force_option = click.option("--force", is_flag=True, help="Write over files that exist.")

#: Of commands that write CSV.
spreadsheet_option = click.option(
    "--spreadsheet/--exact",
    default=None,
    help="CSV: put ' before what a spreadsheet would run as a formula, or write each text as it is.  "
    "[default: --spreadsheet in a file, --exact to stdout]",
)


class OptionsCommand(click.Command):
    """A command whose errors name its options as they are typed."""

    def invoke(self, ctx: click.Context) -> Any:
        from promptmill.errors import BadOption

        try:
            return super().invoke(ctx)
        except BadOption as problem:
            typed = {each.name or "": _typed(each) for each in self.params}
            for name in (text.partition("=")[0] for text in ctx.params.get("param", ())):
                if ctx.params.get(name) in (None, ()):
                    # It was typed as the parameter itself.
                    typed.pop(name, None)
            raise problem.spelled(typed) from None


def _typed(parameter: click.Parameter) -> str:
    return max(parameter.opts, key=len) if isinstance(parameter, click.Option) else (parameter.name or "").upper()


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


def check_outputs(force: bool, *outputs: str | None, inputs: Sequence[str | None] = ()) -> None:
    """Before anything is done: raises PromptmillError for an output that cannot be written, or is there already.

    What the command reads is never written over. Another file is, with ``--force`` or where a person says so.
    """
    from promptmill.core.addresses import sqlite_files
    from promptmill.core.outputs import holds_something, refuse
    from promptmill.core.settings import load_settings
    from promptmill.errors import PromptmillError

    given = [each for each in outputs if each is not None and each != "-"]
    if not given:
        return
    settings = load_settings()
    refuse(given, [*inputs, settings.model, ".env", *sqlite_files(settings.database_url)])
    for output in given:
        if force or not holds_something(output):
            continue
        if not (sys.stdin.isatty() and click.confirm(f"{printable(output)} exists: write over it?", err=True)):
            raise PromptmillError(f"{output} exists", hint="Give another name, or --force to write over it.")


def open_all() -> tuple[Settings, Engine]:
    """Settings and the database at the right revision."""
    from promptmill.core import processes
    from promptmill.core.settings import load_settings
    from promptmill.database.engine import open_database

    processes.allow()
    settings = load_settings()
    return settings, open_database(settings.database_url)


def stderr_console() -> Console:
    """The console for what is said beside the data. No markup: what models and people wrote may look like it."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """The console for what people read, without markup; in a pipe 100 columns wide."""
    return _console(width=None if sys.stdout.isatty() else 100)


def _console(stderr: bool = False, width: int | None = None) -> Console:
    """A console whose own colours and movements reach a terminal, and none of what it is given to print."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class ForPeople(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                is_foreign = self.is_terminal and not segment.control
                yield segment._replace(text=printable(segment.text)) if is_foreign else segment

        def on_broken_pipe(self) -> None:
            # Nobody reads what is said beside the data: the work goes on without a word.
            if not stderr:
                raise BrokenPipeError
            self.quiet = True
            nobody_reads(sys.stderr)

    return ForPeople(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    say(json.dumps(value, ensure_ascii=False, indent=2))


def table(columns: list[str], rows: list[list[Any]], right: set[str] | None = None) -> None:
    """A plain table on stdout; columns in ``right`` are aligned to the right."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Ids are copied from here: they are never broken.
        whole = column in ("job", "done", "errors", "state")
        made.add_column(
            printable(column), justify="right" if right and column in right else "left", overflow="fold", no_wrap=whole
        )
    for row in rows:
        made.add_row(*["-" if cell is None else printable(str(cell)) for cell in row])
    stdout_console().print(made)


def clock(at: float | None) -> str | None:
    """Seconds since the epoch as local time."""
    return None if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
