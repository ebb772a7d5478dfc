"""Jobs that run in the process of a command: who else may be running one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect, writing
from promptmill.database.tables import jobs, metadata, workers
from promptmill.errors import JobError, ModelError
from promptmill.ledger import Ledger
from promptmill.service.local_run import require_same_model, require_unheld
from promptmill.store.catalog import find_job
from promptmill_workers.devices import worker_lock
from tests.unit.test_ledger import JOB, add_job


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """With a job of which a worker ``a`` runs a chunk; it has no row yet."""
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path))
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


@pytest.mark.parametrize("known", [None, "a" * 64])
def test_a_job_is_not_gone_on_with_by_another_model(held: Ledger, known: str | None) -> None:
    with writing(held.db) as db:
        db.execute(sa.update(jobs).values(model_fingerprint=known))
    job = find_job(held.db, JOB)
    require_same_model(job, "a" * 64)
    if known is not None:
        with pytest.raises(
            ModelError, match="with the fingerprint aaaaaaaaaaaa, and the files there are another model"
        ):
            require_same_model(job, "b" * 64)


def add_worker(held: Ledger, pid: int) -> None:
    row = {"id": "a", "host": socket.gethostname(), "pid": pid, "state": "busy", "device_asked": "cpu"}
    with writing(held.db) as db:
        db.execute(sa.insert(workers).values(**row, started_at=0.0, heartbeat_at=0.0))


def test_a_run_whose_pid_is_another_process_now_is_dead(held: Ledger) -> None:
    add_worker(held, os.getpid())
    lock = worker_lock("a")
    lock.acquire()
    with pytest.raises(JobError, match=f"is being run by process {os.getpid()} on "):
        require_unheld(JOB, held)
    lock.release()
    require_unheld(JOB, held)
    # What it left is gone: nothing proves any more that it was here.
    with pytest.raises(JobError):
        require_unheld(JOB, held)


def test_a_run_in_a_container_whose_pids_are_not_known_here_is_left_to_it(held: Ledger) -> None:
    # There is no such process here, and it has no lock here.
    add_worker(held, 2**22 + 1)
    with pytest.raises(JobError, match="is being run by process"):
        require_unheld(JOB, held)


def test_a_process_that_is_not_known_is_not_named(held: Ledger) -> None:
    with pytest.raises(JobError, match=r"is being run by another process\n") as raised:
        require_unheld(JOB, held)
    assert "its lease ends in" in (raised.value.hint or "")
