"""``shell-init``: ``jobs`` is a builtin of every shell, and builtins are found before programs on PATH."""

from __future__ import annotations

import click

from promptmill.core.terminal import say

SCRIPT = """\
# promptmill: known subcommands of `jobs` go to promptmill, everything else to the shell's own `jobs`.
jobs() {{
  case "${{1-}}" in
    {names})
      command promptmill "$@" ;;
    *)
      builtin jobs "$@" ;;
  esac
}}
"""


@click.command("shell-init", epilog='Example, for ~/.bashrc or ~/.zshrc: eval "$(promptmill shell-init)"')
def shell_init() -> None:
    """Print a function for bash and zsh, so that 'jobs submit dataset.jsonl' works as typed."""
    from promptmill.cli import COMMANDS

    say(SCRIPT.format(names="|".join(COMMANDS)), nl=False)
