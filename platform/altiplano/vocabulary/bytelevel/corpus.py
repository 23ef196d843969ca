"""Texts as the different pre-tokens of a byte-level tokenizer, with their counts.

Knows the base's own normaliser, added tokens and pre-tokenizer, nothing of merges' learning. Cost:
1 MB of Chinese text a second; memory is that of the different pre-tokens.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from altiplano.vocabulary.bytelevel.bpe import ByteBpe
from altiplano.vocabulary.fastform import open_fast


class Corpus:
    """Pre-tokens in byte letters with their counts; sorted, so that only their counts matter."""

    def __init__(self, counts: Counter[str]) -> None:
        self.pretokens = sorted(counts)
        self.weights = np.array([counts[token] for token in self.pretokens], np.int64)

    def count(self, bpe: ByteBpe) -> npt.NDArray[np.int64]:
        """Occurrences of every id."""
        encoded = bpe.encode(self.pretokens)
        weights = np.repeat(self.weights, encoded.lengths)
        counts = np.bincount(encoded.ids, weights, max(bpe.vocab.values()) + 1)
        return np.asarray(counts, np.int64)


class Cutter:
    """Cuts text into pre-tokens as a tokenizer does, around its added tokens and further words."""

    def __init__(self, data: dict[str, Any], words: Sequence[str]) -> None:
        fast = open_fast(data)
        self._normalizer, self._pre_tokenizer = fast.normalizer, fast.pre_tokenizer
        whole = {token["content"] for token in data["added_tokens"] if not token["special"]}
        whole.update(words)
        longest_first = sorted(whole, key=lambda text: (-len(text), text))
        self._whole = re.compile("|".join(map(re.escape, longest_first))) if whole else None

    def cut(self, text: str) -> Iterator[str]:
        """Pre-tokens of `text` in byte letters."""
        for part in self._whole.split(text) if self._whole else [text]:
            normal = self._normalizer.normalize_str(part) if self._normalizer else part
            yield from (token for token, _ in self._pre_tokenizer.pre_tokenize_str(normal))

    def corpus(self, lines: Iterable[str]) -> Corpus:
        """All pre-tokens of some lines."""
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(self.cut(line))
        return Corpus(counts)
