"""``verify``: whether answers of a job are what the model says to each prompt alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from promptmill.cli.common import json_option, open_all, print_json
from promptmill.core.terminal import say
from promptmill.errors import EXIT_FAILED

if TYPE_CHECKING:
    from promptmill.experiments.verify import Verification


@click.command(epilog="Example: promptmill verify @last --sample 50")
@click.argument("job")
@click.option("--sample", type=click.IntRange(1), default=50, show_default=True, help="Rows to run again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the choice of rows.")
@click.option("--device", default="auto", show_default=True, help="Where they run.")
@json_option
def verify(job: str, sample: int, seed: int, device: str, as_json: bool) -> None:
    """Run rows of JOB again, one at a time and with nothing shared, and compare the answers; check the ledger's sums.

    Exit code 1 when a greedy answer differs or a sum is wrong. A model that is not float32 may part from itself at a
    near tie, because its arithmetic depends on the size of the batch; a neighbour's text would look quite different.
    Sampling makes that more frequent: sampled answers are told apart, and fail a float32 model on a CPU only.
    """
    from promptmill.cli.progress import counting
    from promptmill.experiments.verify import verify as run

    settings, db = open_all()
    with counting("rows verified") as on_row:
        found = run(job, sample, seed, settings, db, device, on_row)
    if as_json:
        print_json(found.to_json())
    else:
        say(summary(found))
        for each in found.examples:
            kind = " (sampled)" if each.sampled else ""
            say(f"  row {each.row}{kind}, character {each.at}: {each.stored!r} stored, {each.alone!r} alone")
        for left_out in found.left_out_rows:
            say(f"  row {left_out.row} left out: {left_out.reason}")
        for sentence in found.sums or ("the ledger's sums hold",):
            say(f"  {sentence}")
    if not found.ok:
        raise click.exceptions.Exit(EXIT_FAILED)


def summary(found: Verification) -> str:
    """How many answers differ, in one line."""
    greedy = _share(found.mismatches - found.sampled_mismatches, found.compared - found.sampled_compared)
    sampled = _share(found.sampled_mismatches, found.sampled_compared)
    if not found.sampled_compared:
        differ = f"{greedy[0]} answers differ{greedy[1]}"
    else:
        differ = f"{greedy[0]} greedy answers differ{greedy[1]}, {sampled[0]} sampled ones{sampled[1]}"
    return f"{differ}; {found.left_out} left out"


def _share(differ: int, of: int) -> tuple[str, str]:
    return f"{differ} of {of}", f" ({differ / of:.1%})" if of else ""
