"""Keys and values of many sequences in one piece of memory, found by what the sequences hold.

A sequence is known by the digests of its last few states, so an engine need not say when a request
moves, ends or returns. It lies in one block of memory, whose size doubles as it grows; blocks are
given lowest address first, so that those of a batch are neighbours and attention reads them in
place, without gathering. Going back to a shorter state costs nothing: later tokens are forgotten.
When memory runs out, the engine that holds most loses what it used longest ago: who floods the
cache floods its own part. Knows no model and no protocol. A look-up costs microseconds; memory is
taken as it is first touched, up to the given size.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from altiplano.errors import ServeError
from altiplano.serving.speculation.llama import Places, Run, Shape
from altiplano.serving.speculation.protocol import digest

Ids = npt.NDArray[np.int32]

_SMALLEST_BLOCK = 64
_FEWEST_SEQUENCES = 4
"""Of full length, that must fit."""
_NAMES_KEPT = 4
"""States by which a sequence is found: an engine whose last ask was lost names an earlier one."""
_SHORTEST_PREFIX = 16
"""Tokens that must agree for copying to pay."""


class Blocks:
    """Buddy allocator over the tokens of the cache (Knowlton 1965).

    Sizes are `smallest * 2^i` up to `largest`.
    """

    def __init__(self, largest: int, count: int) -> None:
        """Begin with `count` free blocks; `largest` is raised to the next size (`.largest`)."""
        levels = max((largest // _SMALLEST_BLOCK).bit_length() - 1, 0)
        self.smallest = -(-largest // 2**levels)
        self.largest = self.smallest * 2**levels
        self._free = {self.smallest * 2**level: set[int]() for level in range(levels + 1)}
        self._free[self.largest].update(range(0, count * self.largest, self.largest))

    def fit(self, tokens: int) -> int:
        """Size of the smallest block that holds `tokens`."""
        size = self.smallest
        while size < tokens:
            size *= 2
        assert size <= self.largest, f"{tokens} tokens are more than a block of {self.largest}"
        return size

    def take(self, size: int) -> int | None:
        """First token of a free block, the lowest there is; None where none is free."""
        fitting = [(min(starts), large) for large, starts in self._free.items() if starts]
        fitting = [(start, large) for start, large in fitting if large >= size]
        if not fitting:
            return None
        # Splitting a large block is put off as long as a small one will do.
        start, large = min(fitting, key=lambda block: (block[1], block[0]))
        self._free[large].remove(start)
        while large > size:
            large //= 2
            self._free[large].add(start + large)
        return start

    def give(self, start: int, size: int) -> None:
        """Take a block back and join it with its free neighbours."""
        while size < self.largest:
            neighbour = start + size if start // size % 2 == 0 else start - size
            if neighbour not in self._free[size]:
                break
            self._free[size].remove(neighbour)
            start, size = min(start, neighbour), size * 2
        self._free[size].add(start)


@dataclass(eq=False)
class Sequence:
    """One text: what the target has said of it, then what the draft guesses will follow."""

    ids: Ids
    """[size]; the first `known` count."""
    start: int
    size: int
    """Tokens of its block."""
    owner: str
    length: int = 0
    """Tokens that are the target's."""
    known: int = 0
    """`length` and the guesses after it."""
    cached: int = 0
    """First tokens whose keys and values are in the block."""
    used: int = 0
    """Turn in which it was last asked for; it stays for the whole turn."""
    names: list[int] = field(default_factory=list)

    def append(self, tokens: Rows[int] | Ids) -> None:
        """The target has made these; guesses that were right stay, with all that follows them."""
        new = np.asarray(tokens, dtype=np.int32)
        end = self.length + len(new)
        guessed = self.ids[self.length : min(self.known, end)]
        right = int((np.cumprod(guessed == new[: len(guessed)])).sum())
        if right < len(new):
            self.ids[self.length : end] = new
            self.cached = min(self.cached, self.length + right)
            self.known = end
        self.length = end

    def guess(self, token: int) -> None:
        """The draft continues with `token`."""
        self.ids[self.known] = token
        self.known += 1


class Cache:
    """All sequences a draft holds."""

    def __init__(
        self, shape: Shape, *, max_len: int, gib: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Lay out the memory.

        Args:
            max_len: longest sequence; less where fewer than `_FEWEST_SEQUENCES` would fit.

        Raises:
            ServeError: they would be shorter than a block.
        """
        self._shape, self._dtype = shape, dtype
        per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize
        tokens = int(gib * 2**30) // per_token
        self.max_len = min(max_len, tokens // _FEWEST_SEQUENCES)
        """Longest sequence it takes."""
        if self.max_len < min(max_len, _SMALLEST_BLOCK):
            raise ServeError(
                f"`draft.cache_gib` {gib:g} holds {tokens} tokens of this draft, too few to guess "
                f"from ({per_token} bytes each): raise it"
            )
        largest = Blocks(self.max_len, 0).largest
        count = tokens // largest
        self._blocks = Blocks(self.max_len, count)
        rows = count * largest * shape.kv_heads
        # Zeros: unused values are masked by adding -inf to scores, which leaves NaN what it is.
        self.arena = torch.zeros(
            (shape.layers, 2, rows, shape.head_dim), dtype=dtype, device=device
        )
        self._sequences: set[Sequence] = set()
        self._named: dict[int, tuple[Sequence, int]] = {}
        self.turn = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def find(self, name: int, length: int) -> Sequence | None:
        """The sequence that had this digest when it had `length` tokens, or None."""
        sequence, at = self._named.get(name, (None, 0))
        return sequence if at == length else None

    def name(self, sequence: Sequence) -> None:
        """Make the sequence found by what it is now."""
        name = digest(sequence.ids[: sequence.length])
        if name in sequence.names:
            return
        sequence.names.append(name)
        self._named[name] = (sequence, sequence.length)
        if len(sequence.names) > _NAMES_KEPT:
            self._unname(sequence, sequence.names.pop(0))

    def new(self, tokens: Rows[int], owner: str, room: int) -> Sequence | None:
        """A sequence of these tokens, with what another one already has of its beginning.

        Args:
            room: tokens it must have space for.

        Returns:
            None where the memory is taken by sequences of this turn.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        source, common = self._longest_prefix(ids)
        sequence = self._place(owner, room)
        if sequence is None:
            return None
        if source is not None and source in self._sequences:
            self._copy(source, sequence, common)
        sequence.append(ids[sequence.length :])
        return sequence

    def fork(self, source: Sequence, length: int, owner: str, room: int) -> Sequence | None:
        """A copy of the first `length` tokens; None as in `new`."""
        source.used = self.turn
        sequence = self._place(owner, room)
        if sequence is not None:
            self._copy(source, sequence, length)
        return sequence

    def reserve(self, sequence: Sequence, room: int) -> bool:
        """Give a sequence space for `room` tokens; False where there is none."""
        if room <= sequence.size:
            return True
        sequence.used = self.turn
        grown = self._place(sequence.owner, room)
        if grown is None:
            return False
        self._copy(sequence, grown, sequence.known)
        self._sequences.remove(grown)
        self._blocks.give(sequence.start, sequence.size)
        sequence.start, sequence.size, sequence.ids = grown.start, grown.size, grown.ids
        return True

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._sequences.remove(sequence)
        for name in sequence.names:
            self._unname(sequence, name)
        self._blocks.give(sequence.start, sequence.size)

    def _unname(self, sequence: Sequence, name: int) -> None:
        if self._named.get(name, (None, 0))[0] is sequence:
            del self._named[name]

    def _place(self, owner: str, room: int) -> Sequence | None:
        """An empty sequence, made room for by forgetting others."""
        size = self._blocks.fit(room)
        while (start := self._blocks.take(size)) is None:
            victim = self._victim(owner, size)
            if victim is None:
                return None
            self.drop(victim)
            self.evictions += 1
        sequence = Sequence(np.empty(size, np.int32), start, size, owner, used=self.turn)
        self._sequences.add(sequence)
        return sequence

    def _victim(self, owner: str, size: int) -> Sequence | None:
        """Of the owner that would hold most, what was used longest ago."""
        held = {owner: size}
        for sequence in self._sequences:
            held[sequence.owner] = held.get(sequence.owner, 0) + sequence.size
        idle = [sequence for sequence in self._sequences if sequence.used < self.turn]
        idle = [sequence for sequence in idle if held[sequence.owner] >= held[owner]]
        if not idle:
            return None
        return min(idle, key=lambda sequence: (-held[sequence.owner], sequence.used))

    def _longest_prefix(self, ids: Ids) -> tuple[Sequence | None, int]:
        """The sequence that shares most first tokens with `ids`, and how many, or (None, 0)."""
        best, longest = None, 0
        short = ids[:_SHORTEST_PREFIX]
        for sequence in self._sequences:
            end = min(sequence.cached, len(ids))
            if end <= max(longest, _SHORTEST_PREFIX) or not np.array_equal(
                sequence.ids[: len(short)], short
            ):
                continue
            differs = np.flatnonzero(sequence.ids[:end] != ids[:end])
            common = int(differs[0]) if len(differs) else end
            if common > longest:
                best, longest = sequence, common
        return best, longest

    def _copy(self, source: Sequence, target: Sequence, length: int) -> None:
        """Let an empty sequence begin with `length` tokens of another."""
        target.ids[:length] = source.ids[:length]
        target.length = target.known = length
        target.cached = min(source.cached, length)
        self._view(target)[..., : target.cached, :] = self._view(source)[..., : target.cached, :]

    def _view(self, sequence: Sequence) -> Tensor:
        """[layers, 2, kv_heads, size, head_dim] of a sequence's block."""
        heads = self._shape.kv_heads
        rows = self.arena[:, :, sequence.start * heads : (sequence.start + sequence.size) * heads]
        return rows.unflatten(2, (heads, sequence.size))

    def places(self, sequences: Rows[Sequence], ends: Rows[int], count: int) -> Places:
        """Where tokens [end - count, end) of each sequence go, and what they attend to.

        Args:
            sequences: B of them, in the order of their blocks (`start`).
            ends: [B].
        """
        heads, device = self._shape.kv_heads, self.arena.device
        positions = np.asarray(ends)[:, None] + np.arange(-count, 0)
        starts = np.array([sequence.start for sequence in sequences])[:, None, None]
        sizes = np.array([sequence.size for sequence in sequences])[:, None, None]
        written = starts * heads + np.arange(heads) * sizes + positions[:, :, None]
        runs = []
        first = 0
        for last in range(1, len(sequences) + 1):
            before = sequences[last - 1]
            if last < len(sequences):
                after = sequences[last]
                if after.size == before.size and after.start == before.start + before.size:
                    continue
            runs.append(self._run(sequences[first], slice(first, last), positions[first:last]))
            first = last
        return Places(
            torch.from_numpy(positions.ravel()).to(device),
            torch.from_numpy(written.ravel()).to(device),
            runs,
        )

    def _run(self, leader: Sequence, rows: slice, positions: npt.NDArray[np.int64]) -> Run:
        length = int(positions.max()) + 1
        mask = None
        if positions.min() + 1 < length:
            hidden = np.arange(length) > positions[:, None, :, None]
            added = np.where(hidden, np.float32(-np.inf), np.float32(0))
            mask = torch.from_numpy(added).to(self.arena.device, self._dtype)
        return Run(rows, leader.start, leader.size, length, mask)
