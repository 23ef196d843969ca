"""All that a training needs to go on: what checkpoints hold and strategies give and take.

Unsharded and on the CPU, so that a run may be resumed by any number of workers and under any
strategy. Size: three times the trained tensors. Knows neither files nor workers.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class TrainState:
    """A training after `step` finished steps. Data order and dropout follow from the step.

    Attributes:
        step: optimizer steps done.
        weights: trained fp32 tensors by parameter name (`Trainee.trainable`).
        moments: AdamW's state by parameter name: `exp_avg`, `exp_avg_sq` and `step`.
        progress: plain values: run key, precision, best evaluation so far.
    """

    step: int
    weights: dict[str, "torch.Tensor"]
    moments: dict[str, dict[str, "torch.Tensor"]]
    progress: dict[str, Any] = field(default_factory=dict)
