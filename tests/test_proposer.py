"""The object vLLM asks for proposals: right ones, counted right, and never an error."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.serving.speculation.channel import Report
from altiplano.serving.speculation.policy import Policy
from altiplano.serving.speculation.proposer import LocalDraft, Speculation
from tests.helpers.draft_worlds import LONGEST, VOCAB, ArithmeticDraft, World, draft_tokens

_K = 4


def _proposer(draft: ArithmeticDraft, policy: object = None) -> Speculation:
    local = LocalDraft(draft, VOCAB)
    policy = policy or Policy(_K, adaptive=False)
    return Speculation(local, policy, Report(), longest=LONGEST, most=_K)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_proposals_are_what_the_draft_says_whatever_rows_do(data):
    world, draft = World(), ArithmeticDraft(memory=data.draw(st.sampled_from([2, 1000])))
    proposer = _proposer(draft)
    for _ in range(data.draw(st.integers(2, 12))):
        world.change(data)
        world.step(waiting=[0] if data.draw(st.booleans()) else [])
        proposals = world.ask(proposer.propose)
        for fresh, sequence, tokens in zip(world.sampled, world.sequences, proposals, strict=True):
            k = min(_K, LONGEST - 1 - len(sequence)) if fresh else 0
            assert tokens == draft_tokens(sequence, k)
    assert proposer.counts.fallbacks == {}


def test_rows_go_to_the_draft_once_and_then_only_what_is_new():
    world, draft = World(), ArithmeticDraft()
    proposer = _proposer(draft)
    world.join(range(40))
    world.join(range(30))
    for _ in range(6):
        world.step()
        world.ask(proposer.propose)
    whole = [row for row in draft.rows if not row.base_len]
    assert [len(row.tokens) for row in whole] == [41, 31]
    assert all(len(row.tokens) <= _K + 1 for row in draft.rows if row.base_len)


def test_counts_are_what_the_target_accepted():
    world = World()
    proposer = _proposer(ArithmeticDraft())
    world.join([1, 2, 3])
    world.join([4, 5])
    proposed = 0
    for _ in range(12):
        world.step()
        proposed += sum(map(len, world.proposals))
        world.ask(proposer.propose)
    counts = proposer.counts
    assert counts.accepted == world.accepted == sum(counts.accepted_at) > 10
    assert counts.proposed == proposed
    assert counts.steps == 11
    assert sorted(counts.accepted_at, reverse=True) == counts.accepted_at
    assert len(counts.latencies_ms) == 12


def test_a_sequence_is_never_drafted_past_its_longest():
    world = World()
    world.join(range(LONGEST - 8))
    proposer = _proposer(ArithmeticDraft())
    room = []
    while world.lengths[0] < LONGEST:
        world.step()
        room.append((LONGEST - 1 - world.lengths[0], len(world.ask(proposer.propose)[0])))
    assert all(made == max(0, min(_K, left)) for left, made in room)
    assert any(0 < made < _K for _, made in room)


def test_a_draft_with_a_shorter_context_stops_earlier():
    world, draft = World(), ArithmeticDraft()
    draft.max_tokens = 12
    world.join(range(8))
    proposer = _proposer(draft)
    room = []
    for _ in range(6):
        world.step()
        room.append((world.lengths[0], len(world.ask(proposer.propose)[0])))
    assert all(made == max(0, min(_K, 12 - length)) for length, made in room)
    assert room[-1][1] == 0


class _Broken(ArithmeticDraft):
    def propose(self, rows):
        raise RuntimeError("the draft is broken")


class _Wild(ArithmeticDraft):
    def propose(self, rows):
        guesses = super().propose(rows)
        guesses[0].tokens[0] = VOCAB
        return guesses


@pytest.mark.parametrize("kind", [_Broken, _Wild])
def test_errors_are_counted_logged_once_and_cost_no_answer(kind, caplog):
    world, proposer = World(), _proposer(kind())
    world.join([1, 2, 3])
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            world.step()
            assert world.ask(proposer.propose) == [[]]
    assert proposer.counts.fallbacks == {"error": 3}
    assert len(caplog.records) == 1
    assert proposer.counts.accepted == proposer.counts.proposed == 0


class _Plan:
    """A policy that does as it is told and remembers what it was told."""

    on = True
    reason = "told"

    def __init__(self, plan: list[int]) -> None:
        self.plan = plan
        self.seen: list[tuple[list[int], list[int]]] = []
        self.times: list[float] = []

    def tokens(self, batch: int) -> int:
        return self.plan.pop(0)

    def observe(self, batch, proposed, accepted, step_s, draft_s) -> None:
        assert batch == len(proposed) == len(accepted)
        self.seen.append((proposed, accepted))
        self.times += [step_s, draft_s]


class _Never(ArithmeticDraft):
    def propose(self, rows):
        raise AssertionError("nobody may ask")


def test_switched_off_nobody_asks_the_draft():
    world, policy = World(), _Plan([0] * 4)
    proposer = _proposer(_Never(), policy)
    world.join([1, 2, 3])
    for _ in range(4):
        world.step()
        assert world.ask(proposer.propose) == [[]]
    assert proposer.counts.fallbacks == {}
    assert policy.seen == [([0], [0])] * 3


def test_the_policy_sees_only_steps_whose_time_is_typical():
    world, policy = World(), _Plan([_K] * 5 + [0, _K])
    proposer = _proposer(ArithmeticDraft(), policy)
    world.join([1, 2, 3])
    world.step()
    world.ask(proposer.propose)  # The first ask reads the prompt.
    world.step()
    world.ask(proposer.propose)
    assert policy.seen == []
    world.step()
    world.ask(proposer.propose)
    assert [proposed for proposed, _ in policy.seen] == [[_K]]
    world.join(range(20))  # A prompt is computed in the next step, and in part in the one after.
    world.step(waiting=[1])
    world.ask(proposer.propose)
    world.step()
    world.ask(proposer.propose)
    assert len(policy.seen) == 1
    world.step()
    world.ask(proposer.propose)
    assert len(policy.seen) == 1
    world.step()
    world.ask(proposer.propose)
    assert policy.seen[-1] == ([0, 0], [0, 0])
    assert all(seconds >= 0 for seconds in policy.times)
