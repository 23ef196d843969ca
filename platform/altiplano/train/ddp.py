"""Workers that each hold the whole model and share nothing but gradients.

Gradients are summed in buckets, each as soon as it is complete, while the backward pass goes on.
A single worker sums nothing and pays nothing. Memory: two moments and one gradient per trained
tensor. Knows nothing of data, Ray or files; more than one worker needs torch.distributed to be
initialised.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from altiplano.model.adapt import Trainee
from altiplano.train.state import TrainState
from altiplano.train.strategy import Rank, Tensors, make_optimizer

BUCKET_BYTES = 25 * 2**20
"""Enough for a network's full speed, few enough to begin long before the backward pass ends."""


class Replicated:
    """The `ddp` strategy; see `Strategy`."""

    lockstep = False

    def __init__(self, trainee: Trainee, rank: Rank) -> None:
        self._rank = rank
        self._parameters = trainee.trainable()
        self._optimizer = make_optimizer(trainee)
        self._sums = _GradientSums(list(self._parameters.values())) if rank.count > 1 else None

    def loss(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Nothing to prepare: the model is whole."""
        return compute()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; the last one's is sent while it is being computed."""
        if self._sums is not None:
            self._sums.sending = last
        loss.backward()

    def step(self, rate_factor: float, max_grad_norm: float) -> float:
        """Sum, clip, update, forget; a norm that is not finite is returned and updates nothing."""
        if self._sums is not None:
            self._sums.finish()
        gradients = self._gradients()
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        value = float(norm)
        if math.isfinite(value):
            if value > max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(
                    self._parameters.values(), max_grad_norm, norm, foreach=True
                )
            for group in self._optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate_factor
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return value

    def _gradients(self) -> list[torch.Tensor]:
        """One gradient per parameter; no gradient counts as zero, so that every moment decays."""
        gradients = []
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients

    def snapshot(self) -> tuple[Tensors, dict[str, Tensors]] | None:
        """Copies of this worker's tensors, which are every worker's."""
        if self._rank.index != 0:
            return None
        state = self._optimizer.state
        moments = {
            name: copied(state[parameter])
            for name, parameter in self._parameters.items()
            if parameter in state
        }
        return copied(self._parameters), moments

    def restore(self, state: TrainState) -> None:
        """Take weights and moments over in place."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state.weights[name])
        for name, moments in state.moments.items():
            parameter = self._parameters[name]
            self._optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in moments.items()
            }


def copied(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Copies on the CPU that later steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


class _GradientSums:
    """Sums every parameter's gradient over all workers, bucket by bucket.

    All workers must send buckets in one order, whichever gradient is ready first and even where a
    worker had nothing to compute: bucket i goes only after bucket i - 1, and `finish` sends the
    rest. The group is our own, so that other collectives may come between.

    Attributes:
        sending: whether gradients that arrive now are complete.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.sending = False
        self._group = dist.new_group()
        # Gradients are complete in about the reverse order of the forward pass.
        self._buckets = [_Bucket(part) for part in _parts(parameters[::-1])]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._sent = 0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: torch.Tensor) -> None:
        if not self.sending:
            return
        self._bucket_of[parameter].missing -= 1
        while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
            self._send_next()

    def _send_next(self) -> None:
        self._buckets[self._sent].send(self._group)
        self._sent += 1

    def finish(self) -> None:
        """Send what is left and wait: every gradient is the sum over all workers after it."""
        while self._sent < len(self._buckets):
            self._send_next()
        for bucket in self._buckets:
            bucket.wait()
        self._sent, self.sending = 0, False


class _Bucket:
    """Neighbouring gradients that are summed over workers in one message."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = len(parameters)
        first = parameters[0]
        size = sum(p.numel() for p in parameters)
        self._flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        pieces = self._flat.split([p.numel() for p in parameters])
        self._pieces = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        self._work: dist.Work | None = None

    def send(self, group: dist.ProcessGroup) -> None:
        """Begin to sum; the parameters' gradients become the pieces of the message."""
        for parameter, piece in zip(self.parameters, self._pieces, strict=True):
            if parameter.grad is None:
                piece.zero_()
            else:
                piece.copy_(parameter.grad)
            parameter.grad = piece
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def wait(self) -> None:
        """Until the sums are here; the next step begins with all gradients missing."""
        assert self._work is not None
        self._work.wait()
        self._work, self.missing = None, len(self.parameters)


def _parts(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Runs of one type, of about BUCKET_BYTES each."""
    parts: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not parts or room <= 0 or parts[-1][0].dtype != parameter.dtype:
            parts.append([])
            room = BUCKET_BYTES
        parts[-1].append(parameter)
        room -= parameter.numel() * parameter.element_size()
    return parts
