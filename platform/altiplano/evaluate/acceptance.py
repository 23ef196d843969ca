"""How many of a draft's proposals a target accepts, without running speculative decoding.

Greedy speculation emits the target's own greedy text, so the draft's proposals need only be held
against that text: a proposal is accepted while it and all before it in its block are what the
target says. One forward pass of the draft over the finished text tells each of them.
Knows token ids. Costs the target's greedy generation and one pass of the draft.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altiplano.errors import MismatchError
from altiplano.evaluate.generate import greedy_replies
from altiplano.model.load import num_pieces

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def draft_acceptance(
    target: "LlamaForCausalLM",
    draft: "LlamaForCausalLM",
    prompt_ids: Sequence[Sequence[int]],
    *,
    k: int,
    max_new_tokens: int,
    eos_id: int | None = None,
) -> dict[str, float]:
    """Exact acceptance of greedy speculative decoding with blocks of `k` proposals.

    As in an engine, the target says the first token of a reply alone; then each step proposes `k`
    tokens (fewer at the end of the text), accepts the leading right ones and adds one token of the
    target's own.

    Args:
        prompt_ids: token ids of every prompt, BOS included.
        k: proposals per step.
        eos_id: ends a reply; it counts as a token of the reply.

    Returns:
        `acceptance_rate` (accepted / proposed), `accepted_per_step`, `agreement` (share of tokens
        the draft gives right after the target's own text), `tokens`, `steps`.

    Raises:
        MismatchError: the two vocabularies differ in size.
    """
    sizes = [num_pieces(model.config.to_dict()) for model in (target, draft)]
    if sizes[0] != sizes[1]:
        raise MismatchError(
            f"the target has {sizes[0]} pieces and the draft {sizes[1]}: a draft must have its "
            f"target's vocabulary; make it from this target: `altiplano draft CONFIG`"
        )
    replies = greedy_replies(target, prompt_ids, max_new_tokens=max_new_tokens, eos_id=eos_id)
    agrees: list[list[bool]] = []
    for prompt, reply in zip(prompt_ids, replies, strict=True):
        ended = len(reply) < max_new_tokens and eos_id is not None
        agrees.append(_agreement(draft, prompt, [*reply, eos_id] if ended else reply))
    counts = [count_accepted(right, k) for right in agrees]
    accepted, proposed, steps = (sum(column) for column in zip(*counts, strict=True))
    tokens = sum(len(right) for right in agrees)
    return {
        "acceptance_rate": accepted / max(1, proposed),
        "accepted_per_step": accepted / max(1, steps),
        "agreement": sum(sum(right) for right in agrees) / max(1, tokens),
        "tokens": tokens,
        "steps": steps,
    }


def count_accepted(right: Sequence[bool], k: int) -> tuple[int, int, int]:
    """(accepted, proposed, steps) of one reply, given which of its tokens the draft foresees."""
    accepted = proposed = steps = 0
    position = 1  # the first token comes with the prompt's own pass
    while position < len(right):
        block = right[position : position + k]
        run = next((index for index, good in enumerate(block) if not good), len(block))
        accepted, proposed, steps = accepted + run, proposed + len(block), steps + 1
        position += run + 1
    return accepted, proposed, steps


def _agreement(
    draft: "LlamaForCausalLM", prompt: Sequence[int], reply: Sequence[int | None]
) -> list[bool]:
    """For every token of the reply: is it the draft's most likely one after all before it?"""
    import torch

    ids = torch.tensor([[*prompt, *reply]], device=draft.device)
    with torch.no_grad():
        hidden = draft.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        proposals = draft.lm_head(hidden[0, len(prompt) - 1 :]).argmax(dim=-1)
    same: list[bool] = (proposals == ids[0, len(prompt) :]).tolist()
    return same
