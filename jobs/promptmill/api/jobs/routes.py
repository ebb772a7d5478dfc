"""``/v1/jobs``: what the command line does, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import orjson
import sqlalchemy as sa
from fastapi import APIRouter, Request
from pydantic import AfterValidator, Field
from sqlalchemy.engine import Row
from starlette.responses import HTMLResponse, Response, StreamingResponse

from promptmill.api import openapi
from promptmill.api.dependencies import Parts, Reader, Services, Submitter, in_thread, refusal_of
from promptmill.api.http import evaluation
from promptmill.api.http.errors import ApiError, bad, missing, not_found
from promptmill.api.http.evaluation import QUICK
from promptmill.api.http.streams import EventStream, event
from promptmill.api.http.validation import PLAIN, Body, Whole, json_response, page, query_whole
from promptmill.api.jobs import creation
from promptmill.api.keys import Principal
from promptmill.api.openai.file_store import Draft
from promptmill.database.engine import reading
from promptmill.database.revision import opened
from promptmill.database.tables import jobs, requests, results
from promptmill.service import service
from promptmill.service.job_options import JobOptions
from promptmill.store import catalog
from promptmill.types import JobState

router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])

#: Results read at a time, and seconds between looks at a job that is followed.
PAGE_ROWS = 2_000
LOOK_S = 0.5

#: A report runs nothing: it is a page of a model's and a client's words.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
}


def _lines(value: list[Any]) -> list[Any]:
    if not value or not all(isinstance(each, dict | str) for each in value):
        raise bad("Invalid type for 'lines': expected an array of objects or strings.", "lines", "invalid_type")
    return value


class JobBody(Body):
    """A job as a client asks for it; what the options of a job mean, :class:`JobOptions` judges."""

    model: Annotated[str, Field(min_length=1, max_length=4_096), PLAIN]
    file_id: Annotated[str, Field(max_length=64), PLAIN] | None = None
    lines: Annotated[list[Any], AfterValidator(_lines)] | None = Field(None, description="Lines of a JSONL dataset.")
    format: Literal["jsonl", "openai_batch", "csv", "tsv", "text", "json"] | None = None
    task: Annotated[str, Field(max_length=1_000_000), PLAIN] | None = Field(None, description="A task file (YAML).")
    template: Annotated[str, Field(max_length=100_000), PLAIN] | None = None
    system: Annotated[str, Field(max_length=100_000), PLAIN] | None = None
    sampling: dict[str, Any] | None = Field(
        None, description="Sampling parameters of lines that set none of their own."
    )
    name: Annotated[str, Field(max_length=100), PLAIN] | None = None
    priority: Whole | None = Field(None, ge=0, le=9)
    max_errors: Annotated[str, Field(max_length=16), PLAIN] | None = Field(
        None, description="A number, or a share such as 5%."
    )
    skip_invalid: bool | None = None
    deadline: Annotated[str, Field(max_length=40), PLAIN] | None = Field(
        None, description="A span such as 2h, or a time."
    )


def find(parts: Services, job_id: str, principal: Principal) -> Row[Any]:
    """Raises a 404 for a job that is not there, or is another key's."""
    with reading(parts.db) as connection:
        row = connection.execute(
            sa.select(jobs).where(jobs.c.id == job_id.upper(), principal.owned(jobs.c.api_key_id))
        ).one_or_none()
    if row is None:
        raise not_found(f"No job found with id '{job_id[:100]}'.")
    return row


def shape(summary: dict[str, Any]) -> dict[str, Any]:
    return {"id": summary["job_id"], "object": "job", **{k: v for k, v in summary.items() if k != "job_id"}}


def status(parts: Services, job_id: str, principal: Principal) -> dict[str, Any]:
    return shape(service.status(parts.db, find(parts, job_id, principal)))


@router.post(
    "", summary="Create a job", openapi_extra=openapi.body(JobBody), responses=openapi.responses(404, 409, 500)
)
async def create(request: Request, parts: Parts, principal: Submitter) -> Response:
    """From an uploaded file (``file_id``) or from ``lines``; checked whole, then stored whole."""
    body = await JobBody.read(request)
    options = await options_of(parts, principal, body, "lines.jsonl")
    if body.lines is None:
        if body.file_id is None:
            raise missing("file_id")
        row = await in_thread(parts.store.find, body.file_id, principal)
        options = options.model_copy(update={"dataset": row.name})
        job_id = await creation.create(parts, principal, options, str(parts.store.path(row.id)))
    else:
        if body.file_id is not None:
            raise bad("Give 'file_id' or 'lines', not both.", "lines", "invalid_value")
        job_id = await _from_lines(parts, principal, body.lines, options)
    return json_response(await in_thread(status, parts, job_id, principal))


async def _from_lines(parts: Services, principal: Principal, lines: list[Any], options: JobOptions) -> str:
    # In the store's folder, which is swept: nothing of a client stays where a server died.
    with parts.store.draft() as draft:
        await in_thread(_write_lines, draft, lines)
        return await creation.create(parts, principal, options, str(draft.path))


def _write_lines(draft: Draft, lines: list[Any]) -> None:
    for each in lines:
        draft.write(orjson.dumps({"prompt": each} if isinstance(each, str) else each) + b"\n")
    draft.flush()


async def options_of(parts: Services, principal: Principal, body: JobBody, dataset: str) -> JobOptions:
    """The body as options of a job; ``dataset`` is what the dataset is called."""
    model = await in_thread(_model, parts, body.model)
    given = body.model_dump(exclude={"file_id", "lines"}) | {"dataset": dataset, "model": model}
    if given["sampling"]:
        # A schema among the parameters is tried out as a grammar.
        return await parts.quick.run(principal, QUICK, JobOptions.of, given)
    return JobOptions.of(given)


def _model(parts: Services, name: str) -> str:
    """The model as workers know it. Raises a 404."""
    parts.models.refresh()
    model = parts.models.resolve(name)
    if model is None:
        raise ApiError(404, f"The model '{name[:100]}' does not exist.", param="model", code="model_not_found")
    return model


@router.get("", summary="List jobs", openapi_extra=openapi.JOB_LIST, responses=openapi.responses())
async def list_jobs(request: Request, parts: Parts, principal: Reader) -> Response:
    """The key's jobs, the newest first."""
    limit = query_whole(request, "limit", 1, 100, 20)
    after, state = request.query_params.get("after"), request.query_params.get("state")
    if state is not None and state not in list(JobState):
        raise bad(f"Invalid value: '{state[:40]}'.", "state", "invalid_value")
    found = await in_thread(newest, parts, principal, limit + 1, after, state)
    return json_response(page([shape(each) for each in found[:limit]], len(found) > limit))


def newest(
    parts: Services, principal: Principal, limit: int, after: str | None = None, state: str | None = None
) -> list[dict[str, Any]]:
    query = sa.select(jobs).where(principal.owned(jobs.c.api_key_id)).order_by(jobs.c.id.desc()).limit(limit)
    if after:
        query = query.where(jobs.c.id < after.upper())
    if state:
        query = query.where(jobs.c.state == state)
    with reading(parts.db) as connection:
        return [catalog.job_summary(connection, row) for row in connection.execute(query).all()]


@router.get("/{job_id}", summary="A job", responses=openapi.responses(404))
async def retrieve(job_id: str, parts: Parts, principal: Reader) -> Response:
    """Where the job stands."""
    return json_response(await in_thread(status, parts, job_id, principal))


@router.get(
    "/{job_id}/results", summary="Results", response_class=StreamingResponse, openapi_extra=openapi.RESULTS,
    responses=openapi.content(404, kind="application/x-ndjson"),
)  # fmt: skip
async def read_results(job_id: str, request: Request, parts: Parts, principal: Reader) -> Response:
    """One JSON line a result, in the order of the rows; ``after`` goes on behind a row that was read before."""
    job = await in_thread(find, parts, job_id, principal)
    after = query_whole(request, "after", -1, 2**31 - 1, -1)
    failed = request.query_params.get("failed") in ("true", "1")

    async def lines() -> AsyncIterator[bytes]:
        last = after
        while found := await in_thread(result_page, parts, job.id, last, failed, PAGE_ROWS):
            yield b"".join(orjson.dumps(catalog.result_line(row)) + b"\n" for row in found)
            last = found[-1].row

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def result_page(parts: Services, job_id: str, after: int, failed: bool, most: int) -> list[Row[Any]]:
    """The next results behind a row. Pages, so that no transaction is as long as a client is slow."""
    query = (
        sa.select(results, requests.c.custom_id, requests.c.input)
        .join(requests, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
        .where(results.c.job_id == job_id, results.c.row > after)
        .order_by(results.c.row)
        .limit(most)
    )
    if failed:
        query = query.where(results.c.state == "error")
    with reading(parts.db) as connection:
        return list(connection.execute(query))


@router.get("/{job_id}/report", summary="Report", openapi_extra=openapi.REPORT, responses=openapi.responses(404))
async def report(job_id: str, request: Request, parts: Parts, principal: Reader) -> Response:
    """Every figure from the job's rows, as JSON or as a page (``format=html``)."""
    job = await in_thread(find, parts, job_id, principal)
    form, limits = _format(request), evaluation.for_report(job.rows)
    found = await parts.slow.run(principal, limits, report_of, parts.settings.database_url, job.id, form)
    if form == "html":
        return HTMLResponse(found, headers=PAGE_HEADERS)
    return json_response(found)


def report_of(database_url: str, job_id: str, form: str) -> Any:
    """In a child: a task of a client's scores the answers."""
    from promptmill.reports.figures.summary import summarise
    from promptmill.reports.render.html import text

    with opened(database_url) as db:
        return text(db, job_id) if form == "html" else summarise(db, job_id).to_json()


@router.get(
    "/{job_id}/compare/{other_id}", summary="Compare two jobs", openapi_extra=openapi.REPORT,
    responses=openapi.responses(404, 409),
)  # fmt: skip
async def compare(job_id: str, other_id: str, request: Request, parts: Parts, principal: Reader) -> Response:
    """The second job against the first, rows paired by id, as JSON or as a page (``format=html``)."""
    first, second = [await in_thread(find, parts, each, principal) for each in (job_id, other_id)]
    if first.id == second.id:
        raise bad("A comparison needs two different jobs.")
    form, limits = _format(request), evaluation.for_report(first.rows + second.rows)
    url = parts.settings.database_url
    found = await parts.slow.run(principal, limits, comparison_of, url, first.id, second.id, form)
    if form == "html":
        return HTMLResponse(found, headers=PAGE_HEADERS)
    return Response(found, media_type="application/json")


def comparison_of(database_url: str, first: str, second: str, form: str) -> str:
    """In a child, as :func:`report_of`."""
    from promptmill.reports.compare.compare import compare as compared
    from promptmill.reports.render import comparison_forms, comparison_page

    with opened(database_url) as db:
        found = compared(db, first, second)
        return comparison_page.text([found]) if form == "html" else comparison_forms.text(found, "json")


def _format(request: Request) -> str:
    asked = request.query_params.get("format", "json")
    if asked not in ("json", "html"):
        raise bad(f"Invalid value: '{asked[:40]}'. Supported values are: 'json', 'html'.", "format", "invalid_value")
    return asked


# --- what changes a job ----------------------------------------------------------------------------------------------


def change(parts: Services, job_id: str, principal: Principal, verb: str) -> dict[str, Any]:
    """Cancel, pause, resume or retry. Raises JobError for a state that does not allow it."""
    job = find(parts, job_id, principal)
    if verb == "cancel":
        if not parts.ledger.cancel(job.id) and job.state != JobState.CANCELLED:
            raise ApiError(409, f"Cannot cancel a job that is {job.state}.")
    elif verb == "pause":
        service.pause(job.id, parts.settings, parts.db)
    elif job.mode != "queue":
        raise ApiError(409, "The job runs on its own machine: use 'promptmill resume' there.")
    elif verb == "resume":
        parts.ledger.resume(job.id)
        service.dispatch(job, parts.settings, parts.db)
    elif parts.ledger.retry(job.id):
        service.dispatch(job, parts.settings, parts.db)
    return status(parts, job.id, principal)


def _verb(verb: str, summary: str) -> None:
    async def call(job_id: str, parts: Parts, principal: Submitter) -> Response:
        return json_response(await in_thread(change, parts, job_id, principal, verb))

    call.__name__ = f"{verb}_job"
    call.__doc__ = summary
    router.post(f"/{{job_id}}/{verb}", summary=verb.capitalize(), responses=openapi.responses(404, 409))(call)


_verb("cancel", "End the job; what was answered is kept.")
_verb("pause", "Start nothing more of the job; what runs may end.")
_verb("resume", "Go on with a job that was paused or stopped.")
_verb("retry", "Run the errors of an ended job again.")


# --- events ----------------------------------------------------------------------------------------------------------


@router.get(
    "/{job_id}/events", summary="Events", response_class=StreamingResponse,
    responses=openapi.content(404, kind="text/event-stream"),
)  # fmt: skip
async def events(job_id: str, request: Request, parts: Parts, principal: Reader) -> Response:
    """Server-sent events: ``progress`` whenever a count changes, ``end`` with the last of them."""
    first = await in_thread(status, parts, job_id, principal)
    held = parts.limits.running(principal)
    held.__enter__()

    async def followed() -> AsyncIterator[bytes]:
        try:
            shown, now = None, first
            while True:
                if now != shown:
                    shown = now
                    ended = JobState(now["state"]).is_final
                    yield event(now, "end" if ended else "progress", now["ok"] + now["errors"])
                    if ended:
                        return
                await asyncio.sleep(LOOK_S)
                now = await in_thread(status, parts, job_id, principal)
        finally:
            held.__exit__(None, None, None)

    return EventStream(followed(), refusal_of(request, principal))
