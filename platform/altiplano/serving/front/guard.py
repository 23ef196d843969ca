"""What stands between the port and the routes: ids, keys, sizes, and one log line per request.

A pure ASGI layer around the whole application. It reads a request's body once, checks it (size,
encoding, nesting) and passes it on whole; it never looks into an answer's body. Knows no model and
no route but who may call which. Costs 20 to 30 µs a request, and nothing per streamed token.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from itertools import accumulate

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from altiplano.config.serving import LimitSettings
from altiplano.serving.front import logs
from altiplano.serving.front.errors import ApiError, error_response
from altiplano.serving.front.keys import Caller, KeyRing
from altiplano.serving.front.telemetry import Telemetry

PUBLIC = frozenset({"/health", "/health/live", "/health/ready", "/version"})
"""Paths that ask for no key, and that answer when the service is full."""
ADMIN = frozenset({"/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Paths for administrators' keys."""

_log = logging.getLogger("altiplano.guard")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# One that does not end reaches to the end of the body: nothing is ever looked at twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
# Group 1: half a surrogate pair. Pairs and other escapes come first, so that none is cut in two.
_ESCAPE = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)
_NOT_BRACKET = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_RETRY_S = 1.0


class Guard:
    """The ASGI layer.

    Routes find in `request.state`: `request_id`, and `caller` (a `keys.Caller`). They set
    `request.state.model` to the name of the served model, which logs and metrics then carry.

    Args:
        app: what it guards.
        keys: who may call.
        limits: `serve.limits`: `max_body_kib`, `max_schema_depth`, `max_requests`, and
            `slow_client_s` for a body that does not come.
        telemetry: told of every request and refusal.
        cors_origins: web origins whose scripts may call.
        echo_id: put the request's id into the answer; false under Ray Serve, which does so itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        limits: LimitSettings,
        telemetry: Telemetry,
        cors_origins: Sequence[str] = (),
        echo_id: bool = True,
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._telemetry = telemetry
        self._echo_id = echo_id
        self._active = 0
        self._entry: ASGIApp = self._serve
        if cors_origins:
            # Around the checks, so that a browser may read a refusal too.
            self._entry = CORSMiddleware(
                self._serve,
                allow_origins=cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI."""
        entry = self._entry if scope["type"] == "http" else self._app
        await entry(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = _Visit(scope, send, self._echo_id)
        self._active += 1
        try:
            receive = await self._admit(visit, receive)
            await self._app(scope, receive, visit.send)
        except ApiError as error:
            await visit.answer(error)
        except Exception:
            _log.exception("%s %s failed", scope["method"], scope["path"])
            if visit.status:
                # The answer has begun: cutting it short is the only way left to say so.
                raise
            await visit.answer(
                ApiError(500, f"an error of ours; the log has it under {visit.request_id}")
            )
        finally:
            self._active -= 1
            visit.end(self._telemetry)

    async def _admit(self, visit: "_Visit", receive: Receive) -> Receive:
        """The body's source for the application, once everything about the request is right."""
        scope, headers = visit.scope, Headers(scope=visit.scope)
        # As the router sees it.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in PUBLIC:
            return receive
        reason = "full"
        try:
            if self._active > self._limits.max_requests:
                raise ApiError(
                    503,
                    f"{self._limits.max_requests} requests are being answered: try again",
                    code="overloaded",
                    retry_after_s=_RETRY_S,
                )
            reason = "key"
            visit.caller = self._keys.caller(_secret(headers))
            scope["state"]["caller"] = visit.caller
            if path in ADMIN and not visit.caller.admin:
                raise ApiError(403, f"{path} is for administrators' keys", code="not_admin")
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                return receive
            reason = "body"
            body = await self._body(headers, receive)
            check_json(body, self._limits.max_schema_depth)
        except ApiError:
            self._telemetry.rejected(reason)
            raise
        return _Replay(body, receive)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body; never holds more than it may have."""
        limit = self._limits.max_body_kib * 1024
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.slow_client_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before its request was whole")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._limits.slow_client_s:g} s"
            ) from None


class _Visit:
    """One request on its way through: its names, and what became of it."""

    def __init__(self, scope: Scope, send: Send, echo_id: bool) -> None:
        self.scope = scope
        self.caller: Caller | None = None
        self.status = 0
        self._send = send
        self._echo_id = echo_id
        self._began = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _SANE_ID.fullmatch(given) else secrets.token_hex(16)
        logs.request_id.set(self.request_id)
        # A copy: servers share one `state` among requests.
        scope["state"] = {**scope.get("state", {}), "request_id": self.request_id}

    async def send(self, message: Message) -> None:
        """Pass an answer's message on, its beginning with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._echo_id:
                MutableHeaders(scope=message)["x-request-id"] = self.request_id
        await self._send(message)

    async def answer(self, error: ApiError) -> None:
        """Answer with an error; the body that was not read is the server's to drop."""
        await error_response(error)(self.scope, _nothing, self.send)

    def end(self, telemetry: Telemetry) -> None:
        """Log and count the request."""
        seconds = time.monotonic() - self._began
        model = self.scope["state"].get("model", "")
        # The pattern, so that unknown paths do not each make a time series.
        path = getattr(self.scope.get("route"), "path", "other")
        telemetry.request(model, path, self.status, seconds)
        if path in PUBLIC:
            return
        fields = {
            "key": self.caller.name if self.caller is not None else None,
            "method": self.scope["method"],
            "path": path,
            "model": model,
            "status": self.status,
            "ms": round(seconds * 1000, 1),
            "tokens": self.caller.charged if self.caller is not None else 0,
        }
        logs.access.info("request", extra={"fields": fields})


class _Replay:
    """An ASGI source: the body that was read, then what the server still has to say."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def check_json(body: bytes, max_depth: int) -> None:
    """Refuse a body that parsers would choke on. Whether it is JSON at all is theirs to say.

    Needs no recursion; where brackets are few, no look at each character either.

    Raises:
        ApiError: 400: not UTF-8, half a surrogate pair (text no one can write as UTF-8), or nested
            deeper than `max_depth`.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}"
        ) from None
    if (b"\\ud" in body or b"\\uD" in body) and any(map(_half, _ESCAPE.finditer(body))):
        raise ApiError(400, "the body holds half a surrogate pair (\\ud800 to \\udfff)")
    if body.count(b"{") + body.count(b"[") <= max_depth:
        return
    if any(depth > max_depth for depth in _depths(body)):
        raise ApiError(
            400, f"the body is nested deeper than {max_depth} levels", code="nested_too_deep"
        )


def _depths(body: bytes) -> Iterable[int]:
    """Depth after each bracket that stands outside of a string."""
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKET)
    return accumulate(map(_STEP.__getitem__, brackets))


def _half(escape: re.Match[bytes]) -> bool:
    return escape[1] is not None


def _secret(headers: Headers) -> str | None:
    kind, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit // 1024} KiB", code="body_too_large")


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
