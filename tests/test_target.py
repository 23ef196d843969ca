"""A replica without its engine: jobs become steps and an outcome; and which replica gets which."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.errors import ServeError
from altiplano.serving.engine.arguments import explain_shortage
from altiplano.serving.engine.base import EngineLost, InvalidJob
from altiplano.serving.messages import Job, Sampling, Step
from altiplano.serving.routing import PREFIX_TOKENS, PrefixRouter, prefix_key
from altiplano.serving.target import require_reachable, run_job

ids = st.lists(st.integers(0, 2**31 - 1), max_size=100)


class Script:
    """An engine that makes one token per step, then does what it was told."""

    def __init__(self, end: Exception | None = None, steps: int = 3) -> None:
        self.end, self.steps = end, steps
        self.ended = False

    async def generate(self, job: Job) -> AsyncGenerator[Step, None]:
        """As `Engine.generate`."""
        try:
            for number in range(self.steps):
                await asyncio.sleep(0)
                yield Step(job.id, [number])
            if self.end is not None:
                raise self.end
        finally:
            self.ended = True


@pytest.mark.parametrize(
    "end, status",
    [(None, "done"), (InvalidJob("no"), "invalid"), (EngineLost("dead"), "lost")],
)
def test_every_step_is_sent_before_the_outcome_counts_it(
    end: Exception | None, status: str
) -> None:
    sent: list[tuple[str, Step]] = []
    job = Job("j", [1], Sampling(max_tokens=9), reply_to="there")
    engine: Any = Script(end)
    outcome = asyncio.run(run_job(engine, job, lambda *each: sent.append(each)))
    assert (outcome.status, outcome.message, outcome.tokens) == (status, str(end or ""), 3)
    assert sent == [("there", Step("j", [number])) for number in range(3)]


def test_a_cancelled_call_ends_its_job() -> None:
    engine: Any = Script(steps=10**9)

    async def cancel() -> None:
        job = Job("j", [1], Sampling(max_tokens=9))
        task = asyncio.create_task(run_job(engine, job, lambda *_: None))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and engine.ended

    asyncio.run(cancel())


def test_a_loopback_data_address_is_refused_where_there_are_other_machines() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]"):
        require_reachable(host, {"10.0.0.1"})
        with pytest.raises(ServeError, match=r"2 machines \(10.0.0.1, 10.0.0.2\).*data_host=node"):
            require_reachable(host, {"10.0.0.2", "10.0.0.1"})
    require_reachable("node", {"10.0.0.1", "10.0.0.2"})


def test_vllms_word_for_a_cache_too_small_is_said_with_our_keys() -> None:
    text = (
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 "
        "GiB KV cache is needed, which is larger than the available KV cache memory (2.57 GiB). "
        "Based on the available memory, the estimated maximum model length is 21040. Try increasing"
    )
    told = explain_shortage(text)
    assert told is not None
    for part in ("131072 tokens", "16.00 GiB", "2.57 GiB", "serve.max_model_len to at most 21040"):
        assert part in told
    assert explain_shortage("ValueError: something else") is None


@given(ids, ids, ids)
def test_a_prefix_key_tells_first_tokens_apart_and_nothing_else(
    head: list[int], left: list[int], right: list[int]
) -> None:
    full = (head + [0] * PREFIX_TOKENS)[:PREFIX_TOKENS]
    assert prefix_key(full + left) == prefix_key(full + right)
    if left[:PREFIX_TOKENS] != right[:PREFIX_TOKENS]:
        assert prefix_key(left) != prefix_key(right)


class Routed:
    """A `PrefixRouter` with replicas of given queues, outside of Serve."""

    def __init__(self, queues: dict[str, int]) -> None:
        self.router = PrefixRouter.__new__(PrefixRouter)
        self.replicas = [SimpleNamespace(replica_id=Id(unique_id=name)) for name in queues]
        router: Any = self.router
        router._deployment_id = "d"
        router._num_virtual_nodes, router._num_fallback_replicas = 100, 2
        router._replicas = {each.replica_id: each for each in self.replicas}
        router._replica_queue_len_cache = SimpleNamespace(get=lambda each: queues[each.unique_id])
        router._rebuild_ring(frozenset(router._replicas))

    def first(self, key: str) -> str:
        """Name of the replica a request of this key is offered to first."""
        request: Any = SimpleNamespace(
            metadata=SimpleNamespace(session_id=key),
            routing_context=SimpleNamespace(should_backoff=False),
        )
        replicas: Any = self.replicas
        ranks: Any = asyncio.run(self.router.choose_replicas(replicas, request))
        assert request.routing_context.should_backoff
        return str(ranks[0][0].replica_id.unique_id) if len(ranks[0]) == 1 else "any"


class Id(SimpleNamespace):
    """A replica's id."""

    def __hash__(self) -> int:
        return hash(self.unique_id)


def test_prompts_that_begin_alike_go_to_one_replica_and_others_spread() -> None:
    routed = Routed({"a": 0, "b": 3, "c": 8})
    chosen = [routed.first(prefix_key([number])) for number in range(60)]
    assert chosen == [Routed({"a": 1, "b": 0, "c": 2}).first(prefix_key([n])) for n in range(60)]
    assert all(chosen.count(each) > 5 for each in "abc")
    assert routed.first("") == "any"


def test_a_replica_that_is_clearly_busier_is_passed_over() -> None:
    calm, busy = Routed({"a": 0, "b": 0}), Routed({"a": 9, "b": 0})
    keys = [prefix_key([number]) for number in range(30)]
    for key in keys:
        assert busy.first(key) == ("any" if calm.first(key) == "a" else "b")
    assert {calm.first(key) for key in keys} == {"a", "b"}


def test_a_replica_that_leaves_moves_only_its_own_prompts() -> None:
    all_, rest = Routed({"a": 0, "b": 0, "c": 0}), Routed({"a": 0, "b": 0})
    for number in range(50):
        key = prefix_key([number])
        if all_.first(key) != "c":
            assert rest.first(key) == all_.first(key)
