"""The HTTP side of the service: the routes, and the Ray Serve deployment that has them.

`make_app` needs no Ray: tests give it models with clients of their own. Knows which route is whose,
not what is done there. Imports neither torch nor vLLM; a replica starts in two seconds.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from altiplano.config.serving import ModelSettings, ServeSection
from altiplano.serving.front import completions
from altiplano.serving.front.admin import admin_routes, follow_board
from altiplano.serving.front.embeddings import embed
from altiplano.serving.front.errors import ApiError, install_handlers
from altiplano.serving.front.guard import Guard
from altiplano.serving.front.keys import KeyRing
from altiplano.serving.front.logs import write_logs
from altiplano.serving.front.models import HandleClient, open_model
from altiplano.serving.front.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from altiplano.serving.front.state import FrontState
from altiplano.serving.front.telemetry import RayMeters, Telemetry
from altiplano.serving.link import Inbox

_ERROR: dict[str, Any] = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    }
}
_MEANINGS = {
    400: "The request is wrong.",
    401: "No key, or an unknown one.",
    403: "A key without that right.",
    404: "No such model.",
    408: "The body did not come.",
    413: "The body is too large.",
    422: "The request is wrong.",
    429: "The key's rate is spent.",
    500: "An error of ours.",
    503: "Too busy, or a replica was lost: ask again.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, **_ERROR} for status, meaning in _MEANINGS.items()
}


def make_app(state: FrontState) -> FastAPI:
    """The ASGI application: OpenAI's routes on the state's models, guarded."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        tasks = [
            asyncio.create_task(state.hear()),
            asyncio.create_task(follow_board(state.models)),
        ]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(
        title="Altiplano",
        description="The models of this service, in the form of OpenAI's API.",
        lifespan=lifespan,
        # The page of FastAPI loads scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    install_handlers(app)
    _add_answers(app, state)
    _add_models(app, state)
    _add_health(app, state)
    app.include_router(admin_routes(state.models), responses=_ERRORS)
    app.add_middleware(
        Guard,
        keys=state.keys,
        limits=state.limits,
        telemetry=state.telemetry,
        cors_origins=state.cors_origins,
        echo_id=state.echo_id,
    )
    return app


def _add_answers(app: FastAPI, state: FrontState) -> None:
    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await completions.chat(state, request, body)

    @app.post("/v1/completions", responses=_ERRORS)
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        """Go on from a prompt."""
        return await completions.complete(state, request, body)

    @app.post("/v1/embeddings", responses=_ERRORS)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts."""
        return await embed(state, request, body)


def _add_models(app: FastAPI, state: FrontState) -> None:
    @app.get("/v1/models", responses=_ERRORS)
    async def models(request: Request) -> Response:
        """The models this key may use."""
        caller = request.state.caller
        data = [_card(state, name) for name in state.names() if caller.may_use(name)]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def one_model(name: str, request: Request) -> Response:
        """One model."""
        state.find(name, request.state.caller)
        return JSONResponse(_card(state, name))

    @app.get("/metrics", responses=_ERRORS, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters of all replicas, in Prometheus' form."""
        return PlainTextResponse(await asyncio.to_thread(state.metrics))


def _add_health(app: FastAPI, state: FrontState) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """This process answers."""
        return JSONResponse({"status": "live"})

    @app.get("/health", responses=_ERRORS)
    @app.get("/health/ready", responses=_ERRORS)
    async def ready() -> Response:
        """Every model that should have replicas has one that answers."""
        if missing := state.missing():
            raise ApiError(
                503,
                f"not heard of yet: {', '.join(missing)}",
                code="not_ready",
                retry_after_s=1,
            )
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version() -> Response:
        """Versions of the service and of what it runs on."""
        return JSONResponse(state.versions())


def _card(state: FrontState, name: str) -> dict[str, Any]:
    """A model as `/v1/models` describes it."""
    model = next(each for each in state.models if name == each.name or name in each.adapters)
    parent = None if name == model.name else model.name
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "altiplano",
        "root": parent or name,
        "parent": parent,
        "max_model_len": model.context,
    }


class Front:
    """The Ray Serve deployment; wrap it with `serve.ingress()`, which calls the builder below."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        section: dict[str, Any],
        models: Sequence[dict[str, Any]],
        targets: Sequence[Any],
        drafts: Sequence[Any] = (),
    ) -> None:
        """Open the models and the socket for their tokens.

        Args:
            section: `ServeSection.model_dump()`.
            models: per model `name`, `model_dir`, `task` and `entry` (`ModelSettings`).
            targets: handles of their `Target` deployments.
            drafts: handles of `Draft` deployments: bound here so that Serve starts them.
        """
        from altiplano.serving import metrics
        from altiplano.serving.failure import log_folder

        write_logs(log_folder() / "serve" / f"altiplano_front_{os.getpid()}.log")
        settings = ServeSection.model_validate(section)
        inbox = Inbox.open(settings.data_host)
        served = []
        for given, handle in zip(models, targets, strict=True):
            entry = ModelSettings.model_validate(given["entry"])
            client = HandleClient(handle, by_prefix=entry.prefix_routing)
            served.append(open_model(entry, Path(given["model_dir"]), client, inbox))
        self._inbox = inbox
        self._state = FrontState(
            models=served,
            limits=settings.limits,
            keys=KeyRing(settings.keys, settings.host, settings.http_replicas),
            telemetry=Telemetry(RayMeters()),
            cors_origins=settings.cors_origins,
            echo_id=False,
            metrics=metrics.collect,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve serves, once the constructor is through."""
        return make_app(self._state)
