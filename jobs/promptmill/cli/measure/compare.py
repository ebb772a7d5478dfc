"""``compare``: jobs against a baseline, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from promptmill.cli.common import check_outputs, json_option, open_all, stderr_console, stdout_console
from promptmill.errors import EXIT_GATE, PromptmillError

if TYPE_CHECKING:
    from promptmill.reports.compare.comparison import Comparison
    from promptmill.reports.compare.conditions import Condition


@click.command(
    epilog="""\b
Examples:
  promptmill compare before after
  promptmill compare q8 q4 --fail-if 'is_ad.accuracy<-2pp' --fail-if 'output_tps<-5%'
  promptmill compare q8 q4 -o comparison.html
  promptmill compare run1 run2 run3 run4 run5 run6 --by slots
  promptmill compare @last@s1 @last@s2

Jobs of --by are runs of a setting; JOB@s2 is a job as its second score run judged it.

Exit code 3: a condition of --fail-if is met. It is judged by the figures themselves; the message says whether the
change was tested.
"""
)
@click.argument("jobs", nargs=-1, required=True)
@click.option("--by", help="A setting, such as slots or model: jobs that share its value are runs of one setting.")
@click.option("--baseline", help="The job that the others are set against.  [default: the first]")
@click.option("--fail-if", "conditions", multiple=True, help="Leave with exit code 3 when this holds; may be repeated.")
@click.option("--force", is_flag=True, help="Compare other work and other rows too; write over a file that exists.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["term", "html", "md", "json", "csv"]),
    help="[default: by the name of -o, else term]",
)
@click.option("-o", "--output", type=click.Path(), default="-", help="Write here; - is stdout.  [default: -]")
@json_option
def compare(
    jobs: tuple[str, ...],
    by: str | None,
    baseline: str | None,
    conditions: tuple[str, ...],
    force: bool,
    format_: str | None,
    output: str,
    as_json: bool,
) -> None:
    """Compare JOBS: rows are paired by id, intervals take batches as a whole, and families of tests are corrected."""
    from promptmill.cli.look.report import by_name
    from promptmill.reports.compare.compare import Side, compare_all, settings_of
    from promptmill.reports.compare.conditions import parse
    from promptmill.store.catalog import find_scored

    gates = [parse(each) for each in conditions]
    check_outputs(force, output)
    _, db = open_all()
    sides = [Side(job.id, run) for job, run in (find_scored(db, each) for each in (baseline or jobs[0], *jobs))]
    sides = list(dict.fromkeys(sides))
    groups = settings_of(db, sides, by) if by else [[side] for side in sides]
    if len(groups) < 2:
        what = f"with different values of '{by}'" if by else "that are different"
        raise PromptmillError(f"a comparison needs two jobs {what}", hint="promptmill compare BEFORE AFTER")
    found = compare_all(db, groups[0], groups[1:], force)
    for each in found:
        for gate in gates:
            gate.check(each)
    _write(found, "json" if as_json else format_ or by_name(output), output)
    _judge(found, gates)


def _write(found: list[Comparison], format_: str, output: str) -> None:
    from promptmill.cli.look.report import write_text
    from promptmill.reports.render import comparison_forms

    if format_ == "term" and output == "-":
        for each in found:
            comparison_forms.render(each, stdout_console())
    elif format_ == "html":
        from promptmill.reports.render.comparison_page import text

        write_text(text(found), output)
    elif format_ == "json" and len(found) > 1:
        parts = [comparison_forms.text(each, "json").rstrip("\n") for each in found]
        write_text(f"[{', '.join(parts)}]\n", output)
    else:
        write_text(
            "\n".join(comparison_forms.text(each, "md" if format_ == "term" else format_) for each in found), output
        )


def _judge(found: list[Comparison], gates: list[Condition]) -> None:
    met = [(gate, each) for each in found for gate in gates if _met(gate, each)]
    for gate, each in met:
        said = f"failed: {gate.text} holds for {each.after.job_id} ({gate.basis(each)})"
        stderr_console().print(said, soft_wrap=True, markup=False)
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
