"""``models``: what can be given to ``--model``."""

from __future__ import annotations

import click

from promptmill.cli.common import json_option, print_json, table


@click.group()
def models() -> None:
    """Models at hand."""


@models.command("list", epilog="Example: promptmill models list")
@json_option
def list_(as_json: bool) -> None:
    """List the models on this machine: the bundled ones and those fetched from the hub."""
    from promptmill_workers.checkpoints import available

    found = [
        {"name": each.name, "engine": each.engine, "path": str(each.path) if each.path else None}
        for each in available()
    ]
    if as_json:
        print_json(found)
    else:
        table(["model", "engine", "path"], [[each["name"], each["engine"], each["path"]] for each in found])
