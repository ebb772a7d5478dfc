"""``score``: score the stored answers of a job again, with no engine."""

from __future__ import annotations

from typing import Any

import click

from promptmill.cli.common import json_option, open_all, print_json
from promptmill.cli.progress import counting
from promptmill.core.outputs import discard
from promptmill.core.terminal import say
from promptmill.errors import EXIT_GATE


@click.command(epilog="Example: promptmill score @last --task ads_v2.task.yaml")
@click.argument("job", default="@last")
@click.option("--task", type=click.Path(), help="Score by this task file.  [default: the job's own task]")
@click.option("--by", metavar="FIELD", help="Also the scores of each value of a field, such as meta.group.")
@click.option("--junit", type=click.Path(), help="Write the task's gates there as JUnit XML.")
@json_option
def score(job: str, task: str | None, by: str | None, junit: str | None, as_json: bool) -> None:
    """Score the stored answers of JOB, and keep the scores of each row as a new score run.

    Answers and earlier runs stay as they are. Exit code 3 when a gate of the task fails.
    """
    from promptmill.service.service import score_again

    discard(junit)
    _, db = open_all()
    with counting("scored") as on_rows:
        found = score_again(job, task, db, by, on_rows)
    if as_json:
        print_json(found)
    else:
        say(f"score run @s{found['score_run']} of job {found['job_id']}")
        _print(found["scores"])
        for value, scores in found["groups"].items():
            say(f"{by} = {value}")
            _print(scores)
        for gate in found["gates"]:
            say(f"  {gate['text']}")
    if junit is not None:
        from promptmill.scoring.junit import write

        write(junit, found["job_id"], found["gates"])
    if not all(gate["passed"] for gate in found["gates"]):
        raise click.exceptions.Exit(EXIT_GATE)


def _print(scores: dict[str, Any]) -> None:
    """Each figure with its interval and the rows behind it."""
    from promptmill.reports.figures.metrics import METRICS

    for name, each in scores.items():
        spans = {each["metric"]: each["ci95"], **each["figure_ci95"]}
        for figure, value in each["figures"].items():
            metric = METRICS[figure]
            span = f"  95 % CI {metric.interval(tuple(spans[figure]))}" if spans.get(figure) else ""
            say(f"  {name}  {metric.label} {metric.shown(value)}{span}")
        say(f"    {_counts(each)}")


def _counts(each: dict[str, Any]) -> str:
    """What the figures rest on."""
    as_many = f" (as {each['n_effective']:,.0f} without copies)" if each["n_effective"] < each["n"] - 0.5 else ""
    parts = [f"n {each['n']:,}{as_many}", f"unparsed {each['unparsed'] + each['truncated']:,}"]
    for key, label in (("abstain", "abstained"), ("infra_error", "without an answer"), ("unlabelled", "unlabelled"),
                       ("left_out", "left out")):  # fmt: skip
        parts += [f"{label} {each[key]:,}"] if each[key] else []
    if each["metric"] == "accuracy" and each["majority_baseline"] is not None and each["classes"]:
        parts.append(f"majority {100 * each['majority_baseline']:.1f} %")
    if each["scorer_errors"]:
        parts.append(f"the scorer failed on {each['scorer_errors']:,}: {each['scorer_error']}")
    parts += [each["note"]] if each["note"] else []
    classes = [f"{label} {count:,}" for label, count in each["classes"].items()]
    return ", ".join(parts) + (f"; expected: {', '.join(classes)}" if 0 < len(classes) <= MOST_SHOWN else "")


#: Most classes whose counts are printed.
MOST_SHOWN = 20
