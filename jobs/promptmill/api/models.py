"""``/v1/models``: what live workers serve."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from promptmill.api import documents
from promptmill.api.bodies import json_response
from promptmill.api.errors import ApiError
from promptmill.api.model_directory import Model
from promptmill.api.services import Parts, Reader, Services, in_thread

router = APIRouter(prefix="/v1/models", tags=["Models"])


def shape(model: Model) -> dict[str, Any]:
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


@router.get("", summary="List models", responses=documents.responses())
async def list_models(parts: Parts, principal: Reader) -> Response:
    """Models that live workers serve, with the workers of each and whether it is loaded there."""
    await in_thread(parts.models.refresh)
    return json_response({"object": "list", "data": [shape(each) for each in parts.models.models]})


@router.get("/{model:path}", summary="A model", responses=documents.responses(404))
async def retrieve(model: str, parts: Parts, principal: Reader) -> Response:
    """One model, by its name or its file's name."""
    await in_thread(parts.models.refresh)
    return json_response(shape(require(parts, model)))


def require(parts: Services, name: str) -> Model:
    """Raises a 404 for a model that no live worker serves."""
    found = parts.models.find(name)
    if found is None:
        raise ApiError(
            404, f"The model '{name[:100]}' does not exist or you do not have access to it.", param="model",
            code="model_not_found",
        )  # fmt: skip
    return found
