"""Answers as server-sent events: one event per engine step and answer, in OpenAI's form.

An event's JSON is put together from parts that are made once per answer, which costs a microsecond
where a library needs twenty. `EventStream` sends them, notices a client that leaves or does not
read, and tells of an error in the middle as an event. Knows JSON and ASGI, not models.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from altiplano.serving.front.errors import ApiError, error_body, error_response
from altiplano.serving.front.together import end

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of nginx's kind would collect events otherwise.
    (b"x-accel-buffering", b"no"),
]
_json = msgspec.json.encode
T = TypeVar("T")


class Chunks:
    """Writes the events of one response.

    Args:
        shared: what every event has: `id`, `object`, `created`, `model`, `system_fingerprint`.
        chat: chat's form (`delta`), else that of completions (`text`).
        with_usage: events carry `usage`: null until the last one, as OpenAI's do.
    """

    def __init__(self, shared: Mapping[str, Any], *, chat: bool, with_usage: bool) -> None:
        self._chat = chat
        self._head = b"data: " + _json(shared)[:-1]
        self._usage = b',"usage":null' if with_usage else b""
        self._before = b'"delta":{"content":' if chat else b'"text":'
        self._after = b"}" if chat else b""
        self._tail = (
            self._after + b',"logprobs":null,"finish_reason":null}]' + self._usage + b"}\n\n"
        )
        self._opening: dict[int, bytes] = {}

    def piece(self, index: int, text: str) -> bytes:
        """The event of a piece of text and nothing else; the usual one."""
        opening = self._opening.get(index)
        if opening is None:
            opening = self._opening[index] = self._open(index) + self._before
        return opening + _json(text) + self._tail

    def full(
        self,
        index: int,
        text: str,
        *,
        logprobs: Any = None,
        finish: str | None = None,
        stop_reason: str | int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bytes:
        """An event of a piece of text with everything else that may go with it."""
        content = {"content": text} if text or finish is None else {}
        return self.change(
            index,
            {"delta": content} if self._chat else {"text": text},
            logprobs=logprobs,
            finish=finish,
            stop_reason=stop_reason,
            extra=extra,
        )

    def change(
        self,
        index: int,
        content: Mapping[str, Any],
        *,
        logprobs: Any = None,
        finish: str | None = None,
        stop_reason: str | int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bytes:
        """An event with any content, e.g. `{"delta": {"role": "assistant"}}`."""
        rest: dict[str, Any] = {**content, "logprobs": logprobs, "finish_reason": finish}
        if finish is not None:
            rest["stop_reason"] = stop_reason
        rest.update(extra or {})
        return self._open(index) + _json(rest)[1:] + b"]" + self._usage + b"}\n\n"

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The event that counts the tokens."""
        return self._head + b',"choices":[],"usage":' + _json(usage) + b"}\n\n"

    def _open(self, index: int) -> bytes:
        return self._head + b',"choices":[{"index":%d,' % index


class EventStream(Response):
    """A response whose events come from an iterator, which is closed when the client leaves.

    The status waits for the first event, so that an error before it has its own status; a later
    one is an event, and `[DONE]` ends the stream in any case.

    Args:
        events: the events, without the last `[DONE]`.
        slow_client_s: seconds after which a client that reads nothing is given up.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], slow_client_s: float) -> None:
        super().__init__()
        self.status_code = 200
        self.raw_headers = list(_HEADERS)
        self._events = events
        self._slow_client_s = slow_client_s
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI."""
        pump = asyncio.ensure_future(self._pump(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            while not pump.done() and not gone.done() and not self._stuck():
                await asyncio.wait(
                    {pump, gone},
                    timeout=self._slow_client_s / 2,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            if pump.done():
                pump.result()
        finally:
            gone.cancel()
            await end(pump)

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            try:
                first = await anext(self._events, DONE)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
            self._sending_since = asyncio.get_running_loop().time()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send(send, first)
            if first is not DONE:
                await self._rest(send)
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._events.aclose()

    async def _rest(self, send: Send) -> None:
        try:
            async for event in self._events:
                await self._send(send, event)
        except ApiError as error:
            await self._send(send, b"data: " + _json(error_body(error)) + b"\n\n")
        await self._send(send, DONE)

    async def _send(self, send: Send, event: bytes) -> None:
        self._sending_since = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        self._sending_since = None

    def _stuck(self) -> bool:
        since = self._sending_since
        now = asyncio.get_running_loop().time()
        return since is not None and now - since > self._slow_client_s


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work of a whole answer, and stop when the client leaves.

    Raises:
        ApiError: 499, it left; nobody will read this.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client left")
        return task.result()
    finally:
        gone.cancel()
        await end(task)


async def _gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
