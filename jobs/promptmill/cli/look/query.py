"""``query``: SQL over the tables and views, read-only."""

from __future__ import annotations

import sys
from itertools import islice

import click

from promptmill.cli.common import check_outputs, force_option, open_all, spreadsheet_option, stderr_console, table
from promptmill.core.terminal import say
from promptmill.errors import PromptmillError

#: Formats of files, and all that --format takes.
FILES = ("csv", "jsonl", "parquet")
FORMATS = ("table", *FILES)


class _Sql(click.Command):
    """A command whose argument may begin with a comment: ``-- what it is for``, a line break, and the query."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spaced = [f" {each}" if each.startswith("--") and "\n" in each else each for each in args]
        return super().parse_args(ctx, spaced)


@click.command(
    cls=_Sql,
    epilog="""\b
Examples:
  promptmill query --list
  promptmill query percentiles
  promptmill query "SELECT model, COUNT(*) FROM v_results GROUP BY model" --format csv
""",
)
@click.argument("sql", required=False)
@click.option("--list", "show", is_flag=True, help="List views and named queries.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    help="[default: by the name of -o, else table]",
)
@click.option("-o", "--output", type=click.Path(), default="-", help="Write here; - is stdout.  [default: -]")
@spreadsheet_option
@force_option
@click.option("--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds it may take.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonl.")
def query(
    sql: str | None, show: bool, format_: str | None, output: str, spreadsheet: bool | None, force: bool,
    timeout: float, as_json: bool,
) -> None:  # fmt: skip
    """Run SQL (- reads it from stdin), or a named query, on a connection that cannot write."""
    from promptmill.core.outputs import is_stdout, writing
    from promptmill.store.queries import querying, write_csv, write_jsonl, write_parquet

    if show or sql is None:
        _list()
        return
    chosen = _format("jsonl" if as_json else format_, output)
    check_outputs(force, output)
    settings, db = open_all()
    text = sys.stdin.read() if sql == "-" else sql
    with querying(db, text, timeout, settings.query_database_url) as (columns, rows):
        if chosen == "parquet":
            write_parquet(columns, rows, output)
        elif chosen == "table":
            _table(columns, rows)
        else:
            with writing(output) as stream:
                if chosen == "jsonl":
                    write_jsonl(columns, rows, stream)
                else:
                    write_csv(columns, rows, stream, not is_stdout(output) if spreadsheet is None else spreadsheet)


def _format(asked: str | None, output: str) -> str:
    """What was asked for, or what the file's name says. Raises PromptmillError where they do not go together."""
    from promptmill.core.outputs import is_stdout

    if is_stdout(output):
        if asked == "parquet":
            raise PromptmillError("Parquet is written to a file", hint="Give -o FILE.parquet.")
        return asked or "table"
    suffix = output.rpartition(".")[2].lower()
    named = suffix if suffix in FILES else None
    if asked == "table":
        raise PromptmillError("a table is for a terminal", hint=f"To a file: --format {', '.join(FILES)}.")
    if asked and named and asked != named:
        raise PromptmillError(f"--format {asked} and the name {output} contradict each other", hint="Leave one out.")
    if not asked and not named:
        raise PromptmillError(f"the name {output} tells no format", hint=f"Give --format {', '.join(FILES)}.")
    return asked or named or "table"


def _table(columns: list[str], rows: object) -> None:
    from promptmill.store.queries import TABLE_ROWS

    found = list(islice(rows, TABLE_ROWS + 1))  # type: ignore[call-overload]
    right = {name for index, name in enumerate(columns) if found and isinstance(found[0][index], (int, float))}
    table(columns, [[_cell(cell) for cell in row] for row in found[:TABLE_ROWS]], right)
    if len(found) > TABLE_ROWS:
        stderr_console().print(f"only the first {TABLE_ROWS:,} rows are shown; --format csv writes all")


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) and abs(value) < 1e6 else value


def _list() -> None:
    from promptmill.database.views import QUERIES, VIEWS

    say(f"views: v_results, {', '.join(VIEWS)}\n")
    table(["query", "about"], [[name, each.about] for name, each in QUERIES.items()])
