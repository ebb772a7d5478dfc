"""Folders of hosts' sockets: whose parent lives, in whatever pid namespace, keeps them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptmill.errors import DeviceError
from promptmill_workers.devices import Device
from promptmill_workers.engines.contract import EngineOptions
from promptmill_workers.host import socket_folder
from promptmill_workers.host.client import EngineHost, HostConfig
from promptmill_workers.host.socket_folder import FOLDER_PREFIX, LOCK_NAME, SHORT_FOLDER, SocketFolder, remove_leftovers

#: Larger than any process id here: one that no process of this namespace has.
NO_WORKER = 4_999_999


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder with a short path: that of ``tmp_path`` may leave no room for a socket's address."""
    with tempfile.TemporaryDirectory(prefix="p-", dir=SHORT_FOLDER) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_the_folder_of_a_parent_in_another_pid_namespace_stays(temporary: Path) -> None:
    folder = SocketFolder()
    # Its process id means nothing here.
    elsewhere = folder.path.rename(temporary / f"{FOLDER_PREFIX}{NO_WORKER}-abc")
    remove_leftovers()
    assert elsewhere.is_dir()
    folder.remove()


def test_the_folder_of_a_parent_that_was_killed_goes(temporary: Path) -> None:
    program = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from promptmill_workers.host.socket_folder import SocketFolder\n"
        "SocketFolder(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program, str(temporary)], check=False).returncode == -9
    assert len(list(temporary.glob(f"{FOLDER_PREFIX}*/{LOCK_NAME}"))) == 1
    remove_leftovers()
    assert list(temporary.iterdir()) == []


def test_a_folder_that_is_just_being_made_stays(temporary: Path) -> None:
    new = temporary / f"{FOLDER_PREFIX}{NO_WORKER}-new"
    new.mkdir()
    remove_leftovers()
    assert new.is_dir()


def test_a_folder_goes_with_its_host(temporary: Path) -> None:
    folder = SocketFolder()
    folder.remove()
    assert list(temporary.iterdir()) == []


def test_a_host_starts_where_the_temporary_folder_has_a_long_path(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = temporary / ("x" * 110)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(socket_folder, "SHORT_FOLDER", str(temporary))
    host = EngineHost(HostConfig("echo", Device("cpu"), EngineOptions(slots=1)))
    assert len(list(temporary.glob(f"{FOLDER_PREFIX}*"))) == 1
    assert host.wait_ready().slots == 1
    host.kill()
    assert list(deep.iterdir()) == []


def test_no_place_for_a_folder_is_one_clear_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    with pytest.raises(DeviceError, match=r"cannot make a folder for the engine's socket in .*gone: No such file"):
        SocketFolder()
