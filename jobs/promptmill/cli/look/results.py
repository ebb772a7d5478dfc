"""``results``: a job's results as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from promptmill.cli.common import check_outputs, force_option, open_all, spreadsheet_option, stderr_console
from promptmill.errors import PromptmillError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


@click.command(epilog="Example: promptmill results @last --failed --format csv -o failed.csv")
@click.argument("job", default="@last")
@click.option("--failed", is_flag=True, help="Only rows that ended as errors.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["jsonl", "csv", "openai", "parquet"]),
    help="[default: by the name of -o, else jsonl]",
)
@click.option("-o", "--output", type=click.Path(), default="-", help="Write here; - is stdout.  [default: -]")
@click.option("--prompts", is_flag=True, help="Parquet: inputs, expected answers and meta too.")
@spreadsheet_option
@force_option
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonl.")
def results(
    job: str, failed: bool, format_: str | None, output: str, prompts: bool, spreadsheet: bool | None, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the results of JOB, one line each, in the order of its rows.

    CSV has further columns (reasoning, choices, logprobs, choice_probs, continuations, embedding, deduplicated) where a
    row of the job has them, lists and objects as JSON.
    """
    from promptmill.core.outputs import is_stdout
    from promptmill.store.catalog import find_job

    check_outputs(force, output)
    parquet = format_ == "parquet" or (format_ is None and not as_json and output.endswith(".parquet"))
    if parquet and is_stdout(output):
        raise PromptmillError("Parquet is written to a file", hint="Give -o FILE.parquet.")
    if prompts and not parquet:
        raise PromptmillError("--prompts is for Parquet only", hint="Give -o FILE.parquet.")
    _, db = open_all()
    if parquet:
        _write_parquet(db, find_job(db, job).id, output, failed, prompts)
        return
    write_results(db, find_job(db, job).id, output, format_ or ("jsonl" if as_json else None), failed, spreadsheet)


def write_results(
    db: Engine,
    job_id: str,
    output: str,
    format_: str | None = None,
    failed: bool = False,
    spreadsheet: bool | None = None,
) -> None:
    """Write to ``output``, as ``spreadsheet_option`` says where that is CSV."""
    from promptmill.core.outputs import is_stdout, writing
    from promptmill.store.catalog import find_job
    from promptmill.store.result_lines import write

    model, to_stdout = find_job(db, job_id).model, is_stdout(output)
    chosen = format_ or ("csv" if output.endswith(".csv") else "jsonl")
    with writing(output) as stream:
        count = write(db, job_id, model, chosen, stream, failed, not to_stdout if spreadsheet is None else spreadsheet)
    if not to_stdout:
        stderr_console().print(f"{count:,} results in {output}", soft_wrap=True)


def _write_parquet(db: Engine, job_id: str, output: str, failed: bool, prompts: bool) -> None:
    from promptmill.core.outputs import appearing
    from promptmill.store.parquet import write

    with appearing(output) as path:
        count = write(db, job_id, str(path), failed, prompts)
    stderr_console().print(f"{count:,} results in {output}", soft_wrap=True)
