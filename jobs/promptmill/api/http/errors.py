"""Errors as OpenAI's API writes them: ``{"error": {message, type, param, code}}`` and a status."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from promptmill import errors
from promptmill.errors import PromptmillError

log = logging.getLogger("promptmill.api")

#: Status -> the ``type`` of its errors.
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "invalid_request_error",
    405: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip

#: Our errors -> status. Anything else that a person can put right is a bad request.
STATUSES: dict[type[PromptmillError], int] = {
    errors.QueueFull: 429,
    errors.JobError: 409,
    errors.UnknownName: 404,
    errors.BrokerError: 503,
    errors.DatabaseError: 503,
}

#: Options of the command line that are fields of a job's body.
OPTIONS = re.compile(r"--(task|template|skip-invalid|format|model)\b")

#: Seconds after which a client that was told 429 or 503 may try again, where nothing better is known.
RETRY_AFTER_S = 2


class ApiError(Exception):
    """An answer that is an error. ``param`` names the field it is about, ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message, "type": TYPES.get(self.status, "server_error"), "param": self.param,
                "code": self.code,
            }
        }  # fmt: skip


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def missing(name: str) -> ApiError:
    return bad(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")


def not_found(message: str) -> ApiError:
    return ApiError(404, message)


def response(problem: ApiError) -> Response:
    """The error as a response. 409 is not tried again by clients: nothing changes by asking once more."""
    headers = dict(problem.headers)
    if problem.status == 409:
        headers["x-should-retry"] = "false"
    if problem.status in (429, 503):
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    if problem.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(orjson.dumps(problem.body()), problem.status, headers, "application/json")


def of(problem: PromptmillError, in_words: Callable[[str], str] = str) -> ApiError:
    """One of our errors as an answer. ``in_words`` says a message of the command line as who asked knows things."""
    status = next((code for kind, code in STATUSES.items() if isinstance(problem, kind)), 400)
    message = _in_fields(in_words(f"{problem.message}. {problem.hint}" if problem.hint else problem.message))
    if isinstance(problem, errors.BadOption):
        return bad(message, problem.option, "invalid_value")
    # Where the servers are is no business of a client.
    return ApiError(status, "A service is not reachable; try again later." if status == 503 else message)


#: What a hint of the command line says of where rows that failed are shown.
SHOWN_BY = " ('promptmill results --failed')"


def _in_fields(message: str) -> str:
    """A message of the command line for who sent a body: options are the fields of the same names."""
    message = message.replace(SHOWN_BY, " ('results?failed=true')")
    return OPTIONS.sub(lambda found: "'" + found[1].replace("-", "_") + "'", message)


def install(app: FastAPI, page: Callable[[Request, ApiError], Response | None]) -> None:
    """Let every error of ``app`` have that shape; ``page`` makes one for a person at a browser, None for a program."""

    def answer(request: Request, problem: ApiError) -> Response:
        return page(request, problem) or response(problem)

    async def api_error(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, ApiError)
        return answer(request, problem)

    async def our_error(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, PromptmillError)
        found = of(problem)
        if found.status == 503:
            log.warning("%s", problem.message)
        return answer(request, found)

    async def http_error(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        message = {404: f"Unknown request URL: {request.method} {request.url.path[:200]}."}.get(
            problem.status_code, f"{problem.detail}."
        )
        return answer(request, ApiError(problem.status_code, message, headers=dict(problem.headers or {})))

    async def invalid(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, RequestValidationError)
        first = problem.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        if first["type"] == "missing" and param:
            return response(missing(param))
        return response(bad(f"Invalid value for '{param}': {first['msg']}.", param, "invalid_value"))

    async def bug(request: Request, problem: Exception) -> Response:
        return answer(request, ApiError(500, "The server had an error while processing your request."))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(PromptmillError, our_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, bug)
