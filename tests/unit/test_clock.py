"""One clock: the database's. A machine's own may be wrong, may be set, and stops while the machine sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from promptmill.core.settings import Settings
from promptmill.database.clock import DatabaseClock
from promptmill.database.engine import connect, epoch
from promptmill.database.tables import jobs, metadata, results
from promptmill.ledger import Ledger
from promptmill.service.job_options import JobOptions
from promptmill.service.prepare import prepare
from promptmill.service.submission import submit
from promptmill.store import catalog
from promptmill.store.retention import old_jobs
from promptmill.types import ErrorClass, Failed, FinishReason, Lease, Ok, Timing, Usage
from tests.conftest import replace_clock

HOUR = 3600.0


class Machine:
    """Its wall clock is ``ahead_s``. While it ``slept_s``, the database's went on and ``time.monotonic()`` did not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, db: sa.Engine) -> None:
        self.slept_s = self.ahead_s = 0.0
        wall = time.time
        monkeypatch.setattr("time.time", lambda: wall() + self.ahead_s)
        replace_clock(db, lambda own: f"({own} + {self.slept_s!r})")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, db: sa.Engine) -> Machine:
    return Machine(monkeypatch, db)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def submitted(db: sa.Engine, tmp_path: Path) -> Callable[..., str]:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')

    def one(deadline: str | None = None) -> str:
        options = JobOptions(dataset=str(path), model="echo", deadline=deadline)
        with prepare(options, Settings(), "queue") as prepared:
            return submit(db, prepared)

    return one


def claimed(ledger: Ledger, job_id: str) -> Lease:
    lease = ledger.claim_next(job_id, "a")
    assert lease is not None
    return lease


def answer_now(row: int, seconds: float = 0.001) -> tuple[Ok, int]:
    """As an engine host tells it: by the clock of its machine."""
    start = time.monotonic()
    time.sleep(seconds)
    end = time.monotonic()
    return Ok(row, "answer", FinishReason.STOP, Usage(5, 0, 3), Timing(start, start, end, end)), 16


# --- reading it ------------------------------------------------------------------------------------------------------


class Far:
    """A database whose answers take ``there_s`` and ``back_s``, and a machine whose clock stands still meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here, self.clock = 100.0, DatabaseClock()
        monkeypatch.setattr("promptmill.database.clock.time.monotonic", lambda: self.here)

    def ask(self, there_s: float, back_s: float, ahead_s: float = 1000.0) -> float:
        """Seconds that it is believed to be ahead after an answer."""

        sent = self.here
        now = sent + there_s + ahead_s
        self.here = sent + there_s + back_s
        self.clock.learn(now, sent, self.here)
        return self.clock.at(self.here + 100) - (self.here + 100)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Far:
    return Far(monkeypatch)


def test_a_late_answer_is_believed_until_a_faster_one_contradicts_it(far: Far) -> None:
    assert far.ask(0.0, 0.5) == pytest.approx(999.75)
    assert far.ask(0.001, 0.001) == pytest.approx(1000.0)
    assert far.ask(0.0, 0.5) == pytest.approx(1000.0)
    assert far.ask(0.3, 0.0) == pytest.approx(1000.0)


def test_answers_that_agree_change_nothing(far: Far) -> None:
    """Times of one host are compared with each other: they may not wander."""
    believed = {far.ask(0.001 * number, 0.003, 1000 + 0.0005 * (number % 3)) for number in range(20)}
    assert len({round(each, 6) for each in believed}) == 1


@pytest.mark.parametrize("ahead_s", [1000 + HOUR, 1000 - HOUR, 1000.5])
def test_a_jump_is_known_at_the_next_answer_however_late(far: Far, ahead_s: float) -> None:
    far.ask(0.0001, 0.0001)
    assert far.ask(0.1, 0.1, ahead_s) == pytest.approx(ahead_s, abs=0.1)


def test_drift_is_followed(far: Far) -> None:
    far.ask(0.0001, 0.0001)
    for minute in range(1, 600):
        far.here += 60
        # A clock that is a second a day off.
        ahead_s = 1000 + minute * 60 / 86_400
        assert far.ask(0.002, 0.002, ahead_s) == pytest.approx(ahead_s, abs=0.005)


@pytest.mark.parametrize("by_s", [-0.3, -0.003, 0.003, 0.3])
def test_a_correction_turns_no_order_of_moments_round(far: Far, by_s: float) -> None:
    far.ask(0.0001, 0.0001)
    far.here += 1
    before = [far.here + each / 1000 for each in range(-500, 0)]
    said = [far.clock.at(each) for each in before]
    far.ask(0.0001, 0.0001, 1000 + by_s)
    assert [far.clock.at(each) for each in before] == said
    after = [far.clock.at(far.here + each / 1000) for each in range(500)]
    assert said + after == sorted(said + after)


def test_it_says_how_wrong_the_machine_is(machine: Machine) -> None:
    clock = DatabaseClock()
    assert clock.ahead_s() is None
    right = time.time()
    machine.ahead_s = -HOUR
    clock.learn(right, time.monotonic(), time.monotonic())
    assert clock.ahead_s() == pytest.approx(HOUR, abs=60)


# --- what a worker stores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["slept", "set back", "set forward"])
@pytest.mark.parametrize("when", ["before the claim", "while it runs"])
def test_stored_times_are_in_order_on_a_machine_that_slept_or_whose_clock_was_set(
    db: sa.Engine, machine: Machine, submitted: Callable[..., str], trouble: str, when: str
) -> None:
    def strike() -> None:
        machine.slept_s = HOUR if trouble == "slept" else 0.0
        machine.ahead_s = {"set back": -HOUR, "set forward": HOUR}.get(trouble, 0.0)

    ledger, job = Ledger(db), submitted()
    with db.connect() as connection:
        ledger.database_clock.read(connection)
    if when == "before the claim":
        strike()
    lease = claimed(ledger, job)
    assert ledger.record(lease, [answer_now(0)])
    strike()
    assert ledger.record(lease, [answer_now(1)])
    assert ledger.finish(lease, last=[answer_now(2)])
    with db.connect() as connection:
        for row in connection.execute(sa.select(results)):
            assert row.enqueued_at <= row.admitted_at + 0.01
            assert row.admitted_at <= row.first_token_at <= row.finished_at <= row.committed_at + 0.01


def test_the_times_of_an_error_that_is_tried_again_are_the_database_s_too(
    db: sa.Engine, machine: Machine, submitted: Callable[..., str]
) -> None:
    from promptmill.database.tables import retries

    machine.slept_s = HOUR
    ledger, job = Ledger(db), submitted()
    timing = answer_now(0)[0].timing
    ledger.record(claimed(ledger, job), [(Failed(0, ErrorClass.TIMEOUT, "no answer", Usage(5, 0, 2), timing), 16)])
    with db.connect() as connection:
        row = connection.execute(sa.select(retries)).one()
    assert row.retried_at - 60 < row.admitted_at <= row.finished_at <= row.retried_at + 0.01


# --- what a person asks for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead_s", [-3 * HOUR, 3 * HOUR])
def test_a_deadline_counts_by_the_database_whatever_the_submitter_s_clock_says(
    db: sa.Engine, machine: Machine, submitted: Callable[..., str], ahead_s: float
) -> None:
    machine.ahead_s = ahead_s
    job = catalog.find_job(db, submitted("1h"))
    assert job.deadline_at - job.submitted_at == pytest.approx(HOUR)
    Ledger(db).expire_overdue()
    assert catalog.find_job(db, job.id).state == "queued"


def test_the_last_job_is_the_one_that_was_submitted_last(
    db: sa.Engine, machine: Machine, submitted: Callable[..., str]
) -> None:
    submitted()
    time.sleep(0.005)
    machine.ahead_s = -HOUR
    last = submitted()
    assert catalog.find_job(db, "@last").id == last


def test_old_is_old_by_the_database_s_clock(db: sa.Engine, machine: Machine, submitted: Callable[..., str]) -> None:
    young, old = submitted(), submitted()
    for job, age_s in ((young, 0.0), (old, 40 * 24 * HOUR)):
        with db.begin() as connection:
            ended = {"state": "completed", "finished_at": epoch() - age_s}
            connection.execute(sa.update(jobs).where(jobs.c.id == job).values(ended))
    machine.ahead_s = 60 * 24 * HOUR
    assert [each.id for each in old_jobs(db, "30d")] == [old]
    machine.ahead_s = -60 * 24 * HOUR
    assert [each.id for each in old_jobs(db, "30d")] == [old]


def test_the_times_of_an_answer_are_moved_one_by_one() -> None:
    assert Timing(1.0, 2.0, 3.0, 4.0).by(lambda moment: 10 * moment) == Timing(10.0, 20.0, 30.0, 40.0)
