"""What a command says on stderr about a job before and while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from promptmill.cli.common import print_json, stderr_console

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from promptmill.service.preflight import Preflight


def report_dry_run(options: Any, mode: str, as_json: bool) -> None:
    """``--dry-run``: the preflight, and nothing else."""
    from promptmill.core.settings import load_settings
    from promptmill.service.service import dry_run

    found = dry_run(options, load_settings(), mode)
    if as_json:
        print_json(found.to_json() if found else None)
    else:
        show_preflight(found)
        stderr_console().print("dry run: nothing was stored")


def show_preflight(found: Preflight | None) -> None:
    """One line on stderr about what the job will take."""
    from promptmill.cli.progress import preflight_line

    text = preflight_line(found) if found else "the model is not on this machine: prompts were not measured"
    stderr_console().print(text, soft_wrap=True)


def show_warning(text: str) -> None:
    stderr_console().print(f"warning: {text}", soft_wrap=True, markup=False)


def show_numbered(job_id: str, db: Engine) -> None:
    """Say which lines had an id that an earlier one has."""
    from promptmill.service.service import numbered_ids

    found = numbered_ids(job_id, db)
    if found:
        stderr_console().print(f"ids used before were numbered: {', '.join(found)}", soft_wrap=True, markup=False)
