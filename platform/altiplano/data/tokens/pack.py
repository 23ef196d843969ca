"""Packing: token sequences of any length into blocks of T tokens.

Text is cut where it must be (longer than a block) or where a block would stay emptier than its
share; instruction records stay whole. Sequences are put together by best fit, longest first
(Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830), in windows
of `WINDOW_TOKENS` of the stream, so the blocks depend on the stream alone and not on how it is
delivered. Deliberately knows nothing of text, tokenizers or files. Costs some 5 ns
per token and 10 bytes of memory per token of a window; no Python runs per sequence.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altiplano.data.tokens.fit import Pieces, best_fit, cut, fill_up

TARGET, FIRST, TOKEN = 1, 2, 4
"""Flags of a position: the loss is taken on predicting it; attention, positions and prediction
start anew at it; it is no padding."""

WINDOW_TOKENS = 1 << 22
"""Tokens of the stream that are packed together."""
_TOKENS_PER_YIELD = 1 << 20
"""Positions of one `Blocks`: few enough to stay in the processor's caches."""


@dataclass(frozen=True)
class Sequences:
    """Documents or records as tokens, one after the other."""

    ids: npt.NDArray[np.int32]
    """[N]."""
    lengths: npt.NDArray[np.int64]
    """[n], adding up to N."""
    loss: npt.NDArray[np.uint8] | None = None
    """[N], 1 where a token is a training target; None: every token of a sequence but its first,
    which has nothing to be predicted from (and is never one)."""


@dataclass(frozen=True)
class Blocks:
    """Full blocks; padding, only at a block's end, has token 0 and no flag."""

    tokens: npt.NDArray[np.int32]
    """[B, T]."""
    flags: npt.NDArray[np.uint8]
    """[B, T] of TARGET, FIRST and TOKEN."""


def pack_text(
    stream: Iterable[Sequences],
    sequence_length: int,
    *,
    cross_documents: bool = False,
    window_tokens: int = WINDOW_TOKENS,
) -> Iterator[Blocks]:
    """Pack documents; every token comes exactly once, and in order within its piece.

    A document longer than T gives full blocks and a rest. Rests and short documents are put
    together by best fit; then the emptiest blocks are cut up to fill the others. Each piece is a
    segment of its own whose first token is no target. The blocks of a window waste at most
    1/`fit.WORTH_A_CUT` of their positions, and one block's worth besides.

    Args:
        stream: documents with their BOS and EOS.
        sequence_length: T, at least 2.
        cross_documents: join the documents in their order instead and cut at every T tokens: a
            block is one segment, and every token but its first is a target.
        window_tokens: tokens that are packed together; the window ends with a document.
    """
    if cross_documents:
        yield from _concatenate(stream, sequence_length)
        return
    for window in _windows(stream, window_tokens):
        pieces = cut(window.lengths, sequence_length)
        pieces = pieces.in_bins(best_fit(pieces.lengths, sequence_length))
        yield from _gather(window, fill_up(pieces, sequence_length), sequence_length)


def pack_records(
    stream: Iterable[Sequences], sequence_length: int, *, window_tokens: int = WINDOW_TOKENS
) -> Iterator[Blocks]:
    """Put whole records together by best fit, longest first.

    That needs at most 11/9 of the fewest possible blocks, plus four (Johnson et al. 1974).

    Args:
        stream: records, each of at most T tokens.
        sequence_length: T.
        window_tokens: tokens that are packed together; the window ends with a record.
    """
    for window in _windows(stream, window_tokens):
        longest = int(window.lengths.max())
        assert longest <= sequence_length, f"record of {longest} tokens, T is {sequence_length}"
        pieces = cut(window.lengths, sequence_length)
        pieces = pieces.in_bins(best_fit(pieces.lengths, sequence_length))
        yield from _gather(window, pieces, sequence_length)


def _windows(stream: Iterable[Sequences], window_tokens: int) -> Iterator[Sequences]:
    """Cut the stream after every sequence that completes `window_tokens`."""
    held: list[Sequences] = []
    num_held = 0
    for part in stream:
        assert len(part.ids) == part.lengths.sum(), "lengths do not add up to the ids"
        held.append(part)
        num_held += len(part.ids)
        if num_held >= window_tokens:
            *windows, rest = _split(_join(held), window_tokens)
            yield from windows
            held, num_held = [rest], len(rest.ids)
    if num_held:
        yield _join(held)


def _join(parts: list[Sequences]) -> Sequences:
    """One after the other, without empty sequences."""
    lengths = np.concatenate([part.lengths for part in parts])
    losses = [part.loss for part in parts if part.loss is not None]
    assert len(losses) in (0, len(parts)), "a stream has a loss everywhere or nowhere"
    return Sequences(
        np.concatenate([part.ids for part in parts]),
        lengths[lengths > 0],
        np.concatenate(losses) if losses else None,
    )


def _split(sequences: Sequences, window_tokens: int) -> Iterator[Sequences]:
    """Windows, and at last what is too short for one (maybe nothing)."""
    ends = np.cumsum(sequences.lengths)
    first = start = 0
    while first <= len(ends):
        last = int(np.searchsorted(ends, start + window_tokens)) + 1
        stop = int(ends[last - 1]) if last <= len(ends) else len(sequences.ids)
        loss = None if sequences.loss is None else sequences.loss[start:stop]
        yield Sequences(sequences.ids[start:stop], sequences.lengths[first:last], loss)
        first, start = last, stop


def _gather(window: Sequences, pieces: Pieces, sequence_length: int) -> Iterator[Blocks]:
    """Copy every piece to its place.

    Index arithmetic instead of a copy per piece: the source of a position is one more than that
    of the position before, except where a piece (or the padding) begins.
    """
    pieces = pieces.sorted_by_bin()
    fills = pieces.fills()
    piece_ends = np.cumsum(np.bincount(pieces.bins, minlength=len(fills)))
    # Where each piece begins, were all blocks laid end to end with their padding.
    tokens_before = np.cumsum(pieces.lengths) - pieces.lengths
    fills_before = np.cumsum(fills) - fills
    places = pieces.bins * sequence_length + tokens_before - fills_before[pieces.bins]
    step = max(1, _TOKENS_PER_YIELD // sequence_length)
    for start in range(0, len(fills), step):
        stop = min(start + step, len(fills))
        chosen = slice(piece_ends[start - 1] if start else 0, piece_ends[stop - 1])
        at = places[chosen] - start * sequence_length
        sources = np.ones((stop - start) * sequence_length, np.int64)
        sources[at] = pieces.starts[chosen]
        previous = pieces.starts[chosen][:-1] + np.diff(at) - 1
        sources[at[1:]] -= previous
        np.cumsum(sources, out=sources)
        yield _blocks(window, sources, at, fills[start:stop], sequence_length)


def _blocks(
    window: Sequences,
    sources: npt.NDArray[np.int64],
    firsts: npt.NDArray[np.int64],
    fills: npt.NDArray[np.int64],
    sequence_length: int,
) -> Blocks:
    """Blocks from the source of every position; sources of padding are arbitrary."""
    shape = (len(fills), sequence_length)
    # Clipped: only padding points beyond the window.
    tokens = window.ids.take(sources, mode="clip").reshape(shape)
    flags = np.full(len(sources), TOKEN | TARGET, np.uint8)
    if window.loss is not None:
        flags[window.loss.take(sources, mode="clip") == 0] = TOKEN
    flags[firsts] = TOKEN | FIRST
    flags = flags.reshape(shape)
    short = np.flatnonzero(fills < sequence_length)
    padding = np.arange(sequence_length) >= fills[short, None]
    tokens[short] = np.where(padding, 0, tokens[short])
    flags[short] = np.where(padding, 0, flags[short])
    return Blocks(tokens, flags)


def _concatenate(stream: Iterable[Sequences], sequence_length: int) -> Iterator[Blocks]:
    """Documents joined in their order, cut at every T tokens."""
    rest = np.empty(0, np.int32)
    for part in stream:
        assert part.loss is None, "cross_documents takes text, which has no loss of its own"
        ids = np.concatenate([rest, part.ids])
        stop = len(ids) - len(ids) % sequence_length
        rest = ids[stop:]
        if stop:
            yield _whole(ids[:stop].reshape(-1, sequence_length))
    if len(rest):
        last = _whole(np.pad(rest, (0, sequence_length - len(rest)))[None])
        last.flags[0, len(rest) :] = 0
        yield last


def _whole(tokens: npt.NDArray[np.int32]) -> Blocks:
    flags = np.full(tokens.shape, TOKEN | TARGET, np.uint8)
    flags[:, 0] = TOKEN | FIRST
    return Blocks(tokens, flags)
