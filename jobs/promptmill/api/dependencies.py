"""What the calls of the API work with, made once and handed to each."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request
from sqlalchemy.engine import Engine
from starlette.concurrency import run_in_threadpool

from promptmill.api import keys
from promptmill.api.http.errors import ApiError
from promptmill.api.http.evaluation import Evaluation
from promptmill.api.http.streams import Refusal
from promptmill.api.keys import LOCAL, Principal
from promptmill.api.limits import KeyLimits
from promptmill.api.openai.file_store import FileStore
from promptmill.core.settings import Settings
from promptmill.database.tables import api_keys
from promptmill.ledger import Ledger

if TYPE_CHECKING:
    from promptmill.api.interactive.live import Live
    from promptmill.api.openai.model_directory import ModelDirectory

#: Seconds that a key's row is remembered: a revoked one is refused after at most so long.
REMEMBER_S = 2.0

#: Seconds between two notes of when a key was last used.
NOTE_S = 60.0

#: Most keys, wrong ones among them, that are remembered.
MOST_REMEMBERED = 4096


@dataclass(slots=True)
class Services:
    """One server's parts."""

    settings: Settings
    db: Engine
    ledger: Ledger
    store: FileStore
    limits: KeyLimits
    models: ModelDirectory
    live: Live
    #: Where what clients send is evaluated: bodies and answers, datasets and reports.
    quick: Evaluation
    slow: Evaluation
    #: Whether a key is asked for.
    locked: bool
    #: Signs the cookies of logins.
    login_secret: bytes
    _known: dict[str, tuple[float, Principal | None]] = field(default_factory=dict)
    _noted: dict[str, float] = field(default_factory=dict)

    async def who(self, key: str) -> Principal | None:
        """Who holds the key; None when no owner does."""
        hashed, now = keys.digest(key), time.monotonic()
        remembered = self._known.get(hashed)
        if remembered is None or now - remembered[0] > REMEMBER_S:
            found = await run_in_threadpool(keys.find, self.db, api_keys.c.key_sha256, hashed)
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            remembered = self._known[hashed] = now, found[0] if found else None
        principal = remembered[1]
        key_id = principal.key_id if principal else None
        if key_id is not None and now - self._noted.get(key_id, float("-inf")) > NOTE_S:
            self._noted[key_id] = now
            await run_in_threadpool(keys.used, self.db, key_id)
        return principal


def services(request: Request) -> Services:
    """The parts of the server that was asked."""
    found: Services = request.app.state.services
    return found


async def _parts(request: Request) -> Services:
    # Not an ordinary function: those are called in a thread, which costs more than all they do.
    return services(request)


Parts = Annotated[Services, Depends(_parts)]


def bearer(request: Request) -> str | None:
    """The key that came with the call."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key") or None


async def identify(request: Request) -> Principal:
    """Who calls: by key, by the cookie of a page, or a person at this machine. Raises a 401."""
    parts = services(request)
    key = bearer(request)
    found = await parts.who(key) if key else None
    if found is None and key is None and "cookie" in request.headers:
        from promptmill.api.pages.login import principal_of_cookie

        found = await run_in_threadpool(principal_of_cookie, parts.login_secret, parts.db, request)
    if found is not None:
        return found
    if not parts.locked:
        # Clients always send some key; where none is asked for, an unknown one says nothing.
        return LOCAL
    if key is None:
        raise ApiError(
            401, "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.", code="missing_api_key"
        )
    raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")


def refusal_of(request: Request, principal: Principal) -> Refusal | None:
    """What a stream asks again and again: its key may be revoked before its end. None where no key was asked for."""

    async def refusal() -> ApiError | None:
        try:
            await identify(request)
        except ApiError as problem:
            return problem
        return None

    return None if principal.key_id is None else refusal


def _requires(scope: str) -> Any:
    async def check(request: Request) -> Principal:
        principal = await identify(request)
        services(request).limits.count(principal)
        if not principal.may(scope):
            raise ApiError(403, f"This key may not do that: it lacks the scope '{scope}'.", code="missing_scope")
        return principal

    return Depends(check)


Reader = Annotated[Principal, _requires("read")]
Submitter = Annotated[Principal, _requires("submit")]
Admin = Annotated[Principal, _requires("admin")]


async def in_thread(function: Any, *arguments: Any) -> Any:
    """Run what waits for the database beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)
