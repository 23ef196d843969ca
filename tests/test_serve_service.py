"""One real service: two vLLM targets that share a draft replica, keys, HTTP. About two minutes."""

import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from altiplano.config.serving import (
    DraftSettings,
    KeySettings,
    LimitSettings,
    ModelSettings,
    ServeSection,
)
from altiplano.errors import ServeError
from altiplano.serving import service
from altiplano.serving.check import find_parts
from altiplano.serving.front.keys import add_key
from altiplano.serving.service import Service
from tests.helpers.adapters import write_adapter
from tests.helpers.serve_replicas import kill, replica_pids, wait_until
from tests.helpers.served_run import Shape, write_served_run
from tests.helpers.tiny_vocabulary import HARD_TEXTS
from tools.screenshots import ask, browser, enter, missing_programs, text, value, wait

if TYPE_CHECKING:
    from openai import OpenAI

PROMPT = "ba dele koko"
ASKED = [{"role": "user", "content": "mama ti do"}]
CONTEXT = 1024
LONG = 600
"""Tokens that take a few seconds, so that something can die in the meantime."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with a draft."""
    return write_served_run(tmp_path_factory.mktemp("runs") / "demo", Shape(context=CONTEXT))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a key file and the keys in it."""
    file = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    return {
        "file": str(file),
        "user": add_key(file, "user"),
        "admin": add_key(file, "admin", admin=True),
        "slow": add_key(file, "slow", requests_per_minute=1),
    }


@pytest.fixture(scope="module")
def running(run: Path, keys: dict[str, str], ray_cluster: dict[str, str]) -> Iterator[Service]:
    """Serve the run for all tests of this module."""
    section = ServeSection(
        port=_free_port(),
        model_name="tiny",
        min_replicas=2,
        max_replicas=2,
        cpus_per_replica=0.5,
        kv_cache_gib=0.25,
        dtype="float32",
        draft=DraftSettings(
            placement="replica", tokens=3, adaptive=False, deadline_ms=1000, num_cpus=0.5
        ),
        keys=KeySettings(file=keys["file"]),
        limits=LimitSettings(max_n=4),
        models=[
            ModelSettings(
                name="plain",
                path=str(run / "merge"),
                min_replicas=0,
                max_replicas=1,
                max_adapters=2,
                draft=DraftSettings(placement="none"),
            )
        ],
        drain_s=5,
        page=True,
    )
    started = service.start(section, find_parts(section, run))
    yield started
    started.stop()
    # Raises if the port is still taken.
    service.require_free_port("127.0.0.1", section.port)


def _client(running: Service, key: str) -> "OpenAI":
    from openai import DefaultHttpxClient, OpenAI

    transport = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=f"{running.url}/v1", api_key=key, http_client=transport, max_retries=0)


@pytest.fixture(scope="module")
def client(running: Service, keys: dict[str, str]) -> "OpenAI":
    """Return OpenAI's own client on the service."""
    return _client(running, keys["user"])


@pytest.fixture(scope="module")
def greedy(run: Path) -> tuple[list[int], str]:
    """Return what transformers says to the prompt: ids and text of LONG tokens."""
    import torch

    from altiplano.model.load import load_model
    from altiplano.vocabulary.load import Vocabulary

    vocabulary = Vocabulary(run / "merge")
    prompt = [vocabulary.bos_id, *vocabulary.encode(PROMPT)]
    generated = load_model(run / "merge").generate(
        torch.tensor([prompt]), max_new_tokens=LONG, do_sample=False
    )
    ids = generated[0, len(prompt) :].tolist()
    return ids, vocabulary.decode(ids)


def test_the_models_are_offered_by_their_names(client: "OpenAI") -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "plain"]


def test_greedy_completions_are_those_of_transformers(
    client: "OpenAI", run: Path, greedy: tuple[list[int], str]
) -> None:
    """With a draft on the other side of a socket that is often right."""
    from altiplano.vocabulary.load import Vocabulary

    vocabulary = Vocabulary(run / "merge")
    reply = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=200, temperature=0,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    drafted = reply.usage.completion_tokens_details
    assert 0 < drafted.accepted_prediction_tokens <= 200
    answer = reply.choices[0]
    served = answer.model_dump()
    assert served["prompt_token_ids"] == [vocabulary.bos_id, *vocabulary.encode(PROMPT)]
    assert served["token_ids"] == greedy[0][:200]
    assert answer.text.strip() == vocabulary.decode(greedy[0][:200]).strip()


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_the_engine_reads_the_ids_that_training_saw(client: "OpenAI", run: Path, text: str) -> None:
    from altiplano.vocabulary.load import Vocabulary

    vocabulary = Vocabulary(run / "merge")
    answer = client.completions.create(
        model="tiny", prompt=text, max_tokens=1, extra_body={"return_token_ids": True}
    ).choices[0]  # fmt: skip
    expected = [vocabulary.bos_id, *vocabulary.encode(text)]
    assert answer.model_dump()["prompt_token_ids"] == expected


def test_a_streamed_chat_says_what_a_plain_one_says(client: "OpenAI") -> None:
    plain = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=30, temperature=0
    )
    stream = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=30, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == plain.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1].usage == plain.usage
    assert plain.usage is not None and plain.usage.completion_tokens == 30


def test_a_seed_gives_the_same_text_and_n_gives_several(client: "OpenAI") -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=20, temperature=1.2, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    assert ask(7) == ask(7)
    assert len(set(ask(7))) == 3
    assert ask(7) != ask(8)


def test_logprobs_name_the_chosen_token_first(client: "OpenAI") -> None:
    choice = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 5
    for position in choice.logprobs.content:
        best = max(position.top_logprobs, key=lambda each: each.logprob)
        assert best.token == position.token
        assert best.logprob == pytest.approx(position.logprob)


def test_text_ends_before_a_stop_string(client: "OpenAI", greedy: tuple[list[int], str]) -> None:
    word = greedy[1].split()[4]
    choice = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=200, temperature=0, stop=[word]
    ).choices[0]
    assert choice.finish_reason == "stop"
    assert word not in choice.text
    assert greedy[1].strip().startswith(choice.text.strip())


def test_an_answer_follows_a_json_schema(client: "OpenAI") -> None:
    import json

    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=40, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )  # fmt: skip
    said = json.loads(answer.choices[0].message.content or "")
    assert set(said) == {"yes"} and isinstance(said["yes"], bool)


def test_langchains_chat_model_works_unchanged(running: Service, keys: dict[str, str]) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="tiny",
        base_url=f"{running.url}/v1",
        api_key=keys["user"],
        temperature=0,
        max_tokens=12,
        http_client=httpx.Client(trust_env=False),
    )
    plain = model.invoke("mama ti do")
    assert plain.usage_metadata is not None and plain.usage_metadata["output_tokens"] == 12
    streamed = "".join(str(chunk.content) for chunk in model.stream("mama ti do"))
    assert streamed == plain.content


def test_wrong_requests_are_the_clients_fault(
    running: Service, client: "OpenAI", keys: dict[str, str]
) -> None:
    from openai import AuthenticationError, BadRequestError, NotFoundError, RateLimitError

    with pytest.raises(NotFoundError) as refused:
        client.completions.create(model="another", prompt=PROMPT)
    assert "another" in refused.value.response.text
    with pytest.raises(BadRequestError, match=str(CONTEXT)):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5000)
    with pytest.raises(BadRequestError, match="n"):
        client.completions.create(model="tiny", prompt=PROMPT, n=5)
    with pytest.raises(AuthenticationError):
        _client(running, "sk-wrong").models.list()
    slow = _client(running, keys["slow"])
    slow.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
    with pytest.raises(RateLimitError) as limited:
        slow.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
    assert int(limited.value.response.headers["retry-after"]) > 0


def test_metrics_are_an_administrators(running: Service, keys: dict[str, str]) -> None:
    def get(key: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{running.url}/metrics", headers=headers, trust_env=False, timeout=30)

    assert get(keys["user"]).status_code == 403
    wait_until(
        lambda: "altiplano_" in get(keys["admin"]).text and "vllm" in get(keys["admin"]).text,
        "the service's counters in /metrics",
    )


def test_the_terminal_client_answers_piped_questions(
    running: Service,
    keys: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from altiplano.chat import chat

    monkeypatch.setenv("ALTIPLANO_API_KEY", keys["user"])
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("mama ti do\n\n/clear\nbu ka\n/exit\nnever asked\n")
    )
    chat(running.url, system="be brief", max_tokens=16)
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2


def test_a_second_service_on_the_cluster_is_refused(running: Service, run: Path) -> None:
    section = ServeSection(port=_free_port())
    with pytest.raises(
        ServeError, match=r"already runs on this cluster \(altiplano, altiplano-chat\)"
    ):
        service.start(section, find_parts(section, run))


def test_the_draft_speculates_and_is_often_right(running: Service, client: "OpenAI") -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, temperature=0)
    measured = running.speculation_metrics()
    assert measured is not None
    assert measured["accepted_tokens"] > 0
    assert measured["draft_tokens"] <= 3 * measured["drafts"]
    assert measured["acceptance"] == measured["accepted_tokens"] / measured["draft_tokens"] <= 1
    assert 1 < measured["tokens_per_step"] <= 4


def test_a_model_without_replicas_wakes_and_says_the_same_without_a_draft(
    client: "OpenAI", greedy: tuple[list[int], str]
) -> None:
    assert replica_pids("Target-plain") == []
    answer = client.completions.create(
        model="plain", prompt=PROMPT, max_tokens=LONG, temperature=0, timeout=120
    )
    assert answer.choices[0].text.strip() == greedy[1].strip()
    assert len(replica_pids("Target-plain")) == 1


def test_a_seeded_draw_does_not_depend_on_the_draft(client: "OpenAI") -> None:
    texts = [
        client.completions.create(
            model=model, prompt=PROMPT, max_tokens=60, temperature=1.1, seed=11
        )
        .choices[0]
        .text
        for model in ("tiny", "plain")
    ]
    assert texts[0] == texts[1]


def test_adapters_come_and_go_while_serving(
    running: Service, client: "OpenAI", keys: dict[str, str], tmp_path: Path
) -> None:
    from openai import NotFoundError

    path = write_adapter(tmp_path / "adapter")

    def post(what: str, body: dict[str, str], key: str = keys["admin"]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(
            f"{running.url}/v1/{what}_lora_adapter",
            json=body,
            headers=headers,
            trust_env=False,
            timeout=60,
        )

    wish = {"lora_name": "sung", "lora_path": str(path), "model": "plain"}
    assert post("load", wish, keys["user"]).status_code == 403
    assert post("load", {**wish, "lora_name": "../up"}).status_code == 400
    assert post("load", {**wish, "model": "tiny"}).status_code == 400
    loaded = post("load", wish)
    assert loaded.is_success, loaded.text
    assert [model.id for model in client.models.list()] == ["tiny", "plain", "sung"]

    def say(model: str) -> str:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0)
        return answer.choices[0].text

    assert say("sung") != say("plain")
    assert post("unload", {"lora_name": "sung"}).is_success
    with pytest.raises(NotFoundError):
        say("sung")


@pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"
)
def test_the_page_beside_the_service_answers_with_a_key(
    running: Service, keys: dict[str, str]
) -> None:
    url = f"{running.url}/chat"
    upload = httpx.post(f"{url}/gradio_api/upload", content=b"x", trust_env=False)
    assert upload.status_code == 404
    with browser() as driver:
        driver.get(url)
        wait(lambda: "API key" in value(driver, "status"), "the page asks for a key")
        enter(driver, "key", keys["user"] + "\n")
        wait(lambda: value(driver, "chat-model") == "tiny", "the models are offered")
        enter(driver, "longest", "40\n")
        ask(driver, "chat", "mama ti do")
        shown = text(driver, "chat-box")
    assert "tokens/s" in shown
    assert "draft" in shown


# What dies, and what nobody notices.


class _Streams:
    """Several clients that stream the same greedy answer."""

    def __init__(self, client: "OpenAI", count: int) -> None:
        self.client = client
        self.texts = [""] * count
        self.usages: list[Any] = [None] * count
        self.errors: list[Exception] = []
        self.threads = [threading.Thread(target=self._stream, args=(i,)) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def _stream(self, index: int) -> None:
        try:
            stream = self.client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=LONG, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            for chunk in stream:
                if chunk.choices:
                    self.texts[index] += chunk.choices[0].text
                self.usages[index] = chunk.usage or self.usages[index]
        except Exception as error:
            self.errors.append(error)

    def all_under_way(self) -> bool:
        return all(self.texts)

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(timeout=120)
            assert not thread.is_alive()


def _all_well(streams: _Streams, greedy: tuple[list[int], str]) -> None:
    assert streams.errors == []
    assert {text.strip() for text in streams.texts} == {greedy[1].strip()}
    assert {usage.completion_tokens for usage in streams.usages} == {LONG}


def test_the_death_of_the_draft_is_no_users_problem(
    client: "OpenAI", greedy: tuple[list[int], str]
) -> None:
    (draft,) = replica_pids("Draft-tiny")
    streams = _Streams(client, 2)
    wait_until(streams.all_under_way, "first tokens")
    kill(draft)
    streams.finish()
    _all_well(streams, greedy)
    wait_until(lambda: replica_pids("Draft-tiny") not in ([], [draft]), "another draft")


def test_a_request_outlives_its_replica(
    running: Service, client: "OpenAI", keys: dict[str, str], greedy: tuple[list[int], str]
) -> None:
    first, second = replica_pids("Target-tiny")
    streams = _Streams(client, 6)
    plain = threading.Thread(
        target=lambda: answers.append(
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=LONG, temperature=0)
        )
    )
    answers: list[Any] = []
    plain.start()
    wait_until(streams.all_under_way, "first tokens")
    kill(first)
    streams.finish()
    plain.join()
    _all_well(streams, greedy)
    assert answers[0].choices[0].text.strip() == greedy[1].strip()
    assert answers[0].usage.completion_tokens == LONG
    wait_until(lambda: len(set(replica_pids("Target-tiny")) - {first}) == 2, "another target")
    assert second in replica_pids("Target-tiny")


def test_an_address_nobody_serves_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from altiplano.chat import chat

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with pytest.raises(ServeError, match="altiplano serve"):
        chat(f"http://127.0.0.1:{_free_port()}")
