"""``init``: a commented task file to begin with."""

from __future__ import annotations

from pathlib import Path

import click

from promptmill.cli.common import check_outputs, force_option
from promptmill.core.outputs import is_stdout, writing
from promptmill.core.terminal import say

KINDS = ("ad-detection", "classification", "extraction", "multiple-choice", "free")


@click.command(epilog="Example: promptmill init ad-detection -o ads.task.yaml")
@click.argument("kind", type=click.Choice(KINDS))
@click.option("-o", "--output", help="Where to write it; - is stdout.  [default: KIND.task.yaml]")
@force_option
def init(kind: str, output: str | None, force: bool) -> None:
    """Write a commented task file of KIND: change its fields and labels to those of your dataset."""
    text = (Path(__file__).with_name("task_templates") / f"{kind}.yaml").read_text(encoding="utf-8")
    target = output or f"{kind}.task.yaml"
    check_outputs(force, target)
    with writing(target) as stream:
        stream.write(text)
    if not is_stdout(target):
        say(f"{target} is written; next: promptmill datasets validate FILE --task {target}")
