"""URLs of Redis and of databases: taken apart, judged, and shown without their secrets.

A password may hold any characters. Where it is not percent-encoded, the reading is taken that fits the rest of the URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from promptmill.core.registry import suggestion
from promptmill.errors import DatabaseError

if TYPE_CHECKING:
    import sqlalchemy as sa

#: One server: a name or an address, and a port.
_SERVER = re.compile(r"(?P<host>[^\s/?#@:,\[\]]*|\[[^\s/?#@,\[\]]+\])(?::(?P<port>\d{1,5}))?")

#: Names of options whose values are secrets.
_SECRET = re.compile("password|secret|client_key|server_key")

#: Options that are all named where another one is given.
FEW = 16

#: Options of a Redis URL: those of all kinds, and further ones.
REDIS_OPTIONS = frozenset({"db", "username", "password"})
TLS_OPTIONS = frozenset({"ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})
SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password"})


@dataclass(frozen=True, slots=True)
class Parts:
    """A URL taken apart; user, password and values of options as they are meant, the rest as it is written."""

    scheme: str
    user: str | None
    password: str | None = field(repr=False)
    servers: str
    path: str
    options: tuple[tuple[str, str], ...] = field(repr=False)

    def option(self, name: str) -> str | None:
        return next((value for key, value in self.options if key == name), None)

    def masked(self) -> str:
        """The URL with ``***`` for what is secret."""
        # Who gives Redis no name may have put the password in its place.
        is_name = self.password is not None or self.scheme not in REDIS_KINDS
        login = (self.user if is_name else "***") if self.user else ""
        login += ":***" if self.password is not None else ""
        shown = (f"{name}={'***' if _SECRET.search(name) else value}" for name, value in self.options)
        asked = "?" + "&".join(shown) if self.options else ""
        return f"{self.scheme}://{login}{'@' if login else ''}{self.servers}{self.path}{asked}"


#: What is wrong with a URL as it was taken apart; None where all is well.
Judge = Callable[[Parts], str | None]


def take_apart(url: str, judge: Judge) -> Parts:
    """The first reading of the URL in which nothing is wrong, the usual one first. Raises ValueError that says what is.

    Readings differ in which @ ends the password.
    """
    problems = []
    for parts in _readings(url):
        problem = judge(parts)
        if problem is None:
            return parts
        problems.append(problem)
    raise ValueError(problems[0] if problems else "it is no URL")


def _readings(url: str) -> Iterator[Parts]:
    scheme, found, rest = url.strip().partition("://")
    if not found or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return
    usual = re.split(r"[/?#]", rest, maxsplit=1)[0].rfind("@")
    others = [at for at in range(len(rest) - 1, -1, -1) if rest[at] == "@" and at != usual]
    for end in (usual, *others):
        user, password = _login(rest[: max(0, end)])
        place, asked, query = rest[end + 1 :].partition("?")
        servers, slash, path = place.partition("/")
        options = tuple(_option(each) for each in query.split("&") if each) if asked else ()
        yield Parts(scheme.lower(), user, password, servers, slash + path, options)


def _login(text: str) -> tuple[str | None, str | None]:
    user, colon, password = text.partition(":")
    return unquote(user) or None, unquote(password) if colon else None


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    # Without a value it is none: no known name has a question mark.
    return (name, unquote(value)) if equals else (f"{name}?", "")


def unknown_option(parts: Parts, known: frozenset[str]) -> str | None:
    """What is wrong with the options of a URL that may have these ones."""
    wrong = [name for name, _ in parts.options if name not in known]
    if not wrong:
        return None
    if wrong[0].endswith("?") or any(_SECRET.search(name) for name, _ in parts.options):
        # It may be the rest of a password.
        return "behind its ? is something that is no NAME=VALUE of a known option"
    near = suggestion(wrong[0], known)
    if len(known) > FEW:
        near = near.partition("Known:")[0]
    return f"it has the unknown option '{wrong[0]}'. {near}".strip()


def server_of(text: str) -> tuple[str, int | None] | None:
    """Host and port; None for what is neither."""
    found = _SERVER.fullmatch(text)
    if found is None or not 0 < int(found["port"] or 1) < 65536:
        return None
    return unquote(found["host"].strip("[]")), int(found["port"]) if found["port"] else None


def masked(url: str) -> str:
    """A URL with ``***`` for its secrets, whatever its form. A URL that cannot be read keeps its beginning only."""
    scheme = url.partition("://")[0].lower()
    if scheme.partition("+")[0] == "sqlite":
        return url
    try:
        return take_apart(url, _judge_of(scheme)).masked()
    except ValueError:
        return f"{scheme}://***" if re.match(r"[a-z][a-z0-9+.-]{0,20}://", url, re.IGNORECASE) else "***"


def secrets_of(url: str) -> set[str]:
    """Each secret of a URL, as it is meant and as it is written; each piece of one that cannot be read."""
    scheme, _, rest = url.partition("://")
    if scheme.lower().partition("+")[0] == "sqlite":
        return set()
    try:
        parts = take_apart(url, _judge_of(scheme.lower()))
    except ValueError:
        return {piece for piece in re.split("[:@/?#&=]", rest) if len(piece) > 3 and piece != "password"}
    found = [parts.password, *(value for name, value in parts.options if _SECRET.search(name))]
    return {form for each in found if each for form in (each, quote(each, safe=""))}


def _judge_of(scheme: str) -> Judge:
    return judge_redis if scheme in REDIS_KINDS else _judge_postgresql


# --- Redis -----------------------------------------------------------------------------------------------------------

REDIS_KINDS = {
    "redis": REDIS_OPTIONS,
    "rediss": REDIS_OPTIONS | TLS_OPTIONS,
    "unix": REDIS_OPTIONS,
    "redis+socket": REDIS_OPTIONS,
    "sentinel": REDIS_OPTIONS | SENTINEL_OPTIONS,
}


def judge_redis(parts: Parts) -> str | None:
    servers = parts.servers.split(",")
    is_socket = parts.scheme in ("unix", "redis+socket")
    if any(server_of(each) is None for each in servers) or "#" in parts.path:
        return "its host or port cannot be read"
    if len(servers) > 1 and parts.scheme != "sentinel":
        return "it names several servers"
    if is_socket and (parts.servers or len(parts.path) < 2):
        return "it names no socket: the path begins with the third /"
    if parts.scheme == "sentinel" and (not re.fullmatch(r"/[^/]+(/\d*)?", parts.path) or not all(servers)):
        return "it does not say for which service the Sentinels are asked"
    if parts.scheme in ("redis", "rediss") and not re.fullmatch(r"(/\d*)?", parts.path):
        return "its database is no number"
    if not re.fullmatch(r"\d*", parts.option("db") or ""):
        return "its database is no number"
    return unknown_option(parts, REDIS_KINDS[parts.scheme])


# --- databases -------------------------------------------------------------------------------------------------------

_POSTGRESQL_KINDS = ("postgresql", "postgres", "postgresql+psycopg")

#: Options that Python's SQLite takes. A path that begins with ``file:`` may have those of SQLite's own URIs.
_SQLITE_OPTIONS = frozenset(
    {"timeout", "isolation_level", "check_same_thread", "detect_types", "cached_statements", "uri"}
)

_DATABASE_HINT = (
    "Use sqlite:///path/to/file or postgresql://user:password@host/name. In a path % is written as %25 and ? as %3F; "
    "a password that is misread is written with % and two digits for each special character: # is %23, @ is %40."
)


def database_url(url: str) -> sa.URL:
    """Raises DatabaseError that says what is wrong and shows nothing of the URL."""
    scheme, _, rest = url.strip().partition("://")
    try:
        if scheme.lower() in ("sqlite", "sqlite+pysqlite"):
            return _sqlite_url(rest)
        if scheme.lower() not in _POSTGRESQL_KINDS:
            is_url = re.fullmatch(r"[A-Za-z0-9+.-]{1,20}", scheme) and "://" in url
            raise ValueError(f"databases of the kind '{scheme}' are not supported" if is_url else "it is no URL")
        return _postgresql_url(take_apart(url, _judge_postgresql))
    except ValueError as problem:
        raise DatabaseError(f"JOBS_DATABASE_URL: {problem}", hint=_DATABASE_HINT) from None


def sqlite_url(path: str | os.PathLike[str]) -> str:
    """The URL of a file of SQLite, whatever characters its path has."""
    return "sqlite:///" + os.fspath(path).replace("%", "%25").replace("?", "%3F")


def sqlite_files(url: str) -> list[str]:
    """The files of a SQLite database; none of another one."""
    if not url.startswith("sqlite") or (path := database_url(url).database) is None:
        return []
    path = os.path.expanduser(path.removeprefix("file:"))
    return [path, f"{path}-wal", f"{path}-shm"]


def _sqlite_url(rest: str) -> sa.URL:
    import sqlalchemy as sa

    server, slash, path = rest.partition("/")
    if server or (not slash and rest):
        raise ValueError("a SQLite file is behind three slashes, and an absolute path behind four")
    place, asked, query = path.rpartition("?")
    options = tuple(_option(each) for each in query.split("&")) if asked else ()
    if not asked or any(not re.fullmatch(r"\w+", name) for name, _ in options):
        # A question mark of a folder's name, and no option.
        place, options = path, ()
    is_uri = place.startswith("file:")
    if not is_uri and (problem := unknown_option(Parts("sqlite", None, None, "", "", options), _SQLITE_OPTIONS)):
        raise ValueError(problem)
    return sa.URL.create("sqlite", database=unquote(place) or None, query=dict(options))


def _judge_postgresql(parts: Parts) -> str | None:
    if server_of(parts.servers) is None or "#" in parts.path or "@" in parts.path:
        return "its host or port cannot be read"
    return unknown_option(parts, _libpq_options() | {"prepare_threshold"})


@lru_cache(maxsize=1)
def _libpq_options() -> frozenset[str]:
    from psycopg import pq

    return frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())


def _postgresql_url(parts: Parts) -> sa.URL:
    import sqlalchemy as sa

    host, port = server_of(parts.servers) or ("", None)
    query: dict[str, tuple[str, ...] | str] = {}
    for name, value in parts.options:
        # Several servers are several options of one name.
        query[name] = value if name not in query else (*_several(query[name]), value)
    return sa.URL.create(
        "postgresql+psycopg", username=parts.user, password=parts.password, host=host or None, port=port,
        database=unquote(parts.path[1:]) or None, query=query,
    )  # fmt: skip


def _several(value: tuple[str, ...] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
