"""Commands that look answer at once: they import nothing of what runs jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: Celery, the modules that run jobs, and what they import.
HEAVY = (
    "celery",
    "kombu",
    "jinja2",
    "alembic",
    "promptmill.service.service",
    "promptmill.service.prepare",
    "promptmill_workers",
)

LOOK = f"""
import sys
from promptmill.cli import cli
cli(sys.argv[1:], standalone_mode=False)
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", [["workers"], ["workers", "--json"], ["list"]])
def test_a_command_that_looks_imports_nothing_that_runs(command: list[str], tmp_path: Path, redis_url: str) -> None:
    from promptmill.database.engine import connect, epoch, writing
    from promptmill.database.revision import upgrade
    from promptmill.database.tables import workers

    url = f"sqlite:///{tmp_path / 'a.sqlite'}"
    db = connect(url)
    upgrade(db)
    with writing(db) as connection:
        connection.execute(
            workers.insert().values(
                id="w", host="here", pid=1, state="idle", models='["echo"]', device_asked="cpu", engine="echo",
                model="echo", slots=1, started_at=epoch(), heartbeat_at=epoch(),
            )
        )  # fmt: skip
    db.dispose()
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOK, *command], capture_output=True, text=True, check=True,
        env={"JOBS_DATABASE_URL": url, "JOBS_REDIS_URL": redis_url}, cwd=tmp_path,
    )  # fmt: skip
    assert done.stderr.strip() == "[]"
    assert command[0] != "workers" or "echo" in done.stdout
