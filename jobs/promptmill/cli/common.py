"""What commands share: options, settings, the database, and calm output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from promptmill.core.terminal import nobody_reads, printable, say

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy.engine import Engine

    from promptmill.core.settings import Settings

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

force_option = click.option("--force", is_flag=True, help="Write over files that exist.")

#: An option of each command that writes CSV.
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
    from promptmill.database.revision import open_database

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
            # The reader of stderr has gone: the work goes on, and prints nothing more there.
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
