"""What a chunk comes to that meets an error nobody foresaw, and how its lease is kept. Hosts of the echo engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa

from promptmill.database import connect
from promptmill.ledger import Ledger, Standing
from promptmill.tables import attempts, metadata, results
from promptmill.types import ChunkId, JobState, Lease
from promptmill_workers import run_chunk
from promptmill_workers.devices import parse_devices
from promptmill_workers.engines.contract import EngineOptions
from promptmill_workers.host import HostConfig
from promptmill_workers.host_keeper import HostKeeper
from promptmill_workers.patience import Patience
from promptmill_workers.run_chunk import ChunkRunner
from promptmill_workers.stopping import Stop
from tests.unit.test_ledger import JOB, add_job


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def hosts() -> Iterator[HostKeeper]:
    keeper = HostKeeper(HostConfig("echo", parse_devices("cpu")[0], EngineOptions(slots=4)))
    yield keeper
    keeper.close()


def test_a_row_that_the_database_never_takes_ends_as_an_error(
    db: sa.Engine, hosts: HostKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    add_job(db, 6, 6)
    with db.begin() as connection:
        connection.execute(
            sa.text(
                "CREATE TRIGGER refuse BEFORE INSERT ON results WHEN NEW.row = 4 AND NEW.state = 'ok' "
                "BEGIN SELECT RAISE(ABORT, 'value out of range'); END"
            )
        )
    stop = Stop()
    ledger = Ledger(db, max_attempts=1)
    runner = ChunkRunner(ledger, hosts, stop, Patience(stop))
    tried = 0
    while (lease := ledger.claim_next(JOB, "a")) is not None:
        tried += 1
        assert tried < 20, "the chunk is tried for ever"
        runner.run(lease)
    progress = ledger.progress(JOB)
    assert (progress.state, progress.ok, progress.errors) == (JobState.COMPLETED, 5, 1)
    with db.connect() as connection:
        failed = connection.execute(
            sa.select(results.c.row, results.c.error_class, results.c.error_message).where(results.c.state == "error")
        ).one()
        outcomes = set(connection.execute(sa.select(attempts.c.outcome)).scalars())
    assert failed[:2] == (4, "internal")
    assert failed[2] == "internal error: IntegrityError: value out of range"
    assert outcomes == {"done", "failed"}
    # Statements and their values, answers among them, are in no log.
    assert "[SQL" not in caplog.text
    assert "[parameters" not in caplog.text


def test_two_failures_in_a_row_wait_before_the_third_attempt(db: sa.Engine, hosts: HostKeeper, clock: Any) -> None:
    add_job(db, 2, 2, sampling="not JSON")
    stop = Stop()
    ledger = Ledger(db, clock=clock)
    runner = ChunkRunner(ledger, hosts, stop, Patience(stop))
    for _ in range(2):
        lease = ledger.claim_next(JOB, "a")
        assert lease is not None
        runner.run(lease)
    assert ledger.claim_next(JOB, "a") is None
    clock.advance(5)
    assert ledger.claim_next(JOB, "a") is not None


@dataclass
class SlowLedger:
    """A database that takes a second of the clock for every look."""

    clock: Any
    lease_s: float = 30.0
    looks: int = 0
    renewed: list[float] = field(default_factory=list)

    def standing(self, lease: Lease) -> Standing:
        self.looks += 1
        self.clock.advance(1)
        return Standing.HELD

    def renew(self, lease: Lease) -> Standing:
        self.renewed.append(self.clock())
        return self.standing(lease)


def test_leases_are_renewed_by_the_clock(monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
    ledger = SlowLedger(clock)
    monkeypatch.setattr(run_chunk, "WATCH_S", 0.001)
    monkeypatch.setattr(run_chunk, "time", SimpleNamespace(monotonic=clock), raising=False)
    lease = Lease(ChunkId(JOB, 0), 1, 0, "a", 0, 1, "echo", 0.0, None, 5)
    with run_chunk.watching(cast(Ledger, ledger), lease, Stop()):
        give_up = time.monotonic() + 20
        while ledger.looks < 20 and time.monotonic() < give_up:
            time.sleep(0.001)
    waits = [later - earlier for earlier, later in zip(ledger.renewed, ledger.renewed[1:], strict=False)]
    assert waits
    assert max(waits) <= ledger.lease_s / run_chunk.RENEWALS + 1


class ReluctantLedger(Ledger):
    """Tells of a lease half a second late, and takes its end as late, the first time with an error."""

    refused = False

    def claim_next(self, job_id: str, worker_id: str) -> Lease | None:
        lease = super().claim_next(job_id, worker_id)
        time.sleep(0.5)
        return lease

    def _record(self, *arguments: Any, **named: Any) -> int:
        time.sleep(0.5)
        return super()._record(*arguments, **named)

    def finish(self, *arguments: Any, **named: Any) -> bool:
        if not self.refused:
            self.refused = True
            time.sleep(0.5)
            raise sa.exc.OperationalError("COMMIT", {}, Exception("away"), connection_invalidated=True)
        return super().finish(*arguments, **named)


def test_the_time_of_an_attempt_is_accounted_for_however_slow_the_database_is(db: sa.Engine, hosts: HostKeeper) -> None:
    add_job(db, 6, 2)
    stop = Stop()
    ledger = ReluctantLedger(db)
    runner = ChunkRunner(ledger, hosts, stop, Patience(stop))
    # Beforehand, so that no attempt holds its lease while the host starts.
    with hosts.session("echo"):
        pass
    while (lease := ledger.claim_next(JOB, "a")) is not None:
        runner.run(lease)
    with db.connect() as connection:
        tried = connection.execute(sa.select(attempts).order_by(attempts.c.number)).all()
    assert [each.outcome for each in tried] == ["done"] * 3
    gaps = [
        each.ended_at - each.started_at - each.prefill_s - each.decode_s - each.overhead_s - each.idle_s
        for each in tried
    ]
    assert max(map(abs, gaps)) < 0.2, gaps
