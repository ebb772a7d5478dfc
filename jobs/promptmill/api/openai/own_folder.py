"""The folder of the API's files: marked as this database's, and the place of what only its servers may know."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from promptmill.core.settings import Settings, data_dir
from promptmill.database.engine import lock_name, reading, writing
from promptmill.database.tables import files, installation
from promptmill.errors import SettingsError

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


class Taken(SettingsError):
    """The folder is another database's."""


def own_folder(settings: Settings, db: Engine) -> Path:
    """The folder of this database: JOBS_FILES_DIR, or one in the platform's data folder that no other database has.

    Raises :class:`SettingsError` for one of another database, or one that holds what is not the API's.
    """
    with reading(db) as connection:
        mine = connection.execute(sa.select(installation.c.id)).scalar_one()
    if settings.files_dir:
        return _owned(Path(settings.files_dir).expanduser(), mine, db)
    try:
        return _owned(data_dir() / "files", mine, db)
    except Taken:
        return _owned(data_dir() / f"files-{mine[:12]}", mine, db)


def _owned(folder: Path, mine: str, db: Engine) -> Path:
    """The folder, made or marked where it was not; nothing else of it is touched."""
    try:
        if _read(folder / MARK) != mine:
            # Servers that start together: one marks it.
            with writing(db) as connection:
                lock_name(connection, "promptmill files folder")
                _mark(folder, mine, connection)
    except OSError as problem:
        raise SettingsError(
            f"JOBS_FILES_DIR: cannot use the folder {folder}: {problem.strerror or problem}",
            hint="Give a folder that the API may write to.",
        ) from None
    return folder


def secret(folder: Path, db: Engine) -> bytes:
    """The secret of all servers over one folder; made by the first that asks."""
    path = folder / SECRET
    with writing(db) as connection:
        lock_name(connection, "promptmill files folder")
        if len(_read(path)) != 2 * SECRET_BYTES:
            _write(path, secrets.token_hex(SECRET_BYTES))
        return bytes.fromhex(_read(path))


def _mark(folder: Path, mine: str, db: Connection) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = _read(folder / MARK)
    if owner == mine:
        return
    stored = _stored(folder)
    if owner:
        raise Taken(
            f"JOBS_FILES_DIR: the folder {folder} belongs to another database",
            hint=f"Give each database a folder of its own. {MARK} in it names its database (table installation).",
        )
    if not _is_of(stored, db):
        raise Taken(
            f"JOBS_FILES_DIR: the folder {folder} holds {stored[0]}, which this database does not know",
            hint="Give a folder for the API's files alone: an empty one, or one that is not there yet.",
        )
    with contextlib.suppress(PermissionError):
        # A folder that another user owns and shares stays as it is.
        folder.chmod(0o700)
    _write(folder / MARK, mine)


def _is_of(stored: list[str], db: Connection) -> bool:
    """Whether files that an earlier version left without a mark are this database's: it knows one of them, at least."""
    return not stored or any(
        db.execute(sa.select(files.c.id).where(files.c.id.in_(stored[at : at + 500])).limit(1)).scalar()
        for at in range(0, len(stored), 500)
    )


def _stored(folder: Path) -> list[str]:
    """Ids of the files in the folder. Raises :class:`SettingsError` for what no server of ours made."""
    found = []
    for place in folder.iterdir():
        if place.name in NOT_FOREIGN or (place.name == "parts" and place.is_dir()):
            continue
        inside = list(place.iterdir()) if len(place.name) == 2 and place.is_dir() else [place]
        for path in inside:
            if not STORED.fullmatch(path.name) or path.name[-2:] != place.name:
                raise SettingsError(
                    f"JOBS_FILES_DIR: the folder {folder} holds {path.relative_to(folder)}, which is not the API's",
                    hint="Give a folder for the API's files alone: an empty one, or one that is not there yet.",
                )
            found.append(path.name)
    return found


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
