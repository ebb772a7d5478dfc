"""Jobs that run in the process of a command: who else may be running one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from promptmill.database import connect, writing
from promptmill.embedded import require_unheld
from promptmill.errors import JobError
from promptmill.ledger import Ledger
from promptmill.tables import metadata, workers
from tests.unit.test_ledger import JOB, add_job


@pytest.fixture
def held() -> Iterator[Ledger]:
    """With a job of which a worker ``a`` runs a chunk; it has no row yet."""
    db = connect("sqlite://")
    metadata.create_all(db)
    add_job(db, 1, 1, mode="embedded")
    ledger = Ledger(db)
    assert ledger.claim_next(JOB, "a") is not None
    yield ledger
    db.dispose()


def test_a_job_that_another_machine_runs_is_left_to_it(held: Ledger) -> None:
    row = {"id": "a", "host": "elsewhere", "pid": 17, "state": "busy", "device_asked": "cpu", "started_at": 0.0}
    with writing(held.db) as db:
        db.execute(sa.insert(workers).values(**row, heartbeat_at=0.0))
    with pytest.raises(JobError, match="is being run by process 17 on elsewhere"):
        require_unheld(JOB, held)


def test_a_process_that_is_not_known_is_not_named(held: Ledger) -> None:
    with pytest.raises(JobError, match=r"is being run by another process\n") as raised:
        require_unheld(JOB, held)
    assert "its lease ends in" in (raised.value.hint or "")
