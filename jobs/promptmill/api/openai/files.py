"""``/v1/files``."""

from __future__ import annotations

from typing import Any

import orjson
import sqlalchemy as sa
from fastapi import APIRouter, Request
from sqlalchemy.engine import Row
from starlette.responses import FileResponse, Response

from promptmill.api import openapi
from promptmill.api.dependencies import Parts, Reader, Submitter, in_thread
from promptmill.api.http.errors import ApiError, bad, missing
from promptmill.api.http.uploads import Upload, receive
from promptmill.api.http.validation import json_response, number_in, page, query_whole
from promptmill.api.openai.file_store import Draft, store_full, usable
from promptmill.database.engine import reading
from promptmill.database.tables import files

router = APIRouter(prefix="/v1/files", tags=["Files"])

#: What a file may be uploaded for: OpenAI's batches, and datasets of jobs.
PURPOSES = ("batch", "user_data")

#: Files in a list, as OpenAI's API has it.
MOST_FILES = 10_000

#: Shortest and longest life of a file that expires, in seconds.
SHORTEST_LIFE_S, LONGEST_LIFE_S = 3600, 2_592_000

#: Bytes of a file's beginning that are looked at.
HEAD_BYTES = 16 * 2**20

BAD_FORMAT = "Invalid file format for Batch API. Must be .jsonl"


def shape(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id, "object": "file", "bytes": row.bytes, "created_at": int(row.created_at), "filename": row.name,
        "purpose": row.purpose, "status": row.status, "status_details": None,
        "expires_at": None if row.expires_at is None else int(row.expires_at),
    }  # fmt: skip


@router.post("", summary="Upload a file", openapi_extra=openapi.UPLOAD, responses=openapi.responses(413, 415))
async def upload(request: Request, parts: Parts, principal: Submitter) -> Response:
    """A file for a batch or a dataset, streamed to the disk. What is cut off leaves nothing."""
    owner, most, too_large = principal.key_id, parts.settings.api_max_file_bytes, None
    limit = parts.limits.of(principal, "stored_bytes")
    allowed = None if limit is None else int(limit)
    if allowed is not None:
        left = allowed - await in_thread(parts.store.used_bytes, owner)
        if left <= 0 or int(request.headers.get("content-length") or 0) > left:
            raise store_full(allowed)
        if left < most:
            most, too_large = left, store_full(allowed)
    with parts.store.draft(most, too_large) as draft:
        form = await receive(request, draft)
        purpose, expires_in_s = _checked(form)
        name = _name(form)
        if purpose == "batch":
            await in_thread(_require_batch_format, draft, name)
        elif not draft.bytes:
            raise bad("The file is empty.", "file", "invalid_value")
        row = await in_thread(parts.store.store, draft, name, purpose, owner, expires_in_s, None, allowed)
    return json_response(shape(row))


def _checked(form: Upload) -> tuple[str, float | None]:
    purpose = form.fields.get("purpose")
    if not purpose:
        raise missing("purpose")
    if purpose not in PURPOSES:
        listed = ", ".join(f"'{each}'" for each in PURPOSES)
        raise bad(f"Invalid value: '{purpose[:40]}'. Supported values are: {listed}.", "purpose", "invalid_value")
    unknown = sorted(form.fields.keys() - {"purpose", "expires_after[anchor]", "expires_after[seconds]"})
    if unknown:
        raise bad(f"Unknown parameter: '{unknown[0][:40]}'.", unknown[0][:40], "unknown_parameter")
    anchor, seconds = form.fields.get("expires_after[anchor]"), form.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return purpose, None
    if anchor != "created_at":
        raise bad(
            "Invalid value for 'expires_after.anchor': expected 'created_at'.", "expires_after.anchor", "invalid_value"
        )
    life_s = number_in(seconds or "")
    if life_s is None or not SHORTEST_LIFE_S <= life_s <= LONGEST_LIFE_S:
        raise bad(
            f"Invalid value for 'expires_after.seconds': expected {SHORTEST_LIFE_S} to {LONGEST_LIFE_S}.",
            "expires_after.seconds",
            "invalid_value",
        )
    return purpose, float(life_s)


def _name(form: Upload) -> str:
    """The name as text: no folders, nothing that a terminal or a page would act on."""
    name = (form.filename or "").replace("\\", "/").rpartition("/")[2]
    return "".join(each for each in name if each.isprintable())[:255] or "file"


def _require_batch_format(draft: Draft, name: str) -> None:
    if not name.endswith(".jsonl") or not draft.bytes:
        raise bad(BAD_FORMAT)
    draft.flush()
    with draft.path.open("rb") as file:
        # In one piece: lines without anything can be as many as bytes.
        first = file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    try:
        record = orjson.loads(first)
    except orjson.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        raise bad(BAD_FORMAT)


@router.get("", summary="List files", openapi_extra=openapi.FILE_LIST, responses=openapi.responses())
async def list_files(request: Request, parts: Parts, principal: Reader) -> Response:
    """The key's files, the newest first."""
    limit = query_whole(request, "limit", 1, MOST_FILES, MOST_FILES)
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad(f"Invalid value: '{order[:40]}'. Supported values are: 'asc', 'desc'.", "order", "invalid_value")
    query = sa.select(files).where(principal.owned(files.c.api_key_id), usable())
    if purpose := request.query_params.get("purpose"):
        query = query.where(files.c.purpose == purpose)
    if after := request.query_params.get("after"):
        query = query.where(files.c.id < after if order == "desc" else files.c.id > after)
    query = query.order_by(files.c.id.desc() if order == "desc" else files.c.id).limit(limit + 1)

    def fetch() -> list[Row[Any]]:
        with reading(parts.db) as connection:
            return list(connection.execute(query))

    rows = await in_thread(fetch)
    return json_response(page([shape(row) for row in rows[:limit]], len(rows) > limit))


@router.get("/{file_id}", summary="A file's data", responses=openapi.responses(404))
async def retrieve(file_id: str, parts: Parts, principal: Reader) -> Response:
    """Everything of a file but its bytes."""
    return json_response(shape(await in_thread(parts.store.find, file_id, principal)))


@router.delete("/{file_id}", summary="Delete a file", responses=openapi.responses(404))
async def delete(file_id: str, parts: Parts, principal: Submitter) -> Response:
    """Remove the file. Batches that were read from it go on."""
    row = await in_thread(parts.store.find, file_id, principal)
    await in_thread(parts.store.delete, row.id)
    return json_response({"id": row.id, "object": "file", "deleted": True})


@router.get("/{file_id}/content", summary="A file's bytes", response_class=FileResponse, responses=openapi.content(404))
async def content(file_id: str, parts: Parts, principal: Reader) -> Response:
    """The bytes as they were uploaded or written."""
    row = await in_thread(parts.store.find, file_id, principal)
    path = parts.store.path(row.id)
    if not path.is_file():
        raise ApiError(404, f"The content of {row.id} is gone.")
    # Never shown by a browser: what a client uploaded must not run as a page of ours.
    return FileResponse(path, media_type="application/octet-stream", headers={"content-disposition": "attachment"})
