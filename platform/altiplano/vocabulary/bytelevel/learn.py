"""Learns new tokens on top of a byte-level BPE's own: continued BPE.

Knows pre-tokens and their counts, not files. The old merges run first, in context; what they leave
is learned on:

1. *characters*: where a wanted character stays several tokens, they are joined from its lead byte
   on, so that every further token is whole characters. Beginnings of characters are shared;
2. *pieces*: what is then one token per character or more becomes one code point each, cut at
   everything that is not wanted, and the `tokenizers` trainer (Rust) learns on these strings.

Why text without kept characters tokenises as before: a new merge makes either a token with a kept
character, or the beginning of a character whose every completion is kept (`_Filter.safe`). UTF-8
synchronises itself, so neither can occur in the bytes of other text.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from altiplano.config.schema import DroppedPieces, KeptPieces
from altiplano.vocabulary.bytelevel.bpe import ByteBpe, text_of, to_bytes
from altiplano.vocabulary.bytelevel.corpus import Corpus
from altiplano.vocabulary.characters import piece_wanted
from altiplano.vocabulary.proto import SPACE

_MAX_CHARACTER_SHARE = 2 / 3
"""Most of the new tokens that single characters and their beginnings may take (see `train`)."""

_SYMBOLS = 0x10000
"""Code point of id 0 in the strings that pieces are learned on; no surrogates lie above it."""
_ASCII_SPACES = frozenset(" \t\n\v\f\r")


@dataclass(frozen=True)
class Filter:
    """Which texts new tokens may be made of."""

    keep: KeptPieces
    drop: tuple[DroppedPieces, ...] = ()

    def wanted(self, text: str) -> bool:
        """Whether `text` may be a new token: a space only in front, then what `keep` wants."""
        body = text.removeprefix(" ")
        return (
            bool(body)
            and _ASCII_SPACES.isdisjoint(body)
            and piece_wanted(text.replace(" ", SPACE), self.keep, self.drop)
        )

    def neutral(self, text: str) -> bool:
        """Whether `text` may stand in a new token, but needs a kept character beside it."""
        return not self.wanted(text) and self.wanted(text + "一")

    def safe(self, data: bytes) -> bool:
        """Whether bytes that end inside a character occur only in text with a kept character."""
        whole = data.decode(errors="ignore")
        rest = data[len(whole.encode()) :]
        kept = Filter(self.keep)
        return kept.wanted(whole) or (
            (not whole or kept.neutral(whole)) and _all_kept(rest, self.keep)
        )


@functools.lru_cache(maxsize=4096)
def _all_kept(lead: bytes, keep: KeptPieces) -> bool:
    """Whether every character whose UTF-8 begins with `lead` is kept."""
    length = 2 + (lead[0] >= 0xE0) + (lead[0] >= 0xF0)
    missing = length - len(lead)
    first = lead[0] & (0x7F >> length)
    for byte in lead[1:]:
        first = first << 6 | byte & 0x3F
    points = range(first << 6 * missing, (first + 1) << 6 * missing)
    return all(
        Filter(keep).wanted(chr(point))
        for point in points
        if point < 0x110000 and not 0xD800 <= point < 0xE000
    )


def join(parts: Sequence[str], filter_: Filter) -> list[str]:
    """Tokens that join the parts of a character from the left, the last being the whole.

    Empty when a beginning on the way could occur in text without kept characters.
    """
    tokens = ["".join(parts[:count]) for count in range(2, len(parts) + 1)]
    unfinished = [to_bytes(token) for token in tokens if text_of(token) is None]
    if all(data is not None and filter_.safe(data) for data in unfinished):
        return tokens
    return []


def learn_tokens(
    bpe: ByteBpe,
    first_id: int,
    corpus: Corpus,
    filter_: Filter,
    *,
    number: int,
    coverage: float,
    min_count: int,
    max_piece_length: int,
) -> list[str]:
    """At most `number` tokens in byte letters: characters with their beginnings, then pieces.

    Tokens of the base may be among them, not counted: they only gain merges. Arguments as of
    `learn_characters` and `learn_pieces`.
    """
    limit = int(number * _MAX_CHARACTER_SHARE)
    characters = learn_characters(
        bpe, corpus, filter_, coverage=coverage, min_count=min_count, limit=limit
    )
    pieces = learn_pieces(
        bpe.grown(characters, first_id),
        corpus,
        filter_,
        number=number - sum(token not in bpe.vocab for token in characters),
        min_count=min_count,
        max_piece_length=max_piece_length,
    )
    return [*characters, *pieces]


def learn_characters(
    bpe: ByteBpe,
    corpus: Corpus,
    filter_: Filter,
    *,
    coverage: float,
    min_count: int,
    limit: int,
) -> list[str]:
    """Tokens that make wanted characters single ones, the most frequent first.

    Old tokens may hold the end of one character and the beginning of the next; such a group is
    joined as a whole.

    Args:
        bpe: the old BPE.
        corpus: what is counted.
        filter_: which characters.
        coverage: share of the occurrences of wanted characters that single tokens cover.
        min_count: least occurrences; rarer ones would be pruned, and their places be empty.
        limit: most tokens, beginnings included.
    """
    groups, single = _groups(bpe, corpus, filter_)
    names = {id_: token for token, id_ in bpe.vocab.items()}
    candidates: list[tuple[int, tuple[str, ...]]] = []
    for ids, count in groups.items():
        parts = tuple(names[id_] for id_ in ids)
        text = text_of("".join(parts))
        if text is not None and filter_.wanted(text):
            candidates.append((count, parts))
    needed = coverage * (single + sum(count for count, _ in candidates))
    chosen: dict[str, None] = {}
    for count, parts in sorted(candidates, key=lambda item: (-item[0], item[1])):
        if single >= needed or count < min_count:
            break
        new = [token for token in join(parts, filter_) if token not in chosen]
        if len(chosen) + len(new) > limit:
            break
        chosen.update(dict.fromkeys(new))
        single += count if new else 0
    return list(chosen)


def _groups(bpe: ByteBpe, corpus: Corpus, filter_: Filter) -> tuple[Counter[tuple[int, ...]], int]:
    """Runs of several tokens between borders of characters, and how often one token is wanted."""
    encoded = bpe.encode(corpus.pretokens)
    size = max(bpe.vocab.values()) + 1
    inside, wanted = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
    for token, id_ in bpe.vocab.items():
        data, text = to_bytes(token), text_of(token)
        inside[id_] = data is not None and 0x80 <= data[0] < 0xC0
        wanted[id_] = text is not None and filter_.wanted(text)
    starts = np.flatnonzero(encoded.begins() | ~inside[encoded.ids])
    stops = np.append(starts[1:], len(encoded.ids))
    weights = np.repeat(corpus.weights, encoded.lengths)[starts]
    alone = stops - starts == 1
    single = int(weights[alone & wanted[encoded.ids[starts]]].sum())
    groups: Counter[tuple[int, ...]] = Counter()
    ids = encoded.ids.tolist()
    for start, stop, weight in zip(
        starts[~alone].tolist(), stops[~alone].tolist(), weights[~alone].tolist(), strict=True
    ):
        groups[tuple(ids[start:stop])] += weight
    return groups, single


def learn_pieces(
    bpe: ByteBpe,
    corpus: Corpus,
    filter_: Filter,
    *,
    number: int,
    min_count: int,
    max_piece_length: int,
) -> list[str]:
    """At most `number` further tokens, in the order in which BPE learns them.

    Args:
        bpe: the BPE with its new characters.
        corpus: what is learned on.
        filter_: which symbols may be joined.
        number: tokens wanted; fewer come back when no pair is left.
        min_count: least occurrences of a pair (at least 2).
        max_piece_length: in characters.
    """
    if number <= 0:
        return []
    runs = _wanted_runs(bpe, corpus, filter_)
    names = {id_: token for token, id_ in bpe.vocab.items()}
    # Some merges are left out below: too long in characters, or another split of the same text.
    merges = _train(runs, number + number // 8 + 16, max(2, min_count), max_piece_length)
    learned: dict[str, None] = {}
    new = 0
    for pair in merges:
        token = "".join(names[ord(symbol) - _SYMBOLS] for symbol in "".join(pair))
        text = text_of(token)
        assert text is not None, "pieces are learned on whole characters"
        if token in learned or len(text) > max_piece_length:
            continue
        learned[token] = None
        new += token not in bpe.vocab
        if new == number:
            break
    return list(learned)


def _wanted_runs(bpe: ByteBpe, corpus: Corpus, filter_: Filter) -> Counter[str]:
    """Runs of symbols that may be joined, one code point per token, with their counts.

    A space stands only in front, and two neutral symbols never meet: so whatever is joined holds
    a kept character.
    """
    encoded = bpe.encode(corpus.pretokens)
    size = max(bpe.vocab.values()) + 1
    wanted, neutral, spaced = (np.zeros(size, np.bool_) for _ in range(3))
    for id_, text in bpe.texts().items():
        if text:
            wanted[id_], neutral[id_] = filter_.wanted(text), filter_.neutral(text)
            spaced[id_] = text.startswith(" ")
    ids = encoded.ids
    usable = wanted[ids] | neutral[ids]
    cut = encoded.begins() | spaced[ids] | ~usable
    cut[1:] |= ~usable[:-1] | (neutral[ids[1:]] & neutral[ids[:-1]])
    starts = np.flatnonzero(cut)
    stops = np.append(starts[1:], len(ids))
    weights = np.repeat(corpus.weights, encoded.lengths)[starts]
    text = (ids + _SYMBOLS).astype("<u4").tobytes().decode("utf-32-le")
    runs: Counter[str] = Counter()
    several = stops - starts > 1
    for start, stop, weight in zip(
        starts[several].tolist(), stops[several].tolist(), weights[several].tolist(), strict=True
    ):
        runs[text[start:stop]] += weight
    return runs


def _train(
    runs: Counter[str], number: int, min_count: int, max_symbols: int
) -> list[tuple[str, str]]:
    """The first `number` merges that BPE learns on the runs."""
    alphabet = len(set().union(*runs)) if runs else 0
    trainer = BpeTrainer(
        vocab_size=alphabet + number,
        min_frequency=min_count,
        max_token_length=max_symbols + 1,  # the trainer's limit is exclusive
        show_progress=False,
    )
    learner: Any = Tokenizer(BPE())
    words: Iterator[str] = chain.from_iterable(
        repeat(run, count) for run, count in sorted(runs.items())
    )
    learner.train_from_iterator(words, trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
