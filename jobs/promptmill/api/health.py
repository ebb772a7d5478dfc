"""Health: is this server up, and can it serve."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

import psutil
import sqlalchemy as sa
from fastapi import APIRouter, Request
from starlette.responses import Response

from promptmill.api import openapi
from promptmill.api.dependencies import Parts, Reader, Services, identify, in_thread
from promptmill.api.http.errors import ApiError
from promptmill.api.http.validation import json_response
from promptmill.api.keys import Principal
from promptmill.api.openai.model_directory import models_of
from promptmill.database.engine import reading
from promptmill.database.revision import current_revision, head_revision
from promptmill.database.tables import jobs
from promptmill.errors import PromptmillError
from promptmill.ledger import waiting_requests
from promptmill.queue.broker import Broker

router = APIRouter(tags=["System"])

#: Seconds that each look may take.
LOOK_S = 5.0


@router.get("/healthz", summary="Is the server up", responses=openapi.responses())
async def healthz() -> Response:
    """The process answers; nothing else is looked at."""
    return json_response({"status": "ok"})


@router.get("/readyz", summary="Can the server serve", responses=openapi.responses())
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
    current, wanted = current_revision(parts.db), head_revision()
    return "ok" if current == wanted else f"at revision {current}, {wanted} is needed"


def _redis(parts: Services) -> str:
    try:
        Broker(parts.settings.redis_url).ping()
    except PromptmillError:
        return "unreachable"
    return "ok"


def _worker(parts: Services) -> str:
    parts.models.refresh()
    return "ok" if parts.models.models else "no live worker"


@router.get("/health", summary="Health as model servers tell it", responses=openapi.responses())
async def health(request: Request, parts: Parts) -> Response:
    """For clients of other servers: whether a model is loaded; and which, to who may look."""
    checks = await look(parts)
    try:
        named = (await identify(request)).may("read")
    except ApiError:
        named = False
    loaded = [each.name for each in parts.models.models if each.loaded]
    ready = all(each == "ok" for each in checks.values())
    body: dict[str, Any] = {
        "status": "ok" if ready else "error", "healthy": ready, "model_loaded": bool(loaded),
        "model": loaded[0] if loaded and named else None, "models": loaded if named else [],
    }  # fmt: skip
    return json_response(body, 200 if ready else 503)


@router.get("/v1/system/status", summary="Devices, models, queue, memory", responses=openapi.responses())
async def status(parts: Parts, principal: Reader) -> Response:
    """What every worker has and does, what waits, and what this server uses."""
    await in_thread(parts.models.refresh)
    return json_response(await in_thread(_status, parts, principal))


def _status(parts: Services, principal: Principal) -> dict[str, Any]:
    with reading(parts.db) as connection:
        waiting = waiting_requests(connection, "queue")
        mine = sa.select(jobs.c.state, sa.func.count()).where(principal.owned(jobs.c.api_key_id))
        by_state = connection.execute(mine.group_by(jobs.c.state)).all()
    memory = psutil.virtual_memory()
    return {
        "version": version("promptmill"),
        "devices": [
            {
                "worker": each["id"], "host": each["host"], "device": each["device_got"] or each["device_asked"],
                "state": each["state"], "model": each["model"], "models": models_of(each), "engine": each["engine"],
                "slots": each["slots"], "active_sequences": each["active_sequences"],
                "output_tokens_per_second": each["output_tps"], "memory_bytes": each["memory_bytes"],
                "versions": each["versions"],
            }
            for each in parts.models.workers
        ],
        "models": [each.name for each in parts.models.models],
        "queue": {"waiting_requests": waiting, "live_requests": parts.live.waiting},
        "jobs": {row[0]: row[1] for row in by_state},
        "memory": {
            "server_bytes": psutil.Process().memory_info().rss, "available_bytes": memory.available,
            "total_bytes": memory.total,
        },
    }  # fmt: skip
