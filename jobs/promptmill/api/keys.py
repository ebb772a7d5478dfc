"""API keys: random, shown once, stored as SHA-256. A key has scopes, limits, and owns what it makes."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from promptmill.database.engine import epoch, id_at, now_of, reading, writing
from promptmill.database.tables import api_keys
from promptmill.errors import PromptmillError, UnknownName

#: What a key may do: look; look and submit; everything, of all keys.
SCOPES = ("read", "submit", "admin")

PREFIX = "pm-"

#: Limits of a key that ``keys create`` sets.
LIMITS = ("requests_per_s", "queued_requests", "stored_bytes", "concurrent")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. ``key_id`` is None for a person at this machine, of whom no key is asked."""

    key_id: str | None
    scopes: frozenset[str]
    limits: dict[str, Any]

    @property
    def is_operator(self) -> bool:
        """Sees what every key made."""
        return self.key_id is None or "admin" in self.scopes

    def may(self, scope: str) -> bool:
        return "admin" in self.scopes or scope in self.scopes or (scope == "read" and "submit" in self.scopes)

    def owns(self, owner: str | None) -> bool:
        return self.is_operator or owner == self.key_id

    def owned(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """The condition on a table's owner column."""
        return sa.true() if self.is_operator else column == self.key_id


#: A person at this machine, where no keys are asked for.
LOCAL = Principal(None, frozenset(SCOPES), {})


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def create(db: Engine, name: str, scopes: tuple[str, ...], limits: dict[str, Any]) -> tuple[str, str]:
    """A new key; returns its id and the key itself, which cannot be read again."""
    if not name or not name.isprintable() or len(name) > 100:
        raise PromptmillError("a key's name has 1 to 100 printable characters", hint="Give --name.")
    unknown = set(scopes) - set(SCOPES)
    if unknown or not scopes:
        raise PromptmillError(f"unknown scope '{min(unknown, default='')}'", hint=f"Scopes: {', '.join(SCOPES)}.")
    key = PREFIX + secrets.token_urlsafe(32)
    with writing(db) as connection:
        now = now_of(connection)
        key_id = id_at(now)
        connection.execute(
            sa.insert(api_keys).values(
                id=key_id, name=name, key_sha256=digest(key), scopes=",".join(sorted(set(scopes))), created_at=now,
                revoked=False, **limits,
            )
        )  # fmt: skip
    return key_id, key


def revoke(db: Engine, reference: str) -> str:
    """Refuse a key from now on; its id or its name. Raises :class:`UnknownName`."""
    found = [row for row in listed(db) if reference in (row["id"], row["name"])]
    if len(found) != 1:
        raise UnknownName(
            f"{'no key' if not found else 'more than one key'} is called '{reference[:100]}'",
            hint="'promptmill keys list' shows them with their ids.",
        )
    with writing(db) as connection:
        connection.execute(sa.update(api_keys).where(api_keys.c.id == found[0]["id"]).values(revoked=True))
    return str(found[0]["id"])


def listed(db: Engine) -> list[dict[str, Any]]:
    """All keys, without what would let anybody use them."""
    columns = [column for column in api_keys.c if column.name != "key_sha256"]
    with reading(db) as connection:
        return [dict(row) for row in connection.execute(sa.select(*columns).order_by(api_keys.c.id)).mappings()]


def find(db: Engine, column: sa.Column[Any], value: str) -> tuple[Principal, str] | None:
    """Who holds the key with this hash or id, and the hash; None for an unknown or a revoked one."""
    with reading(db) as connection:
        row = connection.execute(sa.select(api_keys).where(column == value)).one_or_none()
    if row is None or row.revoked:
        return None
    limits = {name: getattr(row, name) for name in LIMITS if getattr(row, name) is not None}
    return Principal(row.id, frozenset(row.scopes.split(",")), limits), row.key_sha256


def used(db: Engine, key_id: str) -> None:
    """Note that the key was used now."""
    with writing(db) as connection:
        connection.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=epoch()))
