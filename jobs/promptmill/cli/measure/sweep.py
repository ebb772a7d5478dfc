"""``sweep``: settings measured against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from promptmill.cli.common import (
    OptionsCommand,
    check_outputs,
    force_option,
    json_option,
    open_all,
    stderr_console,
    stdout_console,
)
from promptmill.errors import EXIT_INTERRUPTED, PromptmillError


@click.command(
    cls=OptionsCommand,
    epilog="""\b
Examples:
  promptmill sweep prompts.jsonl --model demo --slots 1,2,4,8 --repeat-runs 3
  promptmill sweep comments.jsonl --task ads.task.yaml --model q8.gguf,q4.gguf -o sweep.html
  promptmill sweep prompts.jsonl --model demo --set n_batch=256,512 --tag batch --limit 200

The same --tag goes on with a sweep that was stopped. Its jobs stay: 'promptmill compare --by slots ...'.
""",
)
@click.argument("dataset")
@click.option("-m", "--model", help="Models, by commas.  [env: JOBS_MODEL]")
@click.option("--slots", help="Sequences decoded together, by commas: 1,2,4,8.")
@click.option("--set", "axes", multiple=True, help="NAME=V1,V2: a setting of the engine or of sampling; repeatable.")
@click.option("--repeat-runs", type=click.IntRange(1, 100), default=3, show_default=True, help="Runs of each setting.")
@click.option("--task", type=click.Path(), help="Task file (YAML): its scores stand beside the speeds.")
@click.option("--template", help="Jinja2 template of the user's message, or @FILE.")
@click.option("--format", help="Format of the dataset where its name does not tell.")
@click.option("--limit", type=click.IntRange(1), help="Take the first N lines only.")
@click.option("--max-tokens", type=click.IntRange(1), help="Most tokens of an answer.")
@click.option("--ignore-eos", is_flag=True, default=None, help="Do not stop at end tokens: all answers of one length.")
@click.option("--device", default="auto", show_default=True)
@click.option("--tag", help="The jobs get this tag.  [default: sweep-TIME]")
@click.option("-o", "--output", type=click.Path(), default="-", help="Write .html, .md, .json or .csv; - is stdout.")
@force_option
@json_option
def sweep(dataset: str, output: str, force: bool, as_json: bool, **values: Any) -> None:
    """Run DATASET under every combination of settings, in turns, and name the smallest that is fast enough."""
    from promptmill.cli.look.report import by_name, write_text
    from promptmill.cli.progress import ProgressView
    from promptmill.experiments.sweep import sweep as run
    from promptmill.reports.compare.sweep import text

    check_outputs(
        force,
        output,
        inputs=[
            dataset,
            values["task"],
            *(values["model"] or "").split(","),
            (values["template"] or "").removeprefix("@"),
        ],
    )
    settings, db = open_all()
    plan = _plan(dataset, values)
    console = stderr_console()

    def on_run(number: int, total: int, label: str) -> None:
        console.print(f"run {number} of {total}: {label}", soft_wrap=True, markup=False)

    try:
        with ProgressView() as view:
            found, finished = run(plan, settings, db, on_run, view.update)
    except KeyboardInterrupt:
        # Ctrl-C while a model loads: there is no job to be paused yet.
        _say_stopped(plan.tag)
        raise
    chosen = "json" if as_json else by_name(output)
    if chosen == "term" and output == "-":
        _print(found)
    else:
        write_text(text(found, "md" if chosen == "term" else chosen), output)
    if not finished:
        _say_stopped(plan.tag)
        raise click.exceptions.Exit(EXIT_INTERRUPTED)


def _say_stopped(tag: str) -> None:
    stderr_console().print(f"stopped; go on with the same command and --tag {tag}", soft_wrap=True)


def _plan(dataset: str, values: dict[str, Any]) -> Any:
    from datetime import UTC, datetime

    from promptmill.experiments.sweep import Plan, axis
    from promptmill.service.job_options import JobOptions
    from promptmill.service.selection import Selection

    axes: dict[str, list[Any]] = {}
    if values["model"]:
        axes["model"] = _parts(values["model"])
    if values["slots"]:
        axes["slots"] = [_slots(each) for each in _parts(values["slots"])]
    axes |= dict(map(axis, values["axes"]))
    sampling = {name: values[name] for name in ("max_tokens", "ignore_eos") if values[name] is not None}
    options = JobOptions(
        dataset=dataset, task=values["task"], template=values["template"], sampling=sampling,
        format=values["format"], device=values["device"], selection=Selection(limit=values["limit"]),
    )  # fmt: skip
    tag = values["tag"] or f"sweep-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return Plan(options, axes, values["repeat_runs"], tag)


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _slots(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 1024:
        raise PromptmillError(f"--slots {text}: not a number from 1 to 1024", hint="For instance --slots 1,2,4,8.")
    return int(text)


def _widths(columns: list[str], cells: list[list[str]], most: int) -> list[int]:
    """Characters of each column but the last: no figure is broken, settings and titles only between words.

    Settings take what the others leave of ``most``; where there is too little, the longest titles are broken.
    """
    texts = list(zip(*cells, strict=True))
    figures = [max(map(len, own)) for own in texts[1:-1]]
    whole = [max(width, _word([title])) for width, title in zip(figures, columns[1:-1], strict=True)]
    least, longest = _word([columns[0], *texts[0]]), max(map(len, texts[0]))
    room = most - least - len(columns)
    while sum(whole) + _word(texts[-1]) > room and whole != figures:
        whole[max(range(len(whole)), key=lambda at: whole[at] - figures[at])] -= 1
    spare = room - sum(whole) - max(map(len, texts[-1]))
    return [least + max(0, min(spare, longest - least)), *whole]


def _word(texts: Sequence[str]) -> int:
    """Characters of the longest word."""
    return max((len(word) for text in texts for word in text.split()), default=0)


def _print(found: Any) -> None:
    from promptmill.reports.compare.sweep import recommended, rows, verdict

    console = stdout_console()
    columns, cells = rows(found)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for at, width in enumerate(_widths(columns, cells, min(console.width, 100))):
        table.add_column(columns[at], justify="right" if at else "left", overflow="fold", width=width)
    table.add_column(columns[-1])
    for row in cells:
        table.add_row(*(Text(cell, style="bold" if "knee" in row[-1] else "") for cell in row))
    console.print(table)
    top = max((each.mean("output_tps") or 0.0 for each in found.settings), default=0.0)
    console.print(Text("\noutput tok/s", style="bold"))
    for each in found.settings:
        rate = each.mean("output_tps") or 0.0
        bar = "█" * round(44 * rate / top) if top else ""
        console.print(Text(f"  {found.label(each)[-34:]:<34} {bar} {rate:,.1f}"))
    console.print(Text(f"\n{verdict(found)}", style="bold"))
    for knee in found.knees():
        console.print(Text(recommended(knee)))
    console.print(Text(f"jobs: promptmill trend --tag {found.tag}", style="dim"))
