"""The routes over replicas without engines: JSON, streams, errors, clients that leave. 8 s."""

import asyncio
import base64
import json
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano.serving.front.app import make_app
from altiplano.serving.front.models import ServedModel
from altiplano.serving.front.sse import EventStream
from altiplano.serving.front.state import FrontState
from altiplano.serving.front.telemetry import MemoryMeters
from altiplano.serving.messages import Job
from tests.helpers.fake_target import FakeTarget, fake_model, fake_state
from tests.helpers.served_run import write_small_model

CHAT = {"messages": [{"role": "user", "content": "mama ti do"}], "temperature": 0}
Client = httpx.AsyncClient


def _words(sequence: Any, job: Job) -> int | None:
    """Count through the pieces by place, so that a continuation goes on rightly."""
    return 330 + len(sequence) % 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(directory: Path) -> ServedModel:
    return fake_model(directory, _words)


def _target(model: ServedModel) -> FakeTarget:
    assert isinstance(model.client, FakeTarget)
    return model.client


def _with(state: FrontState, scenario: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        app = make_app(state)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            Client(transport=transport, base_url="http://test") as client,
        ):
            await asyncio.sleep(0)
            return await asyncio.wait_for(scenario(client), 20)

    return asyncio.run(run())


def _post(model: ServedModel, path: str, body: dict[str, Any]) -> httpx.Response:
    response = _with(fake_state(model), lambda client: client.post(path, json=body))
    assert isinstance(response, httpx.Response)
    return response


def _events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("deaths", [[], [0], [5]])
@pytest.mark.parametrize("per_step", [1, 4])
def test_a_stream_says_what_a_whole_answer_says_whatever_dies(
    directory: Path, deaths: list[int], per_step: int
) -> None:
    body = {**CHAT, "max_tokens": 12, "n": 2, "stop": ["zzz", "yy"]}
    # Each answer is a call of its own: the first dies.
    whole_model = fake_model(directory, _words, per_step=per_step)
    whole = _post(whole_model, "/v1/chat/completions", body).json()
    model = fake_model(directory, _words, deaths=deaths, per_step=per_step)
    streamed = _post(
        model,
        "/v1/chat/completions",
        {**body, "stream": True, "stream_options": {"include_usage": True}},
    )
    events = _events(streamed)
    for choice in whole["choices"]:
        mine = [
            event["choices"][0]
            for event in events
            if event["choices"] and event["choices"][0]["index"] == choice["index"]
        ]
        assert mine[0]["delta"]["role"] == "assistant"
        text = "".join(each["delta"].get("content", "") for each in mine)
        assert text == choice["message"]["content"]
        assert [each["finish_reason"] for each in mine][-1] == choice["finish_reason"] == "length"
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert whole["usage"]["completion_tokens"] == 24
    assert len(_target(model).jobs) == 2 + len(deaths)


def test_a_second_death_in_a_stream_is_an_event_and_then_done(directory: Path) -> None:
    model = fake_model(directory, _words, deaths=[3, 3])
    events = _events(_post(model, "/v1/completions", {"prompt": "ba", "stream": True}))
    assert events[-1]["error"]["code"] == "replica_lost"
    assert len(events) == 7
    whole = _post(fake_model(directory, _words, deaths=[3, 3]), "/v1/completions", {"prompt": "ba"})
    assert whole.status_code == 503 and whole.headers["retry-after"] == "1"


def test_an_error_before_the_first_token_has_its_own_status(directory: Path) -> None:
    model = fake_model(directory, _words, deaths=[0, 0])
    response = _post(model, "/v1/completions", {"prompt": "ba", "stream": True})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "replica_lost"


def test_tokens_are_counted_once_even_where_a_replica_died(directory: Path) -> None:
    model = fake_model(directory, _words, deaths=[5])
    state = fake_state(model)
    _with(state, lambda client: client.post("/v1/completions", json={"prompt": "ba ba"}))
    meters = state.telemetry._meters
    assert isinstance(meters, MemoryMeters)
    assert meters.total("altiplano_completion_tokens", model="tiny") == 16
    assert meters.total("altiplano_retries", reason="replica_lost") == 1
    assert len(meters.values[("altiplano_running", frozenset({("model", "tiny")}))]) == 2


def test_a_stop_string_ends_the_answer_and_its_job(model: ServedModel) -> None:
    whole = _post(model, "/v1/completions", {"prompt": "ba", "max_tokens": 30}).json()
    text = whole["choices"][0]["text"]
    stop = text[20:24]
    end = text.index(stop)
    answer = _post(model, "/v1/completions", {"prompt": "ba", "max_tokens": 200, "stop": stop})
    choice = answer.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[:end], "stop")
    assert choice["stop_reason"] == stop
    assert answer.json()["usage"]["completion_tokens"] < 30
    assert _target(model).cancelled == 1 and _target(model).running == 0


def test_logprobs_have_both_of_openais_forms(model: ServedModel) -> None:
    chat = {**CHAT, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    content = _post(model, "/v1/chat/completions", chat).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    streamed = _events(_post(model, "/v1/chat/completions", {**chat, "stream": True}))
    told = [each["choices"][0]["logprobs"] for each in streamed]
    assert [entry for each in told if each for entry in each["content"]] == content


@pytest.mark.parametrize("stream", [False, True])
def test_completions_logprobs_point_into_the_text(model: ServedModel, stream: bool) -> None:
    body = {"prompt": "ba dele", "max_tokens": 5, "logprobs": 2, "echo": True, "stream": stream}
    response = _post(model, "/v1/completions", body)
    bodies = _events(response) if stream else [response.json()]
    choices = [each["choices"][0] for each in bodies]
    text = "".join(choice["text"] for choice in choices)
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    joined = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    assert text.startswith("ba dele")
    assert joined["token_logprobs"][0] is None and joined["top_logprobs"][0] is None
    for token, offset in zip(joined["tokens"][2:], joined["text_offset"][2:], strict=True):
        assert text[offset:].startswith(token)


def test_only_the_prompt_comes_back_where_nothing_is_to_be_made(model: ServedModel) -> None:
    body = {"prompt": "ba dele", "max_tokens": 0, "logprobs": 1, "echo": True}
    answer = _post(model, "/v1/completions", body).json()
    assert answer["choices"][0]["text"] == "ba dele"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


def test_every_prompt_gets_its_n_answers_and_its_ids(model: ServedModel) -> None:
    body = {"prompt": [[1, 300], [1, 301, 302]], "n": 2, "seed": 5, "return_token_ids": True}
    answer = _post(model, "/v1/completions", body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    prompts = [choice["prompt_token_ids"] for choice in answer["choices"]]
    assert prompts == [[1, 300], [1, 300], [1, 301, 302], [1, 301, 302]]
    assert answer["usage"]["prompt_tokens"] == 5
    assert [job.sampling.seed for job in _target(model).jobs] == [5, 6, 5, 6]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "another", "prompt": "ba"}, 404, "another"),
        ({"prompt": "ba", "max_tokens": 5000}, 400, "256"),
        ({"prompt": "ba", "temperature": 3}, 400, "temperature"),
        ({"prompt": "ba", "guidance_scale": 2.0}, 400, "classifier-free"),
        ({"prompt": "ba", "suffix": "x"}, 400, "suffix"),
        ({"prompt": "ba", "logit_bias": {"9999": 1}}, 400, "9999"),
        ({"prompt": [1, 9999]}, 400, "9999"),
        ({"prompt": "ba", "n": 17}, 400, "17"),
        ({"prompt": "ba", "stream_options": {"include_usage": True}}, 400, "stream"),
        ({}, 400, "prompt"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(
    model: ServedModel, body: dict[str, Any], status: int, says: str
) -> None:
    response = _post(model, "/v1/completions", body)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


def test_keys_nobody_knows_are_ignored(model: ServedModel) -> None:
    assert _post(model, "/v1/completions", {"prompt": "ba", "brand_new": {}}).status_code == 200


def test_tools_and_forms_reach_the_engine_and_come_back(model: ServedModel) -> None:
    tool = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
    body = {
        **CHAT,
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "get"}},
    }
    whole = _post(model, "/v1/chat/completions", body).json()["choices"][0]
    assert _target(model).jobs[0].sampling.guided == {"json": {"type": "object"}}
    (call,) = whole["message"]["tool_calls"]
    assert call["function"]["name"] == "get"
    events = _events(_post(model, "/v1/chat/completions", {**body, "stream": True}))
    parts = [each["choices"][0]["delta"].get("tool_calls", []) for each in events]
    arguments = "".join(part["function"]["arguments"] for each in parts for part in each)
    assert arguments == call["function"]["arguments"]


def test_beams_come_best_first(model: ServedModel) -> None:
    body = {"prompt": "ba", "use_beam_search": True, "n": 2, "max_tokens": 3}
    answer = _post(model, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 2
    assert answer.json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_come_in_both_forms(directory: Path, form: str) -> None:
    model = fake_model(directory, _words, task="embed")
    body = {"input": [[7, 8, 9], [8]], "encoding_format": form}
    answer = _post(model, "/v1/embeddings", body).json()
    vectors = [each["embedding"] for each in answer["data"]]
    if form == "base64":
        vectors = [list(struct.unpack("<2f", base64.b64decode(each))) for each in vectors]
    assert vectors == [[3.0, 7.0], [1.0, 8.0]]
    assert answer["usage"]["prompt_tokens"] == 4
    refused = _post(model, "/v1/completions", {"prompt": "ba"})
    assert refused.status_code == 400 and "/v1/embeddings" in refused.text


def test_the_service_is_ready_when_every_model_was_heard_of(model: ServedModel) -> None:
    async def scenario(client: Client) -> list[int]:
        told = asyncio.Event()
        describe = _target(model).describe

        async def slow() -> Any:
            await told.wait()
            return await describe()

        model.about, _target(model).describe = None, slow  # type: ignore[method-assign]
        await client.get("/version")
        before = [(await client.get(path)).status_code for path in ("/health/live", "/health")]
        told.set()
        hearing = asyncio.create_task(state.hear())
        await hearing
        return [*before, (await client.get("/health/ready")).status_code]

    state = fake_state(model)
    assert _with(state, scenario) == [200, 503, 200]


def test_models_are_listed_with_their_context(model: ServedModel) -> None:
    listed = _with(fake_state(model), lambda client: client.get("/v1/models")).json()
    assert [(each["id"], each["max_model_len"]) for each in listed["data"]] == [("tiny", 256)]
    missing = _with(fake_state(model), lambda client: client.get("/v1/models/a/b"))
    assert missing.status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(directory: Path, stream: bool) -> None:
    model = fake_model(directory, _words, pause=0.01)
    body = json.dumps({"prompt": "ba", "max_tokens": 200, "stream": stream, "n": 2}).encode()

    async def run() -> None:
        app = make_app(fake_state(model))
        left = asyncio.Event()
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if given:
                return given.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        }  # fmt: skip
        answering = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
        while _target(model).running < 2:
            await asyncio.sleep(0.005)
        left.set()
        await asyncio.wait_for(answering, 5)
        assert _target(model).running == 0 and _target(model).cancelled == 2

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_client_that_reads_nothing_is_given_up() -> None:
    closed = []

    async def events() -> Any:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            closed.append(True)

    async def never(_: Any = None) -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        # The head goes into the socket's buffer, then nothing more.
        if message["type"] == "http.response.body":
            await never()

    async def run() -> None:
        await asyncio.wait_for(EventStream(events(), 0.05)({}, never, send), 5)

    asyncio.run(run())
    assert closed == [True]


def test_steps_without_whole_characters_make_no_events(directory: Path) -> None:
    # "é" as two byte pieces: one event, whole.
    pieces = [3 + 0xC3, 3 + 0xA9]
    model = fake_model(directory, lambda sequence, _: pieces[(len(sequence) - 1) % 2])
    body = {"prompt": [5], "max_tokens": 4, "stream": True}
    texts = [each["choices"][0]["text"] for each in _events(_post(model, "/v1/completions", body))]
    assert texts == ["é", "é"]


def test_the_http_side_imports_no_engine() -> None:
    code = (
        "import sys, altiplano.serving.front.app as app\n"
        "print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    path = str(Path(__file__).parents[1] / "platform")
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert ran.stdout.strip() == "[]", ran.stderr
