"""One micro-batch as the tensors a model is called with.

Attention never crosses documents: PyTorch's SDPA gets a block-causal mask of [B, 1, T, T] booleans
(quadratic in the block length, not in the corpus); FlashAttention gets one flat row whose position
ids restart at every document, from which transformers derives variable-length calls.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from altiplano.data.tokens.store import Batch


@dataclass(frozen=True)
class Inputs:
    """What the body is called with, and the targets.

    Attributes:
        model: keyword arguments of the body.
        labels: [B, T] target ids, -100 for none.
    """

    model: dict[str, torch.Tensor | None]
    labels: torch.Tensor


def make_inputs(batch: "Batch", attention: str, device: torch.device) -> Inputs:
    """Tensors on the device for a batch of packed blocks."""
    ids, positions, segments, labels = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (batch.input_ids, batch.position_ids, batch.segment_ids, batch.labels)
    )
    if attention == "flash_attention_2":
        flat = {"input_ids": ids.view(1, -1), "position_ids": positions.view(1, -1)}
        return Inputs({**flat, "attention_mask": None}, labels.view(1, -1))
    return Inputs(
        {"input_ids": ids, "position_ids": positions, "attention_mask": document_mask(segments)},
        labels,
    )


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """Which key each query sees: same document, not later. [B, T] -> [B, 1, T, T] booleans."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    return (same & causal)[:, None]
