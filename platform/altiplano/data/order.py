"""Which blocks a training step reads: a pure function of (seed, step).

So a resumed run, or one with another number of workers, sees the same blocks. Deliberately knows
nothing of workers or files. Costs one permutation per epoch touched.
"""

import numpy as np
import numpy.typing as npt

_KEY_MASK = (1 << 64) - 1


def block_order(num_blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of one epoch: a permutation of range(num_blocks).

    Drawn by sorting raw Philox words, which NumPy promises not to change between releases.
    """
    philox = np.random.Philox(key=np.array([seed & _KEY_MASK, epoch], np.uint64))
    return np.argsort(philox.random_raw(num_blocks), kind="stable").astype(np.int64)


def blocks_at(num_blocks: int, blocks_per_step: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """The global batch of a step: [blocks_per_step] block numbers.

    Epoch follows epoch without a gap: a step may read the end of one and the start of the next.
    """
    positions = step * blocks_per_step + np.arange(blocks_per_step)
    epochs, offsets = np.divmod(positions, num_blocks)
    chosen = np.empty(blocks_per_step, np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        chosen[inside] = block_order(num_blocks, seed, int(epoch))[offsets[inside]]
    return chosen
