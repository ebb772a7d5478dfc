"""A worker's row and its key in Redis: written while the worker lives, whatever happens to either."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError
from redis import Redis

from promptmill.core.settings import Settings
from promptmill.database.engine import reading, writing
from promptmill.database.tables import worker_samples, workers
from promptmill.ledger import Ledger
from promptmill.queue.dispatcher import ALIVE_S
from promptmill.queue.heartbeats import heartbeat_key, heartbeat_of
from promptmill.queue.housekeeping import DAY_S
from promptmill.store.catalog import list_workers
from promptmill_workers.devices import Device
from promptmill_workers.engines.contract import EngineOptions
from promptmill_workers.host.client import HostConfig
from promptmill_workers.host.model_hosts import ModelHosts
from promptmill_workers.worker import heartbeat
from promptmill_workers.worker.heartbeat import Heartbeat
from promptmill_workers.worker.shutdown import Shutdown
from tests.conftest import wait_until

DEVICE = Device("cpu")


@pytest.fixture
def hosts() -> ModelHosts:
    return ModelHosts(HostConfig("echo", DEVICE, EngineOptions(slots=4)))


@pytest.fixture
def beating(database: sa.Engine, hosts: ModelHosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heartbeat]:
    monkeypatch.setattr(heartbeat, "ROW_S", 0.02)
    beating = Heartbeat(Ledger(database), "w1", DEVICE, hosts, Shutdown(), models=["echo"])
    beating.start()
    yield beating
    beating.stop()


def lose_row(database: sa.Engine) -> None:
    with writing(database) as connection:
        connection.execute(sa.delete(workers))


def rows(database: sa.Engine) -> list[tuple[str, str, float]]:
    with reading(database) as connection:
        query = sa.select(workers.c.id, workers.c.models, workers.c.started_at)
        return [tuple(row) for row in connection.execute(query)]


def samples(database: sa.Engine) -> int:
    with reading(database) as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(worker_samples)).scalar_one())


def test_a_worker_whose_row_is_gone_writes_it_down_again(database: sa.Engine, beating: Heartbeat) -> None:
    before = rows(database)
    lose_row(database)
    wait_until(lambda: bool(list_workers(database, ALIVE_S)), "the worker is there again")
    assert rows(database) == before
    wait_until(lambda: samples(database) > 1, "it adds samples again")


def test_a_host_that_changes_writes_down_a_lost_row(database: sa.Engine, hosts: ModelHosts) -> None:
    idle = Heartbeat(Ledger(database), "w1", DEVICE, hosts, Shutdown(), models=["echo"])
    idle.start()
    lose_row(database)
    idle.changed(hosts)
    assert [row[0] for row in rows(database)] == ["w1"]
    idle.stop()
    assert list_workers(database, ALIVE_S) == []


def test_a_database_that_hangs_does_not_silence_the_key_of_redis(
    database: sa.Engine, hosts: ModelHosts, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "ROW_S", 0.02)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.02)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(self: Heartbeat, *_: Any) -> None:
        hangs.set()
        goes_on.wait(120)

    with Redis.from_url(redis_url) as redis:
        beating = Heartbeat(Ledger(database), "w1", DEVICE, hosts, Shutdown(), models=["echo"], redis_url=redis_url)
        beating.start()
        assert heartbeat_of(redis.get(heartbeat_key("w1"))) is not None
        monkeypatch.setattr(Heartbeat, "_add_sample", hang)
        assert hangs.wait(60)
        redis.delete(heartbeat_key("w1"))
        wait_until(lambda: bool(redis.exists(heartbeat_key("w1"))), "the key is written again")
        goes_on.set()
        beating.stop()
        assert not redis.exists(heartbeat_key("w1"))


def test_workers_are_kept_far_longer_than_a_heartbeat_is_fresh() -> None:
    with pytest.raises(ValidationError):
        Settings(samples_days=10 * ALIVE_S / DAY_S)
