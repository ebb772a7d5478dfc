"""The worker of batches: what it cannot get on with holds nobody else up, and comes to an end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from promptmill.api.batches import leases, records, worker
from promptmill.api.batches.leases import BatchLeases
from promptmill.api.batches.worker import BatchWorker
from promptmill.api.http.errors import ApiError
from promptmill.api.keys import LOCAL
from promptmill.api.openai.file_store import FileStore
from promptmill.api.openai.model_directory import ModelDirectory
from promptmill.core import child_processes
from promptmill.core.settings import Settings
from promptmill.database.engine import epoch, reading, writing
from promptmill.database.tables import api_keys, batches, files, jobs, workers
from promptmill.types import JobState
from tests.api.conftest import batch_lines
from tests.conftest import wait_until


@pytest.fixture
def keeper(database: sa.Engine, tmp_path: Path) -> BatchWorker:
    # Nobody listens there: jobs wait in the database.
    url = database.url.render_as_string(hide_password=False)
    settings = Settings(files_dir=str(tmp_path / "files"), redis_url="redis://127.0.0.1:1/0", database_url=url)
    return BatchWorker(settings, database)


def made(db: sa.Engine, file_id: str = "file-none", key_id: str | None = None) -> str:
    """A batch that waits to be validated."""
    values = {
        "input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h", "api_key_id": key_id,
    }  # fmt: skip
    with writing(db) as connection:
        return str(records.insert(connection, values, 3600.0).id)


def add_key(db: sa.Engine, name: str) -> None:
    with writing(db) as connection:
        connection.execute(
            sa.insert(api_keys).values(
                id=name, name=name, key_sha256=name, scopes="submit", created_at=1.0, revoked=False
            )
        )


def uploaded(store: FileStore, content: bytes) -> str:
    with store.draft() as draft:
        draft.write(content)
        return str(store.store(draft, "b.jsonl", "batch", None, None).id)


def state_of(db: sa.Engine, batch_id: str) -> Any:
    with reading(db) as connection:
        return connection.execute(sa.select(batches).where(batches.c.id == batch_id)).one()


def now_of(db: sa.Engine) -> float:
    with reading(db) as connection:
        return float(connection.execute(sa.select(epoch())).scalar() or 0)


def keep(keeper: BatchWorker) -> list[str]:
    """One look, and the work on what was due."""
    due = keeper.claims.due()
    for each in due:
        keeper._keep(each)
    return due


def test_a_batch_that_meets_a_bug_ends_and_says_so(keeper: BatchWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = made(keeper.db, uploaded(keeper.store, batch_lines(2, "demo")))
    monkeypatch.setattr(keeper, "_submit", lambda *given: 1 / 0)
    assert keep(keeper) == [batch_id]
    row = state_of(keeper.db, batch_id)
    assert row.state == "failed"
    (error,) = json.loads(row.errors)
    assert error["code"] == "server_error"
    assert "error while it worked on this batch" in error["message"]
    assert keep(keeper) == []


def test_a_bug_after_its_job_began_ends_the_job_too(keeper: BatchWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = made(keeper.db, uploaded(keeper.store, batch_lines(2, "demo")))
    monkeypatch.setattr(keeper.dispatcher, "dispatch", lambda *given: 1 / 0)
    keep(keeper)
    row = state_of(keeper.db, batch_id)
    with reading(keeper.db) as connection:
        job = connection.execute(sa.select(jobs).where(jobs.c.id == row.job_id)).one()
    assert (row.state, job.state) == ("failed", JobState.CANCELLED)


def test_a_batch_that_waits_for_a_disk_is_tried_again_ever_later(
    keeper: BatchWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = made(keeper.db, uploaded(keeper.store, batch_lines(1, "demo")))

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    waits = []
    monkeypatch.setattr("promptmill.api.batches.worker.child_processes.call", full)
    for _ in range(6):
        assert keep(keeper) == [batch_id]
        assert keep(keeper) == []
        # Another server leaves it alone too.
        assert BatchLeases(keeper.db).due() == []
        row = state_of(keeper.db, batch_id)
        now = now_of(keeper.db)
        with writing(keeper.db) as connection:
            connection.execute(sa.update(batches).values(claimed_until=now - 1))
        assert row.state == "validating"
        waits.append(round(row.claimed_until - now))
    assert waits == [1, 2, 4, 8, 15, 15]
    monkeypatch.undo()
    keep(keeper)
    assert state_of(keeper.db, batch_id).state == "in_progress"


def test_what_a_dead_server_held_is_taken_over_soon(keeper: BatchWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = made(keeper.db)
    assert BatchLeases(keeper.db).due() == [batch_id]
    held_s = state_of(keeper.db, batch_id).claimed_until - now_of(keeper.db)
    assert 4 * leases.RENEW_S <= held_s <= 15
    assert keeper.claims.due() == []
    with writing(keeper.db) as connection:
        connection.execute(sa.update(batches).values(claimed_until=now_of(keeper.db) + 0.2))
    wait_until(lambda: keeper.claims.due() == [batch_id], "its time is over", 5)
    # Who lives keeps it.
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    before = state_of(keeper.db, batch_id).claimed_until
    with keeper.claims.renewing(batch_id):
        wait_until(lambda: state_of(keeper.db, batch_id).claimed_until > before, "it is renewed", 5)


def test_two_servers_with_one_batch_leave_one_job(
    keeper: BatchWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = made(keeper.db, uploaded(keeper.store, batch_lines(1, "demo")))
    other, submitted = BatchWorker(keeper.settings, keeper.db), keeper._submit

    def late(*given: Any) -> str:
        other._keep(batch_id)
        return submitted(*given)

    monkeypatch.setattr(keeper, "_submit", late)
    keeper._keep(batch_id)
    row = state_of(keeper.db, batch_id)
    with reading(keeper.db) as connection:
        found = connection.execute(sa.select(jobs.c.id, jobs.c.state)).all()
    assert row.state == "in_progress"
    assert len(found) == 2
    assert [each.id for each in found if each.state != JobState.CANCELLED] == [row.job_id]


def test_keys_take_turns(keeper: BatchWorker) -> None:
    for name in ("many", "few"):
        add_key(keeper.db, name)
    many = [made(keeper.db, key_id="many") for _ in range(6)]
    few = [made(keeper.db, key_id="few") for _ in range(2)]
    order = [each for _ in range(8) for each in keep(keeper)]
    assert order == [many[0], few[0], many[1], few[1], *many[2:]]


def test_a_file_that_expired_is_used_no_more(keeper: BatchWorker) -> None:
    file_id = uploaded(keeper.store, batch_lines(1, "demo"))
    assert keeper.store.find(file_id, LOCAL).id == file_id
    with writing(keeper.db) as connection:
        connection.execute(sa.update(files).values(expires_at=1.0))
    with pytest.raises(ApiError, match="No such File"):
        keeper.store.find(file_id, LOCAL)
    assert keeper.store.used_bytes(None) == 0
    batch_id = made(keeper.db, file_id)
    keep(keeper)
    (error,) = json.loads(state_of(keeper.db, batch_id).errors)
    assert "Cannot find file" in error["message"]
    keeper.store.sweep()
    assert not keeper.store.path(file_id).exists()


def test_a_batch_waits_for_a_worker_that_is_gone(keeper: BatchWorker) -> None:
    with writing(keeper.db) as connection:
        connection.execute(
            sa.insert(workers).values(
                id="w", host="h", pid=1, state="stopped", models='["/models/big.gguf"]', device_asked="cpu",
                started_at=1.0, heartbeat_at=1.0,
            )
        )  # fmt: skip
    batch_id = made(keeper.db, uploaded(keeper.store, batch_lines(1, "big")))
    keep(keeper)
    row = state_of(keeper.db, batch_id)
    assert (row.state, row.model) == ("in_progress", "big")
    with writing(keeper.db) as connection:
        assert connection.execute(sa.select(jobs.c.model)).scalar() == "/models/big.gguf"
        connection.execute(sa.delete(workers))
    # Now only the job knows it.
    directory = ModelDirectory(keeper.db)
    assert directory.resolve("big.gguf") == "/models/big.gguf"
    assert directory.resolve("small\0") is None


def test_a_nul_in_an_id_is_a_bad_line(keeper: BatchWorker) -> None:
    line = json.loads(batch_lines(1, "demo")) | {"custom_id": "z\0"}
    batch_id = made(keeper.db, uploaded(keeper.store, batch_lines(1, "demo") + json.dumps(line).encode()))
    keep(keeper)
    row = state_of(keeper.db, batch_id)
    assert row.state == "failed"
    assert [(each["code"], each["line"], each["param"]) for each in json.loads(row.errors)] == [
        ("invalid_value", 2, "custom_id")
    ]


def test_what_no_database_takes_is_told_in_the_error_file(keeper: BatchWorker) -> None:
    line = json.loads(batch_lines(1, "demo")) | {"custom_id": "nul"}
    line["body"]["messages"][0]["content"] = "a\0b"
    batch_id = made(keeper.db, uploaded(keeper.store, json.dumps(line).encode()))
    keep(keeper)
    assert state_of(keeper.db, batch_id).state == "in_progress"
    keep(keeper)
    row = state_of(keeper.db, batch_id)
    assert (row.state, row.failed) == ("completed", 1)
    (text,) = keeper.store.path(row.error_file_id).read_text().splitlines()
    assert json.loads(text)["custom_id"] == "nul"
    assert "NUL" in json.loads(text)["response"]["body"]["error"]["message"]


def test_a_file_that_takes_too_long_to_read_ends_its_batch_with_a_word(
    keeper: BatchWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = made(keeper.db, uploaded(keeper.store, batch_lines(2, "demo")))
    monkeypatch.setattr(worker, "limits_for", lambda size: child_processes.ChildLimits(0.0, 512))
    keep(keeper)
    row = state_of(keeper.db, batch_id)
    assert row.state == "failed"
    (error,) = json.loads(row.errors)
    assert error["message"] == "The file was not read: it takes more than 0 s."


def test_one_key_does_not_take_all_places(keeper: BatchWorker) -> None:
    for name in ("many", "few"):
        add_key(keeper.db, name)
    many = [made(keeper.db, key_id="many") for _ in range(6)]
    assert keeper.claims.due() == many[:2]
    few = made(keeper.db, key_id="few")
    assert keeper.claims.due() == [few]
