"""The training loop: batches in, steps out.

The global batch of a step is a pure function of (seed, step); each worker takes every n-th block
of it, and the summed gradient is divided by the number of targets over all workers. So the
trajectory does not depend on how many workers there are, and one integer resumes it.
Knows nothing of Ray, files or the terminal: `reduce_sum`, `on_step` and `on_checkpoint` do.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from altiplano.data.tokens.order import blocks_at
from altiplano.data.tokens.store import TokenStore
from altiplano.errors import TrainingError
from altiplano.model.adapt import Trainee
from altiplano.train.batch import Inputs, make_inputs
from altiplano.train.machine import Machine
from altiplano.train.schedule import Schedule, learning_rate_factor, stream_seed

Objective = Callable[[Trainee, Inputs], torch.Tensor]
"""Summed loss over the targets of a micro-batch."""


@dataclass(frozen=True)
class Rank:
    """This worker's place among all, and how they add tensors up."""

    index: int
    count: int
    reduce_sum: Callable[[torch.Tensor], None]
    """Replaces a tensor by its sum over all workers."""


@dataclass(frozen=True)
class StepRecord:
    """What is known after one step."""

    step: int
    steps: int
    loss: float
    """Mean over the global batch's targets, in nats."""
    learning_rate: float
    grad_norm: float
    targets: int
    tokens_per_second: float
    """Block positions of the global batch per second, padding included."""


def make_optimizer(trainee: Trainee) -> torch.optim.AdamW:
    """Fused AdamW over the trainee's groups."""
    return torch.optim.AdamW(
        trainee.optimizer_groups(), betas=trainee.settings.betas, eps=1e-8, fused=True
    )


def train(
    trainee: Trainee,
    optimizer: torch.optim.AdamW,
    store: TokenStore,
    schedule: Schedule,
    *,
    machine: Machine,
    rank: Rank,
    seed: int,
    start_step: int,
    objective: Objective,
    on_step: Callable[[StepRecord], None],
    on_checkpoint: Callable[[int], None],
) -> None:
    """Train from `start_step` to the end of the schedule.

    Args:
        on_step: called after every step, on every worker.
        on_checkpoint: called with the number of finished steps every `checkpoint_steps` and at
            the end, on every worker.

    Raises:
        TrainingError: the loss is NaN, infinite or exactly zero, or a step has no target.
    """
    settings = trainee.settings
    parameters = list(trainee.trainable().values())
    trainee.model.train()
    for step in range(start_step, schedule.steps):
        started = time.perf_counter()
        factor = learning_rate_factor(step, schedule.steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        torch.manual_seed(stream_seed(seed, "dropout", step, rank.index))
        micro_batches = _micro_batches(store, schedule, machine, rank, seed, step)
        loss_sum, targets = _accumulate(trainee, micro_batches, objective, machine)
        loss, target_count = _reduce(parameters, loss_sum, targets, rank)
        _require_sane(loss, target_count, step, settings.name)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        positions = schedule.blocks_per_step * store.sequence_length
        on_step(
            StepRecord(
                step + 1, schedule.steps, loss, settings.learning_rate * factor, float(norm),
                target_count, positions / seconds,
            )
        )  # fmt: skip
        done = step + 1
        if done % settings.checkpoint_steps == 0 or done == schedule.steps:
            on_checkpoint(done)


def _micro_batches(
    store: TokenStore, schedule: Schedule, machine: Machine, rank: Rank, seed: int, step: int
) -> Iterable[Inputs]:
    """This worker's share of a step's global batch."""
    blocks = blocks_at(store.num_blocks, schedule.blocks_per_step, stream_seed(seed, "order"), step)
    mine = blocks[rank.index :: rank.count]
    for start in range(0, len(mine), schedule.blocks_per_micro_batch):
        batch = store.batch(mine[start : start + schedule.blocks_per_micro_batch])
        yield make_inputs(batch, machine.attention, machine.device)


def _accumulate(
    trainee: Trainee, micro_batches: Iterable[Inputs], objective: Objective, machine: Machine
) -> tuple[float, int]:
    """Add up gradients of the summed loss; returns the sum and its number of targets."""
    loss_sum, targets = 0.0, 0
    mixed = machine.compute != torch.float32
    for inputs in micro_batches:
        with torch.autocast(machine.device.type, machine.compute, enabled=mixed):
            loss = objective(trainee, inputs)
        loss.backward()
        loss_sum += float(loss.detach())
        targets += int((inputs.labels >= 0).sum())
    return loss_sum, targets


def _reduce(
    parameters: list[torch.nn.Parameter], loss_sum: float, targets: int, rank: Rank
) -> tuple[float, int]:
    """Sum loss, targets and gradients over all workers; gradients become means per target."""
    device = parameters[0].device
    sums = torch.tensor([loss_sum, float(targets)], dtype=torch.float64, device=device)
    rank.reduce_sum(sums)
    total_targets = max(1.0, float(sums[1]))
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.view(-1) for p in parameters if p.grad is not None])
    rank.reduce_sum(flat)
    flat /= total_targets
    offset = 0
    for parameter in parameters:
        assert parameter.grad is not None
        size = parameter.numel()
        parameter.grad.copy_(flat[offset : offset + size].view_as(parameter))
        offset += size
    return float(sums[0]) / total_targets, int(sums[1])


def _require_sane(loss: float, targets: int, step: int, name: str) -> None:
    where = f"stage {name}, step {step + 1}"
    if targets == 0:
        raise TrainingError(f"{where}: the batch holds no training target; check the loss mask")
    if not math.isfinite(loss):
        raise TrainingError(
            f"{where}: the loss is {loss}; lower `learning_rate`, or train in float32"
        )
    if loss == 0.0:
        raise TrainingError(
            f"{where}: the loss is exactly 0, so nothing is being learned; check precision and data"
        )
