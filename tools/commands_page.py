"""Write docs/commands.md: what ``--help`` says of each command.

python tools/commands_page.py            write the page
python tools/commands_page.py --check    fail when it is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from promptmill.cli import cli

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"

HEAD = """# Commands

`promptmill COMMAND --help` prints the same text. This page is made from it (`python tools/commands_page.py`).
"""


def page() -> str:
    """The whole text."""
    root = click.Context(cli, info_name="promptmill", terminal_width=100, **cli.context_settings)
    return HEAD + "".join(_sections(root, "##"))


def _sections(context: click.Context, heading: str) -> Iterator[str]:
    """The help of a command, then of the commands under it."""
    yield f"\n{heading} {context.command_path}\n\n```text\n{context.get_help()}\n```\n"
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None
            below = click.Context(command, info_name=name, parent=context, terminal_width=100)
            yield from _sections(below, "##" if context.parent is None else "###")


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/commands.md is not current: python tools/commands_page.py")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
