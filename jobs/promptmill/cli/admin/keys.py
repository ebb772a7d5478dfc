"""``keys``: who may use the API."""

from __future__ import annotations

from typing import Any

import click

from promptmill.cli.common import clock, json_option, open_all, print_json, table
from promptmill.core.terminal import say


@click.group(
    epilog="""\b
Examples:
  promptmill keys create --name ci --scope submit
  promptmill keys create --name dashboard --scope read --requests-per-s 5
  promptmill keys list
  promptmill keys revoke ci
"""
)
def keys() -> None:
    """Keys of the API: made here, shown once, stored as hashes."""


@keys.command()
@click.option("--name", required=True, help="What the key is for.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(["read", "submit", "admin"]), default=["submit"],
    show_default=True, help="read looks; submit looks and submits; admin sees and does everything. May be repeated.",
)  # fmt: skip
@click.option("--requests-per-s", type=click.FloatRange(0, min_open=True), help="Calls a second.")
@click.option("--queued-requests", type=click.IntRange(1), help="Requests that may wait in the queue.")
@click.option("--stored-bytes", type=click.IntRange(1), help="Bytes of files.")
@click.option("--concurrent", type=click.IntRange(1), help="Answers waited for at one time.")
@json_option
def create(name: str, scopes: tuple[str, ...], as_json: bool, **limits: Any) -> None:
    """Make a key and print it. It cannot be shown again."""
    from promptmill.api import keys as stored

    _, db = open_all()
    key_id, key = stored.create(db, name, tuple(scopes), limits)
    if as_json:
        print_json({"id": key_id, "name": name, "scopes": sorted(set(scopes)), "key": key})
    else:
        say(key)
        say(f"key {key_id} ({name}); it is not shown again", err=True)


@keys.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List keys, without what would let anybody use them."""
    from promptmill.api import keys as stored

    _, db = open_all()
    found = stored.listed(db)
    if as_json:
        print_json(found)
        return
    table(
        ["id", "name", "scopes", "made", "last used", "state"],
        [
            [
                each["id"], each["name"], each["scopes"], clock(each["created_at"]), clock(each["last_used_at"]),
                "revoked" if each["revoked"] else "valid",
            ]
            for each in found
        ],
    )  # fmt: skip


@keys.command()
@click.argument("key")
def revoke(key: str) -> None:
    """Refuse KEY (an id or a name) from now on. What it made stays."""
    from promptmill.api import keys as stored

    _, db = open_all()
    say(f"key {stored.revoke(db, key)} is revoked")
