"""Folders of hosts' sockets: whose parent lives, in whatever pid namespace, keeps them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from promptmill_workers.host.client import FOLDER_PREFIX, LOCK_NAME, SocketFolder, _remove_leftovers

#: Larger than any process id here: one that no process of this namespace has.
NOBODY = 4_999_999


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


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
