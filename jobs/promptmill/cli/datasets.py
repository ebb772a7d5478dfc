"""``datasets``: look at a dataset before it is run."""

from __future__ import annotations

import click

from promptmill.cli.common import json_option, print_json


@click.group()
def datasets() -> None:
    """Look at datasets before they are run."""


@datasets.command(epilog="Example: promptmill datasets validate comments.jsonl --task ads.task.yaml")
@click.argument("file")
@click.option("--task", type=click.Path(), help="Task file whose template and labels the lines must fit.")
@click.option("--format", "format_", help="Format of the file where its name does not tell.")
@json_option
def validate(file: str, task: str | None, format_: str | None, as_json: bool) -> None:
    """Read every line of FILE as a job would, and list what is wrong. Exit code 2 if anything is."""
    from promptmill.service import validate_dataset

    found = validate_dataset(file, task, format_)
    if as_json:
        print_json(found)
    else:
        click.echo(
            f"{found['name']}: {found['rows']:,} rows of {found['format']}, {found['labelled']:,} of them labelled, "
            f"sha256 {found['sha256'][:12]}; all can be used"
        )
