"""Counters of /metrics: kept as they arise, in the transaction of what they count, and never less than before."""

from __future__ import annotations

from dataclasses import replace

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.api.prometheus import family, histogram, text_of
from promptmill.database.counting import NO_WORKER, Counts, counting, stored
from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import attempts, worker_samples, workers
from promptmill.ledger import Ledger
from promptmill.queue.housekeeping import STEP_ROWS, Housekeeping
from promptmill.store.catalog import list_workers
from promptmill.store.retention import remove
from promptmill.types import ChunkId, EngineCounters, ErrorClass, Extras, Ok
from tests.unit.test_ledger import JOB, add_job, failed, ok

DAY_S = 86_400.0


def counted(db: Engine) -> dict[str, Counts]:
    """Of each worker, for the one model of these tests."""
    with reading(db) as connection:
        return {worker: counts for worker, _, counts in stored(connection)}


def add_worker(db: Engine, name: str, age_s: float, *sample_ages_s: float) -> None:
    row = {"id": name, "host": "here", "pid": 1, "state": "idle", "device_asked": "cpu", "started_at": 0.0}
    with writing(db) as connection:
        connection.execute(sa.insert(workers).values(**row, heartbeat_at=epoch() - age_s))
        for each in sample_ages_s:
            connection.execute(sa.insert(worker_samples).values(worker_id=name, at=epoch() - each, memory_bytes=each))


def names(db: Engine, column: sa.Column[str]) -> set[str]:
    with reading(db) as connection:
        return set(connection.execute(sa.select(column)).scalars())


def test_results_are_counted_with_their_worker(database: Engine) -> None:
    add_job(database, 3, 3)
    ledger = Ledger(database)
    lease = ledger.claim(ChunkId(JOB, 0), "w1")
    assert lease is not None
    ledger.record(lease, [ok(0), failed(1)], EngineCounters(steps=7, prefill_s=0.25))
    ledger.finish(lease, EngineCounters(steps=1), 4, [ok(2, tokens=5)])
    found = counted(database)["w1"]
    assert found.part("items.") == {"ok": 2, "error": 1}
    assert found.part("errors.") == {failed(1)[0].error_class.value: 1}
    assert found.part("tokens.") == {"prompt": 10, "output": 8}
    assert found.part("engine.") == {"steps": 8, "prefill_s": 0.25}
    # 2 s from the slot to the end, 1 s for each of 2 and 4 more tokens at 0.5 and 0.25 s.
    assert sum(found.histograms["latency"][:-1]) == 2
    assert found.histograms["latency"][-1] == 4.0
    assert found.histograms["tpot"][-1] == 0.75


def test_an_answer_that_was_copied_is_an_item_and_no_tokens(database: Engine) -> None:
    add_job(database, 2, 2)
    ledger = Ledger(database)
    lease = ledger.claim(ChunkId(JOB, 0), "w1")
    assert lease is not None
    result, limit = ok(1)
    assert isinstance(result, Ok)
    ledger.record(lease, [ok(0), (replace(result, extras=Extras(deduplicated=True)), limit)])
    found = counted(database)["w1"]
    assert found.part("items.") == {"ok": 2}
    assert found.part("tokens.") == {"prompt": 5, "output": 3}
    assert sum(found.histograms["latency"][:-1]) == 1


def test_what_is_rolled_back_is_not_counted(database: Engine) -> None:
    class Stop(Exception):
        pass

    for how in (True, False):
        try:
            with writing(database) as connection:
                counting(connection, "echo", "w1").add("items.ok")
                if how:
                    raise Stop
        except Stop:
            pass
    assert counted(database)["w1"].sums == {"items.ok": 1}


def test_a_clock_that_is_set_lowers_no_sum(database: Engine) -> None:
    with writing(database) as connection:
        # Their slots were found at 1.0, before they were put into the queue.
        counting(connection, "echo", "w1").results([ok(0)[0], ok(1)[0]], enqueued_at=1_600_000.0)
    queued = counted(database)["w1"].histograms["queue"]
    assert (queued[0], queued[-1]) == (2, 0.0)


def test_a_batch_that_is_stored_twice_is_counted_once(database: Engine) -> None:
    add_job(database, 2, 2)
    ledger = Ledger(database)
    lease = ledger.claim(ChunkId(JOB, 0), "w1")
    assert lease is not None
    ledger.record(lease, [ok(0)])
    ledger.record(lease, [ok(0), ok(1)], maybe_stored=True)
    assert counted(database)["w1"].part("items.") == {"ok": 2}


def test_counters_stay_when_a_job_is_retried_and_removed(database: Engine) -> None:
    add_job(database, 2, 2)
    ledger = Ledger(database)
    lease = ledger.claim(ChunkId(JOB, 0), "w1")
    assert lease is not None
    ledger.finish(lease, None, 4, [ok(0), failed(1)])
    before = counted(database)["w1"].sums
    assert ledger.retry(JOB) == 1
    ledger.cancel(JOB)
    remove(database, JOB)
    assert counted(database)["w1"].sums == before
    assert counted(database)[NO_WORKER].sums == {"retries": 1}


def test_attempts_that_end_badly_are_counted(database: Engine) -> None:
    add_job(database, 2, 1)
    ledger = Ledger(database, lease_s=-1.0)
    leases = [ledger.claim(ChunkId(JOB, number), "w1") for number in (0, 1)]
    assert leases[0] is not None
    ledger.fail(leases[0], ErrorClass.ENGINE_CRASH, "it died")
    assert len(ledger.requeue_expired()) == 1
    assert [each.sums for _, each in sorted(counted(database).items())] == [{"redeliveries": 1}, {"redeliveries": 1}]


def test_a_worker_that_ended_long_ago_leaves_its_counts_without_its_name(database: Engine) -> None:
    add_worker(database, "gone", 2 * DAY_S)
    add_worker(database, "here", 1.0)
    with writing(database) as connection:
        for name in ("gone", "here", NO_WORKER):
            counts = counting(connection, "echo", name)
            counts.add("items.ok", 2)
            counts.observe("latency", [0.5])
    Housekeeping(database, 14.0, scoring=False).step()
    found = counted(database)
    assert {name: each.sums for name, each in found.items()} == {NO_WORKER: {"items.ok": 4}, "here": {"items.ok": 2}}
    assert found[NO_WORKER].histograms["latency"][-1] == 1.0


def test_old_samples_go_in_small_steps_and_new_ones_stay(database: Engine) -> None:
    add_worker(database, "w1", 1.0, 2.0, 3 * DAY_S)
    with writing(database) as connection:
        old = [{"worker_id": "w1", "at": float(second)} for second in range(STEP_ROWS + 5)]
        connection.execute(sa.insert(worker_samples), old)
    house = Housekeeping(database, 2.0, scoring=False)
    assert [house.step(), house.step()] == [True, False]
    with reading(database) as connection:
        assert connection.execute(sa.select(worker_samples.c.memory_bytes)).scalars().all() == [2]


def test_workers_that_no_attempt_names_go_with_their_time(database: Engine) -> None:
    add_job(database, 2, 2)
    for name, age_s in (("old-idle", 20 * DAY_S), ("old-worked", 20 * DAY_S), ("new-idle", DAY_S)):
        add_worker(database, name, age_s, age_s)
    attempt = {"job_id": JOB, "number": 0, "attempt": 1, "worker_id": "old-worked", "started_at": 0.0}
    with writing(database) as connection:
        connection.execute(sa.insert(attempts).values(attempt))
    house = Housekeeping(database, 14.0, scoring=False)
    while house.step():
        pass
    # Reports name the device and the engine of the one that worked.
    assert names(database, workers.c.id) == {"old-worked", "new-idle"}
    assert names(database, worker_samples.c.worker_id) == {"new-idle"}


def test_a_list_of_workers_has_the_newest_sample_of_each(database: Engine) -> None:
    add_worker(database, "w1", 1.0, 30.0, 3.0, 9.0)
    add_worker(database, "w2", 1.0)
    assert [(each["id"], each["memory_bytes"]) for each in list_workers(database, 30.0)] == [("w1", 3), ("w2", None)]


def test_numbers_keep_every_digit() -> None:
    gauge = family("a", "gauge", "b", [({}, 1796081233.4), ({}, 0.1 + 0.2), ({}, 10**15)])
    summed = histogram("c", "d", (0.5,), [("m", 1, 2, 123456789.0123)])
    lines = text_of([gauge, summed]).decode().splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("c")}
    assert [float(line.split(" ")[1]) for line in lines[2:5]] == [1796081233.4, 0.1 + 0.2, 10**15]
    assert values['c_sum{model="m"}'] == 123456789.0123
    assert values['c_bucket{le="0.5",model="m"}'] == 1
    assert values['c_bucket{le="+Inf",model="m"}'] == values['c_count{model="m"}'] == 2
