"""A service with the OpenAI routes and no model behind: for clients, which know no better."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp


@dataclass
class FakeService:
    """What it is told to be, and what it was asked."""

    models: tuple[str, ...] = ("alpha", "beta")
    key: str | None = None
    """The only key it takes; None takes all."""
    word_s: float = 0.0
    """Seconds between the words of a stream."""
    say: Callable[[dict[str, Any]], str] = lambda body: "one two three four"
    """The answer to a request."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests for answers."""
    abandoned: int = 0
    """Streams whose reader left before their end."""

    def app(self) -> FastAPI:
        """The service."""
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, go_on: Any) -> Any:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return _error(401, "no such key")
            return await go_on(request)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [_model(name) for name in self.models]}

        @app.post("/v1/chat/completions")
        @app.post("/v1/completions")
        async def answer(request: Request) -> Any:
            body = await request.json()
            self.asked.append(body)
            if body["model"] not in self.models:
                return _error(404, f"the model {body['model']} does not exist")
            words = self.say(body).split(" ")
            chat = "messages" in body
            if body.get("stream"):
                return StreamingResponse(self._stream(words, chat), media_type="text/event-stream")
            return JSONResponse(_reply(" ".join(words), chat, len(words)))

        return app

    async def _stream(self, words: list[str], chat: bool) -> AsyncIterator[str]:
        whole = False
        try:
            for number, word in enumerate(words):
                text = word if number == 0 else f" {word}"
                yield _event(_chunk({"content": text} if chat else text, chat))
                await asyncio.sleep(self.word_s)
            drafted = {"accepted_prediction_tokens": 30, "rejected_prediction_tokens": 10}
            usage = _usage(len(words)) | {"completion_tokens_details": drafted}
            yield _event(_chunk("", chat) | {"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
            whole = True
        finally:
            self.abandoned += not whole


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an ASGI application on a free loopback port; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def _error(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "test"}


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}


def _envelope(chat: bool, kind: str) -> dict[str, Any]:
    return {"id": "x", "created": 0, "model": "m", "object": f"chat.completion{kind}"} | (
        {} if chat else {"object": "text_completion"}
    )


def _reply(text: str, chat: bool, tokens: int) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None} | said
    return _envelope(chat, "") | {"choices": [choice], "usage": _usage(tokens)}


def _chunk(piece: Any, chat: bool) -> dict[str, Any]:
    said = {"delta": piece} if chat else {"text": piece}
    choice = {"index": 0, "finish_reason": None, "logprobs": None} | said
    return _envelope(chat, ".chunk") | {"choices": [choice]}


def _event(said: dict[str, Any]) -> str:
    return f"data: {json.dumps(said)}\n\n"
