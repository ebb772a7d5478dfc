"""Health: is this server up, and can it serve."""

from __future__ import annotations

import asyncio
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter
from starlette.responses import Response

from promptmill.api import documents
from promptmill.api.bodies import json_response
from promptmill.api.services import Parts, Services, in_thread
from promptmill.broker import Broker
from promptmill.database import current_revision, head_revision_fast, reading
from promptmill.errors import PromptmillError

router = APIRouter(tags=["System"])

#: Seconds that each look may take.
LOOK_S = 5.0


@router.get("/healthz", summary="Is the server up", responses=documents.responses())
async def healthz() -> Response:
    """The process answers; nothing else is looked at."""
    return json_response({"status": "ok"})


@router.get("/readyz", summary="Can the server serve", responses=documents.responses())
async def readyz(parts: Parts) -> Response:
    """Database, schema, Redis, and a live worker; 503 where one of them is missing."""
    checks = await look(parts)
    ready = all(each == "ok" for each in checks.values())
    return json_response({"status": "ok" if ready else "unavailable", "checks": checks}, 200 if ready else 503)


async def look(parts: Services) -> dict[str, str]:
    """What is there: ``ok``, or what is wrong in a few words."""
    looks = {"database": _database, "schema": _schema, "redis": _redis, "worker": _worker}
    found = await asyncio.gather(
        *(asyncio.wait_for(in_thread(each, parts), LOOK_S) for each in looks.values()), return_exceptions=True
    )
    return {
        name: each
        if isinstance(each, str)
        else "no answer in time"
        if isinstance(each, TimeoutError)
        else "unreachable"
        for name, each in zip(looks, found, strict=True)
    }


def _database(parts: Services) -> str:
    with reading(parts.db) as connection:
        connection.execute(sa.select(1))
    return "ok"


def _schema(parts: Services) -> str:
    current, wanted = current_revision(parts.db), head_revision_fast()
    return "ok" if current == wanted else f"at revision {current}, {wanted} is needed"


def _redis(parts: Services) -> str:
    try:
        Broker(parts.settings.redis_url).clock_offset_s()
    except PromptmillError:
        return "unreachable"
    return "ok"


def _worker(parts: Services) -> str:
    parts.models.refresh()
    return "ok" if parts.models.models else "no live worker"


@router.get("/health", summary="Health as model servers tell it", responses=documents.responses())
async def health(parts: Parts) -> Response:
    """For clients of other servers: whether a model is loaded, and which."""
    checks = await look(parts)
    loaded = [each.name for each in parts.models.models if each.loaded]
    ready = all(each == "ok" for each in checks.values())
    body: dict[str, Any] = {
        "status": "ok" if ready else "error", "healthy": ready, "model_loaded": bool(loaded),
        "model": loaded[0] if loaded else None, "models": loaded,
    }  # fmt: skip
    return json_response(body, 200 if ready else 503)
