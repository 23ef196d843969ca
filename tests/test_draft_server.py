"""A draft replica: greets who fits, answers before it guesses ahead, and fails loudly."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from altiplano.config.serving import ModelSettings
from altiplano.serving import board
from altiplano.serving.draft import BUSY_GOAL, Draft, scale_by_busy, topic
from altiplano.serving.speculation.drafter import Drafter, Work
from altiplano.serving.speculation.protocol import (
    VERSION,
    Ahead,
    Answer,
    Ask,
    FromDraft,
    FromEngine,
    Hello,
    Refused,
    Row,
    Welcome,
    decode_from_draft,
    digest,
    encode,
    vocab_digest,
)
from altiplano.serving.speculation.server import DraftServer
from tests.helpers.served_run import Shape, write_small_model

VOCAB = Shape().vocab_size
HELLO = Hello(VERSION, "ours", VOCAB)


class FaultyDrafter(Drafter):
    """Slow, or dead, at will."""

    pass_s = 0.0
    broken = False

    def finish(self, works: Sequence[Work]) -> None:
        if self.broken:
            raise RuntimeError("the drafter broke")
        super().finish(works)

    def draft_ahead(self, works: Sequence[Work]) -> None:
        time.sleep(self.pass_s)
        super().draft_ahead(works)


class Engine:
    """The other side of the socket."""

    def __init__(self, address: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(address)

    def send(self, message: FromEngine) -> None:
        self.socket.send(encode(message))

    def receive(self) -> FromDraft:
        assert self.socket.poll(10_000), "no message came"
        return decode_from_draft(self.socket.recv())

    def greet(self) -> "Engine":
        self.send(HELLO)
        assert isinstance(self.receive(), Welcome)
        return self


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("draft") / "draft")


@pytest.fixture
def drafter(draft_dir: Path) -> FaultyDrafter:
    return FaultyDrafter(draft_dir, cache_gib=0.02, dtype="float32")


@pytest.fixture
def server(drafter: FaultyDrafter) -> Iterator[DraftServer]:
    server = DraftServer(drafter, vocab_digest="ours", host="127.0.0.1")
    server.start()
    yield server
    server.stop()
    assert not server.alive


def ask(step: int, ids: list[int], k: int = 3, *, overlap: bool = False) -> Ask:
    return Ask(step, [Row(0, 0, ids, k)], overlap)


def expected(draft_dir: Path, ids: list[int], k: int) -> list[int]:
    """What a drafter of its own says."""
    return Drafter(draft_dir, cache_gib=0.02).propose([Row(0, 0, ids, k)])[0].tokens


def test_a_fitting_engine_is_told_the_limits(server: DraftServer, drafter: Drafter) -> None:
    engine = Engine(server.address)
    engine.send(HELLO)
    assert engine.receive() == Welcome(VERSION, "ours", VOCAB, drafter.max_tokens)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(VERSION + 1, "ours", VOCAB), f"version is {VERSION + 1}, the draft's {VERSION}"),
        (Hello(VERSION, "theirs", VOCAB), "vocabulary digest is theirs, the draft's ours"),
        (Hello(VERSION, "ours", VOCAB + 1), f"vocabulary size is {VOCAB + 1}"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(
    server: DraftServer, hello: Hello, reason: str
) -> None:
    engine = Engine(server.address)
    engine.send(hello)
    refused = engine.receive()
    assert isinstance(refused, Refused)
    assert reason in refused.reason
    engine.send(ask(1, [5]))
    Engine(server.address).greet()  # What came before it has been read.
    assert server.counts()["strangers"] == 1


def test_engines_are_answered_each_its_own(server: DraftServer, draft_dir: Path) -> None:
    engines = [Engine(server.address).greet() for _ in range(3)]
    for number, engine in enumerate(engines):
        engine.send(ask(7 + number, [300 + number, 310]))
    for number, engine in enumerate(engines):
        answer = engine.receive()
        assert isinstance(answer, Answer)
        assert answer.step == 7 + number
        assert answer.rows[0].tokens == expected(draft_dir, [300 + number, 310], 3)


def test_after_the_answer_comes_what_follows_it(server: DraftServer, draft_dir: Path) -> None:
    engine = Engine(server.address).greet()
    engine.send(ask(1, [300, 301], overlap=True))
    answer, ahead = engine.receive(), engine.receive()
    assert isinstance(answer, Answer)
    assert isinstance(ahead, Ahead)
    assert ahead.step == 1
    chain = [*answer.rows[0].tokens, ahead.rows[0].guess, *ahead.rows[0].tokens]
    assert chain == expected(draft_dir, [300, 301], 7)
    engine.send(Ask(2, [Row(digest([300, 301]), 2, chain[:4], 3)], False))
    answer = engine.receive()
    assert isinstance(answer, Answer)
    assert answer.rows[0].tokens == chain[4:]
    assert server.counts()["hits"] == 1


def test_an_ask_goes_before_guessing_ahead(server: DraftServer, drafter: FaultyDrafter) -> None:
    drafter.pass_s = 0.2
    busy, other = Engine(server.address).greet(), Engine(server.address).greet()
    busy.send(ask(1, [300, 301], 8, overlap=True))
    assert isinstance(busy.receive(), Answer)
    other.send(ask(1, [302]))
    assert isinstance(other.receive(), Answer)
    assert not busy.socket.poll(0), "it was made to wait until the other's guesses were done"
    assert isinstance(busy.receive(), Ahead)


def test_a_newer_ask_replaces_the_older(server: DraftServer, drafter: FaultyDrafter) -> None:
    drafter.pass_s = 0.3
    engine = Engine(server.address).greet()
    engine.send(ask(1, [300, 301], overlap=True))
    assert isinstance(engine.receive(), Answer)
    time.sleep(0.1)  # Into the first pass ahead: the next two will wait together.
    engine.send(Ask(2, [Row(digest([300, 301]), 2, [9], 3)], False))
    engine.send(Ask(3, [Row(digest([300, 301, 9]), 3, [8], 3)], False))
    answer = engine.receive()
    assert isinstance(answer, Answer)
    assert (answer.step, answer.rows[0].missing) == (3, False)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"x" * 100, encode(Ask(1, [Row(0, 0, [VOCAB], 2)], False))]
)
def test_what_is_no_message_is_dropped_and_counted(server: DraftServer, data: bytes) -> None:
    engine = Engine(server.address).greet()
    engine.socket.send(data)
    engine.send(ask(1, [300]))
    assert isinstance(engine.receive(), Answer)
    assert server.counts()["malformed"] == 1


def test_a_thread_that_dies_is_noticed(server: DraftServer, drafter: FaultyDrafter) -> None:
    drafter.broken = True
    Engine(server.address).greet().send(ask(1, [300]))
    deadline = time.monotonic() + 10
    while server.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.alive
    assert "the drafter broke" in str(server.error)


def context(busy: list[float], replicas: int) -> Any:
    """What the policy reads of Serve's context."""
    return SimpleNamespace(
        aggregated_metrics={"busy": dict(enumerate(busy))},
        current_num_replicas=replicas,
        target_num_replicas=replicas,
    )


@pytest.mark.parametrize(
    ("busy", "replicas", "wanted"),
    [
        ([], 1, 1),
        ([BUSY_GOAL], 1, 1),
        ([1.0], 1, 2),
        ([1.0, 0.9], 2, 4),
        ([0.05, 0.1], 2, 1),
        ([0.0], 1, 1),
        ([0.5, 0.6, 0.7], 3, 3),
    ],
)
def test_replicas_follow_how_busy_they_are(busy: list[float], replicas: int, wanted: int) -> None:
    assert scale_by_busy(context(busy, replicas))[0] == wanted


def test_a_replica_posts_its_address_and_takes_it_down(
    ray_cluster: dict[str, str], draft_dir: Path
) -> None:
    from ray import serve

    entry = ModelSettings(name="story", path="target", max_model_len=128).model_dump()
    deployment = serve.deployment(Draft, name="Draft-story", ray_actor_options={"num_cpus": 0.1})
    serve.start(proxy_location="Disabled")
    try:
        serve.run(
            deployment.bind(entry, str(draft_dir), "127.0.0.1"), name="draft", route_prefix=None
        )
        deadline = time.monotonic() + 20
        while not (notices := board.read(topic("story"), newer_than_s=5)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (notice,) = notices.values()
        assert notice["vocab_digest"] == vocab_digest(draft_dir)
        engine = Engine(notice["address"])
        engine.send(Hello(VERSION, notice["vocab_digest"], VOCAB))
        assert isinstance(engine.receive(), Welcome)
        engine.send(ask(1, [300, 301]))
        answer = engine.receive()
        assert isinstance(answer, Answer)
        assert answer.rows[0].tokens == expected(draft_dir, [300, 301], 3)
        serve.delete("draft")
        assert board.read(topic("story")) == {}
    finally:
        serve.shutdown()
