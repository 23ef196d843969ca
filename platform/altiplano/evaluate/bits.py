"""Bits per byte: how well a model predicts text, comparable across vocabularies.

Perplexity per token falls when tokens get shorter; bits per UTF-8 byte do not depend on how the
text is cut. Knows a model and a vocabulary, not where the text came from.
Costs one forward pass over the text (long documents: nearly two); at most `batch_tokens` positions
and 1,024 rows of logits exist at a time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from altiplano.data.tokens.windows import Window, split_windows, take_bytes
from altiplano.errors import DataError, MismatchError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from altiplano.vocabulary.load import Vocabulary


def bits_per_byte(
    model: "LlamaForCausalLM",
    vocabulary: "Vocabulary",
    texts: Sequence[str],
    *,
    max_bytes: int,
    sequence_length: int,
    batch_tokens: int = 8192,
) -> dict[str, float]:
    """Sum of -log2 p over the tokens of every document, divided by its UTF-8 bytes.

    A document is BOS and its tokens; every token is scored, the first one given BOS alone; the end
    of the document is not. Where a vocabulary has no BOS (Qwen), the EOS of a document before it
    stands there, as in the base's own training. A document longer than the window is read in
    windows that overlap by half, and each token is scored once, so all but the first half-window
    have at least half a window of context.

    Args:
        model: in eval mode.
        vocabulary: the model's own.
        texts: whole documents; taken in order until `max_bytes`, the last one cut at a character.
        max_bytes: UTF-8 bytes to score; the cut does not depend on the vocabulary.
        sequence_length: tokens of a window; the model's longest context if that is less.
        batch_tokens: positions of one forward pass.

    Returns:
        `bits_per_byte`, `tokens_per_character`, `bytes`, `characters`, `tokens`, `documents`.

    Raises:
        DataError: there is no text.
        MismatchError: the vocabulary has neither BOS nor EOS, or more pieces than the model rows.
    """
    _require_fit(model, vocabulary)
    documents = take_bytes(texts, max_bytes)
    if not documents:
        raise DataError("no held-out text to score: raise data.held_out or give longer texts")
    encoded = vocabulary.encode_batch(documents)
    length = min(sequence_length, model.config.max_position_embeddings)
    start = vocabulary.bos_id if vocabulary.bos_id >= 0 else vocabulary.eos_id
    windows = [window for ids in encoded for window in split_windows([start, *ids], length)]
    nats = sum(_score(model, batch) for batch in _batches(windows, batch_tokens))
    tokens = sum(len(ids) for ids in encoded)
    characters = sum(len(text) for text in documents)
    size = sum(len(text.encode()) for text in documents)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "tokens_per_character": tokens / characters,
        "bytes": size,
        "characters": characters,
        "tokens": tokens,
        "documents": len(documents),
    }


def _require_fit(model: "LlamaForCausalLM", vocabulary: "Vocabulary") -> None:
    from altiplano.model.load import num_pieces

    rows = num_pieces(model.config.to_dict())
    if vocabulary.size > rows:
        raise MismatchError(
            f"the vocabulary has {vocabulary.size} pieces and the model {rows} rows: "
            f"give the model the tokenizer it was made with"
        )
    if vocabulary.bos_id < 0 and vocabulary.eos_id < 0:
        raise MismatchError(
            "the vocabulary has neither BOS nor EOS, which the first token of a document is "
            "predicted from: use a tokenizer with one of them"
        )


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows of like length together, so that little is padding."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda w: -len(w.token_ids)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _score(model: "LlamaForCausalLM", batch: Sequence[Window]) -> float:
    """Sum of -ln p over the tokens that the windows of a batch score."""
    import torch

    from altiplano.model.loss import IGNORED, summed_cross_entropy

    width = len(batch[0].token_ids) - 1
    # Padding stands right of every scored position, and attention looks left: no mask is needed.
    inputs = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), IGNORED)
    for row, window in enumerate(batch):
        ids = torch.tensor(window.token_ids)
        inputs[row, : len(ids) - 1] = ids[:-1]
        labels[row, window.first_scored : len(ids) - 1] = ids[window.first_scored + 1 :]
    with torch.no_grad():
        device = model.device
        hidden = model.model(input_ids=inputs.to(device), use_cache=False).last_hidden_state
        return float(summed_cross_entropy(hidden, labels.to(device), model.lm_head))
