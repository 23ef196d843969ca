"""The policy of speculation against simulated engines: it finds what pays and leaves the rest."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.serving.speculation.policy import Policy


@dataclass
class Engine:
    """A target and a draft with known times (plain step = 10 ms), and some noise."""

    rate: float
    """Probability that a draft token is right, after right ones."""
    verify: float = 0.05
    """Of a plain step, per proposed token."""
    draft: float = 0.1
    """Of a plain step, per proposed token."""
    jump: float = 0.0
    """Of a plain step, as soon as anything is verified."""
    noise: float = 0.1
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def seconds(self, tokens: int) -> tuple[float, float]:
        """Return the time of a step and of its drafting, without noise."""
        step = 1 + (self.jump + self.verify * tokens if tokens else 0)
        return 0.01 * step, 0.01 * self.draft * tokens

    def speed(self, tokens: int) -> float:
        """Return the tokens per second that `tokens` proposals give in the long run."""
        return sum(self.rate**i for i in range(tokens + 1)) / sum(self.seconds(tokens))

    def run(self, policy: Policy, seconds: float) -> float:
        """Decode for so long; return tokens per second and row."""
        passed = emitted = 0.0
        while passed < seconds:
            tokens = policy.tokens(self.batch)
            accepted = [self._accepted(tokens) for _ in range(self.batch)]
            step, draft = self.seconds(tokens)
            step *= 1 + self.noise * self.draw.random()
            if self.draw.random() < 0.01:
                step *= 5  # something else had the processor
            policy.observe(self.batch, [tokens] * self.batch, accepted, step, draft)
            passed += step + draft
            emitted += 1 + sum(accepted) / self.batch
        return emitted / passed

    def _accepted(self, tokens: int) -> int:
        right = 0
        while right < tokens and self.draw.random() < self.rate:
            right += 1
        return right


def plain_speed(engine: Engine, seconds: float) -> float:
    """Return what the same engine does without a draft."""
    engine.draw = random.Random(engine.seed)
    policy = Policy(1, adaptive=True)
    passed = emitted = 0.0
    while passed < seconds:
        step = engine.seconds(0)[0] * (1 + engine.noise * engine.draw.random())
        passed += step * (5 if engine.draw.random() < 0.01 else 1)
        emitted += 1
    assert policy.tokens(engine.batch) == 0
    return emitted / passed


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "engine",
    [
        Engine(0.8),
        Engine(0.95, draft=0.05),
        Engine(0.6, draft=0.2),
        Engine(0.75, draft=0.05, jump=0.4),
        Engine(0.7, batch=8, verify=0.02),
    ],
    ids=str,
)
def test_a_good_draft_stays_on_near_its_best_number_of_tokens(engine: Engine, seed: int) -> None:
    engine.seed = seed
    engine.__post_init__()
    policy = Policy(8, adaptive=True)
    engine.run(policy, 5)
    best = max(engine.speed(tokens) for tokens in range(1, 9))
    assert best > 1.1 * engine.speed(0), "the case itself is wrong"

    reached = engine.run(policy, 30)

    noise = 1 + engine.noise / 2 + 0.04  # as `run` slows every step
    assert policy.on
    assert reached > 0.9 * best / noise


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "engine",
    [
        Engine(0.0),
        Engine(0.0, draft=1.0),
        Engine(0.0, draft=0.01, verify=0.01),
        Engine(0.1, batch=8),
    ],
    ids=str,
)
def test_a_bad_draft_costs_less_than_two_percent(engine: Engine, seed: int) -> None:
    engine.seed = seed
    engine.__post_init__()
    policy = Policy(4, adaptive=True)
    reached = engine.run(policy, 120)
    assert not policy.on or engine.draft < 0.02
    assert reached > 0.98 * plain_speed(engine, 120)


def test_load_switches_it_off_and_calm_on_again() -> None:
    calm = Engine(0.8)
    busy = Engine(0.8, batch=32, verify=0.9)
    policy = Policy(4, adaptive=True)
    calm.run(policy, 3)
    assert policy.on
    busy.run(policy, 3)
    assert not policy.on
    calm.run(policy, 0.5)
    assert policy.on
    assert busy.run(policy, 30) > 0.98 * plain_speed(busy, 30)


def test_it_comes_back_when_the_draft_gets_good() -> None:
    engine = Engine(0.0)
    policy = Policy(4, adaptive=True)
    engine.run(policy, 60)
    assert not policy.on
    engine.rate = 0.9
    engine.run(policy, 10)
    assert policy.on
    engine.rate = 0.0
    engine.run(policy, 5)
    assert not policy.on


def test_a_draft_that_fails_leaves_decoding_plain_and_counted_as_plain() -> None:
    policy = Policy(4, adaptive=True)
    for _ in range(200):
        policy.tokens(2)
        policy.observe(2, [0, 0], [0, 0], 0.01, 0.05)
    Engine(0.9, batch=2).run(policy, 2)
    assert policy.on


def test_without_adapting_it_always_proposes_all() -> None:
    policy = Policy(3, adaptive=False)
    for batch in (1, 64):
        for _ in range(50):
            assert policy.tokens(batch) == 3
            policy.observe(batch, [3] * batch, [0] * batch, 1.0, 1.0)
    assert policy.on
    assert policy.reason == "not adaptive"


STEPS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1)), min_size=1, max_size=5),
        st.floats(0, 1e4),
        st.floats(0, 1e4),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=25)
@given(most=st.integers(1, 6), history=STEPS)
def test_any_history_keeps_the_bounds_and_is_recovered_from(most: int, history: list) -> None:
    policy = Policy(most, adaptive=True)
    for rows, step_s, draft_s in history:
        assert 0 <= policy.tokens(len(rows)) <= most
        proposed = [min(tokens, most) for tokens, _ in rows]
        accepted = [int(share * tokens) for (_, share), tokens in zip(rows, proposed, strict=True)]
        policy.observe(len(rows), proposed, accepted, step_s, draft_s)
    Engine(0.9, draft=0.05).run(policy, 40)
    assert policy.on
