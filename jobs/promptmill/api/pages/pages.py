"""The live page: rendered here, kept fresh by htmx, usable without a mouse. Every foreign text is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy.engine import Row
from starlette.responses import HTMLResponse, RedirectResponse, Response

from promptmill.api import keys
from promptmill.api.dependencies import Parts, Services, identify, in_thread, services
from promptmill.api.http.errors import SHOWN_BY, ApiError
from promptmill.api.http.errors import of as error_of
from promptmill.api.http.uploads import receive
from promptmill.api.http.validation import json_response, number_in
from promptmill.api.jobs import creation, routes
from promptmill.api.keys import Principal
from promptmill.api.pages import docs_page, login, page_queries
from promptmill.database.tables import api_keys
from promptmill.errors import PromptmillError

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parent / "static"

#: Largest field of the form: a task file.
LARGEST_FIELD = 1_000_000

_pages = Environment(
    loader=PackageLoader("promptmill.api.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


_pages.filters |= {
    "span": _span, "number": _number, "gib": lambda size: "–" if size is None else f"{size / 2**30:.1f} GiB",
}  # fmt: skip


def _page(name: str, status: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(_pages.get_template(name).render(**values), status, headers={"cache-control": "no-store"})


#: What the page of an error is called.
TITLES = {403: "Not allowed", 404: "No such page", 503: "Not reachable at the moment"}


def error_page(request: Request, problem: ApiError) -> Response | None:
    """An error for a person at a browser; None for a program, for a part of a page, and for the way to the login."""
    if "text/html" not in request.headers.get("accept", "") or "hx-request" in request.headers:
        return None
    if problem.status in (303, 401):
        return None
    found = _page(
        "error.html", problem.status, title=TITLES.get(problem.status, "That did not work"), message=problem.message
    )
    found.headers.update(problem.headers)
    return found


async def _who(request: Request, scope: str = "read") -> Principal:
    """Who looks. A page that needs a login leads there."""
    try:
        found = await identify(request)
    except ApiError:
        raise _Login(request) from None
    services(request).limits.count(found, looks=scope == "read")
    if not found.may(scope):
        raise ApiError(403, f"This key may not do that: it lacks the scope '{scope}'.")
    return found


class _Login(ApiError):
    """Not logged in: to the login, and back again."""

    def __init__(self, request: Request) -> None:
        target = f"/login?next={quote(request.url.path)}"
        is_part = request.headers.get("hx-request") == "true"
        super().__init__(401 if is_part else 303, "Log in first.", headers={"hx-redirect": target, "location": target})


def _frame(parts: Services, principal: Principal) -> dict[str, Any]:
    return {"locked": parts.locked and principal.key_id is not None, "may_submit": principal.may("submit")}


@router.get("/")
async def index(request: Request, parts: Parts) -> Response:
    principal = await _who(request)
    return _page(
        "index.html", jobs=await in_thread(page_queries.job_views, parts, principal),
        workers=await in_thread(page_queries.worker_views, parts, principal), models=parts.models.models,
        problem=None, values={}, **_frame(parts, principal),
    )  # fmt: skip


@router.get("/pages/jobs")
async def jobs_part(request: Request, parts: Parts) -> Response:
    principal = await _who(request)
    return _page("_jobs.html", jobs=await in_thread(page_queries.job_views, parts, principal))


@router.get("/pages/workers")
async def workers_part(request: Request, parts: Parts) -> Response:
    principal = await _who(request)
    return _page("_workers.html", workers=await in_thread(page_queries.worker_views, parts, principal))


@router.get("/jobs")
async def after_submit() -> Response:
    """Where the form's errors are shown: loaded again, or come back to, it is the first page."""
    return RedirectResponse("/", 303)


#: What the form calls ``--skip-invalid``.
TICK = "'Keep bad lines as errors'"


def _in_form(message: str) -> str:
    """A message of the command line for who filled in the form."""
    message = message.replace(SHOWN_BY, "").replace("give --skip-invalid", f"tick {TICK}")
    return message.replace("--skip-invalid", TICK)


@router.post("/jobs")
async def submit(request: Request, parts: Parts) -> Response:
    """The form: a dataset, a model, a task. What is wrong with it is said beside it, and what was typed stays."""
    principal = await _who(request, "submit")
    values: dict[str, str] = {}
    try:
        with parts.store.draft(parts.settings.api_max_file_bytes) as draft:
            form = await receive(request, draft, LARGEST_FIELD)
            values = form.fields
            draft.flush()
            if not draft.bytes:
                raise ApiError(400, "Choose a dataset with at least one line.")
            body: dict[str, Any] = {name: text for name, text in values.items() if text.strip()}
            priority = number_in(body.get("priority", "5"))
            body["skip_invalid"] = "skip_invalid" in body
            body["priority"] = -1 if priority is None else priority
            asked = routes.JobBody.of(body)
            options = await routes.options_of(parts, principal, asked, form.filename or "dataset.jsonl")
            job_id = await creation.create(parts, principal, options, str(draft.path.absolute()))
        return RedirectResponse(f"/jobs/{job_id}", 303)
    except (ApiError, PromptmillError) as problem:
        found = problem if isinstance(problem, ApiError) else error_of(problem, _in_form)
    return _page(
        "index.html", found.status, jobs=await in_thread(page_queries.job_views, parts, principal),
        workers=await in_thread(page_queries.worker_views, parts, principal), models=parts.models.models,
        problem=found.message, values=values, **_frame(parts, principal),
    )  # fmt: skip


async def _job(name: str, parts: Services, principal: Principal, job: Row[Any], problem: str | None = None) -> Response:
    found = await in_thread(page_queries.detail, parts, job)
    return _page(name, job=found, problem=problem, **_frame(parts, principal))


@router.get("/jobs/{job_id}")
async def job_page(job_id: str, request: Request, parts: Parts) -> Response:
    principal = await _who(request)
    try:
        job = await in_thread(routes.find, parts, job_id, principal)
    except ApiError as problem:
        return _page("error.html", problem.status, title="No such job", message=problem.message)
    return _page(
        "job.html", job=await in_thread(page_queries.detail, parts, job), problem=None, **_frame(parts, principal)
    )


@router.get("/pages/jobs/{job_id}")
async def job_part(job_id: str, request: Request, parts: Parts) -> Response:
    principal = await _who(request)
    job = await in_thread(routes.find, parts, job_id, principal)
    return _page(
        "_job.html", job=await in_thread(page_queries.detail, parts, job), problem=None, **_frame(parts, principal)
    )


@router.get("/pages/jobs/{job_id}/answers")
async def job_answers(job_id: str, request: Request, parts: Parts) -> Response:
    principal = await _who(request)
    job = await in_thread(routes.find, parts, job_id, principal)
    return await _job("_answers.html", parts, principal, job)


@router.get("/pages/jobs/{job_id}/series")
async def job_series(job_id: str, request: Request, parts: Parts) -> Response:
    principal = await _who(request)
    job = await in_thread(routes.find, parts, job_id, principal)
    return json_response(await in_thread(page_queries.series, parts, job))


@router.post("/pages/jobs/{job_id}/{verb}")
async def change(job_id: str, verb: str, request: Request, parts: Parts) -> Response:
    """A button of a job's page: the page's part comes back, with what went wrong if anything did."""
    principal = await _who(request, "submit")
    if verb not in ("cancel", "pause", "resume", "retry"):
        raise ApiError(404, "There is no such button.")
    problem = None
    try:
        await in_thread(routes.change, parts, job_id, principal, verb)
    except (ApiError, PromptmillError) as found:
        problem = found.message
    job = await in_thread(routes.find, parts, job_id, principal)
    return _page(
        "_job.html", job=await in_thread(page_queries.detail, parts, job), problem=problem, **_frame(parts, principal)
    )


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Every call, for people. It tells no more than the document for programs, and asks for no key either."""
    tags = docs_page.calls(request.app.openapi())
    return _page("reference.html", base=str(request.base_url).rstrip("/"), tags=tags)


# --- login -----------------------------------------------------------------------------------------------------------


@router.get("/login")
async def login_page(request: Request) -> Response:
    return _page("login.html", next=_inside(request.query_params.get("next", "/")), problem=None)


@router.post("/login")
async def log_in(request: Request, parts: Parts) -> Response:
    form = await request.form(max_files=0, max_fields=4, max_part_size=4096)
    target, key = _inside(str(form.get("next", "/"))), str(form.get("key", "")).strip()
    found = await in_thread(keys.find, parts.db, api_keys.c.key_sha256, keys.digest(key))
    if found is None or found[0].key_id is None:
        return _page("login.html", 401, next=target, problem="This key is unknown or was revoked.")
    answer = RedirectResponse(target, 303)
    answer.set_cookie(
        login.COOKIE, login.cookie_of(parts.login_secret, found[0].key_id, found[1]), max_age=login.LASTS_S,
        httponly=True, samesite="strict", secure=login.is_over_tls(request), path="/",
    )  # fmt: skip
    return answer


@router.post("/logout")
async def log_out() -> Response:
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(login.COOKIE, path="/")
    return answer


def _inside(target: str) -> str:
    """A place on this server, and nowhere else."""
    return target if target.startswith("/") and not target.startswith(("//", "/\\")) else "/"
