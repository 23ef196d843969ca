"""Steps and learning rates: published curves, the shape of every schedule, continuing a stage."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError
from altiplano.train.schedule import (
    Earlier,
    Schedule,
    curve_of,
    learning_rate_factor,
    make_schedule,
)

VICUNA_STEPS = 17298
SHAPES = st.sampled_from(["cosine", "linear", "wsd", "constant"])


def settings(**given) -> TrainSettings:
    return TrainSettings(**{"rows": "new", "tokens_per_step": 1024, **given})


def vicuna(**given) -> TrainSettings:
    return settings(
        schedule="linear", warmup_steps=100, min_lr_ratio=0.0, learning_rate=3e-4, **given
    )


@pytest.mark.parametrize(
    ("step", "published"),
    [(160, 2.9895336667e-4), (5800, 2.00569834e-4), (100, 3e-4), (VICUNA_STEPS, 0.0)],
)
def test_the_linear_curve_is_the_published_one(step: int, published: float) -> None:
    """Chinese-Vicuna's log and the learning rate in its checkpoint 5800."""
    rate = 3e-4 * learning_rate_factor(step, VICUNA_STEPS, vicuna())
    assert rate == pytest.approx(published, rel=1e-8, abs=1e-15)


def test_cosine_and_wsd_are_their_formulas() -> None:
    cosine = settings(schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate_factor(60, 110, cosine) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_factor(35, 110, cosine) == pytest.approx(
        0.1 + 0.45 * (1 + math.cos(math.pi / 4))
    )
    wsd = settings(schedule="wsd", warmup_steps=10, min_lr_ratio=0.2, decay_ratio=0.25)
    factors = [learning_rate_factor(step, 100, wsd) for step in range(100)]
    assert factors[9:76] == [1.0] * 67
    assert factors[80] == pytest.approx(1 - 0.8 * 5 / 25)
    assert factors[99] == pytest.approx(1 - 0.8 * 24 / 25)


@given(
    steps=st.integers(1, 400),
    shape=SHAPES,
    warmup_ratio=st.floats(0, 0.99),
    warmup_steps=st.one_of(st.none(), st.integers(0, 399)),
    floor=st.floats(0, 1),
    decay=st.floats(0.001, 1),
)
def test_rates_rise_to_the_peak_and_fall_without_a_jump(
    steps: int, shape: str, warmup_ratio: float, warmup_steps: int | None, floor: float,
    decay: float,
) -> None:  # fmt: skip
    if warmup_steps is not None:
        warmup_steps %= steps
    chosen = settings(
        schedule=shape, warmup_ratio=warmup_ratio, warmup_steps=warmup_steps,
        min_lr_ratio=floor, decay_ratio=decay,
    )  # fmt: skip
    factors = [learning_rate_factor(step, steps, chosen) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    warmup = math.ceil(warmup_ratio * steps) if warmup_steps is None else warmup_steps
    rising, falling = factors[:warmup], factors[max(0, warmup - 1) :]
    assert all(after > before for before, after in pairwise(rising))
    assert all(after <= before for before, after in pairwise(falling))
    assert max(factors) == 1.0
    assert min(falling) >= floor - 1e-12
    # Nothing is steeper than a cosine over the steps in which the rate falls, the end included.
    span = math.ceil(decay * steps) if shape == "wsd" else steps - warmup
    if shape == "constant":
        assert set(falling) <= {1.0}
        return
    steepest = math.pi / 2 / max(1, min(span, steps - warmup))
    ended = [*falling, learning_rate_factor(steps, steps, chosen)]
    drops = [before - after for before, after in pairwise(ended)]
    assert all(drop <= steepest + 1e-9 for drop in drops)
    assert ended[-1] == pytest.approx(floor)


def test_a_step_reads_as_many_blocks_as_its_tokens_fill() -> None:
    chosen = settings(tokens_per_step=1000, micro_batch_tokens=300, epochs=1.5)
    assert make_schedule(chosen, 33, 128) == Schedule(math.ceil(1.5 * 33 / 8), 8, 2)
    assert make_schedule(settings(steps=7), 33, 128).steps == 7


def test_useless_schedules_are_refused() -> None:
    with pytest.raises(TrainingError, match="would train zero steps"):
        make_schedule(settings(), 0, 128)
    with pytest.raises(TrainingError, match="5 steps and `warmup_steps` 5"):
        make_schedule(settings(warmup_steps=5), 40, 128)


def test_new_data_comes_after_the_old_on_the_old_curve() -> None:
    """Chinese-Vicuna: checkpoint 5800 of 17298 steps goes on with data that is worth fewer."""
    own = 9000
    chosen = vicuna(tokens_per_step=128)
    schedule = make_schedule(chosen, own, 128, earlier=Earlier(5800, VICUNA_STEPS))
    assert (schedule.first_step, schedule.steps) == (5800, VICUNA_STEPS)
    assert curve_of(chosen, schedule)[0] == (5800, pytest.approx(3e-4 * 11498 / 17198))


def test_a_longer_stage_of_its_own_makes_the_curve_longer() -> None:
    chosen = settings(tokens_per_step=128)
    schedule = make_schedule(chosen, 20_000, 128, earlier=Earlier(5800, VICUNA_STEPS))
    assert (schedule.first_step, schedule.steps) == (5800, 20_000)


def test_a_curve_that_has_ended_is_refused_with_what_to_set() -> None:
    chosen = settings(steps=50)
    with pytest.raises(TrainingError, match=r"curve ends there.*100 steps.*`steps: 150`"):
        make_schedule(chosen, 10, 128, earlier=Earlier(100, 100))
    longer = settings(steps=150)
    assert make_schedule(longer, 10, 128, earlier=Earlier(100, 100)).first_step == 100


@given(steps=st.integers(1, 2000), first=st.integers(0, 1999), shape=SHAPES)
def test_the_shown_curve_has_the_ends_the_corners_and_few_points(
    steps: int, first: int, shape: str
) -> None:
    first %= steps
    chosen = settings(schedule=shape, learning_rate=0.5, warmup_ratio=0.1)
    curve = curve_of(chosen, Schedule(steps, 1, 1, first))
    shown = [step for step, _ in curve]
    assert shown == sorted(set(shown)) and shown[0] == first and shown[-1] == steps - 1
    assert len(shown) <= 12
    assert all(rate == 0.5 * learning_rate_factor(s, steps, chosen) for s, rate in curve)
    corner = math.ceil(0.1 * steps)
    assert corner in shown or not first <= corner < steps
