"""Micro-batches of a step, read one step ahead by a thread.

The global batch of a step is a pure function of (seed, step); a worker takes every n-th block of
it. Knows neither the model nor how gradients are shared. Costs the bytes of two steps' blocks.
"""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from altiplano.data.tokens.order import blocks_at
from altiplano.train.batch import Inputs, make_inputs
from altiplano.train.schedule import Schedule, stream_seed

if TYPE_CHECKING:
    from altiplano.data.tokens.store import Batch, TokenStore
    from altiplano.train.machine import Machine
    from altiplano.train.strategy import Rank


@dataclass(frozen=True)
class StepInputs:
    """This worker's share of a step."""

    micro_batches: list[Inputs]
    targets: int
    waited_s: float
    """How long the step had to wait for them."""


class Feed:
    """Gives the micro-batches of one step after another.

    Args:
        lockstep: give every worker as many micro-batches, the last ones without targets where
            blocks run out.
    """

    def __init__(
        self,
        store: "TokenStore",
        schedule: Schedule,
        machine: "Machine",
        rank: "Rank",
        seed: int,
        *,
        lockstep: bool = False,
    ) -> None:
        self._store, self._schedule, self._machine, self._rank = store, schedule, machine, rank
        self._seed, self._lockstep = stream_seed(seed, "order"), lockstep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[tuple[list[Inputs], int]]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def sequence_length(self) -> int:
        """Positions of a block."""
        return self._store.sequence_length

    @property
    def positions_per_step(self) -> int:
        """Block positions of a step over all workers, padding included."""
        return self._schedule.blocks_per_step * self._store.sequence_length

    def take(self, step: int) -> StepInputs:
        """The micro-batches of a step; the next step's are read meanwhile."""
        started = time.perf_counter()
        if self._ahead is not None and self._ahead[0] == step:
            inputs, targets = self._ahead[1].result()
        else:
            inputs, targets = self._load(step)
        waited = time.perf_counter() - started
        self._ahead = None
        if step + 1 < self._schedule.steps:
            self._ahead = (step + 1, self._pool.submit(self._load, step + 1))
        return StepInputs(inputs, targets, waited)

    def _load(self, step: int) -> tuple[list[Inputs], int]:
        schedule, rank = self._schedule, self._rank
        blocks = blocks_at(
            self._store.num_blocks, schedule.blocks_per_step, self._seed, step - schedule.first_step
        )
        mine = blocks[rank.index :: rank.count]
        size = schedule.blocks_per_micro_batch
        batches = [self._store.batch(mine[at : at + size]) for at in range(0, len(mine), size)]
        if self._lockstep:
            most = math.ceil(math.ceil(len(blocks) / rank.count) / size)
            while len(batches) < most:
                batches.append(_without_targets(self._store.batch(blocks[:1])))
        machine = self._machine
        inputs = [make_inputs(batch, machine.attention, machine.device) for batch in batches]
        return inputs, sum(int((batch.labels >= 0).sum()) for batch in batches)


def _without_targets(batch: "Batch") -> "Batch":
    from dataclasses import replace

    return replace(batch, labels=np.full_like(batch.labels, -100))
