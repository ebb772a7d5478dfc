"""``init``: a commented task file to begin with."""

from __future__ import annotations

from pathlib import Path

import click

from promptmill.errors import TaskFileError

KINDS = ("ad-detection", "classification", "extraction", "multiple-choice", "free")


@click.command(epilog="Example: promptmill init ad-detection -o ads.task.yaml")
@click.argument("kind", type=click.Choice(KINDS))
@click.option("-o", "--output", help="Where to write it; - is stdout.  [default: KIND.task.yaml]")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def init(kind: str, output: str | None, force: bool) -> None:
    """Write a commented task file of KIND: change its fields and labels to those of your dataset."""
    text = (Path(__file__).parents[1] / "task_templates" / f"{kind}.yaml").read_text(encoding="utf-8")
    target = output or f"{kind}.task.yaml"
    if target == "-":
        click.echo(text, nl=False)
        return
    try:
        with open(target, "w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise TaskFileError(f"{target} is there already", hint="Give another -o, or --force.") from None
    except OSError as problem:
        raise TaskFileError(f"cannot write {target}: {problem.strerror}") from None
    click.echo(f"{target} is written; next: promptmill datasets validate FILE --task {target}")
