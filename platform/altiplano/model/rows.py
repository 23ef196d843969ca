"""Parts of embedding and head: frozen old rows, trainable new rows, and rows that only pad.

The frozen part is a view of the loaded matrix, so nothing is copied, and no gradient of the size
of the vocabulary is ever made. Where the head is tied, it shares the embedding's two parts.
Padding rows take part in the head's product, whose speed they are there for; their logits are cut
off right after it, so no softmax, no loss and no gradient knows of them.

`head_terms` tells the loss what a head's logits are the sum of. Knows nothing of losses.
"""

from dataclasses import dataclass
from typing import Any

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
        """Look up ids [...] of either part.

        Every id is looked up in both parts and one result is taken: shapes do not depend on the
        ids, so a GPU need not wait for them and a compiler has one graph.
        """
        old, new = self.rows.old, self.rows.new
        vocab_old = old.shape[0]
        known = F.embedding(input_ids.clamp(max=vocab_old - 1), old)
        # Ids of the old part go to rows all over the new one, where their gradient of zero is
        # added: all on one row, they would wait for each other on a GPU.
        fresh = F.embedding((input_ids - vocab_old) % new.shape[0], new)
        return torch.where((input_ids >= vocab_old)[..., None], fresh.to(known.dtype), known)


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


@dataclass(frozen=True)
class HeadTerm:
    """One product that a head adds to its logits [n, pieces].

    `logits[:, first : first + rows] += states @ weight[:rows].T`

    Attributes:
        states: [n, K], with a gradient path.
        weight: [rows or more, K]; further rows are padding.
        first: column of the first row.
        rows: that are pieces.
    """

    states: torch.Tensor
    weight: torch.Tensor
    first: int
    rows: int


def head_terms(head: Any, states: torch.Tensor) -> list[HeadTerm] | None:
    """The products whose sum a head's logits of states [n, H] are.

    Columns come in order: a term begins where those before it end, or adds to what is there.

    Returns:
        None where the head is more than products of its own weights (a bias, DoRA, quantised or
        merged weights, any other function): then call it.
    """
    if isinstance(head, SplitHead):
        old, new = head.rows.old, head.rows.new
        vocab_old = old.shape[0]
        return [
            HeadTerm(states, old, 0, vocab_old),
            HeadTerm(states, new, vocab_old, new.shape[0]),
        ]
    if isinstance(head, PaddedHead):
        return [HeadTerm(states, head.weight, 0, head.pieces)]
    # Not its subclasses: a quantised matrix is one too.
    if type(head) is nn.Linear:
        is_product = head.bias is None
        return [HeadTerm(states, head.weight, 0, head.out_features)] if is_product else None
    return _lora_terms(head, states)


def _lora_terms(head: Any, states: torch.Tensor) -> list[HeadTerm] | None:
    """Terms of PEFT's LoRA: the layer under it, and one of width r for every active adapter."""
    from peft.tuners.lora import Linear

    if type(head) is not Linear or head.merged or head.disable_adapters or head.lora_variant:
        return None
    terms = head_terms(head.base_layer, states)
    names = [name for name in head.active_adapters if name in head.lora_A]
    if terms is None or any(head.lora_B[name].bias is not None for name in names):
        return None
    for name in names:
        down, up = head.lora_A[name], head.lora_B[name]
        narrow = down(head.lora_dropout[name](states.to(down.weight.dtype))) * head.scaling[name]
        terms.append(HeadTerm(narrow, up.weight, 0, up.out_features))
    return terms
