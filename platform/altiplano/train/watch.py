"""Is a training still worth its machine: a watchdog over losses, a meter, a profiler.

Every worker sees the same global numbers, so all of them stop at the same step with the same
reason. Knows nothing of Ray or the model. Costs microseconds per step.
"""

import faulthandler
import math
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError

if TYPE_CHECKING:
    from altiplano.train.loop import StepRecord

_SMOOTHING = 0.9
"""Share of the past in the smoothed loss: about ten steps."""


class Watchdog:
    """Stops a training whose numbers say that it is useless."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._smoothed: float | None = None
        self._lowest = math.inf

    def check(self, record: "StepRecord") -> None:
        """Look at one step.

        Raises:
            TrainingError: no target, a loss or gradient that is NaN or infinite, a loss of exactly
                zero, or one that rose `max_loss_rise` nats above its lowest.
        """
        where = f"stage {self._settings.name}, step {record.step}"
        if record.targets == 0:
            raise TrainingError(f"{where}: the batch holds no training target; check the loss mask")
        if not math.isfinite(record.loss):
            raise TrainingError(
                f"{where}: the loss is {record.loss}; lower `learning_rate`, or train in float32"
            )
        if not math.isfinite(record.grad_norm):
            raise TrainingError(
                f"{where}: the gradient's norm is {record.grad_norm}, so the step changed nothing; "
                f"lower `learning_rate`, or train in float32"
            )
        if record.loss == 0.0:
            raise TrainingError(
                f"{where}: the loss is exactly 0, so nothing is being learned; check precision "
                f"and data"
            )
        before = record.loss if self._smoothed is None else self._smoothed
        self._smoothed = _SMOOTHING * before + (1 - _SMOOTHING) * record.loss
        self._lowest = min(self._lowest, self._smoothed)
        if self._smoothed > self._lowest + self._settings.max_loss_rise:
            raise TrainingError(
                f"{where}: the loss diverges: {self._smoothed:.2f} nats (smoothed) after it was "
                f"{self._lowest:.2f}; lower `learning_rate` ({self._settings.learning_rate:g}), or "
                f"raise `max_loss_rise` ({self._settings.max_loss_rise:g})"
            )


@dataclass(frozen=True)
class Meter:
    """Turns a step into what people and dashboards read."""

    flops_per_token: float
    """Of the model's own arithmetic, recomputation not counted."""
    flops_per_second: float
    """What all workers' matrix units were measured at."""

    def measure(self, record: "StepRecord") -> dict[str, Any]:
        """The step with its share of the machine's matrix speed, memory and time left."""
        speed, values = record.tokens_per_second, asdict(record)
        del values["asked"]
        return {
            **values,
            "mfu": speed * self.flops_per_token / self.flops_per_second,
            "memory_mib": _memory_bytes() / 2**20,
            "seconds_left": (record.steps - record.step) * record.seconds,
        }


def _memory_bytes() -> int:
    """Peak of this worker: of the GPU's memory where it has one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StallTimer:
    """Ends this process, with every thread's stack in a file, when no step is made for long.

    A worker that waits for a dead one inside a collective cannot be asked anything: the timer runs
    in C, beside the interpreter's lock. Ray then starts the workers again.
    """

    def __init__(self, file: Path, timeout_s: float) -> None:
        self._file, self._timeout_s = file, timeout_s
        self._open: IO[str] | None = None

    def beat(self) -> None:
        """Say that a step was made."""
        if self._open is None:
            self._open = self._file.open("w", encoding="utf-8")
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=self._open)

    def stop(self) -> None:
        """No longer watch; an empty file is removed."""
        faulthandler.cancel_dump_traceback_later()
        if self._open is not None:
            self._open.close()
            self._open = None
            if self._file.is_file() and not self._file.stat().st_size:
                self._file.unlink()


class Profiler:
    """A torch.profiler trace of some steps, for chrome://tracing or Perfetto."""

    def __init__(self, steps: tuple[int, int] | None, file: Path) -> None:
        self._steps, self._file = steps, file
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Called with the 1-based number of a step that begins."""
        if self._steps is not None and step == self._steps[0]:
            self._profiler = torch.profiler.profile(profile_memory=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Called when the step is done."""
        if self._profiler is not None and self._steps is not None and step >= self._steps[1]:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._file))
            self._profiler = None
