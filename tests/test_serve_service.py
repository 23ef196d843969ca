"""One real service on the session's cluster: vLLM, a speculating draft, HTTP. About a minute."""

import io
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from altiplano.config.schema import ServeSection
from altiplano.errors import ServeError
from altiplano.serving import service
from altiplano.serving.service import Service
from tests.helpers.served_run import write_served_run

if TYPE_CHECKING:
    from openai import OpenAI

PROMPT = "ba dele koko"
ASKED = [{"role": "user", "content": "mama ti do"}]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with a draft."""
    return write_served_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def running(run: Path, ray_cluster: dict[str, str]) -> Iterator[Service]:
    """Serve the run for all tests of this module."""
    section = ServeSection(
        port=_free_port(), model_name="tiny", kv_cache_gib=0.25, dtype="float32", draft_tokens=3
    )
    started = service.start(section, run / "merge", run / "draft")
    yield started
    started.stop()
    # Raises if the port is still taken.
    service.require_free_port("127.0.0.1", section.port)


@pytest.fixture(scope="module")
def client(running: Service) -> "OpenAI":
    """Return OpenAI's own client on the service."""
    from openai import DefaultHttpxClient, OpenAI

    transport = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=f"{running.url}/v1", api_key="none", http_client=transport)


def test_the_model_is_offered_by_its_name(client: "OpenAI") -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_greedy_completions_are_those_of_transformers(client: "OpenAI", run: Path) -> None:
    import torch

    from altiplano.model.load import load_model
    from altiplano.vocabulary.load import Vocabulary

    vocabulary = Vocabulary(run / "merge")
    expected_ids = [vocabulary.bos_id, *vocabulary.encode(PROMPT)]
    generated = load_model(run / "merge").generate(
        torch.tensor([expected_ids]), max_new_tokens=40, do_sample=False
    )
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=40, temperature=0,
        extra_body={"return_token_ids": True},
    ).choices[0]  # fmt: skip
    served = answer.model_dump()
    assert served["prompt_token_ids"] == expected_ids
    new_ids = generated[0, len(expected_ids) :].tolist()
    assert served["token_ids"] == new_ids
    assert answer.text.strip() == vocabulary.decode(new_ids).strip()


@pytest.mark.parametrize(
    "text",
    [
        "a  b   c",
        " leading",
        "line\n\nline\n",
        "\ttab",
        "雪山上的小船",
        "龘𠮷 Ａ１",
        "👩‍👩‍👧 é e\u0301",
        "▁ ▁",
    ],
)
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
        model="tiny", messages=ASKED, max_tokens=30, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == plain.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3


def test_a_cpu_service_that_speculates_answers_greedily(client: "OpenAI") -> None:
    """Sampling there would give noise (serving/greedy.py)."""
    greedy, hot = (
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=30, temperature=temperature
        )
        for temperature in (0, 1.5)
    )
    assert hot.choices[0].text == greedy.choices[0].text


def test_wrong_requests_are_the_clients_fault(client: "OpenAI") -> None:
    from openai import BadRequestError, NotFoundError

    with pytest.raises(NotFoundError) as refused:
        client.completions.create(model="another", prompt=PROMPT)
    assert "another" in refused.value.response.text
    with pytest.raises(BadRequestError, match="256"):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5000)


def test_the_terminal_client_answers_piped_questions(
    running: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from altiplano.chat import chat

    monkeypatch.setattr(
        "sys.stdin", io.StringIO("mama ti do\n\n/clear\nbu ka\n/exit\nnever asked\n")
    )
    chat(running.url, system="be brief", max_tokens=16)
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2


def test_a_second_service_on_the_cluster_is_refused(running: Service, run: Path) -> None:
    with pytest.raises(ServeError, match=r"already runs on this cluster \(altiplano\)"):
        service.start(ServeSection(port=_free_port()), run / "merge")


def test_the_draft_speculates_and_is_often_right(running: Service, client: "OpenAI") -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, temperature=0)
    measured = running.speculation_metrics()
    assert measured is not None
    assert measured["accepted_tokens"] > 0
    assert measured["draft_tokens"] <= 3 * measured["drafts"]
    assert measured["acceptance"] == measured["accepted_tokens"] / measured["draft_tokens"] <= 1
    assert 1 < measured["tokens_per_step"] <= 4


def test_an_address_nobody_serves_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from altiplano.chat import chat

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with pytest.raises(ServeError, match="altiplano serve"):
        chat(f"http://127.0.0.1:{_free_port()}")
