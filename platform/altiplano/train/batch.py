"""One micro-batch as the tensors a model is called with.

Attention never crosses documents. What it needs for that is made here, once per micro-batch, from
the store's segments: buckets of documents, or FlashAttention's cumulative lengths.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from altiplano.model.attention import arrange, document_lengths

if TYPE_CHECKING:
    from altiplano.data.tokens.store import Batch


@dataclass(frozen=True)
class Inputs:
    """What the body is called with, and the targets.

    Attributes:
        model: keyword arguments of the body.
        labels: [B, T] target ids, -100 for none.
    """

    model: dict[str, Any]
    labels: torch.Tensor


def make_inputs(batch: "Batch", attention: str, device: torch.device) -> Inputs:
    """Tensors on the device for a batch of packed blocks.

    Args:
        attention: `Machine.attention`. For `flash_attention_2` all is one flat row [1, B * T].
    """
    ids, positions, labels = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (batch.input_ids, batch.position_ids, batch.labels)
    )
    if attention == "flash_attention_2":
        flat = {"input_ids": ids.view(1, -1), "position_ids": positions.view(1, -1)}
        return Inputs({**flat, **_variable_lengths(batch, device)}, labels.view(1, -1))
    documents = arrange(batch.segment_ids, device)
    return Inputs({"input_ids": ids, "position_ids": positions, "documents": documents}, labels)


def _variable_lengths(batch: "Batch", device: torch.device) -> dict[str, Any]:
    """Given these, transformers need not ask the GPU in every layer where documents begin."""
    lengths = document_lengths(batch.segment_ids)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    cumulative = torch.from_numpy(ends).to(device, non_blocking=True)
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
