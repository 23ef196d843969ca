"""Training in this process, without Ray: for benches, tests and small experiments.

The same loop, feed and strategy as in a worker. Knows no checkpoints of a run: it gives the state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from altiplano.data.tokens.store import TokenStore
from altiplano.model import attention
from altiplano.model.adapt import Trainee
from altiplano.train.feed import Feed
from altiplano.train.loop import Asked, Engine, Objective, StepRecord, Verdict, train
from altiplano.train.machine import Machine, choose_machine
from altiplano.train.schedule import make_schedule
from altiplano.train.state import TrainState
from altiplano.train.strategy import Rank, Sharing, make_strategy
from altiplano.train.watch import Watchdog
from altiplano.train.worker import make_objective

ALONE = Rank(0, 1, lambda tensor: None)
"""The only worker."""


@dataclass
class Recorder:
    """An observer that keeps the records, and the states that are asked for.

    Args:
        stop_after: ask for the end after this many records, as a preemption does.
    """

    watchdog: Watchdog
    stop_after: int | None = None
    records: list[StepRecord] = field(default_factory=list)
    snapshot: Callable[[int], TrainState | None] = lambda step: None
    state: TrainState | None = None

    def asks(self) -> Asked:
        """To stop after `stop_after` records."""
        return Asked(stop=len(self.records) + 1 == self.stop_after)

    def before_step(self, step: int) -> None:
        """Nothing to do."""

    def on_step(self, record: StepRecord) -> bool:
        """Keep the record."""
        self.watchdog.check(record)
        self.records.append(record)
        return False

    def on_evaluation(self, step: int) -> Verdict:
        """Nothing is evaluated."""
        return Verdict(best=False, stop=False)

    def on_checkpoint(self, step: int, *, best: bool) -> None:
        """Take the state."""
        self.state = self.snapshot(step)


def train_here(
    trainee: Trainee,
    store: TokenStore,
    *,
    seed: int,
    machine: Machine | None = None,
    rank: Rank = ALONE,
    sharing: Sharing | None = None,
    objective: Objective | None = None,
    start: TrainState | None = None,
    stop_after: int | None = None,
) -> tuple[list[StepRecord], TrainState | None]:
    """Train to the end of the trainee's schedule, or to `stop_after` steps in this call.

    Args:
        start: go on from this state.

    Returns:
        the steps, and the state after the last one (None on workers other than 0).
    """
    settings = trainee.settings
    width = trainee.model.config.hidden_size
    machine = machine or choose_machine(settings, width, use_gpu=torch.cuda.is_available())
    attention.register()
    trainee.model.config._attn_implementation = machine.attention
    trainee.model.to(machine.device)
    schedule = make_schedule(settings, store.num_blocks, store.sequence_length)
    strategy = make_strategy(trainee, sharing or Sharing(), rank, machine.device)
    if start is not None:
        strategy.restore(start)

    def snapshot(step: int) -> TrainState | None:
        copied = strategy.snapshot()
        return TrainState(step, *copied) if copied else None

    recorder = Recorder(Watchdog(settings), stop_after=stop_after, snapshot=snapshot)
    with Feed(store, schedule, machine, rank, seed, lockstep=strategy.lockstep) as feed:
        objective = objective or make_objective(None, machine)
        engine = Engine(trainee, strategy, feed, schedule, machine, rank, seed, objective)
        train(engine, recorder, start_step=start.step if start else 0)
    return recorder.records, recorder.state
