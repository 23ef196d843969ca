"""How fast this machine would train, from a few steps of one block with random weights.

A stage's body is its blocks, all alike, so the time of one block, forward and backward, and of the
embedding, head and loss gives the time of a step. What is not timed: the optimizer, sums over
workers, reading data. The figure is thus for workers like this machine that do not wait for each
other. Costs seconds, the memory of one block, and of embedding and head with their gradients.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from altiplano.config.loader import Project
from altiplano.console import format_cell
from altiplano.errors import ConfigError
from altiplano.plan.plan import Plan, StageInputs, stage_inputs
from altiplano.plan.sizes import find_sizes

if TYPE_CHECKING:
    from altiplano.model.adapt import Trainee
    from altiplano.train.batch import Inputs
    from altiplano.train.machine import Machine

_FIRST_TOKENS = 128
_ENOUGH_S = 2.0
"""Repeated no longer than this; a whole micro-batch is timed only where it takes no longer."""
_REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """An estimate of one stage's speed."""

    stage: str
    tokens_per_s: float
    """Of one worker."""
    hours: float | None
    """Of the whole stage with all its workers, where the number of steps is known."""
    timed_tokens: int
    """Of the forward pass that was timed."""
    reason: str
    """Device, precision and attention, and why these."""


def calibrate(project: Project, planned: Plan) -> list[Speed]:
    """Time every stage of a plan on this machine; stages without known sizes have none.

    Raises:
        ConfigError: workers compute on GPUs and this machine has none.
    """
    import torch

    if project.config.cluster.gpus_per_worker > 0 and not torch.cuda.is_available():
        raise ConfigError(
            f"`cluster.gpus_per_worker` is {project.config.cluster.gpus_per_worker:g} and this "
            f"machine has no GPU to time: calibrate on one that has, or for a CPU with "
            f"cluster.gpus_per_worker=0"
        )
    inputs = stage_inputs(project, find_sizes(project, notes=[]))
    found = []
    for stage, known in zip(inputs, planned.stages, strict=True):
        tokens, seconds, reason = _time_stage(project, stage, known.micro_batch_tokens)
        rate = tokens / seconds
        workers = planned.num_workers
        hours = None if known.tokens is None else known.tokens / (rate * workers) / 3600
        found.append(Speed(stage.name, rate, hours, tokens, reason))
    return found


def speed_lines(speeds: list[Speed], workers: int) -> list[str]:
    """The estimates in words, with what they assume."""
    lines = []
    for speed in speeds:
        rate = f"{format_cell(speed.tokens_per_s)} tokens/s for each worker"
        hours = "" if speed.hours is None else f", {speed.hours:.3g} hours"
        lines.append(
            f"{speed.stage}: about {rate}{hours} "
            f"({speed.timed_tokens} tokens timed; {speed.reason})"
        )
    return [
        *lines,
        f"an estimate from one block with random weights on this machine: it assumes {workers} "
        f"such worker{'s' if workers > 1 else ''} that never wait, and counts neither the "
        f"optimizer nor the sending of gradients",
    ]


def _time_stage(
    project: Project, stage: StageInputs, micro_batch_tokens: int
) -> tuple[int, float, str]:
    """Tokens of a forward and backward pass of the whole model, and its seconds, extrapolated."""
    from altiplano.train.machine import choose_machine

    use_gpu = project.config.cluster.gpus_per_worker > 0
    machine = choose_machine(stage.settings, stage.shape.hidden_size, use_gpu=use_gpu)
    trainee = _one_block(stage, machine)
    length = project.config.data.sequence_length
    tokens = min(_FIRST_TOKENS, micro_batch_tokens)
    seconds = _step_seconds(stage, trainee, machine, tokens, length)
    if tokens < micro_batch_tokens and seconds * micro_batch_tokens / tokens < _ENOUGH_S:
        tokens = micro_batch_tokens
        seconds = _step_seconds(stage, trainee, machine, tokens, length)
    return tokens, seconds, machine.reason


def _step_seconds(
    stage: StageInputs, trainee: "Trainee", machine: "Machine", tokens: int, length: int
) -> float:
    """Time of all blocks, from those of one block with and without the head."""
    import torch

    from altiplano.model.loss import summed_cross_entropy

    inputs = _random_inputs(stage, machine, tokens, min(tokens, length))

    def body() -> None:
        states = trainee.hidden(**inputs.model)
        if states.requires_grad:
            states.sum().backward()

    def forward() -> None:
        with torch.no_grad():
            trainee.hidden(**inputs.model)

    def whole() -> None:
        states = trainee.hidden(**inputs.model)
        summed_cross_entropy(states, inputs.labels, trainee.head).backward()

    one_block = _shortest(trainee, machine, body)
    everything = _shortest(trainee, machine, whole)
    seconds = everything + (stage.shape.num_hidden_layers - 1) * one_block
    if stage.teacher is not None:
        # A draft's blocks are of its teacher's shape.
        seconds += stage.teacher.num_hidden_layers * _shortest(trainee, machine, forward)
    return seconds


def _shortest(trainee: "Trainee", machine: "Machine", run: Callable[[], None]) -> float:
    """Seconds of the fastest of a few runs; a slow one is the only one."""
    import torch

    times: list[float] = []
    while len(times) <= _REPEATS and sum(times) < _ENOUGH_S:
        started = time.perf_counter()
        with torch.autocast(
            machine.device.type, dtype=torch.bfloat16, enabled=machine.compute == torch.bfloat16
        ):
            run()
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        trainee.model.zero_grad(set_to_none=True)
    return min(times)


def _one_block(stage: StageInputs, machine: "Machine") -> "Trainee":
    """The stage's model with one block only, its trainable parts in place."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from altiplano.model import attention
    from altiplano.model.adapt import make_trainee
    from altiplano.model.quantize import quantize_blocks
    from altiplano.model.recompute import apply_recompute

    settings, shape = stage.settings, stage.shape
    attention.register()
    config = LlamaConfig(
        vocab_size=stage.vocab_new,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    stored = torch.float32 if settings.full else machine.compute
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(stored)
    if settings.quantize != "none":
        quantize_blocks(model, settings.quantize)
    model.config._attn_implementation = machine.attention
    trainee = make_trainee(model, settings, stage.vocab_old, seed=0)
    trainee.model.to(machine.device).train()
    mode = settings.gradient_checkpointing
    apply_recompute(trainee.model, "full" if mode == "full" else "none")
    return trainee


def _random_inputs(stage: StageInputs, machine: "Machine", tokens: int, length: int) -> "Inputs":
    """Whole blocks of one document each; every token is a target."""
    import numpy as np

    from altiplano.data.tokens.store import Batch
    from altiplano.train.batch import make_inputs

    rows = max(1, tokens // length)
    ids = np.random.default_rng(0).integers(0, stage.vocab_new, (rows, length))
    positions = np.broadcast_to(np.arange(length), ids.shape).copy()
    batch = Batch(ids, positions, np.ones_like(ids), ids)
    return make_inputs(batch, machine.attention, machine.device)
