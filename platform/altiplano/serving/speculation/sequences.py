"""The rows of an engine step, named by what they hold, and which of them a draft holds.

vLLM hands its proposer no request ids and moves rows between steps, so a row is known by the digest
of its tokens. Hashing costs about a microsecond per row and 2000 tokens. Knows neither drafts nor
engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from altiplano.serving.speculation.protocol import Row, digest

_LOOK_BACK = 64
"""A draft that missed a few steps is told at most this many tokens instead of everything."""
_REMEMBERED = 1024


@dataclass(slots=True)
class Line:
    """One row of an engine step that may be drafted for."""

    ids: npt.NDArray[np.int32]
    """[length] the whole sequence, with what this step made. A view: the engine overwrites it."""
    fresh: list[int]
    """What this step made: the accepted proposals and one token of the target's own."""
    before: int
    """`digest` of the sequence before this step."""
    now: int
    """`digest` of `ids`."""
    k: int
    """Most tokens that may be proposed."""

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        return len(self.ids)


def read_line(ids: npt.NDArray[np.int32], length: int, fresh: list[int], longest: int) -> Line:
    """One row of vLLM's arrays.

    Args:
        ids: [max_model_len] the row's ids, `length` of them valid, `fresh` among them.
        longest: tokens a sequence may have; the target adds one of its own to what is proposed.
    """
    hashing = xxhash.xxh3_64(ids[: length - len(fresh)].data)
    before = hashing.intdigest()
    hashing.update(ids[length - len(fresh) : length].data)
    return Line(ids[:length], fresh, before, hashing.intdigest(), max(0, longest - 1 - length))


class Mirror:
    """What a draft holds, as far as we know: one entry per sequence it was last asked about."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}

    def row(self, line: Line, k: int, *, whole: bool = False) -> Row:
        """The row to ask for `line`; from then on the draft is taken to hold it.

        Args:
            whole: say everything, whatever the draft may hold.
        """
        base = 0 if whole else self._base(line)
        length = self._held.pop(base, 0)
        self._held[line.now] = line.length
        if len(self._held) > _REMEMBERED:
            del self._held[next(iter(self._held))]
        return Row(base if length else 0, length, line.ids[length:].tolist(), k)

    def forget(self, name: int) -> None:
        """The draft does not hold the sequence of this digest."""
        self._held.pop(name, None)

    def clear(self) -> None:
        """The draft holds nothing."""
        self._held.clear()

    def _base(self, line: Line) -> int:
        if line.before in self._held:
            return line.before
        lengths = {
            length
            for length in self._held.values()
            if line.length - _LOOK_BACK <= length < line.length
        }
        names = (digest(line.ids[:length]) for length in sorted(lengths, reverse=True))
        return next((name for name in names if name in self._held), 0)


def check_ids(guesses: Sequence[list[int]], vocab_size: int) -> None:
    """Refuse ids that the target has no embedding for: they would end the engine.

    Raises:
        ValueError: names the first such id.
    """
    for tokens in guesses:
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise ValueError(f"the draft proposes {tokens}, ids run from 0 to {vocab_size - 1}")
