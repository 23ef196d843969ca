"""Mixing: shares are reached, limits are kept, and too little text is said in numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.data import ReplaySection, TextSource
from altiplano.data.flow.mix import Portion, copies, copy_factors
from altiplano.errors import DataError

DOCUMENT_TOKENS = 7


def source(name: str, **settings: object) -> TextSource:
    return TextSource(path=name, language="zh", **settings)


def random_keys(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def replay_section(*sources: TextSource, share: float, max_repeat: float = 4.0) -> ReplaySection:
    return ReplaySection(text=list(sources), share=share, max_repeat=max_repeat)


def test_without_weights_a_factor_is_the_repeat() -> None:
    text = [Portion(source("a"), 100), Portion(source("b", repeat=2.5), 0)]
    assert copy_factors(text) == {"a": 1.0, "b": 2.5}


def test_the_scarcest_source_bounds_the_mixture() -> None:
    """100 tokens are half of 200; the other half is a tenth of 1,000."""
    text = [Portion(source("a", weight=1), 100), Portion(source("b", weight=1), 1000)]
    assert copy_factors(text) == {"a": 1.0, "b": 0.1}
    text[0] = Portion(source("a", weight=1, repeat=3), 100)
    assert copy_factors(text) == {"a": 3.0, "b": 0.3}


@given(
    documents=st.lists(st.integers(4_000, 12_000), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.5, 5), min_size=4, max_size=4),
    repeats=st.lists(st.floats(0.5, 4), min_size=4, max_size=4),
    replayed=st.integers(4_000, 12_000),
    share=st.floats(0.05, 0.5),
)
def test_shares_are_reached_and_repeats_are_kept(
    documents: list[int],
    weights: list[float],
    repeats: list[float],
    replayed: int,
    share: float,
) -> None:
    text = [
        Portion(source(f"s{i}", weight=weights[i], repeat=repeats[i]), count * DOCUMENT_TOKENS)
        for i, count in enumerate(documents)
    ]
    old = source("old")
    section = replay_section(old, share=share, max_repeat=100)
    factors = copy_factors(text, [Portion(old, replayed * DOCUMENT_TOKENS)], section)
    tokens = {}
    for seed, portion in enumerate([*text, Portion(old, replayed * DOCUMENT_TOKENS)]):
        label = portion.source.label
        keys = random_keys(portion.tokens // DOCUMENT_TOKENS, seed)
        counts = copies(keys, factors[label])
        limit = 100 if label == "old" else portion.source.repeat
        assert factors[label] <= limit
        assert counts.max() <= np.ceil(limit)
        tokens[label] = int(counts.sum()) * DOCUMENT_TOKENS
    total = sum(tokens.values())
    # Counts are binomial: the tolerance is 2 % of the total, five standard deviations at least.
    assert tokens["old"] / total == pytest.approx(share, abs=0.02)
    for i, portion in enumerate(text):
        wanted = weights[i] / sum(weights[: len(text)]) * (1 - share)
        assert tokens[portion.source.label] / total == pytest.approx(wanted, abs=0.02)
    # One source at least is used as often as it may be.
    assert any(factors[p.source.label] == pytest.approx(p.source.repeat) for p in text)


@given(factor=st.floats(0, 8), seed=st.integers(0, 9))
def test_copies_are_the_factor_on_average(factor: float, seed: int) -> None:
    counts = copies(random_keys(20_000, seed), factor)
    assert set(np.unique(counts)) <= {int(factor), int(factor) + 1}
    assert counts.mean() == pytest.approx(factor, abs=0.02)


@given(factor=st.floats(0, 8))
def test_a_larger_factor_only_adds_copies(factor: float) -> None:
    keys = random_keys(500, 0)
    assert (copies(keys, factor + 0.3) >= copies(keys, factor)).all()


def test_replay_is_its_share_of_all_tokens() -> None:
    old = [source("old"), source("older", repeat=2)]
    portions = [Portion(old[0], 1000), Portion(old[1], 1000)]
    factors = copy_factors(
        [Portion(source("new"), 8000)], portions, replay_section(*old, share=0.2)
    )
    assert factors == {"new": 1.0, "old": pytest.approx(2 / 3), "older": pytest.approx(4 / 3)}


def test_too_little_replay_says_what_is_needed() -> None:
    old = source("old")
    section = replay_section(old, share=0.5, max_repeat=4)
    with pytest.raises(DataError) as caught:
        copy_factors([Portion(source("new"), 10_000)], [Portion(old, 1_000)], section)
    message = str(caught.value)
    assert "holds 1,000 tokens" in message and "50.00% of the training tokens are 10,000" in message
    assert "(4,000 tokens): lower `data.replay.share` to 0.2857" in message
    lower = replay_section(old, share=0.2857, max_repeat=4)
    factors = copy_factors([Portion(source("new"), 10_000)], [Portion(old, 1_000)], lower)
    assert factors["old"] == pytest.approx(4, abs=0.01)


def test_nothing_to_replay_or_to_weigh() -> None:
    old = source("old")
    with pytest.raises(DataError, match="no document of `data.replay` is left"):
        copy_factors(
            [Portion(source("new"), 10)], [Portion(old, 0)], replay_section(old, share=0.1)
        )
    text = [Portion(source("a", weight=1), 100), Portion(source("b", weight=2), 0)]
    with pytest.raises(DataError, match="the source b has weight 2 but no document is left"):
        copy_factors(text)
