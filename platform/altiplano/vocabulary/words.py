"""How words become whole pieces of a BPE vocabulary: which other pieces must come before them.

BPE builds a piece by merging two neighbours, so a word of more than two characters needs pieces on
the way. Knows pieces and scores, not files. Costs a cube of the word's length, per word.
"""

import math
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

from altiplano.vocabulary.characters import is_cjk
from altiplano.vocabulary.proto import SPACE

Score = Callable[[str], float | None]
"""Score of a piece that BPE may merge to, None for any other text."""


@dataclass(frozen=True)
class WordPlan:
    """Pieces that words need, in order of priority, each once."""

    wholes: list[str]
    """The words themselves, and `▁word` where a word after a space needs a piece of its own."""
    parts: list[str]
    """Pieces on the way to a whole: new ones, and added ones that must not lose to others."""


def merge_steps(text: str, score: Score) -> tuple[list[str], set[str]]:
    """What SentencePiece's BPE makes of `text`: the symbols left, and every piece on the way.

    The neighbouring pair whose joined piece scores highest is merged first, the left-most of equal
    ones. Meant for words, not for documents: the cost is the square of the length.
    """
    symbols = list(text)
    built: set[str] = set()
    while True:
        best: tuple[float, int] | None = None
        for index, (left, right) in enumerate(pairwise(symbols)):
            value = score(left + right)
            if value is not None and (best is None or value > best[0]):
                best = (value, index)
        if best is None:
            return symbols, built
        index = best[1]
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
        built.add(symbols[index])


def fewest_parts(leaves: Sequence[str], known: Container[str]) -> list[str]:
    """Pieces to go through so that `leaves` join to one: as few that are not `known` as possible.

    Dynamic programming over all binary trees on the leaves; returns the inner nodes of the best
    tree, known ones included, the whole left out. Of equal trees the one that grows from the left:
    its parts are beginnings of the word, which other text seldom holds (`iPhone1`, not `15`).
    """
    count = len(leaves)
    cost: dict[tuple[int, int], int] = {(at, at + 1): 0 for at in range(count)}
    cuts: dict[tuple[int, int], int] = {}
    for length in range(2, count + 1):
        for start in range(count - length + 1):
            stop = start + length
            least, left = min(
                (cost[start, cut] + cost[cut, stop], -cut) for cut in range(start + 1, stop)
            )
            new = length < count and "".join(leaves[start:stop]) not in known
            cost[start, stop] = least + new
            cuts[start, stop] = -left

    def inner(start: int, stop: int) -> list[str]:
        if stop - start < 2:
            return []
        cut = cuts[start, stop]
        return ["".join(leaves[start:stop]), *inner(start, cut), *inner(cut, stop)]

    return inner(0, count)[1:]


def plan_words(
    words: Sequence[str], score: Score, known: Container[str], fixed: Container[str]
) -> WordPlan:
    """What it takes to make every word one piece.

    A word of Chinese characters is built from its characters, since text may stand on either side
    of it without a space: all pieces on the way rank above ordinary ones, so that no other piece
    takes a character away. A word with other letters is built from the symbols that the vocabulary
    makes of it; after a space these are often other ones (`▁G` + `PU`, not `GP` + `U`), and then
    `▁word` becomes a piece too. So little text without the word changes: only where the symbols of
    a part stand side by side.

    Args:
        words: each of at least one character.
        score: of the vocabulary so far.
        known: its pieces, single characters included.
        fixed: those whose score may not change (the base's).
    """
    wholes: dict[str, None] = {}
    parts: dict[str, None] = {}

    def current(text: str) -> float | None:
        if text in wholes:
            return math.inf
        return sys.float_info.max if text in parts else score(text)

    def add(text: str, leaves: Sequence[str]) -> None:
        # The fast form merges nothing that holds a character which is no piece.
        needed = [char for char in text if char not in known]
        needed += fewest_parts(leaves, _Union(known, wholes, parts))
        parts.update(dict.fromkeys(part for part in needed if part not in fixed))
        wholes[text] = None

    for word in words:
        if word not in fixed:
            add(word, word if all(map(is_cjk, word)) else merge_steps(word, current)[0])
        if not is_cjk(word[0]) and SPACE + word not in fixed:
            symbols, _ = merge_steps(SPACE + word, current)
            if symbols not in ([SPACE, word], [SPACE + word]):
                add(SPACE + word, symbols)
    return WordPlan(list(wholes), [part for part in parts if part not in wholes])


class _Union(Container[str]):
    """Membership in any of several collections, without copying them."""

    def __init__(self, *members: Container[str]) -> None:
        self._members = members

    def __contains__(self, text: object) -> bool:
        return any(text in member for member in self._members)
