"""``tag`` and ``note``: what people write beside their jobs."""

from __future__ import annotations

import sys

import click

from promptmill.cli.common import json_option, open_all, print_json
from promptmill.core.terminal import say


@click.command(
    epilog="""\b
Examples:
  promptmill tag @last nightly
  promptmill tag @last nightly --remove
  promptmill tag @last
"""
)
@click.argument("job")
@click.argument("tags", nargs=-1)
@click.option("--remove", is_flag=True, help="Take the tags away.")
@json_option
def tag(job: str, tags: tuple[str, ...], remove: bool, as_json: bool) -> None:
    """Give JOB tags, or print those it has. 'promptmill trend --tag' follows the jobs of a tag."""
    from promptmill.store.catalog import find_job
    from promptmill.store.tags import add_tags, remove_tags, tags_of

    _, db = open_all()
    job_id = find_job(db, job).id
    if tags:
        (remove_tags if remove else add_tags)(db, job_id, tags)
    found = tags_of(db, job_id)
    if as_json:
        print_json({"job_id": job_id, "tags": found})
    else:
        say(" ".join(found) if found else f"{job_id} has no tags")


@click.command(
    epilog="""\b
Examples:
  promptmill note @last "after the driver update"
  promptmill note @last
  promptmill note @last --remove
"""
)
@click.argument("job")
@click.argument("text", required=False)
@click.option("--remove", is_flag=True, help="Take the note away.")
@json_option
def note(job: str, text: str | None, remove: bool, as_json: bool) -> None:
    """Write TEXT (- reads stdin) beside JOB, or print what is there. Reports show it."""
    from promptmill.store.catalog import find_job
    from promptmill.store.tags import set_note

    _, db = open_all()
    found = find_job(db, job)
    kept = found.note
    if text is not None or remove:
        kept = None if remove else (sys.stdin.read() if text == "-" else text or "").strip() or None
        set_note(db, found.id, kept)
    if as_json:
        print_json({"job_id": found.id, "note": kept})
    else:
        say(kept or f"{found.id} has no note")
