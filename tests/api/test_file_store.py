"""The store of files, without a server around it."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import sqlalchemy as sa
from ulid import ULID

from promptmill.api import keys
from promptmill.api.dependencies import Services
from promptmill.api.http.errors import ApiError
from promptmill.api.jobs import creation
from promptmill.api.jobs.routes import _from_lines
from promptmill.api.openai.file_store import FileStore
from promptmill.api.openai.own_folder import MARK, secret
from promptmill.core.settings import Settings, load_settings
from promptmill.database.engine import connect, reading, writing
from promptmill.database.revision import upgrade
from promptmill.database.tables import files, installation, jobs
from promptmill.errors import SettingsError
from promptmill.service.job_options import JobOptions


@pytest.fixture
def store(database: sa.Engine, tmp_path: Path) -> FileStore:
    return FileStore(Settings(files_dir=str(tmp_path / "files")), database)


def files_in(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "files").rglob("*") if path.is_file() and path.name != MARK]


def stored(store: FileStore, text: bytes = b"x", expires_in_s: float | None = None) -> str:
    with store.draft() as draft:
        draft.write(text)
        return str(store.store(draft, "a.jsonl", "batch", None, expires_in_s).id)


def age(path: Path) -> None:
    os.utime(path, (1, 1))


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
        elsewhere = dead.path.with_name(f"{ULID()}.0123456789ab.part")
        elsewhere.write_bytes(b"of another machine")
        store.sweep()
        assert set(files_in(tmp_path)) == {alive.path, elsewhere}
        os.utime(elsewhere, (1, 1))
        store.sweep()
        assert files_in(tmp_path) == [alive.path]
        assert store.store(alive, "a.jsonl", "batch", None, None).bytes == 1


def test_an_upload_of_this_machine_goes_on_whatever_its_clock_says(store: FileStore, tmp_path: Path) -> None:
    with store.draft() as alive:
        # As old as a clock that is an hour ahead finds it.
        age(alive.path)
        store.sweep()
        assert files_in(tmp_path) == [alive.path]


def test_parts_of_other_machines_are_judged_by_the_clock_of_the_folder(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "files" / "parts" / f"{ULID()}.0123456789ab.part"
    elsewhere.write_bytes(b"x")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    store.sweep()
    assert files_in(tmp_path) == [elsewhere]


def test_what_cannot_be_removed_stops_no_sweep(
    store: FileStore, database: sa.Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, _ = stored(store, expires_in_s=60), stored(store, expires_in_s=60)
    with writing(database) as connection:
        connection.execute(sa.update(files).values(expires_at=1, created_at=1))
    store.path(stuck).unlink()
    store.path(stuck).mkdir()
    part = tmp_path / "files" / "parts" / f"{ULID()}.0123456789ab.part"
    part.mkdir()
    age(part)
    left = part.with_name(f"{ULID()}.0123456789ac.part")
    left.write_bytes(b"x")
    age(left)
    with caplog.at_level("WARNING", "promptmill.api.openai.files"):
        store.sweep()
    assert files_in(tmp_path) == []
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [stuck, part.name]
    # It is tried again, and goes once it can.
    store.path(stuck).rmdir()
    store.sweep()
    with writing(database) as connection:
        assert connection.execute(sa.select(files.c.id)).all() == []


def test_lines_of_a_client_lie_in_the_folder_that_is_swept_and_nowhere_else(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[list[Path], bytes]] = []

    async def create(parts: object, principal: keys.Principal, options: JobOptions, path: str) -> str:
        found.append((files_in(tmp_path), Path(path).read_bytes()))
        return "job"

    monkeypatch.setattr(creation, "create", create)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    parts = cast(Services, SimpleNamespace(store=store))
    assert (
        asyncio.run(_from_lines(parts, keys.LOCAL, ["a secret", {"prompt": "b"}], JobOptions(dataset="lines.jsonl")))
        == "job"
    )
    [(there, text)] = found
    assert [path.parent.name for path in there] == ["parts"]
    assert text == b'{"prompt":"a secret"}\n{"prompt":"b"}\n'
    assert files_in(tmp_path) == []


def test_a_job_is_made_of_a_file_that_is_called_otherwise_than_it_lies(
    database: sa.Engine, redis_url: str, migrated_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    path = tmp_path / "file-01"
    path.write_bytes(gzip.compress(b"id,prompt\na,one\nb,two\n"))
    options = JobOptions(dataset="people.csv.gz", model="echo")
    creation.create_here(Settings(database_url=migrated_url, redis_url=redis_url), options, str(path), (None, None))
    with reading(database) as connection:
        job = connection.execute(sa.select(jobs.c.dataset_name, jobs.c.dataset_format, jobs.c.rows)).one()
    assert tuple(job) == ("people.csv.gz", "csv", 2)


def test_a_sweep_leaves_what_the_store_did_not_make(store: FileStore, tmp_path: Path) -> None:
    root = tmp_path / "files"
    foreign = [root / name for name in ("photos/cat.jpg", "models/big.gguf", "ab/notes", "parts/mine")]
    # One whose name could be the store's own, and which no row names: of a database that was put back.
    foreign.append(root / "zz" / "file-01kb3vxs8gq2xj0000000000zz")
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"precious")
        age(path)
    store.sweep()
    assert set(files_in(tmp_path)) == set(foreign)


def test_what_expired_is_swept_and_told(
    store: FileStore, database: sa.Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expired, kept = stored(store, expires_in_s=60), stored(store)
    with writing(database) as connection:
        connection.execute(sa.update(files).where(files.c.id == expired).values(expires_at=1))
    with caplog.at_level("INFO", "promptmill.api.openai.files"):
        store.sweep()
    assert files_in(tmp_path) == [store.path(kept)]
    assert f"{expired} is removed: it expired" in caplog.text


@pytest.mark.parametrize("state", ["arriving", "deleting"])
def test_what_a_server_that_died_left_half_done_is_removed_later(
    store: FileStore, database: sa.Engine, tmp_path: Path, state: str
) -> None:
    half, fresh = stored(store), stored(store)
    with writing(database) as connection:
        connection.execute(sa.update(files).values(status=state))
        connection.execute(sa.update(files).where(files.c.id == half).values(created_at=1))
    store.sweep()
    assert files_in(tmp_path) == [store.path(fresh)]
    with writing(database) as connection:
        assert connection.execute(sa.select(files.c.id)).scalars().all() == [fresh]


def test_a_file_is_found_once_its_bytes_are_there(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*paths: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr("promptmill.api.openai.file_store.os.replace", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            stored(store)
    assert files_in(tmp_path) == []
    kept = stored(store)
    assert store.find(kept, keys.LOCAL).bytes == 1


def test_a_folder_that_holds_other_things_is_refused(database: sa.Engine, tmp_path: Path) -> None:
    for name in ("photos/cat.jpg", "notes.txt", "ab/cat.jpg"):
        root = tmp_path / name.replace("/", "-")
        path = root / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"precious")
        with pytest.raises(SettingsError, match="which is not the API's"):
            FileStore(Settings(files_dir=str(root)), database)
        assert [each for each in root.rglob("*") if each.is_file()] == [path]


def test_a_folder_of_another_database_is_refused(store: FileStore, database: sa.Engine, tmp_path: Path) -> None:
    other = connect(f"sqlite:///{tmp_path / 'other.sqlite'}")
    upgrade(other)
    with pytest.raises(SettingsError, match="belongs to another database"):
        FileStore(Settings(files_dir=str(tmp_path / "files")), other)
    other.dispose()
    FileStore(Settings(files_dir=str(tmp_path / "files")), database)


def test_a_folder_of_an_earlier_version_goes_on(store: FileStore, database: sa.Engine, tmp_path: Path) -> None:
    kept = stored(store)
    (tmp_path / "files" / MARK).unlink()
    again = FileStore(Settings(files_dir=str(tmp_path / "files")), database)
    assert again.path(kept).read_bytes() == b"x"
    assert (tmp_path / "files" / MARK).exists()


def test_files_of_another_database_without_a_mark_are_refused_too(
    store: FileStore, database: sa.Engine, tmp_path: Path
) -> None:
    stored(store)
    (tmp_path / "files" / MARK).unlink()
    other = connect(f"sqlite:///{tmp_path / 'other.sqlite'}")
    upgrade(other)
    with pytest.raises(SettingsError, match=r"holds file-\w+, which this database does not know"):
        FileStore(Settings(files_dir=str(tmp_path / "files")), other)
    other.dispose()


def test_a_copy_of_a_database_with_an_id_of_its_own_cannot_use_the_folder(
    store: FileStore, database: sa.Engine, tmp_path: Path
) -> None:
    stored(store)
    # As docs/api.md says it, for both kinds of databases.
    text = " ".join((Path(__file__).parents[2] / "docs" / "api.md").read_text().split())
    (statement,) = re.findall(r"`(UPDATE installation SET [^`]*)`", text)
    before = store.root / MARK
    with writing(database) as connection:
        connection.execute(sa.text(statement))
        assert connection.execute(sa.select(installation.c.id)).scalar_one() not in ("", before.read_text().strip())
    with pytest.raises(SettingsError, match="belongs to another database"):
        FileStore(Settings(files_dir=str(store.root)), database)


@pytest.mark.parametrize("name", ["files_dir", "runtime_dir"])
@pytest.mark.parametrize("folder", [" ", "/tmp/x\n", " /tmp/x"])
def test_a_folder_with_blanks_around_it_is_no_setting(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"JOBS_{name.upper()}", folder)
    with pytest.raises(SettingsError, match=f"JOBS_{name.upper()}: a blank or a line break"):
        load_settings()


def test_databases_without_a_setting_have_folders_of_their_own(
    database: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptmill.api.openai.own_folder.data_dir", lambda: tmp_path / "app")
    other = connect(f"sqlite:///{tmp_path / 'other.sqlite'}")
    upgrade(other)
    first, second = [FileStore(Settings(), each) for each in (database, other)]
    kept = [stored(store) for store in (first, second)]
    assert first.root == tmp_path / "app" / "files"
    assert second.root != first.root
    again = FileStore(Settings(), other)
    assert again.path(kept[1]).is_file()
    other.dispose()


def test_servers_over_one_folder_share_one_secret_that_nobody_else_reads(
    store: FileStore, database: sa.Engine, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: secret(tmp_path / "files", database), range(4)))
    (one,) = found
    assert len(one) == 32
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "files").iterdir() if path.is_file()}
    assert (modes, (tmp_path / "files").stat().st_mode & 0o777) == ({0o600}, 0o700)
