"""The folders of hosts' sockets, which go with the process that made them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from pathlib import Path

from promptmill.errors import DeviceError

#: Folders of the hosts' sockets; the number of the parent follows.
FOLDER_PREFIX = "promptmill-host-"

#: The lock in such a folder, and the socket.
LOCK_NAME = "lock"
SOCKET_NAME = "sock"

#: Bytes of the longest address of a socket, and the folder that is used where the temporary one makes it longer.
LONGEST_ADDRESS = 103 if sys.platform == "darwin" else 107
SHORT_FOLDER = "/tmp"  # noqa: S108 - a folder of our own is made in it


class SocketFolder:
    """The folder of a host's socket. Its parent holds a lock in it: the kernel frees that, however the parent ends.

    A process id would prove nothing: other containers that share the temporary folder have their own.
    """

    def __init__(self) -> None:
        """Raises :class:`DeviceError` where no folder can be made."""
        parent = _parent_of_folders()
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=parent))
        except OSError as problem:
            raise DeviceError(
                f"cannot make a folder for the engine's socket in {parent}: {problem.strerror}",
                hint="Set TMPDIR to a folder that may be written to and has a short path.",
            ) from None
        new = self.path / f"{LOCK_NAME}.new"
        self._lock = new.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # A lock that is not held yet cannot be found.
        new.rename(self.path / LOCK_NAME)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _parent_of_folders() -> str:
    """The temporary folder, unless its path leaves no room for the address of a socket."""
    usual = tempfile.gettempdir()
    address = f"{usual}/{FOLDER_PREFIX}{os.getpid()}-12345678/{SOCKET_NAME}"
    return usual if len(os.fsencode(address)) <= LONGEST_ADDRESS else SHORT_FOLDER


def remove_leftovers() -> None:
    """Folders of hosts whose parent was killed before it could tidy up: their locks are free.

    One without a lock is just being made, or an older version's.
    """
    for folder in Path(_parent_of_folders()).glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK_NAME).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
