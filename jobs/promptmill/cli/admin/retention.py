"""``rm`` and ``gc``: removing jobs."""

from __future__ import annotations

import sys

import click

from promptmill.cli.common import OptionsCommand, clock, json_option, open_all, print_json, table
from promptmill.core.terminal import say
from promptmill.errors import PromptmillError


@click.command(epilog="Example: promptmill rm @last --yes")
@click.argument("jobs", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(jobs: tuple[str, ...], yes: bool) -> None:
    """Remove JOBS that have ended, with their prompts, results and scores. This cannot be undone."""
    from promptmill.store.catalog import find_job
    from promptmill.store.retention import remove

    _, db = open_all()
    ids = list(dict.fromkeys(find_job(db, each).id for each in jobs))
    if not yes:
        _ask(f"remove {', '.join(ids)} and all results?")
    for job_id in ids:
        say(f"removed {remove(db, job_id)}")


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise PromptmillError("nothing was removed: stdin is no terminal, so no question was asked", hint="Give --yes.")
    click.confirm(question, abort=True, err=True)


@click.command(cls=OptionsCommand, epilog="Example: promptmill gc --older-than 30d --dry-run")
@click.option("--older-than", required=True, help="Jobs that ended longer ago, such as 30d or 12h.")
@click.option("--keep-scores", is_flag=True, help="Remove prompts and answers only; figures and scores stay.")
@click.option("--dry-run", is_flag=True, help="Only list them.")
@json_option
def gc(older_than: str, keep_scores: bool, dry_run: bool, as_json: bool) -> None:
    """Remove jobs that ended long ago, with their prompts, results and scores."""
    from promptmill.scoring.forgetting import forget
    from promptmill.store.retention import collect, old_jobs
    from promptmill.types import GONE

    _, db = open_all()
    found = old_jobs(db, older_than)
    if keep_scores:
        found = [job for job in found if job.store not in GONE.values()]
    if not dry_run and keep_scores:
        found = [job for job in found if forget(db, job.id, "none")]
    elif not dry_run:
        removed = collect(db, older_than)
        found = [job for job in found if job.id in removed]
    if as_json:
        print_json([job.id for job in found])
        return
    if found:
        rows = [[job.id, job.name, job.state, job.rows, clock(job.finished_at)] for job in found]
        table(["job", "name", "state", "rows", "finished"], rows, right={"rows"})
    jobs = "job" if len(found) == 1 else "jobs"
    what = "prompts and answers of " if keep_scores else ""
    say(f"{what}{len(found)} {jobs} {'would be removed' if dry_run else 'removed'}")
