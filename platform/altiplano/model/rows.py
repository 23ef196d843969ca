"""Parts of embedding and head: frozen old rows, trainable new rows, and rows that only pad.

The frozen part is a view of the loaded matrix, so nothing is copied, and no gradient of the size
of the vocabulary is ever made. Where the head is tied, it shares the embedding's two parts.
Padding rows take part in the head's product, whose speed they are there for; their logits are cut
off right after it, so no softmax, no loss and no gradient knows of them.
"""

import torch
from torch import nn
from torch.nn import functional as F


class PaddedHead(nn.Linear):
    """A head whose matrix has padding rows: hidden [..., H] -> logits [..., pieces]."""

    def __init__(self, weight: nn.Parameter, pieces: int) -> None:
        rows, width = weight.shape
        super().__init__(width, rows, bias=False, device="meta")
        self.weight = weight
        self.pieces = pieces

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the pieces."""
        return super().forward(hidden)[..., : self.pieces]


class SplitRows(nn.Module):
    """The parts of one [V, H] matrix: `old` (frozen, V_old rows), `new` (trained), `padding`."""

    old: torch.Tensor

    def __init__(self, weight: torch.Tensor, vocab_old: int, pieces: int) -> None:
        super().__init__()
        self.register_buffer("old", weight.detach()[:vocab_old], persistent=False)
        self.new = nn.Parameter(weight.detach()[vocab_old:pieces].float().clone())
        self.padding = weight.shape[0] - pieces


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
    """Output head over split rows: hidden [..., H] -> logits [..., pieces]."""

    def __init__(self, rows: SplitRows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of both parts side by side."""
        new = self.rows.new.to(self.rows.old.dtype)
        if self.rows.padding:
            new = F.pad(new, (0, 0, 0, self.rows.padding))
        fresh = F.linear(hidden, new)[..., : self.rows.new.shape[0]]
        return torch.cat([F.linear(hidden, self.rows.old), fresh], dim=-1)
