"""Folders of hosts' sockets: whose parent lives, in whatever pid namespace, keeps them."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptmill.errors import ModelError
from promptmill_workers.host.client import FOLDER_PREFIX, LOCK_NAME, SocketFolder, _remove_leftovers

#: Larger than any process id here: one that no process of this namespace has.
NOBODY = 4_999_999


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Its path is short enough for a socket's, which pytest's own may not be."""
    with tempfile.TemporaryDirectory(prefix="pm-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_the_folder_of_a_parent_in_another_pid_namespace_stays(temporary: Path) -> None:
    folder = SocketFolder()
    # Its process id means nothing here.
    elsewhere = folder.path.rename(temporary / f"{FOLDER_PREFIX}{NOBODY}-abc")
    _remove_leftovers()
    assert elsewhere.is_dir()
    folder.remove()


def test_the_folder_of_a_parent_that_was_killed_goes(temporary: Path) -> None:
    program = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from promptmill_workers.host.client import SocketFolder\n"
        "SocketFolder(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program, str(temporary)], check=False).returncode == -9
    assert len(list(temporary.glob(f"{FOLDER_PREFIX}*/{LOCK_NAME}"))) == 1
    _remove_leftovers()
    assert list(temporary.iterdir()) == []


def test_a_folder_that_is_just_being_made_stays(temporary: Path) -> None:
    new = temporary / f"{FOLDER_PREFIX}{NOBODY}-new"
    new.mkdir()
    _remove_leftovers()
    assert new.is_dir()


def test_a_folder_goes_with_its_host(temporary: Path) -> None:
    folder = SocketFolder()
    folder.remove()
    assert list(temporary.iterdir()) == []


def test_a_temporary_folder_with_a_long_path_has_a_socket_all_the_same(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = temporary / ("x" * 110)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = SocketFolder()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder.path / "host.sock"))
    _remove_leftovers()
    assert folder.path.is_dir()
    folder.remove()
    assert not folder.path.exists()


def test_a_temporary_folder_that_is_gone_is_one_clear_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/promptmill-gone")
    with pytest.raises(ModelError, match="no folder for the engine's socket in /promptmill-gone") as caught:
        SocketFolder()
    assert "TMPDIR" in (caught.value.hint or "")
