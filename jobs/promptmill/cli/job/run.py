"""``run`` and ``resume``: jobs in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from promptmill.cli.common import (
    check_outputs,
    job_inputs,
    job_options,
    json_option,
    open_all,
    print_json,
    run_options,
    stderr_console,
)
from promptmill.core.terminal import say
from promptmill.errors import EXIT_FAILED, EXIT_GATE, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from promptmill.service.local_run import Outcome
    from promptmill.service.preflight import Preflight


@click.command(
    epilog="""\b
Examples:
  promptmill run prompts.txt --model demo
  promptmill run comments.jsonl --model model.gguf --task ads.task.yaml -o results.jsonl
  promptmill run -p "Is this an advertisement?" --model hf:owner/repo:file.gguf
"""
)
@job_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cpu:0-3, cuda:0 or metal.")
@click.option("--context", type=click.IntRange(16), help="Most tokens of a request.  [default: what the job needs]")
@click.option("-o", "--output", type=click.Path(), help="Write the results here: .jsonl or .csv; - is stdout.")
def run(output: str | None, force: bool, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Run DATASET through a model on this machine; no server and no broker is needed.

    DATASET is JSONL, OpenAI batch lines, CSV, TSV or plain text (a prompt a line), also .gz or .zst; - is stdin.
    """
    from promptmill.cli.look.results import write_results
    from promptmill.cli.progress import ProgressView
    from promptmill.core.outputs import is_stdout
    from promptmill.service import service

    options = run_options(values)
    if dry_run:
        report_dry_run(options, "embedded", as_json)
        return
    check_outputs(force, output, values["junit"], inputs=job_inputs(values))
    settings, db = open_all()
    with ProgressView() as view:
        outcome = service.run(options, settings, db, view.update, show_preflight, show_job, show_job_engine)
    show_numbered(outcome.job_id, db)
    if output:
        write_results(db, outcome.job_id, output)
    try:
        quiet = as_json or (output is not None and is_stdout(output))
        end(outcome, db, quiet, as_json, one=options.prompt is not None, junit=values["junit"])
    finally:
        forget_texts(db, outcome)


def forget_texts(db: Engine, outcome: Outcome) -> None:
    """What ``--store`` asked for, after everything that reads the texts; a job that goes on needs them still."""
    from promptmill.scoring.forgetting import forget
    from promptmill.store.catalog import find_job
    from promptmill.store.redaction import LEFT_TO_DO

    job = find_job(db, outcome.job_id)
    if job.mode == "embedded" and job.store in LEFT_TO_DO and outcome.finished and outcome.state.is_final:
        forget(db, job.id, LEFT_TO_DO[job.store])


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


def report_dry_run(options: Any, mode: str, as_json: bool) -> None:
    """``--dry-run``: the preflight, and nothing else."""
    from promptmill.core.settings import load_settings
    from promptmill.service.prepare import dry_run

    found = dry_run(options, load_settings(), mode)
    if as_json:
        print_json(found.to_json() if found else None)
    else:
        show_preflight(found)
        stderr_console().print("dry run: nothing was stored")


def show_preflight(found: Preflight | None) -> None:
    """One line on stderr about what the job will take."""
    from promptmill.cli.progress import preflight_line

    text = preflight_line(found) if found else "the model is not on this machine: prompts were not measured"
    stderr_console().print(text, soft_wrap=True)


def show_warning(text: str) -> None:
    stderr_console().print(f"warning: {text}", soft_wrap=True, markup=False)


def show_job(job_id: str) -> None:
    stderr_console().print(f"job {job_id}", soft_wrap=True)


def show_numbered(job_id: str, db: Engine) -> None:
    """Say which lines had an id that an earlier one has."""
    from promptmill.service.service import numbered_ids

    found = numbered_ids(job_id, db)
    if found:
        stderr_console().print(f"ids used before were numbered: {', '.join(found)}", soft_wrap=True, markup=False)


def show_job_engine(text: str) -> None:
    stderr_console().print(text, soft_wrap=True)


def end(outcome: Outcome, db: Engine, quiet: bool, as_json: bool, one: bool = False, junit: str | None = None) -> None:
    """Print the report, keep the scores, and leave with the exit code the job's end deserves."""
    from promptmill.cli.look.report import print_report
    from promptmill.service.service import keep_scores
    from promptmill.types import JobState

    if one and not quiet:
        _print_answer(db, outcome.job_id)
    elif as_json or not quiet:
        print_report(db, outcome.job_id, as_json)
    if not outcome.finished:
        stderr_console().print(
            f"stopped before the end; go on with: promptmill resume {outcome.job_id}", soft_wrap=True
        )
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
    if outcome.state is not JobState.COMPLETED:
        _say_why(db, outcome)
        raise click.exceptions.Exit(EXIT_FAILED)
    keep_scores(outcome.job_id, db)
    _judge_gates(db, outcome.job_id, junit)


def _judge_gates(db: Engine, job_id: str, junit: str | None) -> None:
    """Say how each gate of the job's task ended; exit code 3 when one failed."""
    from promptmill.reports.figures.summary import summarise
    from promptmill.store.catalog import find_job

    task_text = find_job(db, job_id).task_text
    verdicts = list(summarise(db, job_id).gates) if task_text and "gates" in task_text else []
    if junit is not None:
        from promptmill.scoring.junit import write

        write(junit, job_id, verdicts)
    for verdict in verdicts:
        stderr_console().print(str(verdict), soft_wrap=True, markup=False)
    if not all(verdict.passed for verdict in verdicts):
        raise click.exceptions.Exit(EXIT_GATE)


def _say_why(db: Engine, outcome: Outcome) -> None:
    from promptmill.store.catalog import find_job

    reason = find_job(db, outcome.job_id).stop_reason or "no reason was recorded"
    stderr_console().print(f"job {outcome.job_id} {outcome.state.value}: {reason}", soft_wrap=True)


def _print_answer(db: Engine, job_id: str) -> None:
    """One prompt was asked: its answer is the output."""
    from promptmill.store.catalog import EXTRAS, result_lines

    for line in result_lines(db, job_id):
        if line["state"] == "ok":
            _print_texts(line)
            extras = {name: line[name] for name in (*EXTRAS, "reasoning") if name in line and name != "choices"}
            if extras:
                print_json(extras)
            took = "copied" if line["latency_s"] is None else f"in {line['latency_s']:.2f} s"
            stderr_console().print(f"{line['output_tokens']} tokens {took}")
        else:
            stderr_console().print(f"{line['error']['class']}: {line['error']['message']}", soft_wrap=True)


def _print_texts(line: dict[str, Any]) -> None:
    """The answer, or all of them; of what only has figures none."""
    answers = [line["text"], *(each["text"] for each in line.get("choices", ()))]
    if len(answers) == 1 and not line["text"] and ("continuations" in line or "embedding" in line):
        return
    for number, text in enumerate(answers, start=1):
        if len(answers) > 1:
            say(f"--- answer {number} of {len(answers)}")
        say(text)
