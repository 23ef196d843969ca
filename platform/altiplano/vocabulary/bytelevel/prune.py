"""Leaves out new byte-level tokens that the training texts hardly use: their rows would not learn.

Knows tokens and counts, not files. Cost: one encoding of the different pre-tokens per round; two
to five rounds.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from altiplano.vocabulary.bytelevel.bpe import ByteBpe, splits, text_of
from altiplano.vocabulary.bytelevel.corpus import Corpus


@dataclass(frozen=True)
class Pruned:
    """What is left of new tokens, and what the texts say of them."""

    tokens: list[str]
    rare_parts: dict[str, int] = field(default_factory=dict)
    """Kept although rarer than `min_count` (but seen): frequent tokens are built from them."""
    untrained: list[str] = field(default_factory=list)
    """Beginnings of characters that the texts never hold on their own."""
    removed: int = 0


def prune(
    bpe: ByteBpe, first_id: int, tokens: Sequence[str], corpus: Corpus, min_count: int
) -> Pruned:
    """Leave out new tokens that occur fewer than `min_count` times, until every one left does.

    As `prune.prune_sentencepiece`: a rare token from which frequent ones are built stays as long
    as it occurs at all. One that never occurs takes the place of the rarest token built from it.
    Beginnings of characters stay while a token is built from them. With 0 nothing else goes.
    """
    left = list(tokens)
    while True:
        grown = bpe.grown(left, first_id)
        counts = corpus.count(grown)
        found = {token: int(counts[grown.vocab[token]]) for token in left}
        kept = _Round(bpe, left, found, min_count).kept()
        if len(kept) == len(left):
            break
        left = kept
    new = {token: found[token] for token in left if token not in bpe.vocab}
    return Pruned(
        tokens=left,
        rare_parts={t: n for t, n in new.items() if n < min_count and text_of(t) is not None},
        untrained=[token for token, count in new.items() if not count and text_of(token) is None],
        removed=len(tokens) - len(left),
    )


class _Round:
    """One round: the last learned go first, for they give their occurrences to their parts."""

    def __init__(
        self, bpe: ByteBpe, tokens: Sequence[str], found: dict[str, int], min_count: int
    ) -> None:
        self._bpe, self._tokens, self._min_count = bpe, tokens, min_count
        self._found = dict(found)
        self._alive = set(tokens)
        known = bpe.vocab.keys() | self._alive
        self._ways = {token: splits(token, known) for token in tokens}
        self._users: defaultdict[str, list[str]] = defaultdict(list)
        for token, pairs in self._ways.items():
            for part in dict.fromkeys(part for pair in pairs for part in pair):
                self._users[part].append(token)

    def kept(self) -> list[str]:
        """The tokens that stay, in their order."""
        for token in reversed(self._tokens):
            if token not in self._alive or token in self._bpe.vocab:
                continue
            whole = text_of(token) is not None
            while whole and self._min_count and not self._found[token]:
                users = self._dependants(token)
                if not users:
                    break
                self._leave_out(min(users, key=self._found.__getitem__))
            rare = not whole or self._found[token] < self._min_count
            if rare and not self._dependants(token):
                self._leave_out(token)
        return [token for token in self._tokens if token in self._alive]

    def _exists(self, token: str) -> bool:
        return token in self._alive or token in self._bpe.vocab

    def _dependants(self, token: str) -> list[str]:
        """New tokens that cannot be built without this one."""
        return [
            user
            for user in self._users[token]
            if user in self._alive
            and user not in self._bpe.vocab
            and not any(
                token not in pair and all(map(self._exists, pair)) for pair in self._ways[user]
            )
        ]

    def _leave_out(self, token: str) -> None:
        while users := self._dependants(token):
            self._leave_out(users[0])
        self._alive.discard(token)
        way = next(pair for pair in self._ways[token] if all(map(self._exists, pair)))
        for part in way:
            if part in self._found:
                self._found[part] += self._found[token]
