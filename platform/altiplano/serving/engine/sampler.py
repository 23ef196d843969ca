"""Verify a draft by sampling: draw the target's own token, accept the draft's where they are equal.

Every verified position is one ordinary decoding step of vLLM's `Sampler` (penalties, masks, bias,
temperature, min-p, top-k, top-p, logprobs), so the text has the target's distribution by
construction, and a seeded request draws from its generator once per token it gets: its text is the
one it has without a draft. Accepts a draft's likeliest token with the target's probability of it,
as rejection sampling (Leviathan et al. 2023) does for a draft that proposes its argmax.

It takes the place of vLLM's `RejectionSampler`, which on CPUs reads temperature, top-k and top-p of
draft positions from memory nobody has written (vLLM 0.29, `_expand_kernel_impl` fills a copy), and
everywhere leaves out min-p and the logit bias. Knows nothing of where drafts come from.

Costs what the tokens it emits cost without a draft: positions behind a disagreement are not drawn.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

_T = TypeVar("_T")

_CARRIED = "altiplano_refused"
"""Key of `SamplingParams.extra_args`."""


class ExactSampler(nn.Module):
    """Sample-then-agree, with the interface of vLLM's `RejectionSampler`."""

    def __init__(self, sampler: Sampler) -> None:
        """Args:
        sampler: the one that decodes without drafts.
        """
        super().__init__()
        self.sampler = sampler

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Draw each request's tokens up to the first that differs from its draft.

        Args:
            metadata: the drafts; request r has n_r of them, 0 included.
            draft_probs: not used.
            logits: `[sum(n_r + 1), vocab]`, a request's positions in a row.
            sampling_metadata: the batch's, a row per request.

        Returns:
            Tokens `[batch, max n_r + 1]` int32, -1 where none was drawn; logprobs flattened alike.
        """
        drafts = _split(metadata.draft_token_ids.tolist(), metadata.num_draft_tokens)
        width = metadata.max_spec_len + 1
        first = _first_positions(metadata.num_draft_tokens)
        tokens = torch.full((len(drafts), width), PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
        logprobs: LogprobsTensors | None = None
        alive = list(range(len(drafts)))
        for position in range(width):
            if not alive:
                break
            rows = torch.tensor(alive)
            step = self.sampler(
                logits=logits[first[rows] + position],
                sampling_metadata=_at_position(sampling_metadata, drafts, alive, position),
            )
            drawn = step.sampled_token_ids[:, 0]
            tokens[rows, position] = drawn
            logprobs = _put(
                logprobs, step.logprobs_tensors, rows * width + position, tokens.numel()
            )
            alive = [
                row
                for row, token in zip(alive, drawn.tolist(), strict=True)
                if position < len(drafts[row]) and drafts[row][position] == token
            ]
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def carry_refused(params: SamplingParams, vocab_size: int) -> None:
    """Move what vLLM refuses while speculating to where it does not look, in place.

    It refuses `min_p` and `logit_bias` because its own sampler leaves them out; `restore_refused`
    puts them back in the worker.

    Raises:
        ValueError: the bias names an id that is not in the vocabulary.
    """
    unknown = [token for token in params.logit_bias or {} if not 0 <= token < vocab_size]
    if unknown:
        raise ValueError(f"`logit_bias` names {unknown}, the vocabulary has {vocab_size} ids")
    if params.min_p or params.logit_bias:
        refused = {"min_p": params.min_p, "logit_bias": params.logit_bias}
        params.extra_args = {**(params.extra_args or {}), _CARRIED: refused}
        params.min_p, params.logit_bias = 0.0, None


def restore_refused(params: SamplingParams) -> None:
    """Undo `carry_refused`, in place."""
    refused = (params.extra_args or {}).get(_CARRIED)
    if refused:
        params.min_p, params.logit_bias = refused["min_p"], refused["logit_bias"]


def _split(tokens: list[int], counts: list[int]) -> list[list[int]]:
    """Cut the flat drafts into one list per request."""
    flat: Iterator[int] = iter(tokens)
    return [[next(flat) for _ in range(count)] for count in counts]


def _first_positions(counts: list[int]) -> Tensor:
    """Return where each request's logits begin: `[batch]`."""
    lengths = torch.tensor(counts) + 1
    return lengths.cumsum(0) - lengths


def _put(
    into: LogprobsTensors | None, step: LogprobsTensors | None, places: Tensor, size: int
) -> LogprobsTensors | None:
    """Write the logprobs of one position at `places` of `size` flat rows; None stays None."""
    if step is None:
        return None
    ids, values, ranks = step.logprob_token_ids, step.logprobs, step.selected_token_ranks
    if into is None:
        into = LogprobsTensors(
            ids.new_zeros(size, ids.shape[1]),
            values.new_zeros(size, values.shape[1]),
            ranks.new_zeros(size),
        )
    into.logprob_token_ids[places] = ids
    into.logprobs[places] = values
    into.selected_token_ranks[places] = ranks
    return into


def _at_position(
    batch: SamplingMetadata, drafts: list[list[int]], rows: list[int], position: int
) -> SamplingMetadata:
    """Return the metadata of `rows` as it is after `position` accepted draft tokens each."""
    if position == 0:
        return batch
    assert batch.thinking_budget_state_holder is None, "no reasoning_config is ever set"
    places = {row: place for place, row in enumerate(rows)}
    index = torch.tensor(rows)

    def take(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[index]

    return replace(
        batch,
        temperature=take(batch.temperature),
        top_p=take(batch.top_p),
        top_k=take(batch.top_k),
        generators=_moved(batch.generators, places),
        prompt_token_ids=take(batch.prompt_token_ids),
        frequency_penalties=take(batch.frequency_penalties),
        presence_penalties=take(batch.presence_penalties),
        repetition_penalties=take(batch.repetition_penalties),
        # Empty where nothing asks for the tokens so far.
        output_token_ids=batch.output_token_ids
        and [batch.output_token_ids[row] + drafts[row][:position] for row in rows],
        allowed_token_ids_mask=take(batch.allowed_token_ids_mask),
        bad_words_token_ids=_moved(batch.bad_words_token_ids, places),
        logprob_token_ids=_moved(batch.logprob_token_ids or {}, places),
        logitsprocs=LogitsProcessors(
            _processor_at(processor, len(drafts), index, position)
            for processor in batch.logitsprocs.all
        ),
        spec_token_ids=None,
    )


def _moved(by_row: dict[int, _T], places: dict[int, int]) -> dict[int, _T]:
    """Return the entries of the rows in `places`, under their places."""
    return {places[row]: value for row, value in by_row.items() if row in places}


def _processor_at(
    processor: LogitsProcessor, batch: int, rows: Tensor, position: int
) -> LogitsProcessor:
    """Return vLLM's processor as it acts on `rows` alone, after `position` more tokens each."""
    view = copy.copy(processor)
    place_of = torch.full((batch,), -1).index_copy(0, rows, torch.arange(len(rows)))
    if isinstance(view, MinPLogitsProcessor):
        if view.min_p_count:
            view.min_p = view.min_p[rows]
    elif isinstance(view, LogitBiasLogitsProcessor):
        row, token = view.logits_slice
        place = place_of[row.long()]
        view.logits_slice = place[place >= 0], token[place >= 0]
        view.bias_tensor = view.bias_tensor[place >= 0]
    else:
        assert isinstance(view, MinTokensLogitsProcessor), f"unknown {type(view)}"
        return _MinTokensAt(view, place_of.tolist(), len(rows), position)
    return view


class _MinTokensAt(LogitsProcessor):
    """The minimum length as it binds some positions later."""

    def __init__(
        self, processor: MinTokensLogitsProcessor, place_of: list[int], count: int, position: int
    ) -> None:
        self.processor = processor
        self.count = count
        processor.min_toks = {
            place_of[row]: (minimum - position, *state)
            for row, (minimum, *state) in processor.min_toks.items()
            if place_of[row] >= 0
        }

    def apply(self, logits: Tensor) -> Tensor:
        return self.processor.apply_with_spec_decode(logits, [1] * self.count)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: object) -> None:
        raise AssertionError("lives for one position of one step")
