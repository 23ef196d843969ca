"""Causal attention inside the documents of a micro-batch, without a mask.

Documents of similar length are gathered into buckets [documents, longest, heads, head_dim], padded
on the right, where a causal query never looks. Each bucket is one call of PyTorch's scaled dot
product attention, which then needs no mask. `arrange` decides the buckets, once per micro-batch
and on the host; every layer uses its index tensors. So the work grows with the sum of squared
document lengths, not with the square of the block; two copies of the rows are the price.

Knows nothing of stores or training. The model is called with `documents=arrange(...)`, and its
`config._attn_implementation` is `DOCUMENTS` after `register()`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

DOCUMENTS = "altiplano_documents"
"""Name of this attention among transformers' implementations."""

Indices = npt.NDArray[np.int64]


@dataclass
class Documents:
    """Where the documents of one micro-batch lie.

    A slot is a row of a bucket: one token, or padding. `token_of_slot` is None where the slots
    are the tokens in their order; then nothing is gathered.

    Attributes:
        buckets: (documents, longest document in tokens) of each.
        token_of_slot: [slots] index into the micro-batch's flat tokens; 0 for padding.
        slot_of_token: [B * T] index into the slots.
    """

    buckets: list[tuple[int, int]]
    token_of_slot: torch.Tensor | None = None
    slot_of_token: torch.Tensor | None = None


@dataclass(frozen=True)
class _Costs:
    """What attention costs beside its query-key pairs, counted in such pairs."""

    row: int
    """Of a slot: gathering it, and the kernel's work on a row."""
    call: int
    """Of a bucket: starting its kernels, forward and backward."""


# Measured on a CPU at 8 heads of 64; on a GPU derived from bandwidth and launch times.
_COSTS = {"cpu": _Costs(row=100, call=2_000), "cuda": _Costs(row=600, call=500_000)}


def document_lengths(segments: Indices) -> Indices:
    """Lengths of the documents of a micro-batch in the order of its flat tokens, [documents].

    Args:
        segments: [B, T] number of each token's document, 0 for padding. A padding token counts
            as a document of its own: it costs next to nothing and stays finite.
    """
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = (segments[:, 1:] != segments[:, :-1]) | (segments[:, 1:] == 0)
    return np.diff(np.flatnonzero(begins), append=segments.size)


def arrange(segments: Indices, device: torch.device) -> Documents:
    """Sort a micro-batch's documents into buckets.

    Args:
        segments: [B, T] as `data.tokens.store.Batch.segment_ids`: documents never span blocks.
        device: where the attention is computed; the index tensors go there.
    """
    costs = _COSTS.get(device.type, _COSTS["cuda"])
    lengths = document_lengths(segments)
    order = np.argsort(lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    buckets, cost = cheapest_buckets(sizes, counts, costs.row, costs.call)
    blocks, length = segments.shape
    # One document per block, padded at the end: causal attention over the block is the same.
    if segments.max() <= 1 and blocks * length * (length + costs.row) + costs.call <= cost:
        return Documents([(blocks, length)])
    if len(sizes) == 1:
        return Documents(buckets)
    slot_of_token, slots = _place(lengths, order, buckets)
    token_of_slot = np.zeros(slots, np.int64)
    token_of_slot[slot_of_token] = np.arange(len(slot_of_token))
    there, back = (
        torch.from_numpy(index).to(device, non_blocking=True)
        for index in (token_of_slot, slot_of_token)
    )
    return Documents(buckets, there, back)


def cheapest_buckets(
    sizes: Indices, counts: Indices, row: int, call: int
) -> tuple[list[tuple[int, int]], int]:
    """Cut ascending document lengths into runs so that padded work and calls cost least.

    A run of n documents, the longest of L tokens, costs n L (L + row) + call. Exact, by dynamic
    programming over the different lengths, of which N tokens have at most sqrt(2 N).

    Returns:
        (documents, longest) of each bucket, shortest first, and the whole cost.
    """
    documents = np.concatenate([[0], np.cumsum(counts)])
    best = np.zeros(len(sizes) + 1, np.int64)
    cut = np.zeros(len(sizes) + 1, np.int64)
    for end, size in enumerate(sizes, start=1):
        padded = (documents[end] - documents[:end]) * (size * (size + row))
        totals = best[:end] + padded + call
        cut[end] = totals.argmin()
        best[end] = totals[cut[end]]
    buckets, end = [], len(sizes)
    while end:
        start = cut[end]
        buckets.append((int(documents[end] - documents[start]), int(sizes[end - 1])))
        end = start
    return buckets[::-1], int(best[-1])


def _place(lengths: Indices, order: Indices, buckets: list[tuple[int, int]]) -> tuple[Indices, int]:
    """Slot of each flat token, and the number of slots."""
    widths = np.repeat([longest for _, longest in buckets], [count for count, _ in buckets])
    first_slot = np.empty_like(lengths)
    first_slot[order] = np.cumsum(widths) - widths
    first_token = np.cumsum(lengths) - lengths
    slots = np.repeat(first_slot - first_token, lengths) + np.arange(lengths.sum())
    return slots, int(widths.sum())


def register() -> None:
    """Make `DOCUMENTS` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(DOCUMENTS, attend)
    AttentionMaskInterface.register(DOCUMENTS, _make_mask)


# Bucket shapes change with every micro-batch: compiled, each would be compiled anew.
@torch.compiler.disable
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' layers call it.

    Args:
        query: [B, H, T, d].
        key: [B, H_kv, T, d]; H is a multiple of H_kv (grouped queries, Ainslie et al. 2023).
        value: as `key`.
        attention_mask: None in training; with a mask it is transformers' own SDPA.
        documents: of this micro-batch; without it, plain causal attention over T.

    Returns:
        [B, T, H, d] in the type of `value`, and None for the weights.
    """
    if attention_mask is not None or documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return out, None
    # CPU kernels are up to 4 times slower in bfloat16 than in float32, casts included.
    on_cpu = query.device.type == "cpu"
    compute = torch.promote_types(value.dtype, torch.float32) if on_cpu else value.dtype
    blocks, heads, length, width = query.shape
    rows = [_spread(states, documents).to(compute) for states in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        out = _attend_buckets(rows, documents.buckets, scaling, dropout)
    if documents.slot_of_token is not None:
        out = _Collect.apply(out, documents.slot_of_token)
    return out.to(value.dtype).view(blocks, length, heads, width), None


def _spread(states: torch.Tensor, documents: Documents) -> torch.Tensor:
    """[B, H, T, d] -> [slots, H, d]."""
    rows = states.transpose(1, 2).flatten(0, 1)
    if documents.token_of_slot is None:
        return rows
    spread: torch.Tensor = _Spread.apply(rows, documents.token_of_slot, documents.slot_of_token)
    return spread


def _attend_buckets(
    rows: list[torch.Tensor],
    buckets: list[tuple[int, int]],
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Queries, keys and values of all slots -> [slots, H, d]."""
    sizes = [count * longest for count, longest in buckets]
    outs = []
    for (count, longest), *parts in zip(
        buckets, *(states.split(sizes) for states in rows), strict=True
    ):
        query, key, value = (part.unflatten(0, (count, longest)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Spread(torch.autograd.Function):
    """Rows of tokens to rows of slots.

    The gradient of a token is that of its slot. Padding slots have none: only their own queries,
    whose outputs nobody takes, look at them. So both ways are gathers, without a sum.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, token_of_slot: torch.Tensor,
        slot_of_token: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(slot_of_token)
        return rows.index_select(0, token_of_slot)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slot_of_token,) = ctx.saved_tensors
        return grad.index_select(0, slot_of_token), None, None


class _Collect(torch.autograd.Function):
    """Rows of slots to rows of tokens; padding slots get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, slot_of_token: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slot_of_token)
        ctx.slots = rows.shape[0]
        return rows.index_select(0, slot_of_token)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slot_of_token,) = ctx.saved_tensors
        spread = grad.new_zeros((ctx.slots, *grad.shape[1:]))
        return spread.index_copy_(0, slot_of_token, grad), None


def _make_mask(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """The mask transformers shall build: none in training, SDPA's with padding or a cache."""
    if attention_mask is None and q_length == kv_length:
        return None
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )
    return mask
