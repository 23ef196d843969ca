"""Which piece of which sequence goes into which block: best fit over a histogram of lengths.

Works on lengths alone and never sees a token. Blocks that are filled alike are one group, so the
cost depends on how many lengths are distinct (at most T), not on how many sequences there are.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

WORTH_A_CUT = 128
"""A block is filled up with part of another document where at least T / this is empty."""


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens of one flat array; all arrays are int64 [number of pieces]."""

    starts: Ints
    """First token of each piece."""
    lengths: Ints
    bins: Ints
    """Number of the block each piece is in."""

    def in_bins(self, bins: Ints) -> Self:
        """The same pieces, put into blocks."""
        return type(self)(self.starts, self.lengths, bins)

    def chosen(self, which: npt.NDArray[np.generic]) -> Self:
        """Some of the pieces, or all in another order."""
        return type(self)(self.starts[which], self.lengths[which], self.bins[which])

    def sorted_by_bin(self) -> Self:
        """Block by block; blocks are numbered from 0 without a gap, pieces keep their order."""
        bins = (np.cumsum(np.bincount(self.bins) > 0) - 1)[self.bins]
        return self.in_bins(bins).chosen(np.argsort(bins, kind="stable"))

    def fills(self) -> Ints:
        """Tokens in each block."""
        return np.bincount(self.bins, weights=self.lengths).astype(np.int64)


def cut(lengths: Ints, sequence_length: int) -> Pieces:
    """Sequences as pieces of T tokens and a rest; not yet in blocks.

    Args:
        lengths: [n] tokens of each sequence, none of them 0.
        sequence_length: T.
    """
    counts = -(-lengths // sequence_length)
    last = np.cumsum(counts) - 1
    piece_lengths = np.full(int(counts.sum()), sequence_length, np.int64)
    piece_lengths[last] = lengths - (counts - 1) * sequence_length
    starts = np.cumsum(piece_lengths) - piece_lengths
    return Pieces(starts, piece_lengths, np.zeros_like(starts))


def best_fit(lengths: Ints, sequence_length: int) -> Ints:
    """Block of each piece, by best fit decreasing: each goes where it leaves the least room.

    Args:
        lengths: [n], between 1 and T.
        sequence_length: T.

    Returns:
        [n] block numbers from 0.
    """
    groups = _Groups(sequence_length)
    counts = np.bincount(lengths, minlength=sequence_length + 1)
    for length in np.flatnonzero(counts)[::-1]:
        groups.put(int(length), int(counts[length]))
    slot_lengths, slot_bins = groups.slots()
    bins = np.empty_like(lengths)
    by_length = np.argsort(lengths, kind="stable")
    bins[by_length] = slot_bins[np.argsort(slot_lengths, kind="stable")]
    return bins


class _Groups:
    """Blocks by what is in them: a group's blocks hold what its parent's do, and one thing more.

    A group is a node of a tree; `counts` says how many blocks are just so.
    """

    def __init__(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length
        self._parents = [-1]
        self._added = [(0, 0)]
        """(length, pieces of it in every block), beyond what the parent holds."""
        self._counts = [0]
        self._with_room: dict[int, list[int]] = defaultdict(list)
        """Groups that have blocks, by their room."""
        self._rooms = 0
        """Bit r is set where `_with_room[r]` is not empty."""

    def put(self, length: int, count: int) -> None:
        """Place pieces of one length, the shortest so far.

        The fullest block that has room takes as many as fit, since it stays the best fit until
        it has no more room; then the next. All blocks of a group are filled at once.
        """
        while count:
            enough = self._rooms >> length
            if not enough:
                each = self._sequence_length // length
                self._open(count // each, length, each)
                self._open(min(1, count % each), length, count % each)
                return
            room = length + (enough & -enough).bit_length() - 1
            group = self._with_room[room][-1]
            each = min(room // length, count)
            filled = min(self._counts[group], count // each)
            self._take(room, group, filled)
            self._add(group, room, filled, length, each)
            count -= filled * each

    def _open(self, blocks: int, length: int, each: int) -> None:
        if blocks:
            self._add(0, self._sequence_length, blocks, length, each)

    def _take(self, room: int, group: int, blocks: int) -> None:
        self._counts[group] -= blocks
        if self._counts[group] == 0:
            self._with_room[room].pop()
            if not self._with_room[room]:
                self._rooms ^= 1 << room

    def _add(self, parent: int, room: int, blocks: int, length: int, each: int) -> None:
        group, room = len(self._parents), room - length * each
        self._parents.append(parent)
        self._added.append((length, each))
        self._counts.append(blocks)
        self._with_room[room].append(group)
        self._rooms |= 1 << room

    def slots(self) -> tuple[Ints, Ints]:
        """Length and block of every place for a piece."""
        first_bins = (np.cumsum(self._counts) - self._counts).tolist()
        rows = []
        for group, count in enumerate(self._counts):
            node = group if count else 0
            while node:
                rows.append((*self._added[node], count, first_bins[group]))
                node = self._parents[node]
        lengths, each, counts, firsts = np.array(rows, np.int64).reshape(-1, 4).T
        sizes = each * counts
        number = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        bins = np.repeat(firsts, sizes) + number // np.repeat(each, sizes)
        return np.repeat(lengths, sizes), bins


def fill_up(pieces: Pieces, sequence_length: int) -> Pieces:
    """Cut up the emptiest blocks to fill the others, as far as that saves blocks.

    Args:
        pieces: in blocks.
        sequence_length: T.

    Returns:
        The same tokens, in fewer blocks or the same; only pieces of dissolved blocks are cut.
    """
    fills = pieces.fills()
    emptiest = np.argsort(fills, kind="stable")
    sorted_fills = fills[emptiest]
    gaps = sequence_length - sorted_fills
    gaps[gaps < max(2, sequence_length // WORTH_A_CUT)] = 0
    room_beyond = gaps.sum() - np.cumsum(gaps)
    dissolved = int(np.count_nonzero(np.cumsum(sorted_fills) <= room_beyond))
    if dissolved == 0:
        return pieces
    is_dissolved = np.zeros(len(fills), bool)
    is_dissolved[emptiest[:dissolved]] = True
    leaves = is_dissolved[pieces.bins]
    poured = _pour(pieces.chosen(leaves), emptiest[dissolved:], gaps[dissolved:])
    return _join(pieces.chosen(~leaves), poured)


def _pour(pieces: Pieces, bins: Ints, gaps: Ints) -> Pieces:
    """Pieces laid end to end and cut where one gap is full and the next begins."""
    piece_ends, gap_ends = np.cumsum(pieces.lengths), np.cumsum(gaps)
    total = piece_ends[-1]
    ends = np.union1d(piece_ends, gap_ends[gap_ends < total])
    begins = np.concatenate([[0], ends[:-1]])
    source = np.searchsorted(piece_ends, begins, side="right")
    starts = pieces.starts[source] + begins - (piece_ends - pieces.lengths)[source]
    return Pieces(starts, ends - begins, bins[np.searchsorted(gap_ends, begins, side="right")])


def _join(left: Pieces, right: Pieces) -> Pieces:
    return Pieces(
        np.concatenate([left.starts, right.starts]),
        np.concatenate([left.lengths, right.lengths]),
        np.concatenate([left.bins, right.bins]),
    )
