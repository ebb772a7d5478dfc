"""``/v1/chat/completions``, ``/v1/completions``, ``/v1/embeddings`` and ``/generate``: a worker answers at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response
from ulid import ULID

from promptmill.api import openapi
from promptmill.api.dependencies import Parts, Services, Submitter, in_thread, refusal_of
from promptmill.api.http import validation
from promptmill.api.http.errors import ApiError
from promptmill.api.http.errors import of as error_of
from promptmill.api.http.evaluation import QUICK
from promptmill.api.http.streams import ClientGone, EventStream, event, unless_gone
from promptmill.api.http.validation import json_response
from promptmill.api.interactive.pending_request import PendingRequest
from promptmill.api.keys import Principal
from promptmill.api.openai import request_parsing, response_shapes
from promptmill.api.openai.request_parsing import Question
from promptmill.core.child_processes import OverLimit
from promptmill.queue.interactive_wire import DONE, FAILED, TEXT
from promptmill.tasks.openai import CHAT, COMPLETIONS, EMBEDDINGS

router = APIRouter(tags=["Answers"])

#: Number of the prompt, kind and value of a reply.
Reply = tuple[int, str, Any]

DONE_EVENT = b"data: [DONE]\n\n"

#: Status of an answer whose client is gone, for the log.
GONE = 499


#: What any of these may end with.
ENDS = openapi.responses(404, 502, 504)


@router.post(CHAT, summary="Chat completion", openapi_extra=openapi.CHAT, responses=ENDS)
async def chat(request: Request, parts: Parts, principal: Submitter) -> Response:
    """Answers a chat, whole or as a stream. It goes to the head of the queue and joins a running batch."""
    return await _complete(request, parts, principal, CHAT)


@router.post(
    COMPLETIONS, summary="Text completion", openapi_extra=openapi.COMPLETION,
    responses=ENDS,
)  # fmt: skip
async def complete(request: Request, parts: Parts, principal: Submitter) -> Response:
    """Continues texts as they are, without a chat template."""
    return await _complete(request, parts, principal, COMPLETIONS)


@router.post(EMBEDDINGS, summary="Embeddings", openapi_extra=openapi.EMBEDDING, responses=ENDS)
async def embed(request: Request, parts: Parts, principal: Submitter) -> Response:
    """A vector for each text."""
    question = await _question(request, parts, principal, EMBEDDINGS)
    model = await find_model(parts, question.model)
    with parts.limits.running(principal):
        found = await _or_gone(request, _answers(parts, principal, question, model))
    return (
        json_response(response_shapes.embeddings(question, found)) if found is not None else Response(status_code=GONE)
    )


async def _complete(request: Request, parts: Services, principal: Principal, url: str) -> Response:
    question = await _question(request, parts, principal, url)
    model = await find_model(parts, question.model)
    if question.stream:
        return await _streamed(request, parts, principal, question, model)
    with parts.limits.running(principal, max(1, len(question.texts))):
        found = await _or_gone(request, _answers(parts, principal, question, model, request.state))
    if found is None:
        return Response(status_code=GONE)
    await _read_calls(parts, principal, question, found)
    return json_response(response_shapes.whole(question, found))


#: Fields that are tried out as a grammar, or checked as a schema.
TRIED_OUT = ("response_format", "json_schema", "tools", "regex", "choices")


async def _question(request: Request, parts: Services, principal: Principal, url: str) -> Question:
    body = await validation.read_object(request)
    if all(body.get(name) is None for name in TRIED_OUT):
        return request_parsing.read(body, url)
    return await parts.quick.run(principal, QUICK, request_parsing.read, body, url)


async def _read_calls(parts: Services, principal: Principal, question: Question, found: list[dict[str, Any]]) -> None:
    """Put the calls of answers into them, where arguments are validated by a schema of the client's."""
    if question.offer is not None and question.offer.is_strict:
        read = await parts.quick.run(principal, QUICK, response_shapes.calls_of, question.offer, found)
        for choice, calls in zip(response_shapes.all_choices(found), read, strict=True):
            choice["calls"] = calls


async def find_model(parts: Services, name: str) -> str:
    """The name that workers know. Raises a 404, or a 503 for a model whose workers are away for the moment."""
    if not parts.models.is_fresh:
        await in_thread(parts.models.refresh)
    found = parts.models.find(name)
    if found is not None:
        return found.name
    if parts.models.was_there(name):
        raise ApiError(503, f"No worker serves '{name[:100]}' at the moment; try again.", code="model_unavailable")
    raise ApiError(
        404, f"The model '{name[:100]}' does not exist or you do not have access to it.", param="model",
        code="model_not_found",
    )  # fmt: skip


async def _or_gone(request: Request, work: Any) -> Any:
    try:
        return await unless_gone(request, work)
    except ClientGone:
        return None


async def _answers(
    parts: Services, principal: Principal, question: Question, model: str, state: Any = None
) -> list[dict[str, Any]]:
    """The answers to all prompts of a body, which run together. If one fails, so does the body.

    ``state``: of the request; it is told when a chat was queued and answered.
    """
    if question.messages is not None:
        async with parts.live.call(model, question.sampling, principal.key_id, messages=question.messages) as call:
            answer = await call.answer()
        if state is not None and call.queued_at is not None and answer["finished_at"]:
            ago_s = parts.ledger.database_clock.at(time.monotonic()) - answer["finished_at"]
            state.answered = call.queued_at, time.perf_counter() - ago_s
        return [answer]
    if len(question.texts) == 1:
        return [await _answer(parts, principal, question, model, question.texts[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_answer(parts, principal, question, model, text)) for text in question.texts]
    except* ApiError as problems:
        raise problems.exceptions[0] from None
    return [task.result() for task in tasks]


async def _answer(parts: Services, principal: Principal, question: Question, model: str, prompt: str) -> dict[str, Any]:
    async with parts.live.call(model, question.sampling, principal.key_id, prompt=prompt) as call:
        return await call.answer()


# --- streams ---------------------------------------------------------------------------------------------------------


async def _streamed(
    request: Request, parts: Services, principal: Principal, question: Question, model: str
) -> Response:
    """Begins when the first text is there, so that a request that fails is an error and not a broken stream."""
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(parts.limits.running(principal, max(1, len(question.texts))))
        calls = [
            await stack.enter_async_context(
                parts.live.call(
                    model, question.sampling, principal.key_id, messages=question.messages, prompt=prompt, stream=True
                )
            )
            for prompt in question.texts or (None,)
        ]
        replies = await stack.enter_async_context(contextlib.aclosing(_merged(calls)))
        first = await _or_gone(request, anext(replies))
        if first is None:
            return Response(status_code=GONE)
        read = partial(_read_calls, parts, principal, question)
        return EventStream(_events(question, first, replies, read, stack.pop_all()), refusal_of(request, principal))
    raise AssertionError


async def _merged(calls: list[PendingRequest]) -> AsyncGenerator[Reply]:
    """The replies to all calls as they come. Raises the ApiError of the first that fails."""
    if len(calls) == 1:
        async for kind, value in calls[0].replies():
            yield 0, kind, value
        return
    arrived: asyncio.Queue[Reply] = asyncio.Queue()

    async def read(number: int) -> None:
        try:
            async for kind, value in calls[number].replies():
                arrived.put_nowait((number, kind, value))
        except ApiError as problem:
            arrived.put_nowait((number, FAILED, problem))

    tasks = [asyncio.create_task(read(number)) for number in range(len(calls))]
    try:
        for _ in calls:
            kind = TEXT
            while kind == TEXT:
                number, kind, value = await arrived.get()
                if kind == FAILED:
                    raise value
                yield number, kind, value
    finally:
        for task in tasks:
            task.cancel()


async def _events(
    question: Question,
    first: Reply,
    replies: AsyncIterator[Reply],
    read_calls: Callable[[list[dict[str, Any]]], Awaitable[None]],
    held: contextlib.AsyncExitStack,
) -> AsyncIterator[bytes]:
    chunks = response_shapes.Chunks(question, first[2]["backend"] if first[1] == DONE else first[2][-1])
    async with held:
        for chunk in chunks.begin():
            yield event(chunk)
        try:
            found: list[dict[str, Any]] = []
            number, kind, value = first
            while True:
                if kind == DONE:
                    found.append(value)
                    await read_calls([value])
                for chunk in chunks.text(number, *value) if kind == TEXT else chunks.end(number, value):
                    yield event(chunk)
                if len(found) == max(1, len(question.texts)):
                    break
                number, kind, value = await anext(replies)
            for chunk in chunks.usage(found):
                yield event(chunk)
            yield DONE_EVENT
        except (ApiError, OverLimit) as problem:
            yield event((problem if isinstance(problem, ApiError) else error_of(problem)).body())


# --- as a reference server had it ------------------------------------------------------------------------------------


class GenerateBody(validation.Body):
    """One prompt, as a reference server took it. The limits of the numbers are those of a chat."""

    prompt: Annotated[str, Field(min_length=1, max_length=16 * 2**20), validation.PLAIN]
    model: Annotated[str, Field(max_length=4_096), validation.PLAIN] | None = None
    max_tokens: Any = Field(None, json_schema_extra={"type": "integer", "minimum": 1})
    temperature: Any = Field(None, json_schema_extra={"type": "number", "minimum": 0, "maximum": 2})


@router.post("/generate", summary="One prompt, one text", openapi_extra=openapi.body(GenerateBody),
             responses=ENDS)  # fmt: skip
async def generate(request: Request, parts: Parts, principal: Submitter) -> Response:
    """``prompt``, ``max_tokens`` and ``temperature``; the model that is loaded answers, unless ``model`` names one."""
    body = await GenerateBody.read(request)
    asked = body.model_dump(exclude={"prompt"}, exclude_none=True)
    asked["model"] = body.model or await _default_model(parts)
    question = request_parsing.read({"messages": [{"role": "user", "content": body.prompt}], **asked}, CHAT)
    started = time.perf_counter()
    with parts.limits.running(principal):
        found = await _or_gone(request, _answers(parts, principal, question, await find_model(parts, question.model)))
    if found is None:
        return Response(status_code=GONE)
    seconds = time.perf_counter() - started
    tokens = response_shapes.total_usage(found).output_tokens
    data = {
        "id": str(ULID()).lower(), "text": found[0]["text"], "response_time": round(seconds, 6),
        "tokens_per_second": round(tokens / seconds, 3),
    }  # fmt: skip
    return json_response({"success": True, "data": data})


async def _default_model(parts: Services) -> str:
    """The model of the settings, else one that is loaded, else any."""
    if not parts.models.is_fresh:
        await in_thread(parts.models.refresh)
    if parts.settings.model and (found := parts.models.find(parts.settings.model)):
        return found.name
    there = sorted(parts.models.models, key=lambda each: not each.loaded)
    if not there:
        raise ApiError(503, "No worker is there to answer; try again.", code="model_unavailable")
    return there[0].name
