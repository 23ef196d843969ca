"""Order: every epoch a permutation, another one each time, and the same for ever."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from altiplano.data.tokens.order import blocks_at


def epoch_order(num_blocks: int, seed: int, epoch: int) -> list[int]:
    """A whole epoch as one step."""
    return blocks_at(num_blocks, num_blocks, seed, epoch).tolist()


@given(num_blocks=st.integers(1, 300), seed=st.integers(), epoch=st.integers(0, 1 << 40))
def test_an_epoch_is_a_permutation_and_pure(num_blocks: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_blocks, seed, epoch)
    assert sorted(order) == list(range(num_blocks))
    assert order == epoch_order(num_blocks, seed, epoch)


@given(num_blocks=st.integers(1, 20), blocks_per_step=st.integers(1, 50), seed=st.integers(0, 99))
def test_steps_run_through_epochs_without_gaps(
    num_blocks: int, blocks_per_step: int, seed: int
) -> None:
    steps = [blocks_at(num_blocks, blocks_per_step, seed, step) for step in range(6)]
    stream = np.concatenate(steps)
    for epoch in range(len(stream) // num_blocks):
        part = stream[epoch * num_blocks : (epoch + 1) * num_blocks]
        assert part.tolist() == epoch_order(num_blocks, seed, epoch)


def test_the_order_does_not_change_between_releases() -> None:
    """A run that is resumed after an update must see the same blocks."""
    assert epoch_order(8, seed=0, epoch=0) == [0, 3, 4, 5, 7, 2, 1, 6]
    assert epoch_order(8, seed=0, epoch=1) == [3, 7, 2, 4, 5, 0, 1, 6]
    assert blocks_at(1_000_003, 4, seed=7, step=10**9).tolist() == [744247, 997959, 582274, 742991]


def test_seeds_and_epochs_differ() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in range(-3, 20) for epoch in range(20)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_every_block_comes_everywhere_equally_often() -> None:
    """Chi-squared of block x position over 4,000 keys, for domains that are full and are not."""
    for num_blocks in (3, 5, 16, 23):
        orders = np.array([epoch_order(num_blocks, seed, 3) for seed in range(4_000)])
        expected = len(orders) / num_blocks
        counts = np.array([np.bincount(column, minlength=num_blocks) for column in orders.T])
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        freedom = (num_blocks - 1) ** 2
        assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom), num_blocks


def test_neighbours_are_strangers() -> None:
    """Blocks of one book lie together in the store, and must not stay together."""
    order = np.array(epoch_order(100_000, seed=1, epoch=0))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert (np.abs(np.diff(order)) == 1).sum() < 20
