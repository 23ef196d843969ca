"""A draft replica that is asked over a socket: used when it answers, missed by nobody otherwise."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from altiplano.config.serving import DraftSettings
from altiplano.serving.speculation.bridge import ACCEPTED, FALLBACKS, LATENCY, Bridge
from altiplano.serving.speculation.channel import Link, Report
from altiplano.serving.speculation.client import RemoteDraft
from altiplano.serving.speculation.connection import Breaker, Deadline
from altiplano.serving.speculation.drafter import Drafter
from altiplano.serving.speculation.policy import Policy
from altiplano.serving.speculation.proposer import Proposer, Speculation
from altiplano.serving.speculation.protocol import VERSION, Hello, Row
from altiplano.serving.speculation.server import DraftServer
from tests.helpers.draft_worlds import LONGEST, VOCAB, DraftReplica, World, draft_tokens

_K = 4
_LONG_S = 5.0
"""No test waits so long unless it fails."""


class _Board:
    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)


class _Engine:
    """A world whose proposer asks drafts over sockets."""

    def __init__(
        self,
        *addresses: str,
        deadline_ms: float = 1000,
        vocab_size: int = VOCAB,
        **keys: object,
    ) -> None:
        self.world = World()
        self.continued = draft_tokens
        self.board = _Board(*addresses)
        hello = Hello(VERSION, "same", vocab_size)
        counts = Report()
        draft = RemoteDraft(
            hello,
            DraftSettings(placement="replica", deadline_ms=deadline_ms, **keys),
            self.board,
            counts,
            "engine",
        )
        policy = Policy(_K, adaptive=False)
        self.counts = counts
        self.proposer = Speculation(draft, policy, counts, longest=LONGEST, most=_K)

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.proposer.close()

    def step(self) -> list[list[int]]:
        """One engine step; proposals are right or absent."""
        self.world.step()
        proposals = self.world.ask(self.proposer.propose)
        for sequence, tokens in zip(self.world.sequences, proposals, strict=True):
            assert tokens == self.continued(sequence, len(tokens))
        return proposals

    def steps_until(self, reached: Callable[[], object]) -> None:
        """Step as a slow target would, until something holds."""
        deadline = time.monotonic() + _LONG_S
        while not reached():
            assert time.monotonic() < deadline, f"never, only {self.counts}"
            self.step()
            self._make_room()
            time.sleep(0.002)

    def _make_room(self) -> None:
        if self.world.lengths[0] > LONGEST - 10:
            while self.world.sampled:
                self.world.leave(0)
            self.world.join([1, 2, 3])


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """On a busy machine a usual round trip says little of the next."""
    monkeypatch.setattr(Deadline, "SHORTEST_S", 1.0)


@pytest.fixture
def replica():
    with DraftReplica() as replica:
        yield replica


def test_every_row_gets_what_the_draft_says(replica):
    with _Engine(replica.address, overlap=False) as engine:
        engine.world.join([1, 2, 3])
        engine.world.join([4, 5])
        engine.steps_until(lambda: engine.counts.proposed)
        for _ in range(8):
            assert [len(tokens) for tokens in engine.step()] == [_K, _K]
        assert engine.counts.accepted == engine.world.accepted > 8
        assert engine.counts.fallbacks.keys() <= {"connecting"}


def test_a_step_that_was_guessed_ahead_waits_for_nobody(replica):
    with _Engine(replica.address, overlap=True, deadline_ms=200) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.ahead_hits >= 5)
        assert engine.counts.ahead_misses > 0
        replica.behave = "silent"
        hits, asks = engine.counts.ahead_hits, replica.asks
        time.sleep(0.05)
        engine.step()
        late = engine.counts.fallbacks.get("deadline", 0)
        assert (engine.counts.ahead_hits, late) in ((hits + 1, 0), (hits, 1))
        assert replica.asks <= asks + 1


@given(data=st.data())
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_proposals_are_right_whatever_rows_do(replica, data):
    replica.draft.memory = data.draw(st.sampled_from([2, 1000]))
    with _Engine(replica.address, overlap=data.draw(st.booleans())) as engine:
        world = engine.world
        for _ in range(data.draw(st.integers(4, 14))):
            world.change(data)
            engine.step()
            time.sleep(0.001)
        assert engine.counts.fallbacks.keys() <= {"connecting", "busy"}


def test_long_prompts_are_read_while_nobody_waits(replica):
    with _Engine(replica.address) as engine:
        engine.world.join(range(100))
        engine.steps_until(lambda: engine.counts.proposed)
        assert len(replica.draft.rows[0].tokens) > 90
        assert all(row.base_len for row in replica.draft.rows[1:3])


def test_a_long_prompt_that_is_read_slowly_stops_no_step_and_opens_no_breaker(replica):
    with _Engine(replica.address, deadline_ms=20) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.proposed)
        replica.behave = "reading"
        engine.world.join(range(100))
        engine.steps_until(lambda: engine.counts.fallbacks.get("busy"))
        proposed = engine.counts.proposed
        engine.steps_until(lambda: engine.counts.proposed > proposed)
        assert engine.counts.fallbacks.keys() <= {"connecting", "busy"}


@pytest.mark.parametrize("behave", ["silent", "slow", "stale"])
def test_a_late_draft_costs_a_few_deadlines_and_is_used_again_when_it_is_well(replica, behave):
    with _Engine(replica.address, deadline_ms=20) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.proposed)
        replica.behave = behave
        asks = replica.asks
        engine.steps_until(lambda: engine.counts.breaker_open)
        # An ask that waits for no answer may be on its way; who owes one is asked nothing more.
        assert replica.asks - asks <= 1 + (1 if behave == "silent" else Breaker.FAILURES)
        proposed, began = engine.counts.proposed, time.process_time()
        for _ in range(20):
            engine.step()
        assert engine.counts.proposed - proposed <= _K
        assert time.process_time() - began < 1
        replica.behave = "right"
        proposed = engine.counts.proposed
        engine.steps_until(lambda: engine.counts.proposed > proposed + 20)


def test_failures_that_are_not_in_a_row_open_no_breaker(replica):
    with _Engine(replica.address, deadline_ms=20, overlap=False) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.proposed)
        for failures in range(1, Breaker.FAILURES + 2):
            replica.behave = "slow"
            engine.steps_until(lambda: engine.counts.fallbacks.get("deadline", 0) == failures)  # noqa: B023
            replica.behave = "right"
            proposed = engine.counts.proposed
            engine.steps_until(lambda: engine.counts.proposed > proposed)  # noqa: B023
        assert "breaker" not in engine.counts.fallbacks


def test_a_draft_that_forgot_a_sequence_is_told_all_of_it(replica):
    with _Engine(replica.address, overlap=False) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.proposed)
        replica.draft.held.clear()
        assert engine.step() == [[]]
        assert [len(tokens) for tokens in engine.step()] == [_K]
        assert replica.draft.rows[-1].base_len == 0


def test_a_replica_that_left_the_board_is_asked_no_more():
    with DraftReplica() as one, DraftReplica() as other, _Engine(one.address) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.proposed)
        engine.board.addresses = [other.address]
        asks = one.asks
        engine.steps_until(lambda: other.asks)
        assert one.asks == asks
        assert "breaker" not in engine.counts.fallbacks


def test_a_draft_that_dies_while_an_engine_waits_ends_the_wait():
    with DraftReplica() as replica, _Engine(replica.address, overlap=False) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.proposed)
        replica.behave = "silent"
        death = threading.Timer(0.1, replica.die)
        death.start()
        assert engine.step() == [[]]
        death.join()
        assert engine.counts.fallbacks["disconnected"] == 1
        assert "deadline" not in engine.counts.fallbacks


def test_an_always_wrong_draft_changes_no_answer(replica):
    replica.behave = "wrong"
    with _Engine(replica.address, overlap=False) as engine:
        engine.world.join([1, 2, 3])
        plain = World()
        plain.join([1, 2, 3])
        for _ in range(20):
            engine.world.step()
            engine.world.ask(engine.proposer.propose)
            plain.step()
        assert engine.world.sequences == plain.sequences
        assert engine.counts.accepted == 0


@pytest.mark.parametrize("behave", ["garbage", "rows", "ids", "many"])
def test_nonsense_is_never_proposed(replica, behave):
    with _Engine(replica.address) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.proposed)
        replica.behave = behave
        engine.steps_until(lambda: engine.counts.fallbacks.get("malformed"))
        assert engine.step() == [[]]
        replica.behave = "right"
        proposed = engine.counts.proposed
        engine.steps_until(lambda: engine.counts.proposed > proposed)


def test_another_vocabulary_is_never_asked():
    with DraftReplica("other") as other, _Engine(other.address) as engine:
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.fallbacks.get("vocabulary"))
        for _ in range(5):
            assert engine.step() == [[]]
        assert other.asks == 0
        assert engine.counts.breaker_open
        with DraftReplica() as right:
            engine.board.addresses = [right.address]
            engine.steps_until(lambda: engine.counts.proposed)
            assert not engine.counts.breaker_open


def test_a_draft_that_dies_is_noticed_at_once_and_its_successor_used():
    with _Engine(deadline_ms=1000) as engine:
        engine.world.join([1, 2, 3])
        assert engine.step() == [[]]
        assert engine.counts.fallbacks == {"no_draft": 1}
        with DraftReplica() as first:
            engine.board.addresses = [first.address]
            engine.steps_until(lambda: engine.counts.proposed)
        engine.steps_until(lambda: engine.counts.breaker_open)
        assert "deadline" not in engine.counts.fallbacks
        proposed = engine.counts.proposed
        with DraftReplica() as second:
            engine.board.addresses = [second.address]
            engine.steps_until(lambda: engine.counts.proposed > proposed)


def test_of_several_replicas_another_takes_over():
    with (
        DraftReplica() as one,
        DraftReplica() as other,
        _Engine(one.address, other.address) as engine,
    ):
        engine.world.join([1, 2, 3])
        engine.steps_until(lambda: engine.counts.proposed)
        assert (one.asks == 0) != (other.asks == 0)
        used, spare = (one, other) if one.asks else (other, one)
        used.die()
        engine.steps_until(lambda: spare.asks)
        assert not engine.counts.breaker_open


def test_a_breaker_waits_longer_each_time_and_forgets_on_success():
    breaker, now, pauses = Breaker(), 0.0, []
    for _ in range(Breaker.FAILURES - 1):
        breaker.failed(now)
        assert not breaker.is_open(now)
    for _ in range(7):
        breaker.failed(now)
        pause = next(each for each in range(1, 600) if not breaker.is_open(now + each / 100)) / 100
        pauses.append(pause)
        now += pause
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    breaker.succeeded()
    breaker.failed(now)
    assert not breaker.is_open(now)


def test_a_deadline_follows_the_usual_round_trip(monkeypatch):
    monkeypatch.undo()
    deadline = Deadline(0.05)
    assert deadline.seconds() == 0.05
    for _ in range(8):
        deadline.answered(0.004)
    assert deadline.seconds() == pytest.approx(0.012)
    for _ in range(32):
        deadline.answered(0.0001)
    assert deadline.seconds() == 0.002
    deadline.missed()
    assert deadline.seconds() == 0.05


def test_the_real_replica_says_what_its_model_says(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    drafter, reference = (Drafter(tmp_path, cache_gib=0.01, max_len=LONGEST) for _ in range(2))
    server = DraftServer(drafter, vocab_digest="same", host="127.0.0.1")
    server.start()
    vocab_size = drafter.vocab_size

    def continued(sequence: Sequence[int], k: int) -> list[int]:
        return reference.propose([Row(0, 0, list(sequence), k)])[0].tokens

    def target(sequence: Sequence[int]) -> int:
        token = continued(sequence, 1)[0]
        return token if len(sequence) % 7 else (token + 1) % vocab_size

    try:
        with _Engine(server.address, vocab_size=vocab_size, deadline_ms=1000) as engine:
            engine.world = World(target)
            engine.continued = continued
            engine.world.join(range(1, 80))
            engine.world.join([1, 2, 3])
            engine.steps_until(lambda: engine.counts.ahead_hits >= 5)
            engine.world.join(engine.world.sequences[0])
            engine.world.swap(0, 2)
            hits = engine.counts.ahead_hits
            engine.steps_until(lambda: engine.counts.ahead_hits >= hits + 5)
        assert engine.counts.fallbacks.keys() <= {"connecting", "busy"}
    finally:
        server.stop()


def test_the_class_that_vllm_loads_finds_its_draft_through_the_bridge(replica):
    async def steps() -> int:
        bridge = Bridge("model", _Metrics(), lambda: {"a": {"address": replica.address}})
        bridge.start()
        proposer = Proposer(_vllm_config(bridge.channel))
        proposer.load_model(None)
        world = World()
        world.join([1, 2, 3])
        try:
            async with asyncio.timeout(_LONG_S):
                while not any(world.ask(proposer.propose)):
                    world.step()
                    world.leave(0)
                    world.join([1, 2, 3])
                    world.step()
                    await asyncio.sleep(0.01)
                while not bridge.counts.fallbacks:
                    await asyncio.sleep(0.01)
        finally:
            bridge.close()
        assert bridge.counts.fallbacks["no_draft"]
        return len(world.proposals[0])

    assert asyncio.run(steps()) == 3


def test_a_tensor_parallel_target_is_refused():
    with pytest.raises(ValueError, match="target has 2.*draft_model"):
        Proposer(_vllm_config("ipc:///nowhere", ranks=2))


def _vllm_config(channel: str, ranks: int = 1) -> SimpleNamespace:
    draft = {
        "placement": "replica",
        "settings": DraftSettings(placement="replica", tokens=3, adaptive=False).model_dump(),
        "channel": channel,
        "vocab_digest": "same",
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        additional_config={"altiplano_draft": draft},
        speculative_config=SimpleNamespace(num_speculative_tokens=3),
        model_config=SimpleNamespace(max_model_len=LONGEST, get_vocab_size=lambda: VOCAB),
    )


class _Metrics:
    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def add(self, name: str, amount: float, **tags: str) -> None:
        key = (name, *tags.values())
        self.values[key] = self.values.get(key, 0) + amount

    def set(self, name: str, value: float) -> None:
        self.values[(name,)] = value

    def time(self, name: str, milliseconds: float) -> None:
        self.add(name, 1)


def test_the_bridge_carries_addresses_in_and_counters_out():
    metrics = _Metrics()
    notices = {"a": {"address": "tcp://b:1"}, "b": {"address": "tcp://a:1"}}

    async def exchange() -> Report:
        bridge = Bridge("model", metrics, lambda: notices)
        bridge.start()
        counts = Report(latencies_ms=[1.0, 2.0])
        link = Link(bridge.channel, counts)
        counts.accepted = 2
        counts.accepted_at = [2, 0]
        try:
            async with asyncio.timeout(_LONG_S):
                while not (link.addresses and bridge.counts.accepted == 2):
                    await asyncio.sleep(0.01)
                counts.accepted = 5
                counts.fell_back("busy")
                while bridge.counts.accepted != 5:
                    await asyncio.sleep(0.01)
            assert link.addresses == ["tcp://a:1", "tcp://b:1"]
        finally:
            await asyncio.to_thread(link.close)
            bridge.close()
        return bridge.counts

    counts = asyncio.run(exchange())
    assert counts.fallbacks == {"busy": 1}
    assert metrics.values[(ACCEPTED,)] == 5
    assert metrics.values[(FALLBACKS, "busy")] == 1
    assert metrics.values[(LATENCY,)] == 2
    assert metrics.values[("altiplano_draft_accepted_at", "0")] == 2
