"""Split embedding and head: frozen old rows, trainable new rows.

The frozen part is a view of the loaded matrix, so nothing is copied, and no gradient of the size
of the vocabulary is ever made. Where the head is tied, it shares the embedding's two parts.
"""

import torch
from torch import nn
from torch.nn import functional as F


class SplitRows(nn.Module):
    """The two parts of one [V, H] matrix: `old` (frozen, V_old rows) and `new` (trained)."""

    old: torch.Tensor

    def __init__(self, weight: torch.Tensor, vocab_old: int) -> None:
        super().__init__()
        self.register_buffer("old", weight.detach()[:vocab_old], persistent=False)
        self.new = nn.Parameter(weight.detach()[vocab_old:].float().clone())

    def joined(self) -> torch.Tensor:
        """The whole [V, H] matrix, new rows in the old rows' type; copies, for saving only."""
        return torch.cat([self.old, self.new.detach().to(self.old.dtype)])


class SplitEmbedding(nn.Module):
    """Embedding look-up over split rows: ids [...] -> [..., H]."""

    def __init__(self, rows: SplitRows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [...] of either part."""
        vocab_old = self.rows.old.shape[0]
        is_new = input_ids >= vocab_old
        embedded = F.embedding(input_ids.clamp(max=vocab_old - 1), self.rows.old)
        fresh = F.embedding(input_ids[is_new] - vocab_old, self.rows.new)
        return embedded.index_put((is_new,), fresh.to(embedded.dtype))


class SplitHead(nn.Module):
    """Output head over split rows: hidden [..., H] -> logits [..., V]."""

    def __init__(self, rows: SplitRows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of both parts side by side."""
        new = self.rows.new.to(self.rows.old.dtype)
        return torch.cat([F.linear(hidden, self.rows.old), F.linear(hidden, new)], dim=-1)
