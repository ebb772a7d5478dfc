"""``run`` and ``resume``: jobs in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from promptmill.cli.common import (
    OptionsCommand,
    check_outputs,
    job_inputs,
    job_options,
    json_option,
    open_all,
    options_of,
    print_json,
    stderr_console,
)
from promptmill.cli.job.ending import end, forget_texts
from promptmill.cli.job.messages import report_dry_run, show_numbered, show_preflight, show_warning
from promptmill.core.terminal import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


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
    help="Most tokens of a request.  [default: what the job needs]",
)
@click.option("-o", "--output", type=click.Path(), help="Write the results here: .jsonl or .csv; - is stdout.")
def run(output: str | None, force: bool, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Run DATASET through a model on this machine; no server and no broker is needed.

    DATASET is JSONL, OpenAI batch lines, CSV, TSV or plain text (a prompt a line), also .gz or .zst; - is stdin.
    """
    from promptmill.cli.look.results import write_results
    from promptmill.cli.progress import ProgressView
    from promptmill.core.outputs import is_stdout
    from promptmill.service import local_run

    options = options_of(values)
    if dry_run:
        report_dry_run(options, "embedded", as_json)
        return
    check_outputs(force, output, values["junit"], inputs=job_inputs(values))
    settings, db = open_all()
    with ProgressView() as view:
        outcome = local_run.run(options, settings, db, view.update, show_preflight, show_job, show_job_engine)
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
