"""The layer around the routes: ids, keys, sizes, nesting, CORS, full houses, and the access log."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from altiplano.config.serving import KeySettings, LimitSettings
from altiplano.serving.front import logs
from altiplano.serving.front.errors import ApiError, install_handlers
from altiplano.serving.front.guard import Guard, check_json
from altiplano.serving.front.keys import KeyRing, add_key
from altiplano.serving.front.telemetry import MemoryMeters, Telemetry


class Message(BaseModel):
    content: str


class Body(BaseModel):
    messages: list[Message]


class World:
    """A small guarded application and what it counted."""

    def __init__(self, keys: KeyRing | None = None, **limits: Any) -> None:
        self.meters = MemoryMeters()
        self.hold = asyncio.Event()
        self.held = 0
        app = FastAPI()
        install_handlers(app)
        app.add_middleware(
            Guard,
            keys=keys or KeyRing(KeySettings()),
            limits=LimitSettings(**limits),
            telemetry=Telemetry(self.meters),
            cors_origins=["https://good.example"],
        )

        @app.get("/health")
        @app.get("/metrics")
        async def fine() -> str:
            return "fine"

        @app.post("/v1/echo/{status}")
        async def echo(status: int, body: Body, request: Request) -> dict[str, str]:
            request.state.model = "tiny"
            request.state.caller.charge(7)
            logging.getLogger("altiplano.test").info("echoed")
            if status == 500:
                raise RuntimeError("secret path /srv/model")
            if status != 200:
                raise ApiError(status, "no", code="because", param="p", retry_after_s=2.4)
            return {"id": request.state.request_id, "said": body.messages[0].content}

        @app.post("/v1/hold")
        async def hold() -> str:
            self.held += 1
            await self.hold.wait()
            return "held"

        @app.post("/v1/stream")
        async def stream() -> StreamingResponse:
            async def parts() -> AsyncIterator[bytes]:
                for index in range(3):
                    yield f"data: {index}\n\n".encode()

            return StreamingResponse(parts(), media_type="text/event-stream")

        self.app = app

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://front")


HELLO = {"messages": [{"content": "hello"}]}


def run(work: Callable[[World, httpx.AsyncClient], Awaitable[None]], **world: Any) -> World:
    """Do `work` with a client of a new world."""

    async def all_of_it() -> World:
        made = World(**world)
        async with made.client() as client:
            await work(made, client)
        return made

    return asyncio.run(all_of_it())


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


def test_a_sane_request_id_is_kept_and_any_other_replaced() -> None:
    async def work(_: World, client: httpx.AsyncClient) -> None:
        for given_id, kept in [("abc-1.2_X", True), ("a b", False), ("x" * 129, False)]:
            answer = await client.post(
                "/v1/echo/200", json=HELLO, headers={"x-request-id": given_id}
            )
            told = answer.headers.get_list("x-request-id")
            assert len(told) == 1 and told[0] == answer.json()["id"]
            assert (told[0] == given_id) is kept
        first, second = [await client.get("/health") for _ in range(2)]
        assert first.headers["x-request-id"] != second.headers["x-request-id"]

    run(work)


def test_every_refusal_has_openais_form() -> None:
    async def work(world: World, client: httpx.AsyncClient) -> None:
        cases = [
            (await client.post("/v1/echo/200", json={}), 400, "messages"),
            (await client.post("/v1/echo/200", json={"messages": [{"content": 3}]}), 400,
             "messages.0.content"),
            (await client.post("/v1/echo/200", content=b"{"), 400, None),
            (await client.post("/v1/echo/x", json=HELLO), 400, "status"),
            (await client.get("/nowhere"), 404, None),
            (await client.get("/v1/hold"), 405, None),
            (await client.post("/v1/echo/429", json=HELLO), 429, "p"),
        ]  # fmt: skip
        for answer, status, param in cases:
            assert answer.status_code == status
            assert error_of(answer)["param"] == param
        assert cases[-1][0].headers["retry-after"] == "3"
        assert "POST" in cases[-2][0].headers["allow"]
        assert world.meters.total("altiplano_http_requests", path="other", status="404") == 1

    run(work)


def test_an_error_of_ours_is_answered_without_its_text_and_logged_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(_: World, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/echo/500", json=HELLO)
        assert answer.status_code == 500
        assert error_of(answer)["type"] == "server_error"
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in error_of(answer)["message"]

    run(work)
    assert "secret path" in caplog.text


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (413, openai.APIStatusError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_openais_client_raises_its_own_classes(status: int, kind: type[Exception]) -> None:
    async def work(_: World, client: httpx.AsyncClient) -> None:
        api = openai.AsyncOpenAI(
            base_url="http://front/v1", api_key="k", http_client=client, max_retries=0
        )
        with pytest.raises(kind) as raised:
            await api.post(f"/echo/{status}", body=HELLO, cast_to=object)
        if status != 500:
            assert (raised.value.code, raised.value.param) == ("because", "p")  # type: ignore[attr-defined]

    run(work)


def test_keys_open_the_api_and_admin_keys_the_admin_routes(tmp_path: Path) -> None:
    user = add_key(tmp_path / "keys", "user")
    admin = add_key(tmp_path / "keys", "boss", admin=True)
    keys = KeyRing(KeySettings(file=str(tmp_path / "keys")))

    async def work(world: World, client: httpx.AsyncClient) -> None:
        async def status(path: str, **headers: str) -> int:
            method = "POST" if path.startswith("/v1") else "GET"
            body = HELLO if method == "POST" else None
            answer = await client.request(method, path, json=body, headers=headers)
            return answer.status_code

        assert await status("/health") == 200
        assert await status("/v1/echo/200") == 401
        assert await status("/nowhere") == 401
        assert await status("/v1/echo/200", Authorization=f"Bearer {user}") == 200
        assert await status("/v1/echo/200", Authorization=f"bearer  {user}") == 200
        assert await status("/v1/echo/200", **{"x-api-key": user}) == 200
        assert await status("/v1/echo/200", Authorization=f"Basic {user}") == 401
        assert await status("/metrics", Authorization=f"Bearer {user}") == 403
        assert await status("/metrics", Authorization=f"Bearer {admin}") == 200
        assert world.meters.total("altiplano_http_rejected", reason="key") == 4

    run(work, keys=keys)


def test_a_body_that_is_too_large_is_refused_announced_or_not() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * 1024

    async def work(_: World, client: httpx.AsyncClient) -> None:
        for content in (b" " * 2049, chunks()):
            answer = await client.post("/v1/echo/200", content=content)
            assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
        fits = {"messages": [{"content": "x" * 1900}]}
        assert (await client.post("/v1/echo/200", json=fits)).status_code == 200

    run(work, max_body_kib=2)


def test_a_body_that_never_ends_is_given_up() -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def work(_: World, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/echo/200", content=slowly())
        assert answer.status_code == 408

    run(work, slow_client_s=0.05)


def test_bytes_that_are_no_text_are_refused_by_place() -> None:
    async def work(_: World, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/echo/200", content=b'{"a": "\xff"}')
        assert answer.status_code == 400
        assert "byte 7 is 0xff" in error_of(answer)["message"]

    run(work)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='[]{}"\\,:aé'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[{"\\'), inner, max_size=3)
    ),
    max_leaves=20,
)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


@given(value=_JSON, limit=st.integers(1, 6), ascii_only=st.booleans())
def test_nesting_is_counted_as_a_parser_would(value: Any, limit: int, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    if _depth(value) > limit:
        with pytest.raises(ApiError, match=f"deeper than {limit}"):
            check_json(body, limit)
    else:
        check_json(body, limit)


@given(text=st.text(alphabet=st.characters(exclude_categories=[]), max_size=12))
def test_half_a_surrogate_pair_is_refused_and_everything_else_is_not(text: str) -> None:
    body = json.dumps(["\\ud800", text]).encode()
    # Halves that stand together are a pair to a parser.
    if any("\ud800" <= letter <= "\udfff" for letter in json.loads(body)[1]):
        with pytest.raises(ApiError, match="half a surrogate pair"):
            check_json(body, 3)
    else:
        check_json(body, 3)


@given(body=st.binary(max_size=60) | st.text('[]{}"\\', max_size=60).map(str.encode))
def test_any_bytes_are_either_refused_or_passed_on(body: bytes) -> None:
    try:
        check_json(body, 3)
    except ApiError as error:
        assert error.status == 400


@pytest.mark.parametrize("piece", [b"[", b"[]", b'"[', b'\\"[', b'["\\'])
def test_a_hostile_body_is_looked_through_once(piece: bytes) -> None:
    """Two megabytes of it; what looks twice at each byte would outlast the test's time limit."""
    body = piece * (2**21 // len(piece))
    try:
        check_json(body, 32)
    except ApiError as error:
        assert error.code == "nested_too_deep"


def test_a_full_house_answers_503_but_its_health() -> None:
    async def work(world: World, client: httpx.AsyncClient) -> None:
        held = [asyncio.create_task(client.post("/v1/hold", json={})) for _ in range(2)]
        while world.held < 2:
            await asyncio.sleep(0)
        answer = await client.post("/v1/echo/200", json=HELLO)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert (await client.get("/health")).status_code == 200
        world.hold.set()
        assert [(await task).status_code for task in held] == [200, 200]
        assert (await client.post("/v1/echo/200", json=HELLO)).status_code == 200

    run(work, max_requests=2)


def test_browsers_of_the_named_origins_may_call_and_others_may_not() -> None:
    async def work(_: World, client: httpx.AsyncClient) -> None:
        asks = {"access-control-request-method": "POST", "origin": "https://good.example"}
        answer = await client.options(
            "/v1/echo/200", headers={**asks, "access-control-request-headers": "authorization"}
        )
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        refused = await client.post(
            "/v1/echo/200", content=b"{", headers={"origin": asks["origin"]}
        )
        assert refused.headers["access-control-allow-origin"] == "https://good.example"
        bad = await client.options(
            "/v1/echo/200", headers={**asks, "origin": "https://bad.example"}
        )
        assert "access-control-allow-origin" not in bad.headers

    run(work)


def test_streamed_answers_pass_and_count_when_they_end() -> None:
    async def work(world: World, client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/stream", json={}) as answer:
            text = "".join([part async for part in answer.aiter_text()])
        assert text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
        assert world.meters.total("altiplano_http_requests", path="/v1/stream", status="200") == 1

    run(work)


def test_the_log_has_a_line_per_request_with_its_id_and_nothing_said(tmp_path: Path) -> None:
    secret = add_key(tmp_path / "keys", "web")
    logger = logging.getLogger("altiplano")
    before = logger.handlers[:], logger.level, logger.propagate

    async def work(_: World, client: httpx.AsyncClient) -> None:
        await client.get("/health")
        await client.post(
            "/v1/echo/200",
            json={"messages": [{"content": "hush hush"}]},
            headers={"authorization": f"Bearer {secret}", "x-request-id": "r1"},
        )

    try:
        logs.write_logs(tmp_path / "logs" / "front.log")
        run(work, keys=KeyRing(KeySettings(file=str(tmp_path / "keys"))))
    finally:
        for handler in set(logger.handlers) - set(before[0]):
            logger.removeHandler(handler)
            handler.close()
        logger.level, logger.propagate = before[1:]
    text = (tmp_path / "logs" / "front.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["request"] for line in lines} == {"r1"}
    echoed, access = lines
    assert (echoed["logger"], echoed["message"]) == ("altiplano.test", "echoed")
    assert access.pop("ms") >= 0 and access.pop("time")
    assert access == {
        "level": "INFO",
        "logger": "altiplano.access",
        "request": "r1",
        "key": "web",
        "method": "POST",
        "path": "/v1/echo/{status}",
        "model": "tiny",
        "status": 200,
        "tokens": 7,
    }
    assert "hush" not in text and secret not in text
