"""Packing: token sequences of any length into blocks of at most T tokens.

Text is split where a block ends, so no position is wasted; instruction records stay whole.
Deliberately knows nothing of text, tokenizers or files. Costs one pass; records are held in
windows of `RECORDS_PER_WINDOW`.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RECORDS_PER_WINDOW = 16_384
"""Records that are packed together: enough for full blocks, few enough for memory."""

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class TokenSequence:
    """One document or record as tokens."""

    ids: IntArray
    loss: IntArray
    """1 where a token is a training target."""


@dataclass(frozen=True)
class Block:
    """Up to T tokens; all arrays have the same length."""

    ids: IntArray
    segments: IntArray
    """1, 2, ...: which document of the block a token belongs to."""
    loss: IntArray


def pack_text(documents: Iterable[IntArray], sequence_length: int) -> Iterator[Block]:
    """Fill blocks one after the other, splitting documents at block borders.

    Every id of every document comes exactly once and in order; all blocks but the last are full.
    Each piece is a segment of its own, and every token but a segment's first is a target (the
    first has nothing to be predicted from).

    Args:
        documents: ids with their BOS and EOS.
        sequence_length: T.
    """
    pieces: list[IntArray] = []
    room = sequence_length
    for document in documents:
        start = 0
        while start < len(document):
            piece = document[start : start + room]
            pieces.append(piece)
            start += len(piece)
            room -= len(piece)
            if room == 0:
                yield _join([TokenSequence(piece, _all_but_first(piece)) for piece in pieces])
                pieces, room = [], sequence_length
    if pieces:
        yield _join([TokenSequence(piece, _all_but_first(piece)) for piece in pieces])


def pack_records(
    records: Iterable[TokenSequence], sequence_length: int, window: int = RECORDS_PER_WINDOW
) -> Iterator[Block]:
    """Put whole records together by best fit, longest first, within windows of records.

    Best-fit decreasing needs at most 11/9 of the fewest possible blocks, plus one
    (Johnson et al. 1974).

    Args:
        records: each of at most T tokens.
        sequence_length: T.
        window: records packed together.
    """
    for group in _windows(records, window):
        yield from (_join(block) for block in _best_fit(group, sequence_length))


def _windows(records: Iterable[TokenSequence], window: int) -> Iterator[list[TokenSequence]]:
    stream = iter(records)
    while group := list(itertools.islice(stream, window)):
        yield group


def _best_fit(records: Sequence[TokenSequence], sequence_length: int) -> list[list[TokenSequence]]:
    """Blocks of records; each record goes where it leaves the least room."""
    blocks: list[list[TokenSequence]] = []
    rooms: list[tuple[int, int]] = []  # (room left, block number), sorted
    for record in sorted(records, key=lambda record: -len(record.ids)):
        length = len(record.ids)
        assert length <= sequence_length, f"record of {length} tokens, block of {sequence_length}"
        at = bisect_left(rooms, (length, 0))
        if at < len(rooms):
            room, number = rooms.pop(at)
        else:
            room, number = sequence_length, len(blocks)
            blocks.append([])
        blocks[number].append(record)
        if room > length:
            insort(rooms, (room - length, number))
    return blocks


def _join(sequences: Sequence[TokenSequence]) -> Block:
    numbers = [np.full(len(s.ids), number) for number, s in enumerate(sequences, start=1)]
    return Block(
        ids=np.concatenate([s.ids for s in sequences]),
        segments=np.concatenate(numbers),
        loss=np.concatenate([s.loss for s in sequences]),
    )


def _all_but_first(ids: IntArray) -> npt.NDArray[np.uint8]:
    loss = np.ones(len(ids), np.uint8)
    loss[0] = 0
    return loss
