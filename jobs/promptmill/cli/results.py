"""``results``: a job's results as a file."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from promptmill.cli.common import open_all, stderr_console
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
@click.option("--force", is_flag=True, help="Write over a file that exists.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonl.")
def results(
    job: str, failed: bool, format_: str | None, output: str, prompts: bool, force: bool, as_json: bool
) -> None:
    """Write the results of JOB, one line each, in the order of its rows.

    CSV has further columns (reasoning, choices, logprobs, choice_probs, continuations, embedding, deduplicated) where a
    row of the job has them, lists and objects as JSON.
    """
    from promptmill.catalog import find_job
    from promptmill.cli.report import check_target

    check_target(output, force)
    parquet = format_ == "parquet" or (format_ is None and not as_json and output.endswith(".parquet"))
    if parquet and output == "-":
        raise PromptmillError("Parquet is written to a file", hint="Give -o FILE.parquet.")
    if prompts and not parquet:
        raise PromptmillError("--prompts is for Parquet only", hint="Give -o FILE.parquet.")
    _, db = open_all()
    if parquet:
        _write_parquet(db, find_job(db, job).id, output, failed, prompts)
        return
    write_results(db, find_job(db, job).id, output, format_ or ("jsonl" if as_json else None), failed)


def check_output(output: str) -> None:
    """Raises PromptmillError for a path that cannot be written, before any work is done."""
    if output == "-":
        return
    path = Path(output)
    if path.is_dir():
        raise PromptmillError(f"{output} is a folder", hint="Give a file's name.")
    if not path.absolute().parent.is_dir():
        raise PromptmillError(f"there is no folder {path.absolute().parent}", hint="Make it first.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PromptmillError(f"{path.absolute().parent} cannot be written to")


def write_results(db: Engine, job_id: str, output: str, format_: str | None = None, failed: bool = False) -> None:
    """Write to ``output``. A file appears whole or not at all."""
    from promptmill.catalog import find_job
    from promptmill.result_formats import write

    model = find_job(db, job_id).model
    chosen = format_ or ("csv" if output.endswith(".csv") else "jsonl")
    if output == "-":
        write(db, job_id, model, chosen, sys.stdout, failed)
        return
    path = Path(output).absolute()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", dir=path.parent, delete=False) as file:
        try:
            count = write(db, job_id, model, chosen, file, failed)
            file.flush()
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    stderr_console().print(f"{count:,} results in {output}", soft_wrap=True)


def _write_parquet(db: Engine, job_id: str, output: str, failed: bool, prompts: bool) -> None:
    """The file appears whole or not at all."""
    from promptmill.parquet_form import write
    from promptmill.whole_files import appearing

    with appearing(output) as partial:
        count = write(db, job_id, str(partial), failed, prompts)
    stderr_console().print(f"{count:,} results in {output}", soft_wrap=True)


def _umask() -> int:
    """The process's file mode mask; reading it is only possible by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
