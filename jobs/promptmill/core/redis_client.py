"""Clients of Redis, and what Celery needs to know of it, from one URL of any of its forms."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, unquote

from promptmill.core.addresses import (
    REDIS_KINDS,
    SENTINEL_OPTIONS,
    TLS_OPTIONS,
    Parts,
    judge_redis,
    server_of,
    take_apart,
)
from promptmill.errors import SettingsError

_REDIS_HINT = (
    "Use redis://user:password@host:6379/0, rediss:// for TLS, unix:///path/to/socket or "
    "sentinel://host1:26379,host2:26379/SERVICE/0. A password that is misread is written with % and two digits for "
    "each special character: # is %23, / is %2F, @ is %40, % is %25."
)


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
    if scheme not in REDIS_KINDS:
        is_url = re.match(r"[a-z0-9+.-]{1,20}://", url, re.IGNORECASE)
        what = f"'{scheme}' is no scheme of Redis" if is_url else "it is no URL"
        raise SettingsError(f"JOBS_REDIS_URL: {what}", hint=_REDIS_HINT)
    try:
        parts = take_apart(url, judge_redis)
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
        login = {name.removeprefix("sentinel_"): value for name, value in parts.options if name in SENTINEL_OPTIONS}
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
        elif name in TLS_OPTIONS:
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
