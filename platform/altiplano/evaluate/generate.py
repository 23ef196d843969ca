"""Greedy text of many prompts at a time.

Knows token ids, not text. Prompts of like length share a batch, padded on the left; transformers
derives positions from the mask, so padding changes nothing. Costs one cached forward pass per
token of the longest reply of a batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def greedy_replies(
    model: "LlamaForCausalLM",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continue every prompt greedily.

    Args:
        model: in eval mode.
        prompts: token ids, BOS included; none empty.
        max_new_tokens: longest reply.
        eos_id: ends a reply and is left out of it; None to always go on to `max_new_tokens`.
        batch_size: prompts per batch.

    Returns:
        token ids of the replies, in the order of the prompts.
    """
    import torch
    from transformers import GenerationConfig

    assert all(prompts), "a prompt holds at least BOS"
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
        eos_token_id=eos_id, pad_token_id=0,
    )  # fmt: skip
    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            prompt = torch.tensor(prompts[index])
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        with torch.no_grad():
            generated = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
        for index, tokens in zip(chosen, generated[:, width:].tolist(), strict=True):
            replies[index] = _until(tokens, eos_id)
    return replies


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
