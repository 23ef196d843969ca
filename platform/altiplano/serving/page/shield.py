"""What a browser may do with the page: ASGI middleware around the framework that draws it.

Only the routes the page needs are open (the framework's others take uploads, fetch addresses, hand
out files); the browser is told to load nothing from elsewhere, whatever a model wrote; no request
is large. Knows nothing of chats. Costs microseconds per request.
"""

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY = "; ".join(
    (
        "default-src 'none'",
        # The framework's page starts itself from scripts and styles within the HTML.
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
_READ = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|theme\.css|startup-events|queue/data|heartbeat/[^/]+)"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|cancel|reset)/?")
_LARGEST_BODY = 1 << 20


class Shield:
    """Lets through what the page needs, with headers that keep the browser on this server."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        """`prefix` is the page's path for browsers."""
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def send_shielded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_shielded)

    def _refusal(self, scope: Scope) -> Response | None:
        path = scope["path"].removeprefix(self._prefix)
        if path == "":
            # The page's addresses are relative to its folder. No host, no scheme: proxies change
            # both on the way.
            return RedirectResponse(f"{self._prefix}/", 307)
        allowed = {"GET": _READ, "HEAD": _READ, "POST": _WRITE}.get(scope["method"])
        if allowed is None or not allowed.fullmatch(path):
            return PlainTextResponse("there is no such page", 404)
        if scope["method"] == "POST":
            length = Headers(scope=scope).get("content-length", "")
            if not length.isdecimal():
                return PlainTextResponse("say the length of the body", 411)
            if int(length) > _LARGEST_BODY:
                return PlainTextResponse("that is too long", 413)
        return None
