"""The loss over a large vocabulary, in chunks.

Positions without a target are dropped before the head's matrix product, and at most
`chunk_tokens` rows of logits exist at a time: their part is recomputed in the backward pass, so
memory is chunk_tokens x vocabulary instead of tokens x vocabulary, for one more product.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]

IGNORED = -100


def summed_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk_tokens: int = 1024
) -> torch.Tensor:
    """Sum of -ln p(label) over all positions whose label is not -100.

    Args:
        hidden: [B, T, H] last hidden states.
        labels: [B, T] target of each position (already shifted), -100 for none.
        head: maps [n, H] to logits [n, V].

    Returns:
        fp32 scalar; 0 with a gradient path where nothing is a target.
    """
    wanted = labels != IGNORED
    states, targets = hidden[wanted], labels[wanted]
    total = hidden.sum() * 0.0
    for start in range(0, states.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        total = total + _chunk(_cross_entropy, head, states[part], targets[part])
    return total.float()


def summed_distillation(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    chunk_tokens: int = 1024,
) -> torch.Tensor:
    """Sum over target positions of the cross-entropy against the teacher's distribution.

    This is KL(teacher || student) up to the teacher's entropy (Hinton et al. 2015, T = 1).
    Shapes as in `summed_cross_entropy`; `teacher_hidden` is [B, T, H_teacher].
    """
    wanted = labels != IGNORED
    states, teacher_states = hidden[wanted], teacher_hidden[wanted]
    total = hidden.sum() * 0.0
    for start in range(0, states.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        with torch.no_grad():
            target = teacher_head(teacher_states[part]).float().softmax(dim=-1)
        total = total + _chunk(_soft_cross_entropy, head, states[part], target)
    return total.float()


def _chunk(
    function: Callable[..., torch.Tensor], head: Head, states: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    result: torch.Tensor = checkpoint(function, head, states, target, use_reentrant=False)
    return result


def _cross_entropy(head: Head, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction="sum")


def _soft_cross_entropy(head: Head, states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * head(states).float().log_softmax(dim=-1)).sum()
