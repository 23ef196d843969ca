"""Steps and learning rates as pure functions of the settings and the step.

Nothing here has state, so a resumed run needs one integer to go on exactly. Knows neither data nor
weights; costs nothing.
"""

import math
from dataclasses import dataclass

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError

_CURVE_POINTS = 9


@dataclass(frozen=True)
class Earlier:
    """How far an earlier stage came that this one continues."""

    step: int
    """Optimizer steps behind its weights."""
    steps: int
    """Steps its learning-rate curve was made for."""


@dataclass(frozen=True)
class Schedule:
    """How long a stage runs and how a global batch is divided."""

    steps: int
    """Steps of the learning-rate curve; the stage makes those from `first_step` on."""
    blocks_per_step: int
    """Blocks of one optimizer step over all workers."""
    blocks_per_micro_batch: int
    """Blocks of one forward pass of one worker."""
    first_step: int = 0
    """Steps an earlier stage made; the global batch of step s is number s - first_step of this
    stage's data."""


def make_schedule(
    settings: TrainSettings,
    num_blocks: int,
    sequence_length: int,
    *,
    earlier: Earlier | None = None,
) -> Schedule:
    """Derive steps and batch sizes from the settings and the size of the data.

    A stage that continues an earlier one begins at the earlier one's step, with the first block of
    its own data. Its curve is as long as the longer of two: the earlier curve, and the curve this
    stage would have alone (`steps`, or `epochs` over its data). So with an earlier curve of 17298
    steps left at step 5800, and new data worth 9000 steps, 11498 steps follow on the old curve, as
    if the new data came after the old; with new data worth 20000, 14200 steps follow on a curve of
    20000. Chinese-Vicuna continues in this way. Steps are counted as they are, whatever the two
    batch sizes.

    Args:
        earlier: of the stage that this one continues.

    Raises:
        TrainingError: there is no data, warm-up leaves no step, or the curve has ended already.
    """
    if num_blocks == 0:
        raise TrainingError(
            f"stage {settings.name} would train zero steps: its token store holds no blocks; "
            f"give it more text or records"
        )
    blocks = max(1, round(settings.tokens_per_step / sequence_length))
    micro = max(1, settings.micro_batch_tokens // sequence_length)
    own = settings.steps or max(1, math.ceil(settings.epochs * num_blocks / blocks))
    steps = max(own, earlier.steps) if earlier else own
    if settings.warmup_steps is not None and settings.warmup_steps >= steps:
        raise TrainingError(
            f"stage {settings.name} has {steps} steps and `warmup_steps` {settings.warmup_steps}: "
            f"the learning rate would never reach its peak; lower it, or use `warmup_ratio`"
        )
    if earlier is None:
        return Schedule(steps, blocks, micro)
    if earlier.step >= steps:
        raise TrainingError(
            f"stage {settings.name} continues after step {earlier.step}, and its learning-rate "
            f"curve ends there (the earlier stage's: {earlier.steps} steps, its own: {own}): set "
            f"`steps: {earlier.step + own}` for {own} more, or `begin.mode: warm_start`"
        )
    return Schedule(steps, blocks, micro, first_step=earlier.step)


def learning_rate_factor(step: int, steps: int, settings: TrainSettings) -> float:
    """Learning rate of a step as a share of the peak, in (0, 1].

    Warm-up is (step + 1) / warmup, so that the first step trains and its last one has the peak.
    After it, progress is (step - warmup) / (steps - warmup), as in Hugging Face's schedules: it
    would be 1, and the rate `min_lr_ratio`, at the step after the last. `cosine` and `linear` fall
    over all of it; `wsd` (warmup-stable-decay, MiniCPM, Hu et al. 2024, here with a linear decay)
    falls over the last `decay_ratio` of the steps; `constant` does not.

    Args:
        step: 0-based.
        steps: of the whole curve.
    """
    warmup = _warmup_steps(steps, settings)
    if step < warmup:
        return (step + 1) / warmup
    start = _decay_start(steps, settings)
    if step < start:
        return 1.0
    progress = (step - start) / (steps - start)
    cosine = settings.schedule == "cosine"
    shape = (1 + math.cos(math.pi * progress)) / 2 if cosine else 1 - progress
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape


def curve_of(settings: TrainSettings, schedule: Schedule) -> list[tuple[int, float]]:
    """The learning rate at a dozen telling steps: the ends, the corners and some between.

    Returns:
        (0-based step, learning rate), in order, of the steps that the stage makes.
    """
    first, last = schedule.first_step, schedule.steps - 1
    corners = {_warmup_steps(schedule.steps, settings), _decay_start(schedule.steps, settings)}
    even = {first + round((last - first) * i / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)}
    shown = sorted(even | {step for step in corners if first <= step <= last})
    return [
        (step, settings.learning_rate * learning_rate_factor(step, schedule.steps, settings))
        for step in shown
    ]


def _warmup_steps(steps: int, settings: TrainSettings) -> int:
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil(settings.warmup_ratio * steps)


def _decay_start(steps: int, settings: TrainSettings) -> int:
    """The last step at the peak; `steps` where the rate never falls."""
    if settings.schedule == "constant":
        return steps
    warmup = _warmup_steps(steps, settings)
    if settings.schedule == "wsd":
        return max(warmup, steps - math.ceil(settings.decay_ratio * steps))
    return warmup


def stream_seed(seed: int, *names: str | int) -> int:
    """A seed for one named use of randomness; other uses never shift it."""
    import hashlib

    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
