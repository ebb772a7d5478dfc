"""``datasets``: look at a dataset before it is run."""

from __future__ import annotations

from typing import Any

import click

from promptmill.cli.common import json_option, print_json, stdout_console
from promptmill.core.terminal import say
from promptmill.errors import EXIT_BAD_INPUT


@click.group()
def datasets() -> None:
    """Look at datasets before they are run."""


@datasets.command(epilog="Example: promptmill datasets validate comments.jsonl --task ads.task.yaml")
@click.argument("file")
@click.option("--task", type=click.Path(), help="Task file whose template and labels the lines must fit.")
@click.option("--format", "format_", help="Format of the file where its name does not tell.")
@click.option("-m", "--model", help="Measure the prompts with this model's tokeniser.")
@json_option
def validate(file: str, task: str | None, format_: str | None, model: str | None, as_json: bool) -> None:
    """Read every line of FILE as a job would, and list what is wrong. Exit code 2 if anything is.

    Duplicates are only told; labels that no answer could equal are wrong.
    """
    from promptmill.service.lint import validate_dataset

    found = validate_dataset(file, task, format_, model)
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["problems"]:
        raise click.exceptions.Exit(EXIT_BAD_INPUT)


def _print(found: dict[str, Any]) -> None:
    verdict = "" if found["problems"] else "; all can be used"
    say(
        f"{found['name']}: {found['rows']:,} rows of {found['format']}, {found['labelled']:,} of them labelled, "
        f"sha256 {found['sha256'][:12]}{verdict}"
    )
    for name, counts in found["labels"].items():
        say(f"  {name}: " + ", ".join(f"{label} {count:,}" for label, count in counts.items()))
    told = {
        "duplicate_ids": "ids used before, numbered",
        "duplicate_inputs": "inputs that were there before, with the same labels",
        "contradictions": "inputs that were there before, with other labels",
        "mentions": "prompts that hold the value expected of them",
        "answers_too_long": "expected answers with more tokens than max_tokens",
    }
    for key, text in told.items():
        _print_finding(text, found[key])
    for name, finding in found["missing_labels"].items():
        _print_finding(f"rows without a value for {name}", finding)
    if found["tokens"]:
        say("  prompt tokens: " + ", ".join(f"{key} {value}" for key, value in found["tokens"].items()))
    for problem in found["problems"]:
        say(f"  wrong: {problem}")


def _print_finding(text: str, finding: dict[str, Any]) -> None:
    if finding["count"]:
        say(f"  {finding['count']:,} {text}: {', '.join(finding['ids'])}")


@datasets.command(epilog="Example: promptmill datasets show comments.jsonl --task ads.task.yaml --model demo")
@click.argument("file")
@click.option("--task", type=click.Path(), help="Task file whose template is filled.")
@click.option("--format", "format_", help="Format of the file where its name does not tell.")
@click.option("-m", "--model", help="Apply this model's chat template, and count its tokens.")
@click.option("--sample", type=click.IntRange(1), default=5, show_default=True, help="Lines to draw.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draw.")
@click.option("--where", multiple=True, help="Lines with FIELD=VALUE only; may be repeated.")
@json_option
def show(
    file: str, task: str | None, format_: str | None, model: str | None, sample: int, seed: int,
    where: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Print lines of FILE as the model will see them. What is expected is shown beside; no prompt holds it."""
    from dataclasses import asdict

    from rich.text import Text

    from promptmill.service.lint import preview
    from promptmill.service.selection import Selection, parse_where

    found = preview(file, task, format_, model, Selection(where=parse_where(where), sample=sample, seed=seed))
    if as_json:
        print_json([asdict(each) for each in found])
        return
    console = stdout_console()
    for each in found:
        tokens = f", {each.tokens:,} tokens" if each.tokens is not None else ""
        console.print(Text(f"--- line {each.line}, {each.id or 'no id'}{tokens}", style="bold"), soft_wrap=True)
        say(each.prompt if each.error is None else f"cannot be used: {each.error}")
        if each.expected is not None:
            console.print(Text(f"expected: {each.expected}", style="dim"), soft_wrap=True)
