"""How a command ends with its job: the report, the scores, the gates, and the exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from promptmill.cli.common import print_json, stderr_console
from promptmill.core.terminal import say
from promptmill.errors import EXIT_FAILED, EXIT_GATE, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from promptmill.scoring.gates import GateVerdict
    from promptmill.service.local_run import RunOutcome


def end(
    outcome: RunOutcome, db: Engine, quiet: bool, as_json: bool, one: bool = False, junit: str | None = None
) -> None:
    """Keep the scores, print the report, and leave with the exit code the job's end deserves."""
    from promptmill.cli.look.report import print_report
    from promptmill.reports.figures.summary import summarise
    from promptmill.service.service import keep_scores
    from promptmill.types import JobState

    completed = outcome.finished and outcome.state is JobState.COMPLETED
    if completed:
        # First: what reads the scores afterwards judges no answer again.
        keep_scores(outcome.job_id, db)
    shown = (as_json or not quiet) and not (one and not quiet)
    summary = summarise(db, outcome.job_id) if shown or completed else None
    if one and not quiet:
        _print_answer(db, outcome.job_id)
    elif shown and summary is not None:
        print_report(summary, as_json)
    if not outcome.finished:
        stderr_console().print(
            f"stopped before the end; go on with: promptmill resume {outcome.job_id}", soft_wrap=True
        )
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
    if not completed:
        _say_why(db, outcome)
        raise click.exceptions.Exit(EXIT_FAILED)
    _judge_gates(outcome.job_id, list(summary.gates) if summary else [], junit)


def _judge_gates(job_id: str, verdicts: list[GateVerdict], junit: str | None) -> None:
    """Say how each gate of the job's task ended; exit code 3 when one failed."""
    if junit is not None:
        from promptmill.scoring.junit import write

        write(junit, job_id, [verdict.to_json() for verdict in verdicts])
    for verdict in verdicts:
        stderr_console().print(str(verdict), soft_wrap=True, markup=False)
    if not all(verdict.passed for verdict in verdicts):
        raise click.exceptions.Exit(EXIT_GATE)


def _say_why(db: Engine, outcome: RunOutcome) -> None:
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


def forget_texts(db: Engine, outcome: RunOutcome) -> None:
    """What ``--store`` asked for, after everything that reads the texts; a job that goes on needs them still."""
    from promptmill.scoring.forgetting import forget
    from promptmill.store.catalog import find_job
    from promptmill.store.redaction import LEFT_TO_DO

    job = find_job(db, outcome.job_id)
    if job.mode == "embedded" and job.store in LEFT_TO_DO and outcome.finished and outcome.state.is_final:
        forget(db, job.id, LEFT_TO_DO[job.store])
