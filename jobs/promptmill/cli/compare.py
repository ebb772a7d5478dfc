"""``compare``: jobs against a baseline, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from promptmill.cli.common import json_option, open_all, stderr_console, stdout_console
from promptmill.errors import EXIT_GATE, PromptmillError

if TYPE_CHECKING:
    from promptmill.reports.compare import Comparison
    from promptmill.reports.conditions import Condition


@click.command(
    epilog="""\b
Examples:
  promptmill compare before after
  promptmill compare q8 q4 --fail-if 'is_ad.accuracy<-2pp' --fail-if 'output_tps<-5%'
  promptmill compare q8 q4 --format md -o comparison.md

Exit code 3: a condition of --fail-if is met.
"""
)
@click.argument("jobs", nargs=-1, required=True)
@click.option("--baseline", help="The job that the others are set against.  [default: the first]")
@click.option("--fail-if", "conditions", multiple=True, help="Leave with exit code 3 when this holds; may be repeated.")
@click.option("--force", is_flag=True, help="Compare other work too; write over a file that exists.")
@click.option(
    "--format", "format_", type=click.Choice(["term", "md", "json", "csv"]), default="term", show_default=True
)
@click.option("-o", "--output", type=click.Path(), default="-", help="Write here; - is stdout.  [default: -]")
@json_option
def compare(
    jobs: tuple[str, ...],
    baseline: str | None,
    conditions: tuple[str, ...],
    force: bool,
    format_: str,
    output: str,
    as_json: bool,
) -> None:
    """Compare JOBS: rows are paired by id, intervals take batches as a whole, and families of tests are corrected."""
    from promptmill.catalog import find_job
    from promptmill.cli.report import check_target
    from promptmill.reports.compare import compare as compared
    from promptmill.reports.conditions import parse

    gates = [parse(each) for each in conditions]
    check_target(output, force)
    _, db = open_all()
    first = find_job(db, baseline or jobs[0]).id
    others = [job for job in (find_job(db, each).id for each in jobs) if job != first]
    if not others:
        raise PromptmillError("a comparison needs two different jobs", hint="promptmill compare BEFORE AFTER")
    found = [compared(db, first, other, force) for other in others]
    _write(found, "json" if as_json else format_, output)
    _judge(found, gates)


def _write(found: list[Comparison], format_: str, output: str) -> None:
    from promptmill.cli.report import write_text
    from promptmill.reports import comparison_forms

    if format_ == "term":
        for each in found:
            comparison_forms.render(each, stdout_console())
    elif format_ == "json" and len(found) > 1:
        parts = [comparison_forms.text(each, "json").rstrip("\n") for each in found]
        write_text(f"[{', '.join(parts)}]\n", output)
    else:
        write_text("\n".join(comparison_forms.text(each, format_) for each in found), output)


def _judge(found: list[Comparison], gates: list[Condition]) -> None:
    met = [(gate, each) for each in found for gate in gates if _met(gate, each)]
    for gate, each in met:
        stderr_console().print(f"failed: {gate.text} holds for {each.after.job_id}", soft_wrap=True, markup=False)
    if met:
        raise click.exceptions.Exit(EXIT_GATE)


def _met(gate: Condition, found: Comparison) -> bool:
    """A condition that cannot be judged is not passed over in silence."""
    holds = gate.holds(found)
    if holds is None:
        raise PromptmillError(
            f"--fail-if {gate.text} cannot be judged for {found.after.job_id}",
            hint="The figure was not measured, or the jobs did different work (--force compares all the same).",
        )
    return holds
