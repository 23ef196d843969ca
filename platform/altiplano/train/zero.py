"""Workers that share optimizer, gradients and weights: DeepSpeed's ZeRO (Rajbhandari et al. 2020).

DeepSpeed averages over workers what the loop wants summed, so the loss is multiplied by their
number first; everything else is the same arithmetic as `Replicated`, and so are the numbers.
Knows nothing of data, Ray or files; torch.distributed is initialised by whoever calls.
Costs: importing DeepSpeed takes seconds, and its first use on a machine without GPU builds a small
C++ extension (a minute; needs g++ and ninja).
"""

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from altiplano.errors import TrainingError
from altiplano.model.adapt import Trainee
from altiplano.train.ddp import copied
from altiplano.train.state import TrainState
from altiplano.train.strategy import Rank, Sharing, Tensors, make_optimizer
from altiplano.train.zero_config import deepspeed_config

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """The `zero1`, `zero2` and `zero3` strategies; see `Strategy`.

    Under `zero3` a parameter is whole only inside `loss`, `snapshot` is the way to read it.
    """

    lockstep = True

    def __init__(
        self, trainee: Trainee, sharing: Sharing, rank: Rank, device: torch.device
    ) -> None:
        _require_possible(trainee, sharing)
        self._rank = rank
        self._stage = int(sharing.strategy.removeprefix("zero"))
        self._parameters = trainee.trainable()
        self._engine = _engine(trainee, sharing, rank, device)
        self._shared = self._engine.optimizer

    def loss(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `compute` inside DeepSpeed's forward pass, which gathers weights as they are used."""
        loss: torch.Tensor = self._engine(compute)
        return loss

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient, shared out at once from stage 2 on."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._rank.count)

    def step(self, rate_factor: float, max_grad_norm: float) -> float:
        """Clip and update; a norm that is not finite is returned and updates nothing."""
        for group in self._shared.param_groups:
            group["lr"] = group["peak_lr"] * rate_factor
        self._shared.clip_grad = max_grad_norm
        self._engine.step()
        if not self._engine.was_step_applied():
            return float("nan")
        return float(self._engine.get_global_grad_norm())

    def snapshot(self) -> tuple[Tensors, dict[str, Tensors]] | None:
        """Gather tensor by tensor; only worker 0 keeps them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_moments()
        # Before the first step there is no state, as with any optimizer.
        step = self._shared.optimizer.state[self._masters()[0]].get("step")
        weights: Tensors = {}
        moments: dict[str, Tensors] = {}
        for name, parameter in self._parameters.items():
            whole = safe_get_full_fp32_param(parameter) if self._stage == 3 else parameter
            if self._rank.index == 0:
                weights |= copied({name: whole})
            if step is not None:
                found = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
                if self._rank.index == 0:
                    moments[name] = copied({"step": step, **found})
        return (weights, moments) if self._rank.index == 0 else None

    def restore(self, state: TrainState) -> None:
        """Take each worker's share of weights and moments; every worker is given all of them."""
        from deepspeed.runtime.zero import GatheredParameters

        partitioned = self._stage == 3
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                # Where the parameter is whole on every worker, gathering it does nothing.
                with GatheredParameters(parameter, modifier_rank=0, enabled=partitioned):
                    if self._rank.index == 0 or not partitioned:
                        parameter.copy_(state.weights[name])
        self._shared.refresh_fp32_params()
        if state.moments:
            self._restore_moments(state.moments)

    def _restore_moments(self, moments: dict[str, Tensors]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._make_moments(next(iter(moments.values()))["step"])
        for name, parameter in self._parameters.items():
            for key in _MOMENTS:
                value = moments[name][key].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, key)

    def _make_moments(self, step: torch.Tensor) -> None:
        """AdamW makes its moments in the first step, which a resumed run is past."""
        states = self._shared.optimizer.state
        for master in self._masters():
            if not states[master]:
                states[master] = {key: torch.zeros_like(master) for key in _MOMENTS}
            states[master]["step"] = step.to(master.device, copy=True)
        self._link_moments()

    def _link_moments(self) -> None:
        """Let each parameter find its moments; DeepSpeed does it for the first group only."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._stage < 3:
            states = self._shared.optimizer.state
            for group, master in zip(self._shared.bit16_groups, self._masters(), strict=True):
                lazy_init_hp_params_optimizer_state(group, master, states)

    def _masters(self) -> list[torch.Tensor]:
        """The flat fp32 tensors that this worker's optimizer updates."""
        masters: list[torch.Tensor] = (
            self._shared.fp32_partitioned_groups_flat
            if self._stage == 3
            else self._shared.single_partition_of_fp32_groups
        )
        return masters


class _Forward(nn.Module):
    """Makes any computation on a model a forward pass of a module that holds it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` returns."""
        return compute()


def _engine(trainee: Trainee, sharing: Sharing, rank: Rank, device: torch.device) -> Any:
    """DeepSpeed's engine around the trainee's model, on our device and process group."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # DeepSpeed calls torch.distributed by names that PyTorch 2.13 says so about at every call.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=_Forward(trainee.model),
        optimizer=make_optimizer(trainee),
        config=deepspeed_config(trainee.settings, sharing, rank.count),
        dist_init_required=False,
    )
    return engine


def _require_possible(trainee: Trainee, sharing: Sharing) -> None:
    if find_spec("deepspeed") is None:
        raise TrainingError(
            f"`cluster.strategy: {sharing.strategy}` needs DeepSpeed, which is not installed: "
            "install the cpu or gpu extra, or set `strategy: ddp`"
        )
    if sharing.strategy == "zero3" and trainee.settings.quantize != "none":
        raise TrainingError(
            f"`strategy: zero3` cannot split weights stored in {trainee.settings.quantize}: set "
            "`strategy: zero2`, or `quantize: none`"
        )
