"""``verify``: whether answers of a job are what the model says to each prompt alone."""

from __future__ import annotations

import click

from promptmill.cli.common import json_option, open_all, print_json
from promptmill.errors import EXIT_FAILED


@click.command(epilog="Example: promptmill verify @last --sample 50")
@click.argument("job")
@click.option("--sample", type=click.IntRange(1), default=50, show_default=True, help="Rows to run again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the choice of rows.")
@click.option("--device", default="auto", show_default=True, help="Where they run.")
@json_option
def verify(job: str, sample: int, seed: int, device: str, as_json: bool) -> None:
    """Run rows of JOB again, one at a time and with nothing shared, and compare the answers; check the ledger's sums.

    Exit code 1 when an answer differs or a sum is wrong. A quantised model may part from itself at a near tie, because
    its arithmetic depends on the size of the batch; a neighbour's text would look quite different.
    """
    from promptmill.cli.progress import counting
    from promptmill.verification import verify as run

    settings, db = open_all()
    with counting("rows verified") as on_row:
        found = run(job, sample, seed, settings, db, device, on_row)
    if as_json:
        print_json(found.to_json())
    else:
        rate = "" if found.rate is None else f" ({found.rate:.1%})"
        click.echo(f"{found.mismatches} of {found.compared} answers differ{rate}; {found.left_out} left out")
        for each in found.examples:
            click.echo(f"  row {each.row}, character {each.at}: {each.stored!r} stored, {each.alone!r} alone")
        for sentence in found.sums or ("the ledger's sums hold",):
            click.echo(f"  {sentence}")
    if not found.ok:
        raise click.exceptions.Exit(EXIT_FAILED)
