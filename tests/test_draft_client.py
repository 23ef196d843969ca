"""A draft replica that is asked over a socket: used when it answers, missed by nobody otherwise."""

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from altiplano.config.serving import DraftSettings, EngineSettings
from altiplano.serving.speculation.bridge import ACCEPTED, FALLBACKS, LATENCY, Bridge
from altiplano.serving.speculation.channel import Link, Report
from altiplano.serving.speculation.client import RemoteDraft
from altiplano.serving.speculation.connection import Breaker, Deadline
from altiplano.serving.speculation.policy import Policy
from altiplano.serving.speculation.proposer import Proposer
from altiplano.serving.speculation.protocol import VERSION, Hello
from tests.helpers.draft_worlds import LONGEST, VOCAB, DraftReplica, World, draft_tokens

_K = 4
_LONG_S = 5.0
"""No test waits so long unless it fails."""


class _Board:
    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)


class _Engine:
    """A world whose proposer asks drafts over sockets."""

    def __init__(self, *addresses: str, deadline_ms: float = 1000, **keys: object) -> None:
        self.world = World()
        self.board = _Board(*addresses)
        hello = Hello(VERSION, "same", VOCAB)
        counts = Report()
        draft = RemoteDraft(
            hello,
            DraftSettings(placement="replica", deadline_ms=deadline_ms, **keys),
            self.board,
            counts,
            "engine",
        )
        policy = Policy(_K, adaptive=False)
        self.proposer = Proposer.of_parts(draft, policy, longest=LONGEST, most=_K)
        self.counts = self.proposer.counts
        draft._counts = self.counts

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.proposer.close()

    def step(self) -> list[list[int]]:
        """One engine step; proposals are right or absent."""
        self.world.step()
        proposals = self.world.ask(self.proposer.propose)
        for sequence, tokens in zip(self.world.sequences, proposals, strict=True):
            assert tokens == draft_tokens(sequence, len(tokens))
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


@pytest.fixture
def replica():
    with DraftReplica() as replica:
        yield replica
