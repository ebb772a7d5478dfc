"""URLs of Redis and of databases: taken apart, judged, and shown without their secrets.

A password may hold any characters. Where it is not percent-encoded, the reading is taken that fits the rest of the URL.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from promptmill.core.registry import suggestion
from promptmill.errors import DatabaseError, SettingsError

if TYPE_CHECKING:
    import sqlalchemy as sa

#: One server: a name or an address, and a port.
_SERVER = re.compile(r"(?P<host>[^\s/?#@:,\[\]]*|\[[^\s/?#@,\[\]]+\])(?::(?P<port>\d{1,5}))?")

#: Names of options whose values are secrets.
_SECRET = re.compile("password|secret|client_key|server_key")

#: Options that are all named where another one is given.
FEW = 16

#: Options of a Redis URL: those of all kinds, and further ones.
_REDIS_OPTIONS = frozenset({"db", "username", "password"})
_TLS_OPTIONS = frozenset({"ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})
_SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password"})

_REDIS_HINT = (
    "Use redis://user:password@host:6379/0, rediss:// for TLS, unix:///path/to/socket or "
    "sentinel://host1:26379,host2:26379/SERVICE/0. A password that is misread is written with % and two digits for "
    "each special character: # is %23, / is %2F, @ is %40, % is %25."
)


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
        is_name = self.password is not None or self.scheme not in _REDIS_KINDS
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
    return _judge_redis if scheme in _REDIS_KINDS else _judge_postgresql


# --- Redis -----------------------------------------------------------------------------------------------------------

_REDIS_KINDS = {
    "redis": _REDIS_OPTIONS,
    "rediss": _REDIS_OPTIONS | _TLS_OPTIONS,
    "unix": _REDIS_OPTIONS,
    "redis+socket": _REDIS_OPTIONS,
    "sentinel": _REDIS_OPTIONS | _SENTINEL_OPTIONS,
}


def _judge_redis(parts: Parts) -> str | None:
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
    return unknown_option(parts, _REDIS_KINDS[parts.scheme])


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where Redis is, and how one logs in."""

    #: Host and port, of the server or of each Sentinel.
    servers: tuple[tuple[str, int], ...] = ()
    #: Path of a socket.
    path: str | None = None
    #: What the Sentinels are asked for.
    service: str | None = None
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    #: Arguments of redis-py for TLS; None without it.
    tls: dict[str, Any] | None = None
    sentinel_login: dict[str, str] = field(default_factory=dict, repr=False)


def redis_address(url: str) -> RedisAddress:
    """Raises SettingsError that says what is wrong and shows nothing of the URL."""
    scheme = url.partition("://")[0].lower()
    if scheme not in _REDIS_KINDS:
        is_url = re.match(r"[a-z0-9+.-]{1,20}://", url, re.IGNORECASE)
        what = f"'{scheme}' is no scheme of Redis" if is_url else "it is no URL"
        raise SettingsError(f"JOBS_REDIS_URL: {what}", hint=_REDIS_HINT)
    try:
        parts = take_apart(url, _judge_redis)
    except ValueError as problem:
        raise SettingsError(f"JOBS_REDIS_URL: {problem}", hint=_REDIS_HINT) from None
    common = RedisAddress(
        username=parts.option("username") or parts.user,
        password=parts.option("password") or parts.password or None,
        db=_database_number(parts),
    )
    if parts.scheme in ("unix", "redis+socket"):
        return replace(common, path=unquote(parts.path))
    default = 26379 if parts.scheme == "sentinel" else 6379
    found = [server_of(each) or ("", None) for each in parts.servers.split(",")]
    common = replace(common, servers=tuple((host or "127.0.0.1", port or default) for host, port in found))
    if parts.scheme == "sentinel":
        login = {name.removeprefix("sentinel_"): value for name, value in parts.options if name in _SENTINEL_OPTIONS}
        return replace(common, service=unquote(parts.path.split("/")[1]), sentinel_login=login)
    return replace(common, tls=_tls(parts)) if parts.scheme == "rediss" else common


def _database_number(parts: Parts) -> int:
    steps = parts.path.split("/")[1:]
    behind = {"redis": steps, "rediss": steps, "sentinel": steps[1:]}.get(parts.scheme, [])
    return int(parts.option("db") or "".join(behind) or 0)


def _tls(parts: Parts) -> dict[str, Any]:
    found: dict[str, Any] = {"ssl_cert_reqs": "required"}
    for name, value in parts.options:
        if name == "ssl_check_hostname":
            found[name] = value.lower() in ("true", "1", "yes")
        elif name == "ssl_cert_reqs":
            found[name] = value.lower().removeprefix("cert_")
            if found[name] not in ("none", "optional", "required"):
                raise SettingsError("JOBS_REDIS_URL: ssl_cert_reqs is none, optional or required", hint=_REDIS_HINT)
        elif name in _TLS_OPTIONS:
            if not os.access(value, os.R_OK):
                raise SettingsError(f"JOBS_REDIS_URL: {name}: there is no file {value} that can be read")
            found[name] = value
    if found["ssl_cert_reqs"] == "none":
        # Python refuses to look at the name of a certificate that it does not look at.
        found.setdefault("ssl_check_hostname", False)
    return found


def redis_client(url: str, *, asynchronous: bool = False, **options: Any) -> Any:
    """A client of redis-py, or of its asyncio side; ``options`` go to each connection. Nothing is connected yet."""
    # The two sides have the same names.
    side = "redis.asyncio" if asynchronous else "redis"
    redis: Any = importlib.import_module(side)
    address = redis_address(url)
    login = {"username": address.username, "password": address.password, "db": address.db}
    if address.path is not None:
        return redis.Redis(unix_socket_path=address.path, **login, **options)
    if address.service is not None:
        asked = {name: value for name, value in options.items() if name.startswith("socket_")}
        sentinels = importlib.import_module(f"{side}.sentinel")
        known = sentinels.Sentinel(address.servers, sentinel_kwargs=address.sentinel_login | asked)
        client = known.master_for(address.service, **login, **options)
        # Connections to the Sentinels end with the client.
        close, name = _closing_all([client, *known.sentinels], asynchronous)
        setattr(client, name, close)
        return client
    tls = {"ssl": True, **address.tls} if address.tls is not None else {}
    ((host, port),) = address.servers
    return redis.Redis(host=host, port=port, **tls, **login, **options)


def _closing_all(clients: list[Any], asynchronous: bool) -> tuple[Callable[..., Any], str]:
    """What closes all of these clients, and under which name a client has it."""
    name = "aclose" if asynchronous else "close"
    closes = [getattr(each, name) for each in clients]

    def close() -> None:
        for each in closes:
            each()

    async def aclose() -> None:
        for each in closes:
            await each()

    return (aclose if asynchronous else close), name


def celery_broker(url: str, **sockets: float) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The same as Celery takes it: a URL that it cannot misread, settings, and options of the transport.

    ``sockets``: how long it waits, which Sentinels are to be told too.
    """
    address = redis_address(url)
    login = f"{quote(address.username or '', safe='')}:{quote(address.password or '', safe='')}@"
    login = "" if login == ":@" else login
    if address.path is not None:
        # The path of the socket is where the host would be, the database is an option.
        return f"redis+socket://{login}{quote(address.path)}?virtual_host={address.db}", {}, sockets
    hosts = [f"{login}{f'[{host}]' if ':' in host else host}:{port}/{address.db}" for host, port in address.servers]
    if address.service is not None:
        asked = {"master_name": address.service, "sentinel_kwargs": address.sentinel_login | sockets}
        return ";".join(f"sentinel://{each}" for each in hosts), {}, sockets | asked
    if address.tls is not None:
        return f"rediss://{hosts[0]}", {"broker_use_ssl": address.tls}, sockets
    return f"redis://{hosts[0]}", {}, sockets


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
