"""Is this evaluation the best so far, and is it time to stop?

One number is compared: the mean over languages of the held-out bits per byte, so that a language
counts the same whatever the size of its held-out text. The state is four plain values that travel
in checkpoints, so a resumed run decides as the uninterrupted one would. Knows neither models nor
data; costs nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError

_STATE = ("best", "best_step", "reference", "without_gain")


@dataclass
class Progress:
    """The evaluations of a stage so far.

    Attributes:
        settings: `early_stop`'s patience and smallest gain.
        best: fewest bits per byte so far; none before the first evaluation.
        best_step: number of finished steps it was measured after.
        reference: what the next evaluation must be below by more than `min_delta` to be a gain, so
            that gains too small to count alone count once they add up.
        without_gain: evaluations since the last gain.
    """

    settings: TrainSettings
    best: float | None = None
    best_step: int | None = None
    reference: float | None = None
    without_gain: int = 0

    def update(self, step: int, bits: Mapping[str, float]) -> bool:
        """Take an evaluation; was it the best so far (where equal, the earlier is)?

        Args:
            step: number of finished steps.
            bits: bits per byte by language.

        Raises:
            TrainingError: one of them is NaN or infinite.
        """
        if wrong := [language for language, value in bits.items() if not math.isfinite(value)]:
            raise TrainingError(
                f"stage {self.settings.name}, step {step}: the bits per byte of held-out text in "
                f"{', '.join(wrong)} are not finite; lower `learning_rate`, or train in float32"
            )
        mean = math.fsum(bits.values()) / len(bits)
        stop = self.settings.early_stop
        least = stop.min_delta if stop else 0.0
        if self.reference is None or mean < self.reference - least:
            self.reference, self.without_gain = mean, 0
        else:
            self.without_gain += 1
        better = self.best is None or mean < self.best
        if better:
            self.best, self.best_step = mean, step
        return better

    @property
    def should_stop(self) -> bool:
        """Whether `early_stop.patience` evaluations in a row brought no gain."""
        stop = self.settings.early_stop
        return stop is not None and self.without_gain >= stop.patience

    def to_json(self) -> dict[str, Any]:
        """The state as plain values."""
        return {name: getattr(self, name) for name in _STATE}

    @classmethod
    def from_json(cls, state: Mapping[str, Any] | None, settings: TrainSettings) -> "Progress":
        """Go on from what `to_json` gave; None is a training at its beginning."""
        return cls(settings, **(state or {}))


def evaluation_due(settings: TrainSettings, done: int, steps: int) -> bool:
    """Whether held-out text is measured after `done` finished steps; always after the last."""
    every = settings.evaluate_steps
    return every is not None and (done % every == 0 or done == steps)
