"""``score``: score the stored answers of a job again, with no engine."""

from __future__ import annotations

import click

from promptmill.cli.common import json_option, open_all, print_json
from promptmill.errors import EXIT_GATE


@click.command(epilog="Example: promptmill score @last --task ads_v2.task.yaml")
@click.argument("job", default="@last")
@click.option("--task", type=click.Path(), help="Score by this task file.  [default: the job's own task]")
@click.option("--junit", type=click.Path(), help="Write the task's gates there as JUnit XML.")
@json_option
def score(job: str, task: str | None, junit: str | None, as_json: bool) -> None:
    """Score the stored answers of JOB, and keep the scores of each row as a new score run.

    Answers and earlier runs stay as they are. Exit code 3 when a gate of the task fails.
    """
    from promptmill.service import score_again

    _, db = open_all()
    found = score_again(job, task, db)
    if as_json:
        print_json(found)
    else:
        click.echo(f"score run {found['score_run_id']} of job {found['job_id']}")
        for name, each in found["scores"].items():
            value = "-" if each["value"] is None else f"{each['value']:.4f}"
            span = "[{:.4f}, {:.4f}]".format(*each["ci95"]) if each["ci95"] else "-"
            click.echo(f"  {name}  {each['metric']} {value}  95 % CI {span}  n {each['n']:,}  "
                       f"unparsed {each['unparsed'] + each['truncated']:,}")  # fmt: skip
        for gate in found["gates"]:
            click.echo(f"  {gate['text']}")
    if junit is not None:
        from promptmill.gates import Verdict
        from promptmill.junit import write

        verdicts = [Verdict(gate["name"], gate["demand"], gate["value"], gate["passed"]) for gate in found["gates"]]
        write(junit, found["job_id"], verdicts)
    if not all(gate["passed"] for gate in found["gates"]):
        raise click.exceptions.Exit(EXIT_GATE)
