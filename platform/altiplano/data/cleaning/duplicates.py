"""Texts that came before: the same content, or nearly the same.

Digests and signatures are made of one text each, wherever it is read; `Duplicates` then goes
through them in corpus order, so what is left never depends on how the work was spread. Knows no
files. A digest costs 3 to 6 ns per byte, a signature about 0.1 ms.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from altiplano.config.data import CleanSection

if TYPE_CHECKING:
    from datasketch import MinHash

UIntArray = np.ndarray[Any, np.dtype[np.uint64]]
MaskArray = np.ndarray[Any, np.dtype[np.bool_]]
SignatureArray = np.ndarray[Any, np.dtype[np.uint32]]

PERMUTATIONS = 128
"""Values of a signature; an estimated similarity is off by about 0.04 at 0.8."""
SHINGLE_CHARACTERS = 5
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SEED = 1
_SCHEME = "affine32"
"""datasketch's: 32-bit hashes, permuted by `a * h + b`."""
_NO_SHINGLE = np.uint32(2**32 - 1)


def content_digests(texts: Sequence[str]) -> UIntArray:
    """Two independent 64-bit numbers of each text's normalised content, by one hash.

    Line ends, spaces at borders, runs of spaces and Unicode composition do not matter.

    Returns:
        `[n, 2]`: the content key, which tells texts apart (of 100 million, two different ones agree
        with a chance of 0.03 %), and the number that decides whether a text is held out.
    """
    digests = b"".join(hashlib.sha256(_normal(text).encode()).digest()[:16] for text in texts)
    pairs = np.frombuffer(digests, ">u8").reshape(len(texts), 2)
    return np.ascontiguousarray(pairs[:, ::-1], dtype=np.uint64)


def content_key(text: str) -> int:
    """64-bit key of a text's normalised content; the same for texts that say the same."""
    return int(content_digests([text])[0, 0])


def held_out_mask(digests: UIntArray, share: float) -> MaskArray:
    """Which of some texts belong to the held-out split, from their `content_digests`."""
    return digests[:, 1] < np.uint64(min(int(share * 2**64), 2**64 - 1))


def signature(text: str) -> SignatureArray:
    """MinHash of a text's character 5-grams, white space left out: uint32 `[PERMUTATIONS]`.

    A text of fewer than five characters has a signature of its own that resembles no other.
    """
    content = "".join(_normal(text).split())
    sketch = _empty_sketch().copy()
    if len(content) >= SHINGLE_CHARACTERS:
        sketch.update_batch(_shingle_hashes(content))
    return sketch.hashvalues


class Duplicates:
    """Which texts are the first of their content; goes through the corpus once, in order.

    Costs about 16 bytes per document for `exact`, and 6 KB more and 0.1 ms for `near`.
    """

    def __init__(self, settings: CleanSection) -> None:
        """Nothing seen yet; `duplicates` and `near_threshold` of the settings count."""
        self._keys = _KeySet() if settings.duplicates != "keep" else None
        self._near = _Near(settings.near_threshold) if settings.duplicates == "near" else None

    def filter(self, keys: UIntArray, signatures: SignatureArray | None = None) -> MaskArray:
        """Which of the next documents are new; they are remembered.

        Args:
            keys: content keys, `[n]`.
            signatures: `[n, PERMUTATIONS]`; needed for `near`.
        """
        if self._keys is None:
            return np.ones(len(keys), bool)
        new = self._keys.add(keys)
        if self._near is not None:
            assert signatures is not None and len(signatures) == len(keys)
            for number in np.flatnonzero(new):
                new[number] = self._near.add(signatures[number])
        return new


class _KeySet:
    """Set of 64-bit keys by open addressing in one array; 0 means empty, so key 0 counts as 1."""

    def __init__(self) -> None:
        self._slots = np.zeros(1 << 12, np.uint64)
        self._count = 0

    def add(self, keys: UIntArray) -> MaskArray:
        """Add keys; which of them were not there before, the first of equal ones only."""
        distinct, first = np.unique(np.maximum(keys, np.uint64(1)), return_index=True)
        while 3 * len(self._slots) < 4 * (self._count + len(distinct)):
            held = self._slots[self._slots != 0]
            self._slots = np.zeros(2 * len(self._slots), np.uint64)
            self._insert(held)
        added = self._insert(distinct)
        self._count += int(added.sum())
        new = np.zeros(len(keys), bool)
        new[first[added]] = True
        return new

    def _insert(self, keys: UIntArray) -> MaskArray:
        """Insert distinct keys; which were not there."""
        added = np.zeros(len(keys), bool)
        mask = np.uint64(len(self._slots) - 1)
        left = np.arange(len(keys))
        places = (keys * _FACTOR >> np.uint64(32)) & mask
        while len(left):
            found = self._slots[places]
            empty = found == 0
            # Of several keys that want one empty slot the last written has it; the others go on.
            self._slots[places[empty]] = keys[left[empty]]
            settled = self._slots[places] == keys[left]
            added[left[settled & empty]] = True
            left = left[~settled]
            places = (places[~settled] + np.uint64(1)) & mask
        return added


class _Near:
    """Near-duplicates by locality-sensitive hashing, checked against the signatures themselves."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        # Candidates are checked, so too many cost a little time, too few would cost duplicates.
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self._signatures: list[SignatureArray] = []

    def add(self, sign: SignatureArray) -> bool:
        """Remember a signature that resembles none before; whether it does not."""
        from datasketch import LeanMinHash

        if (sign == _NO_SHINGLE).all():
            return True
        sketch = LeanMinHash(seed=_SEED, hashvalues=sign, scheme=_SCHEME)
        for number in self._index.query(sketch):
            if np.mean(self._signatures[number] == sign) >= self._threshold:
                return False
        self._index.insert(len(self._signatures), sketch)
        self._signatures.append(sign.copy())
        return True


@lru_cache(maxsize=1)
def _empty_sketch() -> "MinHash":
    """Its permutations take longer to draw than a signature to make."""
    from datasketch import MinHash

    return MinHash(PERMUTATIONS, seed=_SEED, scheme=_SCHEME, hashfunc=int)


def _shingle_hashes(content: str) -> UIntArray:
    """32-bit hashes of the distinct 5-grams: polynomials of the code points, upper half."""
    points = np.frombuffer(content.encode("utf-32-le"), np.uint32).astype(np.uint64)
    count = len(points) - SHINGLE_CHARACTERS + 1
    hashes = np.zeros(count, np.uint64)
    for place in range(SHINGLE_CHARACTERS):
        hashes = (hashes + points[place : place + count]) * _FACTOR
    return np.unique(hashes >> np.uint64(32))


def _normal(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    # No white space but single spaces inside: nothing to do, at a fifth of the cost.
    if text.isprintable() and "  " not in text and text == text.strip():
        return text
    return " ".join(text.split())
