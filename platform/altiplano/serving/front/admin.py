"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters come and go while serving.

A replica checks an adapter and loads it; then it stands on the notice board, where every HTTP
replica finds it within a second and names it in its jobs, so that other and later replicas load it
with the first job that wants it. Knows no files and no engine. Who may call is the guard's job.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from altiplano.serving import board
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.models import ServedModel, TargetLost

_log = logging.getLogger(__name__)

_LOOK_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RETRY_S = 5.0


class LoadRequest(BaseModel):
    """Body of `/v1/load_lora_adapter`, as vLLM's."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[str, Field(min_length=1)]
    """Name clients give in `model`: letters, digits, `.`, `_`, `-`; at most 64."""
    lora_path: Annotated[str, Field(min_length=1)]
    """Absolute directory that every node can read, or an fsspec URL (`s3://bucket/adapter`)."""
    model: str | None = None
    """The model it is for; the service's first by default."""


class UnloadRequest(BaseModel):
    """Body of `/v1/unload_lora_adapter`."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str


def admin_routes(models: Sequence[ServedModel]) -> APIRouter:
    """The two routes, for these models."""
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load(request: LoadRequest) -> dict[str, Any]:
        return await load_adapter(models, request)

    @router.post("/v1/unload_lora_adapter")
    async def unload(request: UnloadRequest) -> dict[str, Any]:
        return await unload_adapter(models, request)

    return router


async def load_adapter(models: Sequence[ServedModel], request: LoadRequest) -> dict[str, Any]:
    """Have a replica check and load an adapter, then post it for all.

    Raises:
        ApiError: 400 the name or the adapter will not do, 404 no such model, 503 no replica.
    """
    name = request.lora_name
    if not _NAME.fullmatch(name):
        raise ApiError(
            400,
            f"`lora_name` {name!r} may have letters, digits, '.', '_' and '-', 64 at most, and "
            f"begins with a letter or digit",
            param="lora_name",
        )
    model = _find_model(models, request.model)
    await refresh(models)
    taken = [each for each in models if name == each.name or name in each.adapters]
    if taken:
        raise ApiError(
            400, f"{name!r} is served already, by {taken[0].name}: unload it first, or name it "
            f"otherwise", param="lora_name", code="name_taken",
        )  # fmt: skip
    most = model.entry.max_adapters
    if len(model.adapters) >= most:
        raise ApiError(
            400, f"model {model.name} has {len(model.adapters)} adapters and takes {most}: unload "
            f"one, or raise serve.max_adapters", param="lora_name", code="too_many_adapters",
        )  # fmt: skip
    path = await _ask(model, "load", name, request.lora_path)
    await asyncio.to_thread(board.post, _topic(model), name, {"path": path})
    model.adapters[name] = path
    return {"id": name, "object": "model", "parent": model.name, "path": path}


async def unload_adapter(models: Sequence[ServedModel], request: UnloadRequest) -> dict[str, Any]:
    """Take an adapter off the board; answers under way are finished with it.

    Raises:
        ApiError: 404 no such adapter.
    """
    name = request.lora_name
    await refresh(models)
    model = next((each for each in models if name in each.adapters), None)
    if model is None:
        known = sorted(name for each in models for name in each.adapters)
        raise ApiError(
            404,
            f"there is no adapter {name!r}; loaded: {', '.join(known) or 'none'}",
            param="lora_name",
            code="adapter_not_found",
        )
    await asyncio.to_thread(board.remove, _topic(model), name)
    path = model.adapters.pop(name)
    if not model.sleeps:
        # Only one replica hears of it; the others drop it when they need the room.
        await _ask(model, "unload", name, path)
    return {"id": name, "object": "model", "deleted": True}


async def refresh(models: Sequence[ServedModel]) -> None:
    """Read the board: which adapters there are now."""
    for model in models:
        if model.entry.max_adapters:
            notices = await asyncio.to_thread(board.read, _topic(model))
            model.adapters = {name: notice["path"] for name, notice in notices.items()}


async def follow_board(models: Sequence[ServedModel]) -> None:
    """Keep the models' adapters as the board has them, for ever; for a task of the application."""
    while any(model.entry.max_adapters for model in models):
        try:
            await refresh(models)
        except Exception as error:
            _log.warning("the adapters cannot be looked up: %r", error)
        await asyncio.sleep(_LOOK_S)


def _find_model(models: Sequence[ServedModel], name: str | None) -> ServedModel:
    model = next((each for each in models if name in (None, each.name)), None)
    if model is None:
        served = ", ".join(each.name for each in models)
        raise ApiError(
            404, f"there is no model {name!r}; served: {served}", param="model",
            code="model_not_found",
        )  # fmt: skip
    return model


async def _ask(model: ServedModel, action: str, name: str, path: str) -> str:
    """Have one replica load or drop an adapter; returns what it says."""
    try:
        outcome = await model.client.adapter(action, name, path)
    except TargetLost:
        raise ApiError(
            503, f"the replica of {model.name} that was asked died: try again",
            retry_after_s=_RETRY_S,
        ) from None  # fmt: skip
    if outcome.status != "done":
        raise ApiError(400, outcome.message, param="lora_path", code="adapter_refused")
    return outcome.message


def _topic(model: ServedModel) -> str:
    return f"adapter/{model.name}"
