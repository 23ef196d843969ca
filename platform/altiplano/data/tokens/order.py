"""Which blocks a training step reads: a pure function of (seed, step).

So a resumed run, or one with another number of workers, sees the same blocks. Deliberately knows
nothing of workers or files. Costs the blocks of one step, whatever the step and the number of
blocks in the store: the permutation of an epoch is computed at the positions asked for.
"""

import numpy as np
import numpy.typing as npt

_ROUNDS = 12
"""Four rounds are enough in theory (Luby and Rackoff 1988) where the halves have many bits. In a
store of a few blocks they have two, and over 200,000 keys chi-squared of which two blocks come
first still rejects 8 rounds of 5 blocks (by 16 standard deviations; 10 rounds: 1.4, 12: 0.0) and
6 rounds of 16 blocks (19; 8 rounds: 1.7)."""
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""The odd constant whose multiples seed SplitMix64's streams (Steele et al. 2014)."""
_Words = npt.NDArray[np.uint64]


def blocks_at(num_blocks: int, blocks_per_step: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """The global batch of a step: [blocks_per_step] block numbers.

    Epoch follows epoch without a gap: a step may read the end of one and the start of the next.
    Every epoch is a permutation of all blocks, another one for every (seed, epoch).
    """
    positions = step * blocks_per_step + np.arange(blocks_per_step)
    epochs, offsets = np.divmod(positions, num_blocks)
    keys = _mix(_mix(np.array([seed % (1 << 64)], np.uint64)) + epochs.astype(np.uint64))
    return _permute(offsets.astype(np.uint64), num_blocks, keys).astype(np.int64)


def _permute(values: _Words, size: int, keys: _Words) -> _Words:
    """Where each value below `size` goes, in the permutation its key names.

    A Feistel network permutes the next power of four; whatever lands beyond `size` goes through
    it again until it lands below (cycle walking, Black and Rogaway 2002), which takes four turns
    or fewer on average and keeps it a permutation of range(size).
    """
    half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    values = _feistel(values, half_bits, keys)
    while len(beyond := np.flatnonzero(values >= size)):
        values[beyond] = _feistel(values[beyond], half_bits, keys[beyond])
    return values


def _feistel(values: _Words, half_bits: np.uint64, keys: _Words) -> _Words:
    """Permute [0, 4 ** half_bits)."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for _ in range(_ROUNDS):
        keys = keys + _GAMMA
        left, right = right, left ^ (_mix(_mix(keys) ^ right) & mask)
    return left << half_bits | right


def _mix(words: _Words) -> _Words:
    """SplitMix64's finaliser: every bit of the result depends on every bit of the word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
