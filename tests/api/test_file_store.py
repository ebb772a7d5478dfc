"""The store of files, without a server around it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from promptmill.api import keys
from promptmill.api.errors import ApiError
from promptmill.api.file_store import FileStore
from promptmill.settings import Settings


@pytest.fixture
def store(database: sa.Engine, tmp_path: Path) -> FileStore:
    return FileStore(Settings(files_dir=str(tmp_path / "files")), database)


def files_in(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "files").rglob("*") if path.is_file()]


def test_uploads_side_by_side_keep_to_the_limit_of_their_key(
    store: FileStore, database: sa.Engine, tmp_path: Path
) -> None:
    owner, _ = keys.create(database, "small", ("submit",), {})
    together = threading.Barrier(6)

    def upload(number: int) -> int:
        with store.draft(2_000) as draft:
            draft.write(b"x" * 300)
            together.wait(20)
            try:
                store.store(draft, "a.jsonl", "batch", owner, None, allowed=1_000)
            except ApiError as problem:
                return problem.status
            return 200

    with ThreadPoolExecutor(6) as threads:
        statuses = list(threads.map(upload, range(6)))
    assert sorted(statuses) == [200] * 3 + [429] * 3
    assert store.used_bytes(owner) == sum(path.stat().st_size for path in files_in(tmp_path)) == 900


def test_parts_of_a_process_that_died_are_gone_at_once(store: FileStore, tmp_path: Path) -> None:
    with store.draft() as alive, store.draft() as dead:
        for each in (alive, dead):
            each.write(b"x")
            each.finish()
        # As the end of its process does.
        dead._file.close()
        elsewhere = dead.path.with_name("01J.0123456789ab.part")
        elsewhere.write_bytes(b"of another machine")
        store.sweep()
        assert set(files_in(tmp_path)) == {alive.path, elsewhere}
        os.utime(elsewhere, (1, 1))
        store.sweep()
        assert files_in(tmp_path) == [alive.path]
        assert store.store(alive, "a.jsonl", "batch", None, None).bytes == 1
