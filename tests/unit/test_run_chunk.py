"""What a chunk comes to that meets an error nobody foresaw, and how its lease is kept. Hosts of the echo engine."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa

from promptmill.database.engine import connect
from promptmill.database.tables import attempts, chunks, jobs, metadata, requests, results
from promptmill.ledger import Ledger, Standing
from promptmill.ledger.conditions import lock_held
from promptmill.types import ChunkId, JobState, Lease, Request, SamplingParams
from promptmill_workers.devices import parse_devices
from promptmill_workers.engines.contract import EngineOptions
from promptmill_workers.host.client import HostConfig, HostCrashed, HostDied
from promptmill_workers.host.model_hosts import ModelHosts
from promptmill_workers.model_files import fingerprint_of, states_of
from promptmill_workers.worker import chunk_runner, held_leases
from promptmill_workers.worker.chunk_runner import ChunkRunner
from promptmill_workers.worker.database_retry import DatabaseRetry
from promptmill_workers.worker.held_leases import HeldLeases
from promptmill_workers.worker.shutdown import Shutdown
from tests.conftest import by_clock, wait_until
from tests.two_models import CHANGED, put
from tests.unit.test_ledger import JOB, add_job, ok


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def hosts() -> Iterator[ModelHosts]:
    keeper = ModelHosts(HostConfig("echo", parse_devices("cpu")[0], EngineOptions(slots=4, threads=1)))
    yield keeper
    keeper.close()


def test_a_row_that_the_database_never_takes_ends_as_an_error(
    db: sa.Engine, hosts: ModelHosts, caplog: pytest.LogCaptureFixture
) -> None:
    add_job(db, 6, 6)
    with db.begin() as connection:
        connection.execute(
            sa.text(
                "CREATE TRIGGER refuse BEFORE INSERT ON results WHEN NEW.row = 4 AND NEW.state = 'ok' "
                "BEGIN SELECT RAISE(ABORT, 'value out of range'); END"
            )
        )
    stop = Shutdown()
    ledger = Ledger(db, max_attempts=1)
    runner = ChunkRunner(ledger, hosts, stop, DatabaseRetry(stop))
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


def test_two_failures_in_a_row_wait_before_the_third_attempt(db: sa.Engine, hosts: ModelHosts, clock: Any) -> None:
    add_job(db, 2, 2, sampling="not JSON")
    stop = Shutdown()
    ledger = Ledger(by_clock(db, clock))
    runner = ChunkRunner(ledger, hosts, stop, DatabaseRetry(stop))
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
    monkeypatch.setattr(held_leases, "WATCH_S", 0.001)
    monkeypatch.setattr(held_leases, "time", SimpleNamespace(monotonic=clock), raising=False)
    lease = Lease(ChunkId(JOB, 0), 1, 0, "a", 0, 1, "echo", 0.0, None, 5)
    with held_leases.watching(cast(Ledger, ledger), lease, Shutdown()):
        give_up = time.monotonic() + 60
        while ledger.looks < 20 and time.monotonic() < give_up:
            time.sleep(0.001)
    waits = [later - earlier for earlier, later in zip(ledger.renewed, ledger.renewed[1:], strict=False)]
    assert waits
    assert max(waits) <= ledger.lease_s / held_leases.RENEWALS + 1


class LosingLedger(Ledger):
    """Commits a claim and the end of a chunk, and loses the answer, once each."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.to_lose = ["claim_next", "finish"]
        #: Done between the end of a chunk and the loss of the answer.
        self.meanwhile: Callable[[], None] = lambda: None

    def _lose(self, name: str) -> None:
        if name in self.to_lose:
            self.to_lose.remove(name)
            raise sa.exc.OperationalError("COMMIT", {}, Exception("away"), connection_invalidated=True)

    def claim_next(self, job_id: str, worker_id: str) -> Lease | None:
        lease = super().claim_next(job_id, worker_id)
        self._lose("claim_next")
        return lease

    def finish(self, *arguments: Any, **named: Any) -> bool:
        done = super().finish(*arguments, **named)
        if "finish" in self.to_lose:
            self.meanwhile()
        self._lose("finish")
        return done


def test_answers_of_the_database_that_are_lost_cost_nothing(db: sa.Engine, hosts: ModelHosts) -> None:
    model = "echo:token_s=0.02"
    add_job(db, 6, 2, model=model)
    stop = Shutdown()
    ledger, patiently = LosingLedger(db), DatabaseRetry(stop)
    runner, claims = ChunkRunner(ledger, hosts, stop, patiently), HeldLeases(ledger, "a", patiently)
    told: list[Any] = []
    with hosts.session(model) as beside:

        def meanwhile() -> None:
            # Half of an answer: the first of the two sessions that asks is told what it cost.
            running.start()
            time.sleep(0.3)

        def answer() -> None:
            request = Request(9, "b", SamplingParams(max_tokens=40), prompt="two " * 40)
            told.extend(each for batch in beside.answer([request]) for each in batch)

        running = threading.Thread(target=answer)
        ledger.meanwhile = meanwhile
        while True:
            with claims.taken(lambda: ledger.claim_next(JOB, "a")) as lease:
                if lease is None:
                    break
                runner.run(lease)
        running.join()
        counters = beside.counters()
    assert ledger.to_lose == []
    assert ledger.progress(JOB).ok == 6
    with db.connect() as connection:
        tried = connection.execute(sa.select(attempts)).all()
        # Answers that were copied from another row's cost nothing.
        sums = sa.select(sa.func.sum(results.c.prompt_tokens - results.c.cached_tokens)).where(~results.c.deduplicated)
        tokens = connection.execute(sums).scalar_one()
    assert [each.outcome for each in tried] == ["done"] * 3
    computed = sum(each.prefill_tokens for each in tried) + counters.prefill_tokens
    assert computed == tokens + sum(each.usage.prompt_tokens - each.usage.cached_tokens for each in told)


# --- another model under the same name -------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    put(path, right=True)
    return path


def fingerprint_at(path: Path) -> str:
    return fingerprint_of(states_of(path))


def runner_of(db: sa.Engine, hosts: ModelHosts, *, alone: bool) -> ChunkRunner:
    stop = Shutdown()
    return ChunkRunner(Ledger(db), hosts, stop, DatabaseRetry(stop), None if alone else lambda model: True)


def tried(db: sa.Engine) -> list[tuple[Any, ...]]:
    columns = attempts.c.number, attempts.c.outcome, attempts.c.model_fingerprint
    with db.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*columns).order_by(*columns[:2]))]


def test_a_chunk_for_another_model_is_given_back_and_has_not_failed(
    db: sa.Engine, hosts: ModelHosts, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = fingerprint_at(model)
    add_job(db, 4, 2, model=str(model), model_fingerprint=right, sampling='{"max_tokens": 4}')
    put(model, right=False)
    ledger, runner = Ledger(db), runner_of(db, hosts, alone=False)
    assert not runner.refuses(JOB, str(model), right), "nobody knows what is there before it was loaded"
    for number in range(2):
        lease = ledger.claim(ChunkId(JOB, number), "wrong")
        assert lease is not None
        runner.run(lease)

    assert runner.refuses(JOB, str(model), right)
    assert tried(db) == [(0, "released", None), (1, "released", None)]
    assert (ledger.progress(JOB).state, ledger.progress(JOB).done) == (JobState.RUNNING, 0)
    told = [each.message for each in caplog.records if "another model" in each.message]
    assert told == [
        f"job {JOB}: it is for the model {model} with the fingerprint {right[:12]}, and the files here are another "
        f"model: {fingerprint_at(model)[:12]}"
    ]
    # The right file is put back: the same worker goes on, and the chunks have no failure.
    put(model, right=True)
    assert not runner.refuses(JOB, str(model), right)
    while (lease := ledger.claim_next(JOB, "right")) is not None:
        assert lease.failures == 0
        runner.run(lease)
    assert (ledger.progress(JOB).state, ledger.progress(JOB).ok) == (JobState.COMPLETED, 4)
    assert tried(db) == [(0, "done", right), (0, "released", None), (1, "done", right), (1, "released", None)]


def test_a_host_that_ends_and_finds_another_file_gives_its_chunk_back(
    db: sa.Engine, hosts: ModelHosts, model: Path
) -> None:
    right = fingerprint_at(model)
    add_job(db, 4, 2, model=str(model), model_fingerprint=right, sampling='{"max_tokens": 4}')
    ledger, runner = Ledger(db), runner_of(db, hosts, alone=False)
    first = ledger.claim(ChunkId(JOB, 0), "a")
    assert first is not None
    runner.run(first)
    put(model, right=False)
    assert hosts.pid is not None
    os.kill(hosts.pid, signal.SIGKILL)
    time.sleep(0.2)
    second = ledger.claim(ChunkId(JOB, 1), "a")
    assert second is not None
    runner.run(second)

    assert tried(db) == [(0, "done", right), (1, "released", None)]
    assert runner.refuses(JOB, str(model), right)


def test_answers_of_files_that_are_written_to_meanwhile_are_not_stored(
    db: sa.Engine, hosts: ModelHosts, model: Path
) -> None:
    right = fingerprint_at(model)
    add_job(db, 8, 8, model=str(model), model_fingerprint=right, sampling='{"max_tokens": 400, "ignore_eos": true}')
    ledger, runner = Ledger(db), runner_of(db, hosts, alone=False)
    lease = ledger.claim(ChunkId(JOB, 0), "a")
    assert lease is not None
    running = threading.Thread(target=runner.run, args=(lease,))
    running.start()
    wait_until(lambda: hosts.info is not None, "the model is loaded")
    with model.open("r+b") as file:
        file.seek(-CHANGED, os.SEEK_END)
        file.write(bytes(CHANGED))
    running.join(120)

    assert tried(db) == [(0, "released", right)]
    assert ledger.progress(JOB).done == 0


def test_a_run_whose_model_became_another_one_ends_and_says_so(db: sa.Engine, hosts: ModelHosts, model: Path) -> None:
    add_job(db, 2, 1, model=str(model), model_fingerprint=fingerprint_at(model), mode="embedded")
    put(model, right=False)
    ledger, runner = Ledger(db), runner_of(db, hosts, alone=True)
    lease = ledger.claim_next(JOB, "a")
    assert lease is not None
    runner.run(lease)

    progress = ledger.progress(JOB)
    assert (progress.state, progress.done) == (JobState.FAILED, 0)
    assert "the files here are another model" in (progress.stop_reason or "")
    assert ledger.claim_next(JOB, "a") is None


def test_a_job_of_which_nobody_knew_the_model_is_for_the_first_that_answers(
    db: sa.Engine, hosts: ModelHosts, model: Path
) -> None:
    add_job(db, 4, 2, model=str(model), sampling='{"max_tokens": 4}')
    ledger, runner = Ledger(db), runner_of(db, hosts, alone=False)
    early = ledger.claim(ChunkId(JOB, 1), "late")
    first = ledger.claim(ChunkId(JOB, 0), "early")
    assert first is not None
    assert early is not None
    right = fingerprint_at(model)
    runner.run(first)
    assert ledger.model_of(JOB) == (str(model), right)
    # Claimed before anybody knew: told all the same.
    put(model, right=False)
    other = ModelHosts(HostConfig("echo", parse_devices("cpu")[0], EngineOptions(slots=4, threads=1)))
    try:
        runner_of(db, other, alone=False).run(early)
    finally:
        other.close()
    assert tried(db) == [(0, "done", right), (1, "released", None)]


def test_an_attempt_names_what_answered_it(db: sa.Engine, hosts: ModelHosts, model: Path) -> None:
    add_job(db, 1, 1, model=str(model), sampling='{"max_tokens": 2}')
    lease = Ledger(db).claim_next(JOB, "a")
    assert lease is not None
    runner_of(db, hosts, alone=True).run(lease)
    with db.connect() as connection:
        found = connection.execute(sa.select(attempts.c.environment)).scalar_one()
    assert json.loads(found) == hosts.info.environment if hosts.info else {}
    assert json.loads(found)["version"]


def texts_of(db: sa.Engine, job_id: str) -> list[tuple[str, bool]]:
    query = sa.select(results.c.text, results.c.deduplicated).where(results.c.job_id == job_id).order_by(results.c.row)
    with db.connect() as connection:
        return [(text, copied) for text, copied in connection.execute(query)]


def run_again(db: sa.Engine, runner: ChunkRunner, job_id: str, **values: Any) -> list[tuple[str, bool]]:
    """Another job like the first one."""
    with db.begin() as connection:
        for table in (jobs, requests, chunks):
            key = table.c.id if table is jobs else table.c.job_id
            for row in connection.execute(sa.select(table).where(key == JOB)).mappings().all():
                zero = {"ok": 0, "errors": 0, "output_tokens": 0, "attempt": 0} if table is chunks else {}
                fresh = (
                    values | {"state": "queued"} if table is jobs else {"state": "queued"} if table is chunks else {}
                )
                connection.execute(sa.insert(table).values({**row, **zero, **fresh, key.name: job_id}))
    return run_all(db, runner, job_id)


def run_all(db: sa.Engine, runner: ChunkRunner, job_id: str) -> list[tuple[str, bool]]:
    ledger = Ledger(db)
    while (lease := ledger.claim_next(job_id, "a")) is not None:
        runner.run(lease)
    return texts_of(db, job_id)


def test_answers_are_kept_under_what_answered(db: sa.Engine, hosts: ModelHosts, model: Path) -> None:
    """Whatever the job says: its claim is wrong here."""
    asked = {"model": str(model), "sampling": '{"max_tokens": 8}', "use_cache": True}
    add_job(db, 1, 1, **asked)
    runner = runner_of(db, hosts, alone=False)
    [(right, copied)] = run_all(db, runner, JOB)
    assert not copied
    assert run_again(db, runner, "again") == [(right, True)]

    put(model, right=False)
    assert hosts.unload(str(model))
    [(wrong, copied)] = run_again(db, runner, "other", model_fingerprint=None)
    assert not copied
    assert wrong != right


def test_no_answer_crosses_from_one_key_to_another(db: sa.Engine, hosts: ModelHosts, model: Path) -> None:
    add_job(db, 1, 1, model=str(model), sampling='{"max_tokens": 4}', use_cache=True, api_key_id="alice")
    runner = runner_of(db, hosts, alone=False)
    assert [copied for _, copied in run_all(db, runner, JOB)] == [False]
    assert [copied for _, copied in run_again(db, runner, "bob", api_key_id="bob")] == [False]
    assert [copied for _, copied in run_again(db, runner, "nobody", api_key_id=None)] == [False]
    assert [copied for _, copied in run_again(db, runner, "alice", api_key_id="alice")] == [True]


def test_without_a_cache_nothing_is_remembered_from_job_to_job(db: sa.Engine, hosts: ModelHosts) -> None:
    add_job(db, 3, 3)
    runner = runner_of(db, hosts, alone=False)
    assert [copied for _, copied in run_all(db, runner, JOB)] == [False, True, True]
    assert [copied for _, copied in run_again(db, runner, "again")] == [False, True, True]


class SickHosts:
    """A device on which hosts end, or do not load."""

    def __init__(self, problem: Exception, restarts: int = 0) -> None:
        self.problem, self.restarts = problem, restarts

    @contextmanager
    def session(self, *arguments: Any, **named: Any) -> Iterator[None]:
        self.restarts += isinstance(self.problem, HostDied)
        raise self.problem
        yield

    def back_off(self) -> float:
        self.restarts += 1
        return 0.01


def run_sick(ledger: Ledger, hosts: SickHosts, *, others: bool) -> None:
    stop = Shutdown()
    runner = ChunkRunner(ledger, cast(ModelHosts, hosts), stop, DatabaseRetry(stop), lambda model: others)
    for _ in range(100):
        lease = ledger.claim_next(JOB, "sick")
        if lease is None:
            return
        runner.run(lease)


def test_a_machine_that_cannot_load_a_model_ends_no_job_of_others(db: sa.Engine) -> None:
    add_job(db, 6, 2)
    ledger = Ledger(db)
    healthy = ledger.claim_next(JOB, "healthy")
    assert healthy is not None
    sick = ledger.claim_next(JOB, "sick")
    assert sick is not None
    stop = Shutdown()
    hosts = SickHosts(HostCrashed("no memory"))
    runner = ChunkRunner(ledger, cast(ModelHosts, hosts), stop, DatabaseRetry(stop), lambda model: True)
    runner.run(sick)
    assert ledger.progress(JOB).state is JobState.RUNNING
    assert ledger.record(healthy, [ok(0), ok(1)]) == 2
    # Its chunk is there for another one at once, and no failure of it is counted.
    again = ledger.claim(sick.chunk, "healthy")
    assert again is not None
    assert again.failures == 0
    assert hosts.restarts == 1


@pytest.mark.parametrize("others", [True, False])
def test_a_model_that_loads_nowhere_ends_its_job(db: sa.Engine, others: bool) -> None:
    add_job(db, 6, 2)
    ledger = Ledger(db)
    hosts = SickHosts(HostCrashed("no memory"))
    run_sick(ledger, hosts, others=others)
    progress = ledger.progress(JOB)
    assert (progress.state, progress.stop_reason) == (JobState.FAILED, "no memory")
    assert hosts.restarts == (chunk_runner.DEATHS_IN_A_ROW if others else 0)


def test_deaths_under_other_jobs_are_not_this_one_s(db: sa.Engine) -> None:
    add_job(db, 2, 2)
    ledger = Ledger(db)
    stop = Shutdown()
    hosts = SickHosts(HostDied("signal 9"), restarts=1000)
    runner = ChunkRunner(ledger, cast(ModelHosts, hosts), stop, DatabaseRetry(stop))
    lease = ledger.claim_next(JOB, "sick")
    assert lease is not None
    runner.run(lease)
    assert ledger.progress(JOB).state is JobState.RUNNING


def test_a_job_that_others_answer_is_not_given_up_by_one_whose_hosts_die(db: sa.Engine, clock: Any) -> None:
    add_job(db, 100, 1)
    ledger = Ledger(by_clock(db, clock))
    stop = Shutdown()
    runner = ChunkRunner(ledger, cast(ModelHosts, SickHosts(HostDied("signal 9"))), stop, DatabaseRetry(stop))
    for _ in range(chunk_runner.DEATHS_IN_A_ROW + 5):
        bad = ledger.claim_next(JOB, "sick")
        assert bad is not None
        good = ledger.claim(ChunkId(JOB, 99 - bad.attempt - bad.chunk.number), "healthy")
        if good is not None:
            assert ledger.finish(good, last=[ok(good.first_row)])
        runner.run(bad)
        clock.advance(100)
    assert ledger.progress(JOB).state is JobState.RUNNING


class ReluctantLedger(Ledger):
    """Tells of a lease half a second late, and takes its end as late, the first time with an error."""

    refused = False

    def claim_next(self, job_id: str, worker_id: str) -> Lease | None:
        lease = super().claim_next(job_id, worker_id)
        time.sleep(0.5)
        return lease

    def finish(self, *arguments: Any, **named: Any) -> bool:
        if not self.refused:
            self.refused = True
            time.sleep(0.5)
            raise sa.exc.OperationalError("COMMIT", {}, Exception("away"), connection_invalidated=True)
        return super().finish(*arguments, **named)


def test_an_engine_is_busy_no_longer_than_its_worker_holds_leases_however_slow_the_database_is(
    db: sa.Engine, hosts: ModelHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock_late(*arguments: Any) -> bool:
        time.sleep(0.5)
        return lock_held(*arguments)

    monkeypatch.setattr("promptmill.ledger.results.lock_held", lock_late)
    add_job(db, 6, 2)
    stop = Shutdown()
    ledger = ReluctantLedger(db)
    runner = ChunkRunner(ledger, hosts, stop, DatabaseRetry(stop))
    # Beforehand, so that no attempt holds its lease while the host starts.
    with hosts.session("echo"):
        pass
    while (lease := ledger.claim_next(JOB, "a")) is not None:
        runner.run(lease)
    with db.connect() as connection:
        tried = connection.execute(sa.select(attempts).order_by(attempts.c.number)).all()
    assert [each.outcome for each in tried] == ["done"] * 3
    held_s = [each.ended_at - each.started_at for each in tried]
    busy_s = [each.prefill_s + each.decode_s + each.overhead_s for each in tried]
    assert all(0 < busy + each.idle_s <= held for busy, held, each in zip(busy_s, held_s, tried, strict=True))
    # Three claims took half a second each: no session was open then.
    assert sum(held_s) - sum(busy_s) - sum(each.idle_s for each in tried) > 1
