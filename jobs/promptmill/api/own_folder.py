"""The folder of the API's files: marked as this database's, and the place of what only its servers may know."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.database import lock_name, reading, writing
from promptmill.errors import SettingsError
from promptmill.tables import installation

#: The file that says whose the folder is.
MARK = "promptmill-files"

#: What signs the cookies of logins. In no table: who reads the database must not be able to log in.
SECRET = "login-secret"  # noqa: S105 - its name

#: Bytes of the secret.
SECRET_BYTES = 32

#: Besides what the store makes: ours, and what file systems put into an empty folder themselves.
NOT_FOREIGN = {MARK, SECRET, "lost+found"}

#: Names of files that the store gives: of uploads and of batches' results.
STORED = re.compile(r"file-[0-9a-z]{1,60}")


def own(folder: Path, db: Engine) -> None:
    """Make the folder, or mark it as this database's; nothing else of it is touched.

    Raises :class:`SettingsError` for a folder of another database, or one that holds what is not the API's.
    """
    with reading(db) as connection:
        mine = connection.execute(sa.select(installation.c.id)).scalar_one()
    try:
        if _read(folder / MARK) != mine:
            # Servers that start together: one marks it.
            with writing(db) as connection:
                lock_name(connection, "promptmill files folder")
                _mark(folder, mine)
    except OSError as problem:
        raise SettingsError(
            f"JOBS_FILES_DIR: cannot use the folder {folder}: {problem.strerror or problem}",
            hint="Give a folder that the API may write to.",
        ) from None


def secret(folder: Path, db: Engine) -> bytes:
    """The secret of all servers over one folder; made by the first that asks."""
    path = folder / SECRET
    with writing(db) as connection:
        lock_name(connection, "promptmill files folder")
        if len(_read(path)) != 2 * SECRET_BYTES:
            _write(path, secrets.token_hex(SECRET_BYTES))
        return bytes.fromhex(_read(path))


def _mark(folder: Path, mine: str) -> None:
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = _read(folder / MARK)
    if owner == mine:
        return
    if owner:
        raise SettingsError(
            f"JOBS_FILES_DIR: the folder {folder} belongs to another database",
            hint=f"Give each database a folder of its own. Its file {MARK} names the database (table installation).",
        )
    foreign = None if is_new else _foreign(folder)
    if foreign:
        raise SettingsError(
            f"JOBS_FILES_DIR: the folder {folder} holds {foreign}, which is not the API's",
            hint="Give a folder for the API's files alone: an empty one, or one that is not there yet.",
        )
    with contextlib.suppress(PermissionError):
        # A folder that somebody else owns and shares stays as it is.
        folder.chmod(0o700)
    _write(folder / MARK, mine)


def _foreign(folder: Path) -> str | None:
    """A name in the folder that no server of ours made, if there is one: earlier versions left no mark."""
    for place in folder.iterdir():
        if place.name in NOT_FOREIGN or (place.name == "parts" and place.is_dir()):
            continue
        if len(place.name) != 2 or not place.is_dir():
            return place.name
        for file in place.iterdir():
            if not STORED.fullmatch(file.name) or file.name[-2:] != place.name:
                return f"{place.name}/{file.name}"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        return "what is no mark"


def _write(path: Path, text: str) -> None:
    """A new file, for this user alone, whatever the umask. What is there is the rest of a server that died."""
    path.unlink(missing_ok=True)
    with open(path, "x", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
