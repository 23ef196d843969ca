"""The training loop: batches in, steps out.

The global batch of a step is a pure function of (seed, step); the summed loss is divided by the
number of targets over all workers before any gradient is made. So the trajectory does not depend
on how many workers there are, and one integer resumes it.
Knows nothing of Ray, files or the terminal: the observer does.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from altiplano.model.adapt import Trainee
from altiplano.train.batch import Inputs
from altiplano.train.best import evaluation_due
from altiplano.train.feed import Feed, StepInputs
from altiplano.train.machine import Machine
from altiplano.train.schedule import Schedule, learning_rate_factor, stream_seed
from altiplano.train.strategy import Rank, Strategy

Objective = Callable[[Trainee, Inputs], torch.Tensor]
"""Summed loss over the targets of a micro-batch."""


@dataclass(frozen=True)
class StepRecord:
    """What is known after one step, on every worker alike but for the times."""

    step: int
    steps: int
    loss: float
    """Mean over the global batch's targets, in nats."""
    learning_rate: float
    rows_learning_rate: float
    grad_norm: float
    """Before clipping."""
    targets: int
    tokens_per_second: float
    """Block positions of the global batch per second, padding included."""
    seconds: float
    data_wait_s: float
    asked: "Asked"
    """Of any worker."""


@dataclass(frozen=True)
class Asked:
    """What workers want of all of them after this step."""

    stop: bool = False
    """Save and end."""
    look: bool = False
    """See together whether a node is about to be taken away, which costs a barrier."""


@dataclass(frozen=True)
class Verdict:
    """What an evaluation says."""

    best: bool
    """The weights are the best so far."""
    stop: bool
    """They have not been getting better for long."""


class Observer(Protocol):
    """What the loop tells, and asks; called on every worker, in the same order."""

    def asks(self) -> Asked:
        """What this worker wants; where one wants it, all do it."""

    def before_step(self, step: int) -> None:
        """A step begins; 1-based."""

    def on_step(self, record: StepRecord) -> bool:
        """A step is done; whether to save now, all workers alike. May raise to end the training."""

    def on_evaluation(self, step: int) -> Verdict:
        """`evaluate_steps` steps are done: measure."""

    def on_checkpoint(self, step: int, *, best: bool) -> None:
        """Save the state after `step` steps."""


@dataclass(frozen=True)
class Engine:
    """The parts of one training."""

    trainee: Trainee
    strategy: Strategy
    feed: Feed
    schedule: Schedule
    machine: Machine
    rank: Rank
    seed: int
    objective: Objective


def train(engine: Engine, observer: Observer, *, start_step: int) -> int:
    """Train from `start_step` to the end of the schedule, or to where an observer ends it.

    Returns:
        the number of finished steps; the state after them has been given to `on_checkpoint`.
    """
    settings, steps = engine.trainee.settings, engine.schedule.steps
    engine.trainee.model.train()
    for done in range(start_step + 1, steps + 1):
        observer.before_step(done)
        record = _take_step(engine, done - 1, observer.asks())
        save = observer.on_step(record)
        verdict = Verdict(best=False, stop=False)
        if evaluation_due(settings, done, steps):
            verdict = observer.on_evaluation(done)
        ends = verdict.stop or record.asked.stop or done == steps
        if save or ends or verdict.best or done % settings.checkpoint_steps == 0:
            observer.on_checkpoint(done, best=verdict.best)
        if ends:
            return done
    return start_step


def _take_step(engine: Engine, step: int, asks: Asked) -> StepRecord:
    started = time.perf_counter()
    settings, schedule, rank = engine.trainee.settings, engine.schedule, engine.rank
    torch.manual_seed(stream_seed(engine.seed, "dropout", step, rank.index))
    inputs = engine.feed.take(step)
    targets, stop, look = _sum_over_workers(engine, [inputs.targets, asks.stop, asks.look])
    loss_sum = _accumulate(engine, inputs, total_targets=max(1.0, targets))
    factor = learning_rate_factor(step, schedule.steps, settings)
    norm = engine.strategy.step(factor, settings.max_grad_norm)
    (loss,) = _sum_over_workers(engine, [loss_sum])
    seconds = time.perf_counter() - started
    return StepRecord(
        step=step + 1,
        steps=schedule.steps,
        loss=loss,
        learning_rate=settings.learning_rate * factor,
        rows_learning_rate=(settings.rows_learning_rate or settings.learning_rate) * factor,
        grad_norm=norm,
        targets=int(targets),
        tokens_per_second=engine.feed.positions_per_step / seconds,
        seconds=seconds,
        data_wait_s=inputs.waited_s,
        asked=Asked(stop > 0, look > 0),
    )


def _accumulate(engine: Engine, inputs: StepInputs, *, total_targets: float) -> float:
    """Add up the gradients of this worker's micro-batches; returns its part of the mean loss."""
    machine, strategy = engine.machine, engine.strategy
    mixed = machine.compute != torch.float32
    loss_sum = torch.zeros((), device=machine.device)
    for number, batch in enumerate(inputs.micro_batches, 1):

        def compute(batch: Inputs = batch) -> torch.Tensor:
            with torch.autocast(machine.device.type, machine.compute, enabled=mixed):
                return engine.objective(engine.trainee, batch)

        loss = strategy.loss(compute) / total_targets
        strategy.backward(loss, last=number == len(inputs.micro_batches))
        loss_sum += loss.detach()
    return float(loss_sum)


def _sum_over_workers(engine: Engine, values: Sequence[float]) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float64, device=engine.machine.device)
    engine.rank.reduce_sum(sums)
    found: list[float] = sums.tolist()
    return found
