"""A byte-level BPE as `tokenizer.json` holds it: tokens spelled in byte letters, and merges.

Knows bytes, tokens and merges, not languages or directories. Cost: growing 128,000 tokens and
280,000 merges by thousands takes a second.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import BPE

_BATCH = 65_536
"""Pre-tokens that are encoded at a time: bounds the memory of the encodings."""


def _letters() -> dict[int, str]:
    """GPT-2's letter for every byte: itself where it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + index) for index, byte in enumerate(hidden)
    }


LETTER_OF = _letters()
"""Letter of every byte."""
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}
"""Byte of every letter."""


def to_letters(data: bytes) -> str:
    """Spell bytes in letters, as tokens of a byte-level BPE are."""
    return "".join(LETTER_OF[byte] for byte in data)


def to_bytes(token: str) -> bytes | None:
    """Bytes of a token, or None when it is spelled in other characters (special tokens are)."""
    try:
        return bytes(BYTE_OF[letter] for letter in token)
    except KeyError:
        return None


def text_of(token: str) -> str | None:
    """Text of a token, or None when it is no whole characters."""
    data = to_bytes(token)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return None


def splits(token: str, known: Container[str]) -> list[tuple[str, str]]:
    """Every split of a token in two known ones, the longest first part first."""
    return [
        (token[:cut], token[cut:])
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in known and token[cut:] in known
    ]


@dataclass(frozen=True)
class ByteBpe:
    """Tokens, merges in order, and whether a whole pre-token that is a token skips the merges."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    ignore_merges: bool

    @classmethod
    def read(cls, model: Mapping[str, Any]) -> Self:
        """From the `model` of a `tokenizer.json`; older files write merges as `left right`."""
        merges = [
            merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
        ]
        pairs = [(left, right) for left, right in merges]
        return cls(dict(model["vocab"]), pairs, bool(model.get("ignore_merges")))

    def grown(self, tokens: Sequence[str], first_id: int) -> Self:
        """A copy with further tokens, and with merges of every split of each, in their order.

        All new merges rank behind all old ones, and old merges never make a new token, so a new
        merge is tried where the old BPE has nothing left to do. A token of `tokens` that is there
        already keeps its id and only gains merges.

        Args:
            tokens: in byte letters, most important first.
            first_id: id of the first new one; the others follow.
        """
        new = [token for token in tokens if token not in self.vocab]
        vocab = self.vocab | {token: first_id + index for index, token in enumerate(new)}
        known = set(self.merges)
        merges = [pair for token in tokens for pair in splits(token, vocab) if pair not in known]
        return type(self)(vocab, self.merges + merges, self.ignore_merges)

    def texts(self) -> dict[int, str | None]:
        """Text of every id, None for what is no whole characters."""
        return {id_: text_of(token) for token, id_ in self.vocab.items()}

    def encode(self, pretokens: Sequence[str]) -> "Encoded":
        """Encode pre-tokens, spelled in byte letters."""
        model = BPE(vocab=self.vocab, merges=self.merges, ignore_merges=self.ignore_merges)
        encoder = Tokenizer(model)
        ids: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(pretokens), _BATCH):
            batch = list(pretokens[start : start + _BATCH])
            encodings = encoder.encode_batch_fast(batch, add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int64) for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return Encoded(np.concatenate(ids) if ids else np.empty(0, np.int64), lengths)


@dataclass(frozen=True)
class Encoded:
    """Ids of many pre-tokens end to end, int64 [N], and the number of ids of each, int64 [n]."""

    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def begins(self) -> npt.NDArray[np.bool_]:
        """Where a pre-token begins, [N]."""
        begins = np.zeros(len(self.ids), np.bool_)
        begins[np.cumsum(self.lengths) - self.lengths] = True
        return begins
