"""``/v1/models``: what live workers serve."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from promptmill.api import openapi
from promptmill.api.dependencies import Admin, Parts, Reader, Services, in_thread
from promptmill.api.http.errors import ApiError
from promptmill.api.http.validation import PLAIN, Body, json_response
from promptmill.api.openai.model_directory import ServedModel
from promptmill.queue.interactive_wire import LOAD, UNLOAD

router = APIRouter(prefix="/v1/models", tags=["Models"])


class ModelOrder(Body):
    """What a worker is told about a model."""

    model: Annotated[str, Field(min_length=1, max_length=4_096), PLAIN]
    worker: Annotated[str, Field(max_length=100), PLAIN] | None = Field(None, description="Only this worker.")


def shape(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name, "object": "model", "created": model.since, "owned_by": "promptmill",
        "workers": [
            {
                "id": each["id"], "state": each["state"], "loaded": each["model"] == model.name,
                "device": each["device_got"], "slots": each["slots"],
            }
            for each in model.workers
        ],
    }  # fmt: skip


@router.get("", summary="List models", responses=openapi.responses())
async def list_models(parts: Parts, principal: Reader) -> Response:
    """Models that live workers serve, with the workers of each and whether it is loaded there."""
    await in_thread(parts.models.refresh)
    return json_response({"object": "list", "data": [shape(each) for each in parts.models.models]})


@router.get("/{model:path}", summary="A model", responses=openapi.responses(404))
async def retrieve(model: str, parts: Parts, principal: Reader) -> Response:
    """One model, by its name or its file's name."""
    await in_thread(parts.models.refresh)
    return json_response(shape(require(parts, model)))


@router.post(
    "/load", summary="Load a model", status_code=202, openapi_extra=openapi.body(ModelOrder),
    responses=openapi.responses(404),
)  # fmt: skip
async def load(request: Request, parts: Parts, principal: Admin) -> Response:
    """On all workers that serve it, or on one. It is done when /v1/models says so."""
    return await _order(request, parts, LOAD)


@router.post(
    "/unload", summary="Unload a model", status_code=202, openapi_extra=openapi.body(ModelOrder),
    responses=openapi.responses(404),
)  # fmt: skip
async def unload(request: Request, parts: Parts, principal: Admin) -> Response:
    """Frees its memory where nothing of it runs. The next request for it loads it again."""
    return await _order(request, parts, UNLOAD)


async def _order(request: Request, parts: Services, what: str) -> Response:
    body = await ModelOrder.read(request)
    await in_thread(parts.models.refresh)
    model = require(parts, body.model)
    told = [each["id"] for each in model.workers if body.worker in (None, each["id"])]
    if not told:
        raise ApiError(404, f"No worker '{(body.worker or '')[:100]}' serves this model.", param="worker")
    for each in told:
        parts.live.order(each, what, model.name)
    return json_response({"id": model.name, "object": "model", "order": what, "workers": told}, 202)


def require(parts: Services, name: str) -> ServedModel:
    """Raises a 404 for a model that no live worker serves."""
    found = parts.models.find(name)
    if found is None:
        raise ApiError(
            404, f"The model '{name[:100]}' does not exist or you do not have access to it.", param="model",
            code="model_not_found",
        )  # fmt: skip
    return found
