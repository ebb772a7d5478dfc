"""How urgent a job is that has waited, and which messages were lost: with a real Redis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from redis import Redis

from promptmill.core.settings import Settings
from promptmill.database.engine import connect, epoch, writing
from promptmill.database.tables import chunks, jobs, workers
from promptmill.ledger import Ledger, recovery
from promptmill.queue import broker
from promptmill.queue.broker import Broker, queue_name
from promptmill.queue.dispatcher import (
    AGE_S,
    ALIVE_S,
    LOST_MESSAGE_S,
    SEARCH_LEASES,
    Dispatcher,
    _aged,
    live_workers,
    waits_for,
)
from promptmill.queue.heartbeats import heartbeat_key
from promptmill.service import service
from promptmill.store import catalog
from promptmill.store.catalog import waiting_for_models
from promptmill.types import ChunkId
from tests.conftest import Command, migrate, wait_until

MODEL = "echo"


@pytest.mark.parametrize(
    ("priority", "waited_s", "expected"),
    [(5, 0, 5), (5, AGE_S - 1, 5), (5, AGE_S, 4), (9, 4.5 * AGE_S, 5), (2, 100 * AGE_S, 0), (5, -3, 5)],
)
def test_a_waiting_job_moves_up(priority: int, waited_s: float, expected: int) -> None:
    assert _aged(priority, waited_s) == expected


# --- lost messages ---------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """With a job of four chunks that is urgent, and one that is not."""
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    migrate(url)
    db = connect(url)
    for job_id, priority in (("urgent", 0), ("busy", 5)):
        job = {
            "id": job_id, "state": "queued", "mode": "queue", "dataset_name": "d", "dataset_sha256": "0",
            "dataset_format": "f", "model": MODEL, "sampling": "{}", "priority": priority, "rows": 4, "env": "{}",
            "submitted_at": epoch(),
        }  # fmt: skip
        with writing(db) as connection:
            connection.execute(sa.insert(jobs).values(job))
            for number in range(4):
                values = {"job_id": job_id, "number": number, "first_row": number, "rows": 1, "state": "queued"}
                zero = {"attempt": 0, "ok": 0, "errors": 0, "output_tokens": 0}
                connection.execute(sa.insert(chunks).values(values | zero))
    return Ledger(db, lease_s=0.2)


def pass_time(ledger: Ledger, seconds: float) -> None:
    with writing(ledger.db) as db:
        db.execute(sa.update(chunks).values(published_at=chunks.c.published_at - seconds))


def all_of(*job_ids: str) -> set[ChunkId]:
    return {ChunkId(job_id, number) for job_id in job_ids for number in range(4)}


def test_a_lost_message_is_found_beside_those_of_a_busy_job(
    ledger: Ledger, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "PAGE", 3)
    broker_ = Broker(redis_url)
    dispatcher = Dispatcher(ledger, broker_)
    assert dispatcher.reconcile() == 8
    assert broker_.waiting_chunks(MODEL) == all_of("urgent", "busy")
    with Redis.from_url(redis_url) as redis:
        redis.delete(queue_name(MODEL))  # the list of priority 0
    assert broker_.waiting_chunks(MODEL) == all_of("busy")

    assert Dispatcher(ledger, broker_).reconcile() == 0, "it may just have been read by a worker"
    pass_time(ledger, LOST_MESSAGE_S + 1)
    assert Dispatcher(ledger, broker_).reconcile() == 4
    assert broker_.waiting_chunks(MODEL) == all_of("urgent", "busy")
    assert broker_.waiting([MODEL]) == [8], "what waits was not sent again"


def test_the_queues_of_all_models_are_counted_on_one_connection(ledger: Ledger, redis_url: str) -> None:
    broker_ = Broker(redis_url)
    Dispatcher(ledger, broker_).reconcile()
    with Redis.from_url(redis_url) as redis:
        before = redis.info("stats")["total_connections_received"]
        assert broker_.waiting(["other", MODEL, "another"]) == [0, 8, 0]
        assert redis.info("stats")["total_connections_received"] == before + 1
    assert broker_.waiting([]) == []


def test_one_lost_message_of_a_job_is_found(ledger: Ledger, redis_url: str) -> None:
    broker_ = Broker(redis_url)
    Dispatcher(ledger, broker_).reconcile()
    with Redis.from_url(redis_url) as redis:
        redis.rpop(queue_name(MODEL))
    pass_time(ledger, LOST_MESSAGE_S + 1)
    assert Dispatcher(ledger, broker_).reconcile() == 1
    assert broker_.waiting_chunks(MODEL) == all_of("urgent", "busy")


def test_a_chunk_that_runs_lost_nothing(ledger: Ledger, redis_url: str) -> None:
    broker_ = Broker(redis_url)
    Dispatcher(ledger, broker_).reconcile()
    with Redis.from_url(redis_url) as redis:
        redis.rpop(queue_name(MODEL))
    lease = Ledger(ledger.db).claim(ChunkId("urgent", 0), "w")
    assert lease is not None
    pass_time(ledger, LOST_MESSAGE_S + 1)
    assert Dispatcher(ledger, broker_).reconcile() == 0


def test_a_full_queue_is_searched_now_and_then(ledger: Ledger, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broker_ = Broker(redis_url)
    dispatcher = Dispatcher(ledger, broker_)
    now = [1000.0]
    monkeypatch.setattr("promptmill.queue.dispatcher.time.monotonic", lambda: now[0])
    dispatcher.reconcile()
    dispatcher.reconcile()
    pass_time(ledger, LOST_MESSAGE_S + 1)
    with Redis.from_url(redis_url) as redis:
        redis.rpop(queue_name(MODEL))
    assert dispatcher.reconcile() == 0, "it has just been searched"
    now[0] += SEARCH_LEASES * ledger.lease_s
    assert dispatcher.reconcile() == 1


def test_messages_of_others_are_passed_over(redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.lpush(queue_name(MODEL), b"no json", b'{"body": "IQ=="}', b"[1]", b'{"body": "e30="}')
    assert Broker(redis_url).waiting_chunks(MODEL) == set()


def test_the_command_takes_back_all_chunks_of_dead_workers(
    ledger: Ledger, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "MOST_AT_ONCE", 3)
    for job_id in ("urgent", "busy"):
        while ledger.claim_next(job_id, "dead") is not None:
            pass
    with writing(ledger.db) as db:
        db.execute(sa.update(chunks).values(leased_until=1.0))
    assert service.reconcile(Settings(redis_url=redis_url), ledger.db)[0] == 8


def add_worker(ledger: Ledger, name: str, model: str | None, fingerprint: str | None) -> None:
    row = {
        "id": name, "host": "h", "pid": 1, "state": "idle", "models": '["echo", "other"]', "model": model,
        "model_fingerprint": fingerprint, "device_asked": "cpu", "versions": "{}", "started_at": epoch(),
        "heartbeat_at": epoch(),
    }  # fmt: skip
    with writing(ledger.db) as db:
        db.execute(sa.insert(workers).values(row))


def test_a_job_waits_while_all_workers_have_another_model(ledger: Ledger, redis_url: str) -> None:
    with writing(ledger.db) as db:
        db.execute(sa.update(jobs).where(jobs.c.id == "busy").values(state="paused"))
        db.execute(sa.update(jobs).where(jobs.c.id == "urgent").values(model_fingerprint="a" * 64))
    dispatcher = Dispatcher(ledger, Broker(redis_url))
    add_worker(ledger, "wrong", MODEL, "b" * 64)

    assert dispatcher.reconcile() == 0
    assert waiting_for_models(ledger.db, ALIVE_S) == {
        "urgent": "a worker whose echo has the fingerprint aaaaaaaaaaaa (wrong has bbbbbbbbbbbb)"
    }
    assert waiting_for_models(ledger.db, ALIVE_S, "busy") == {}

    add_worker(ledger, "right", MODEL, "a" * 64)
    assert waiting_for_models(ledger.db, ALIVE_S) == {}
    assert dispatcher.reconcile() == 4


@pytest.mark.parametrize(
    ("model", "fingerprint"),
    [(MODEL, None), ("other", "b" * 64), (None, None)],
    ids=["older", "other model", "loading"],
)
def test_a_worker_of_which_that_is_not_known_may_have_the_model(
    ledger: Ledger, redis_url: str, model: str | None, fingerprint: str | None
) -> None:
    with writing(ledger.db) as db:
        db.execute(sa.update(jobs).values(model_fingerprint="a" * 64))
    add_worker(ledger, "some", model, fingerprint)
    assert waiting_for_models(ledger.db, ALIVE_S) == {}
    assert Dispatcher(ledger, Broker(redis_url)).reconcile() > 0


@pytest.mark.parametrize(
    ("state", "models", "silent_s", "expected"),
    [
        ("busy", '["other", "echo"]', 0, True),
        ("idle", '["echo"]', 0, True),
        ("restarting", '["echo"]', 0, False),
        ("loading", '["echo"]', 0, False),
        ("idle", '["other"]', 0, False),
        ("idle", '["echo"]', ALIVE_S + 1, False),
    ],
)
def test_who_else_has_a_model_loaded(
    ledger: Ledger, redis_url: str, state: str, models: str, silent_s: float, expected: bool
) -> None:
    own = {"host": "h", "pid": 1, "device_asked": "cpu", "versions": "{}", "started_at": epoch()}
    with writing(ledger.db) as db:
        for name, says, serves, age_s in (("me", "idle", '["echo"]', 0.0), ("other", state, models, silent_s)):
            row = {"id": name, "state": says, "models": serves, "heartbeat_at": epoch() - age_s}
            db.execute(sa.insert(workers).values(own | row))
    assert Dispatcher(ledger, Broker(redis_url)).is_served_elsewhere(MODEL, "me") is expected


# --- a model that nobody serves --------------------------------------------------------------------------------------


def work(ledger: Ledger, models: str, age_s: float = 0.0, state: str = "idle") -> None:
    with writing(ledger.db) as db:
        values = {
            "id": f"w{models}{age_s}{state}", "host": "h", "pid": 1, "device_asked": "cpu", "models": models,
            "state": state, "started_at": epoch(), "heartbeat_at": epoch() - age_s,
        }  # fmt: skip
        db.execute(sa.insert(workers).values(values))


def test_what_a_job_waits_for_is_said_with_what_is_served_and_what_to_start(ledger: Ledger) -> None:
    job = catalog.find_job(ledger.db, "urgent")
    start = f"Start one: promptmill worker --model {MODEL}"
    assert waits_for(ledger.db, job) == f"no live worker serves {MODEL}: no worker is alive. {start}"
    work(ledger, f'["{MODEL}"]', age_s=2 * ALIVE_S)
    work(ledger, f'["{MODEL}"]', state="stopped")
    work(ledger, '["other", "demo"]')
    said = service.status(ledger.db, job)["waits_for"]
    assert said == f"no live worker serves {MODEL}: live workers serve demo, other. {start}"
    work(ledger, f'["{MODEL}"]', state="busy")
    assert service.status(ledger.db, job)["waits_for"] is None


def test_a_worker_that_redis_hears_of_is_alive_however_old_its_row_is(ledger: Ledger, redis_url: str) -> None:
    work(ledger, '["echo"]', age_s=2 * ALIVE_S)
    assert live_workers(ledger.db, redis_url) == []
    message = {"state": "busy", "active": 1, "waiting": 0, "slots": 4, "model": MODEL, "commits": []}
    with Redis.from_url(redis_url) as redis, ledger.db.connect() as connection:
        name = connection.execute(sa.select(workers.c.id)).scalar_one()
        redis.set(heartbeat_key(name), json.dumps(message))
    assert [(each["id"], each["state"]) for each in live_workers(ledger.db, redis_url)] == [(name, "busy")]


@pytest.mark.parametrize("change", [{"state": "paused"}, {"state": "completed"}, {"mode": "embedded"}])
def test_a_job_that_no_worker_is_to_run_waits_for_none(ledger: Ledger, change: dict[str, str]) -> None:
    with writing(ledger.db) as db:
        db.execute(sa.update(jobs).where(jobs.c.id == "urgent").values(change))
    assert waits_for(ledger.db, catalog.find_job(ledger.db, "urgent")) is None


def test_who_submits_or_watches_a_job_that_nobody_serves_is_told_at_once(command: Command, redis_url: str) -> None:
    command.environment |= {"JOBS_REDIS_URL": redis_url}
    submitted = command("submit", "-p", "hi", "--model", "echo")
    assert (submitted.code, "warning: no live worker serves echo" in submitted.err) == (0, True), submitted.err
    assert (
        "no live worker serves echo"
        in json.loads(command("submit", "-p", "x", "--model", "echo", "--json").out)["waits_for"]
    )
    process = command.start("watch", "@last")
    (log,) = command.folder.glob("*.log")
    try:
        wait_until(lambda: "no live worker serves echo" in log.read_text(), "it is said")
    finally:
        process.terminate()
        process.wait()
