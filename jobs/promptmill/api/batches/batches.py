"""``/v1/batches``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.engine import Row
from starlette.responses import Response

from promptmill.api import openapi
from promptmill.api.batches import records
from promptmill.api.dependencies import Parts, Reader, Services, Submitter, in_thread
from promptmill.api.http.errors import ApiError, bad, not_found
from promptmill.api.http.evaluation import QUICK
from promptmill.api.http.validation import PLAIN, Body, Metadata, Whole, json_response, page, query_whole
from promptmill.api.jobs.client_tasks import require_task
from promptmill.api.keys import Principal
from promptmill.api.openai.files import LONGEST_LIFE_S, SHORTEST_LIFE_S
from promptmill.core.spans import span_s
from promptmill.database.engine import reading, writing
from promptmill.database.tables import batches
from promptmill.errors import PromptmillError

router = APIRouter(prefix="/v1/batches", tags=["Batches"])

#: Longest task file, in characters.
LONGEST_TASK = 1_000_000

#: Shortest and longest completion window, in seconds.
SHORTEST_WINDOW_S, LONGEST_WINDOW_S = 60.0, 30 * 86_400.0


class Life(Body):
    """When what a batch writes is removed."""

    anchor: Literal["created_at"]
    seconds: Whole = Field(ge=SHORTEST_LIFE_S, le=LONGEST_LIFE_S)


class BatchBody(Body):
    """A batch as a client asks for it."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=64), PLAIN]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Annotated[str, Field(min_length=1, max_length=16, examples=["24h"]), PLAIN]
    metadata: Metadata | None = None
    output_expires_after: Life | None = None
    priority: Whole = Field(5, ge=0, le=9, description="0 is the most urgent.")
    task: Annotated[str, Field(max_length=LONGEST_TASK), PLAIN] | None = Field(
        None, description="A task file (YAML): how the answers are scored."
    )
    idempotency_key: Annotated[str, Field(max_length=255), PLAIN] | None = Field(
        None, description="The same key again returns the same batch."
    )

    def values(self) -> dict[str, Any]:
        """Columns of the batch."""
        return {
            "input_file_id": self.input_file_id, "endpoint": self.endpoint,
            "completion_window": self.completion_window,
            "metadata": None if self.metadata is None else json.dumps(self.metadata, ensure_ascii=False),
            "priority": self.priority, "task_text": self.task, "idempotency_key": self.idempotency_key,
            "output_expires_after_s": self.output_expires_after.seconds if self.output_expires_after else None,
        }  # fmt: skip


@router.post("", summary="Create a batch", openapi_extra=openapi.body(BatchBody), responses=openapi.responses(409))
async def create(request: Request, parts: Parts, principal: Submitter) -> Response:
    """The batch is validated next; what is wrong with its lines is in ``errors`` of the batch."""
    body = await BatchBody.read(request)
    window_s = _window_s(body.completion_window)
    if body.task is not None:
        await _require_task(parts, principal, body.task)
    row = await in_thread(_create, parts, body.values() | {"api_key_id": principal.key_id}, window_s)
    return json_response((await in_thread(records.shape, parts.db, [row]))[0])


async def _require_task(parts: Services, principal: Principal, text: str) -> None:
    """Raises a 400 for a task that cannot be used, or takes too long to read: its templates and schemas are tried."""
    try:
        await parts.quick.run(principal, QUICK, require_task, text, "task")
    except PromptmillError as problem:
        raise bad(f"Invalid value for 'task': {problem.message}", "task", "invalid_value") from None


def _window_s(text: str) -> float:
    try:
        seconds = span_s(text, "completion_window") or 0.0
    except PromptmillError:
        seconds = 0.0
    if not SHORTEST_WINDOW_S <= seconds <= LONGEST_WINDOW_S:
        raise bad(
            f"Invalid value: '{text}'. Supported values are: '24h', or another span from 1m to 30d.",
            "completion_window",
            "invalid_value",
        )
    return seconds


#: What makes two creations with one idempotency key the same.
SAME = (
    "input_file_id", "endpoint", "completion_window", "metadata", "priority", "task_text", "output_expires_after_s",
)  # fmt: skip


def _create(parts: Services, values: dict[str, Any], window_s: float) -> Row[Any]:
    with writing(parts.db) as connection:
        twin = records.twin(connection, values["idempotency_key"], values["api_key_id"])
        if twin is None:
            return records.insert(connection, values, window_s)
    if any(getattr(twin, name) != values[name] for name in SAME):
        raise ApiError(
            409, "Idempotency key already used with other parameters.", param="idempotency_key",
            code="idempotency_conflict",
        )  # fmt: skip
    return twin


@router.get("", summary="List batches", openapi_extra=openapi.PAGED, responses=openapi.responses())
async def list_batches(request: Request, parts: Parts, principal: Reader) -> Response:
    """The key's batches, the newest first."""
    limit = query_whole(request, "limit", 1, 100, 20)
    query = sa.select(batches).where(principal.owned(batches.c.api_key_id))
    if after := request.query_params.get("after"):
        query = query.where(batches.c.id < after)

    def fetch() -> list[dict[str, Any]]:
        with reading(parts.db) as connection:
            rows = list(connection.execute(query.order_by(batches.c.id.desc()).limit(limit + 1)))
        return records.shape(parts.db, rows)

    found = await in_thread(fetch)
    return json_response(page(found[:limit], len(found) > limit))


def find(parts: Services, batch_id: str, principal: Principal) -> Row[Any]:
    """Raises a 404 for a batch that is not there, or is another key's."""
    with reading(parts.db) as connection:
        row = connection.execute(
            sa.select(batches).where(batches.c.id == batch_id, principal.owned(batches.c.api_key_id))
        ).one_or_none()
    if row is None:
        raise not_found(f"No batch found with id '{batch_id[:100]}'.")
    return row


@router.get("/{batch_id}", summary="A batch", responses=openapi.responses(404))
async def retrieve(batch_id: str, parts: Parts, principal: Reader) -> Response:
    """Where the batch stands."""
    row = await in_thread(find, parts, batch_id, principal)
    return json_response((await in_thread(records.shape, parts.db, [row]))[0])


@router.post("/{batch_id}/cancel", summary="Cancel a batch", responses=openapi.responses(404, 409))
async def cancel(batch_id: str, parts: Parts, principal: Submitter) -> Response:
    """End the batch; what was answered is kept. Cancelling twice changes nothing."""
    row = await in_thread(_cancel, parts, batch_id, principal)
    return json_response((await in_thread(records.shape, parts.db, [row]))[0])


def _cancel(parts: Services, batch_id: str, principal: Principal) -> Row[Any]:
    row = find(parts, batch_id, principal)
    if row.state not in ("cancelling", "cancelled"):
        with writing(parts.db) as connection:
            moved = records.move(connection, row.id, ("validating", "in_progress"), "cancelling")
        row = find(parts, batch_id, principal)
        if not moved and row.state not in ("cancelling", "cancelled"):
            raise ApiError(409, f"Cannot cancel a batch with status '{row.state}'.")
    if row.job_id is not None and row.state == "cancelling":
        parts.ledger.cancel(row.job_id)
    return row
