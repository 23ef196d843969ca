"""How workers share one optimizer step: what a strategy is, and which one a config means.

A strategy owns the optimizer. It knows nothing of data, Ray or files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from altiplano.model.adapt import Trainee
    from altiplano.train.state import TrainState

Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Rank:
    """This worker's place among all, and how they add tensors up."""

    index: int
    count: int
    reduce_sum: Callable[["torch.Tensor"], None]
    """Replaces a tensor by its sum over all workers."""


@dataclass(frozen=True)
class Sharing:
    """What workers share (names as in `cluster`)."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    offload: bool = False
    deepspeed: str | None = None
    """The user's DeepSpeed JSON itself, not its path."""


class Strategy(Protocol):
    """One optimizer step, shared by all workers. Every method is called on every worker."""

    lockstep: bool
    """Whether all workers must compute the same number of micro-batches."""

    def loss(self, compute: Callable[[], "torch.Tensor"]) -> "torch.Tensor":
        """Run one forward pass; returns what `compute` does, the summed loss."""

    def backward(self, loss: "torch.Tensor", *, last: bool) -> None:
        """Add a micro-batch's gradient to this step's.

        Args:
            loss: summed over targets, divided by their number over *all* workers.
            last: no micro-batch of this step comes after it on this worker.
        """

    def step(self, rate_factor: float, max_grad_norm: float) -> float:
        """Sum gradients over workers, clip, update, forget them; returns the norm before clipping.

        Args:
            rate_factor: of every group's peak learning rate.
        """

    def snapshot(self) -> tuple[Tensors, dict[str, Tensors]] | None:
        """Weights and moments as in `TrainState`, copied to the CPU; on worker 0, else None."""

    def restore(self, state: "TrainState") -> None:
        """Go on from a state, whatever strategy and number of workers it was made by.

        Moments may be empty: then only the weights are taken (a warm start).
        """


def make_strategy(
    trainee: "Trainee", sharing: Sharing, rank: Rank, device: "torch.device"
) -> Strategy:
    """The strategy a config means; called on every worker at once.

    Args:
        trainee: its model is on `device`, and the same on every worker.

    Raises:
        TrainingError: DeepSpeed is not installed, or cannot do what the stage wants.
    """
    if sharing.strategy == "ddp":
        from altiplano.train.ddp import Replicated

        return Replicated(trainee, rank)
    from altiplano.train.zero import Zero

    return Zero(trainee, sharing, rank, device)


def make_optimizer(trainee: "Trainee") -> "torch.optim.AdamW":
    """Fused AdamW (Loshchilov & Hutter 2019) over the trainee's groups, the same for everyone."""
    import torch

    return torch.optim.AdamW(
        trainee.optimizer_groups(), betas=trainee.settings.betas, eps=1e-8, fused=True
    )
