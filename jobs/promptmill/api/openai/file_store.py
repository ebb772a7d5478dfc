"""Files of the API: bytes in a folder under random names, everything else in the table ``files``.

A file appears whole: it is written aside, brought to the disk and renamed. Its row is there before its bytes are in
their place, and goes after them: whatever has to be removed has a row, and what has none is not the store's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row
from ulid import ULID

from promptmill.api.http.errors import ApiError, not_found
from promptmill.api.keys import Principal
from promptmill.api.limits import too_many
from promptmill.api.openai.own_folder import own_folder
from promptmill.core.settings import Settings
from promptmill.database.engine import database_now, epoch, id_at, lock_name, reading, writing
from promptmill.database.tables import files

log = logging.getLogger("promptmill.api.openai.files")

#: Seconds after which what is half there is taken for the rest of a server that died, on whichever machine.
ORPHAN_S = 3600.0

#: Names of parts: see :func:`_new_part`. Nothing else is removed from their folder.
PART = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}\.[0-9a-f]{12}\.part")


class Draft:
    """A file that is being written."""

    def __init__(self, file: IO[bytes], most: int | None, too_large: ApiError | None) -> None:
        self.path = Path(file.name)
        self.bytes = 0
        self._most = most
        self._too_large = too_large
        self._digest = hashlib.sha256()
        self._file = file

    def write(self, data: bytes) -> None:
        """Raises a 413, or what else was said, beyond the largest size."""
        self.bytes += len(data)
        if self._most is not None and self.bytes > self._most:
            raise self._too_large or ApiError(
                413, f"The file is larger than {self._most:,} bytes.", param="file", code="file_too_large"
            )
        self._digest.update(data)
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def look(self) -> None:
        """See what another process wrote to the file instead."""
        self.bytes = self.path.stat().st_size
        with self.path.open("rb") as file:
            self._digest = hashlib.file_digest(file, hashlib.sha256)

    def finish(self) -> str:
        """On the disk; returns the SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


class FileStore:
    """Bytes by id. A name that a client gives is only ever text in the table."""

    def __init__(self, settings: Settings, db: Engine) -> None:
        """Raises :class:`SettingsError` for a folder that is not, and cannot become, this database's."""
        self.root = own_folder(settings, db)
        self._parts = self.root / "parts"
        self._parts.mkdir(exist_ok=True, mode=0o700)
        self._db = db

    def path(self, file_id: str) -> Path:
        """Where the bytes lie. ``file_id`` comes from the table, never from a client."""
        return self.root / file_id[-2:] / file_id

    @contextlib.contextmanager
    def draft(self, most: int | None = None, too_large: ApiError | None = None) -> Iterator[Draft]:
        """A file to write to, of at most so many bytes; what was not stored in the end is gone."""
        draft = Draft(_new_part(self._parts), most, too_large)
        try:
            yield draft
        finally:
            draft.discard()

    def store(
        self,
        draft: Draft,
        name: str,
        purpose: str,
        owner: str | None,
        expires_in_s: float | None,
        file_id: str | None = None,
        allowed: int | None = None,
    ) -> Row[Any]:
        """Keep a finished draft; returns its row. The same ``file_id`` again replaces the file.

        Raises a 429 where the owner would have more than ``allowed`` bytes.
        """
        sha256 = draft.finish()
        file_id = file_id or f"file-{id_at(database_now(self._db)).lower()}"
        target = self.path(file_id)
        target.parent.mkdir(exist_ok=True, mode=0o700)
        with writing(self._db) as connection:
            if allowed is not None:
                # Uploads that run side by side have each found room for themselves alone.
                lock_name(connection, f"files {owner}")
                if _used_bytes(connection, owner) + draft.bytes > allowed:
                    raise store_full(allowed)
            now = connection.execute(sa.select(epoch())).scalar() or 0.0
            connection.execute(sa.delete(files).where(files.c.id == file_id))
            connection.execute(
                sa.insert(files).values(
                    id=file_id, name=name, purpose=purpose, bytes=draft.bytes, sha256=sha256, api_key_id=owner,
                    created_at=now, expires_at=None if expires_in_s is None else now + expires_in_s,
                    status="arriving",
                )
            )  # fmt: skip
        os.replace(draft.path, target)
        with writing(self._db) as connection:
            mine = files.c.id == file_id
            connection.execute(sa.update(files).where(mine).values(status="processed"))
            return connection.execute(sa.select(files).where(mine)).one()

    def find(self, file_id: str, principal: Principal) -> Row[Any]:
        """The file's row. Raises a 404 for one that is not there, or is another key's."""
        with reading(self._db) as connection:
            row = connection.execute(
                sa.select(files).where(files.c.id == file_id, principal.owned(files.c.api_key_id), usable())
            ).one_or_none()
        if row is None:
            raise not_found(f"No such File object: {file_id[:100]}")
        return row

    def used_bytes(self, owner: str | None) -> int:
        with reading(self._db) as connection:
            return _used_bytes(connection, owner)

    def delete(self, file_id: str) -> None:
        """From now on the file is not found; its row goes when its bytes are gone. A sweep tries again what fails."""
        with writing(self._db) as connection:
            connection.execute(sa.update(files).where(files.c.id == file_id).values(status="deleting"))
        try:
            self.path(file_id).unlink(missing_ok=True)
        except OSError as problem:
            log.warning("%s cannot be removed: %s", file_id, problem.strerror)
            return
        with writing(self._db) as connection:
            connection.execute(sa.delete(files).where(files.c.id == file_id))

    def sweep(self) -> None:
        """Remove files that expired, and what a server that died left behind: by their rows, never by what is found.

        A database that was put back to an older state knows nothing of newer files, and they stay.
        """
        half = sa.and_(files.c.status != "processed", files.c.created_at < epoch() - ORPHAN_S)
        over = sa.or_(files.c.expires_at < epoch(), half)
        with reading(self._db) as connection:
            left = connection.execute(sa.select(files.c.id, files.c.status).where(over)).all()
        for file_id, status in left:
            log.info("%s is removed: %s", file_id, "it expired" if status == "processed" else f"left {status}")
            self.delete(file_id)
        with self.draft() as fresh:
            # By the clock of the folder's file system: this machine's may be wrong.
            limit = fresh.path.stat().st_mtime - ORPHAN_S
        for path in self._parts.iterdir():
            if PART.fullmatch(path.name):
                self._sweep_part(path, limit)

    def _sweep_part(self, path: Path, limit: float) -> None:
        try:
            if _is_left(path, limit):
                log.info("%s is removed: left by a server that died", path.name)
                path.unlink()
        except FileNotFoundError:
            # It was stored or given up meanwhile.
            pass
        except OSError as problem:
            log.warning("%s cannot be removed: %s", path.name, problem.strerror)


def _here() -> str:
    """How names of parts end on this machine: several may share the folder, and locks may not reach from one to all."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = platform.node()
    return f".{hashlib.sha256(machine.encode()).hexdigest()[:12]}.part"


def _new_part(folder: Path) -> IO[bytes]:
    """A part that is held until it is closed: one that is not held is the rest of a process that died."""
    while True:
        file = (folder / f"{ULID()}{_here()}").open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A sweep was faster, and takes it for such a rest.
            file.close()
            continue
        except OSError:
            # No locks there; parts go when they are old.
            return file
        if Path(file.name).exists():
            return file
        file.close()


def _is_left(part: Path, limit: float) -> bool:
    """Whether the process that wrote the part is gone: by its lock, or by its age where no lock can tell."""
    if part.name.endswith(_here()):
        with part.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                # No locks there.
                pass
            else:
                return True
    return part.stat().st_mtime < limit


def _used_bytes(db: Connection, owner: str | None) -> int:
    there = sa.and_(files.c.status != "deleting", _unexpired())
    total = db.execute(sa.select(sa.func.sum(files.c.bytes)).where(files.c.api_key_id == owner, there)).scalar()
    return int(total or 0)


def usable() -> sa.ColumnElement[bool]:
    """The condition on files that are there and have not expired, whether or not they were swept away yet."""
    return sa.and_(files.c.status == "processed", _unexpired())


def _unexpired() -> sa.ColumnElement[bool]:
    return sa.or_(files.c.expires_at.is_(None), files.c.expires_at > epoch())


def store_full(allowed: int) -> ApiError:
    """A key has stored all that it may."""
    return too_many(f"This key may store {allowed:,} bytes; delete files first.", 60)
