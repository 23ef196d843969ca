"""Cleaning one text: Unicode, invisible characters, script of Chinese, and rules that leave it out.

What each rule does is said in `CleanSection`. Knows one text at a time; texts that came before are
the business of `duplicates`. A text without anything to clean costs about 3 ns per byte, OpenCC 50
to 150, the rule on repetition 30.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from altiplano.config.data import CleanSection

if TYPE_CHECKING:
    import numpy as np
    import opencc

# Line ends of other systems and of Unicode become "\n".
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Controls but tab and line feed, soft hyphens, zero-width spaces, direction marks and isolates,
# invisible operators, byte-order marks, annotation marks, tags and noncharacters. The joiners
# U+200C and U+200D and variation selectors stay: Indic and Persian scripts, emoji and variants of
# Han characters are spelt with them. So do private characters: they are visible somewhere.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0001\U000e0020-\U000e007f]"
)
_REPEAT_BYTES = 32
"""A stretch that counts as repeated: half a dozen English words, ten Chinese characters."""
_FACTOR = 0x9E3779B97F4A7C15
"""Odd, and without a pattern: multiplied with, it spreads the bits of a hash."""
_CONVERSIONS = {"simplified": "t2s", "traditional": "s2t"}


@dataclass(frozen=True)
class Cleaner:
    """The rules of one config; can be sent to other processes."""

    settings: CleanSection

    def clean(self, text: str) -> str:
        """Return the text without what is to be removed, normalised, converted and stripped."""
        if self.settings.strip_control:
            text = _without_invisible(text)
        form = self.settings.unicode
        if form != "keep" and not text.isascii():
            text = unicodedata.normalize(form, text)
        if self.settings.chinese != "keep" and not text.isascii():
            text = _converter(_CONVERSIONS[self.settings.chinese]).convert(text)
        return text.strip()

    def reason_to_drop(self, text: str) -> tuple[str, str] | None:
        """Why a cleaned text is left out, as a short reason and a detail; None keeps it."""
        settings, length = self.settings, len(text)
        if length < settings.min_characters:
            return "too_short", f"{length} characters, at least {settings.min_characters}"
        if settings.max_characters is not None and length > settings.max_characters:
            return "too_long", f"{length} characters, at most {settings.max_characters}"
        if settings.max_repetition < 1:
            share = repetition(text)
            if share > settings.max_repetition:
                return "repetitive", f"{share:.2f} repeated, at most {settings.max_repetition}"
        return None


def repetition(text: str) -> float:
    """Share of a text that lies in stretches of 32 bytes of UTF-8 which stood in it before.

    One measure for repeated lines, repeated phrases and one character over and over, and the same
    for scripts with and without spaces; after the duplicate n-grams of Gopher (Rae et al. 2021).
    The first occurrence does not count: a text said twice has a share of a half.
    """
    import numpy as np

    raw = np.frombuffer(text.encode("utf-8"), np.uint8)
    if len(raw) <= _REPEAT_BYTES:
        return 0.0
    hashes = _stretch_hashes(raw)
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0.0
    order = np.argsort(hashes, kind="stable")
    again = order[1:][ordered[1:] == ordered[:-1]]
    edges = np.zeros(len(raw) + 1, np.int32)
    edges[again] += 1
    edges[again + _REPEAT_BYTES] -= 1
    return float((np.cumsum(edges) > 0).sum() / len(raw))


def _stretch_hashes(raw: "np.ndarray") -> "np.ndarray":
    """Hash of the `_REPEAT_BYTES` bytes from every position on, by doubling (uint64)."""
    import numpy as np

    hashes, length, factor = raw.astype(np.uint64) + np.uint64(1), 1, _FACTOR
    while length < _REPEAT_BYTES:
        hashes = hashes[:-length] * np.uint64(factor) + hashes[length:]
        length, factor = 2 * length, factor * factor % 2**64
    return hashes


def _without_invisible(text: str) -> str:
    # A printable text has none of either, and most others nothing but line feeds.
    if text.isprintable() or text.replace("\n", "").isprintable():
        return text
    return _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))


@lru_cache(maxsize=2)
def _converter(conversion: str) -> "opencc.OpenCC":
    """One per process: loading its tables takes a tenth of a second."""
    import opencc

    return opencc.OpenCC(conversion)
