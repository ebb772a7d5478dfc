"""Files that appear, and locks: nobody can lay a link in their way, and locks are their user's alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptmill.core.outputs import appearing
from promptmill.errors import DeviceError
from promptmill_workers.devices import FileLock


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o000)
    yield
    os.umask(before)


def test_nobody_knows_the_name_under_which_a_file_is_written(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        with appearing(str(tmp_path / "out.txt")) as partial:
            # It is there, and ours, before anything is written.
            assert partial.is_file()
            assert str(os.getpid()) != partial.name.rpartition("-")[2]
            names.append(partial.name)
            partial.write_text("whole")
    assert len(set(names)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_a_file_that_appears_has_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with appearing(str(tmp_path / "out.txt")) as partial:
            partial.write_text("whole")
    finally:
        os.umask(before)
    assert (tmp_path / "out.txt").stat().st_mode & 0o777 == 0o640


def test_locks_are_for_their_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_umask: None) -> None:
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path / "run"))
    lock = FileLock("device-cpu")
    assert lock.acquire() is None
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run" / "device-cpu.lock").stat().st_mode & 0o777 == 0o600
    lock.release()


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "device-cpu.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DeviceError, match=r"cannot use the lock .*device-cpu.lock: it is a symbolic link"):
        FileLock("device-cpu").acquire()
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("folder", ["file", "file/run", "circle"])
def test_what_is_no_folder_of_locks_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path / folder))
    with pytest.raises(DeviceError, match=f"cannot use the folder of locks .*{folder}: "):
        FileLock("device-cpu")


def test_a_folder_in_the_place_of_a_lock_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBS_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "device-cpu.lock").mkdir()
    with pytest.raises(DeviceError, match=r"cannot use the lock .*device-cpu.lock: Is a directory"):
        FileLock("device-cpu").acquire()
