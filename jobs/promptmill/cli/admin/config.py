"""``config``: the settings in force."""

from __future__ import annotations

import click

from promptmill.cli.common import json_option, print_json, table


@click.command(epilog="Example: promptmill config --json")
@json_option
def config(as_json: bool) -> None:
    """Print each setting, its value and where it came from: the environment, .env or the default."""
    from promptmill.core.settings import describe, load_settings

    found = describe(load_settings())
    if as_json:
        print_json({each.name: {"value": each.value, "source": each.source} for each in found})
    else:
        table(
            ["setting", "value", "from", ""], [[each.name, each.value, each.source, each.description] for each in found]
        )
