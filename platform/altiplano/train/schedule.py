"""Steps and learning rates as pure functions of the settings and the step.

Nothing here has state, so a resumed run needs one integer to go on exactly.
"""

import math
from dataclasses import dataclass

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError


@dataclass(frozen=True)
class Schedule:
    """How long a stage runs and how a global batch is divided."""

    steps: int
    blocks_per_step: int
    """Blocks of one optimizer step over all workers."""
    blocks_per_micro_batch: int
    """Blocks of one forward pass of one worker."""


def make_schedule(settings: TrainSettings, num_blocks: int, sequence_length: int) -> Schedule:
    """Derive steps and batch sizes from the settings and the size of the data.

    Raises:
        TrainingError: there is no data, so zero steps would be trained.
    """
    if num_blocks == 0:
        raise TrainingError(
            f"stage {settings.name} would train zero steps: its token store holds no blocks; "
            f"give it more text or records"
        )
    blocks = max(1, round(settings.tokens_per_step / sequence_length))
    micro = max(1, settings.micro_batch_tokens // sequence_length)
    steps = settings.steps or max(1, math.ceil(settings.epochs * num_blocks / blocks))
    return Schedule(steps, blocks, micro)


def learning_rate_factor(step: int, steps: int, settings: TrainSettings) -> float:
    """Learning rate of a step as a share of the peak.

    Linear warm-up over `warmup_ratio` of the steps, then cosine or linear decay to `min_lr_ratio`
    at the last step, or constant.

    Args:
        step: 0-based.
    """
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    floor = settings.min_lr_ratio
    if settings.schedule == "linear":
        shape = 1 - progress
    else:
        shape = (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * shape


def stream_seed(seed: int, *names: str | int) -> int:
    """A seed for one named use of randomness; other uses never shift it."""
    import hashlib

    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
