"""Which characters are Chinese, and which new pieces a vocabulary should take.

Knows Unicode ranges, not vocabularies. Costs a few comparisons per character.

General punctuation that Chinese shares with English (“ ” ‘ ’ … — ·) is *not* counted as Chinese:
a piece such as `——` would change English. It may stand in a Chinese piece (`：“`), which needs a
character of its own kind besides.
"""

import unicodedata
from collections.abc import Sequence
from typing import Literal

from altiplano.config.schema import DroppedPieces, KeptPieces
from altiplano.vocabulary.proto import SPACE

Refusal = Literal["keep", "digits", "latin"]
"""Why a piece is left out: `keep` does not want it, or what `drop` found in it."""

SHARED_PUNCTUATION = frozenset("“”‘’…—·")
"""Punctuation of Chinese and English text; allowed in a Chinese piece, never enough for one."""

_CJK_RANGES = (
    (0x2E80, 0x2FDF),  # radicals
    (0x2FF0, 0x303F),  # description characters, symbols and punctuation
    (0x3100, 0x312F),  # bopomofo
    (0x31A0, 0x31EF),  # bopomofo extended, strokes
    (0x3200, 0x4DBF),  # enclosed and squared, extension A
    (0x4E00, 0x9FFF),  # unified ideographs
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0xFE30, 0xFE4F),  # vertical forms
    (0xFF00, 0xFFEF),  # half-width and full-width forms
    (0x20000, 0x3FFFF),  # the planes of ideographs
)


def is_cjk(char: str) -> bool:
    """Whether a character is written in Chinese only.

    Han ideographs of all planes with their radicals, strokes and compatibility forms, CJK symbols
    and punctuation (the ideographic space too), bopomofo, enclosed and squared forms, vertical
    forms, half-width and full-width forms.
    """
    code = ord(char)
    return code >= _CJK_RANGES[0][0] and any(low <= code <= high for low, high in _CJK_RANGES)


def piece_wanted(text: str, keep: KeptPieces, drop: Sequence[DroppedPieces]) -> bool:
    """Whether a piece (with `▁` for a space) passes the filters; see `refusal`."""
    return refusal(text, keep, drop) is None


def refusal(text: str, keep: KeptPieces, drop: Sequence[DroppedPieces]) -> Refusal | None:
    """Why a piece is not wanted, or None.

    `non_ascii` wants no visible ASCII character and at least one that is not ASCII; `cjk` wants
    Chinese characters (`is_cjk`) and the punctuation shared with English, at least one character
    being Chinese. Both let a space stand beside them. So every piece either lets through holds a
    character that the text it must not touch cannot hold.
    """
    visible = text.replace(SPACE, "")
    if not _is_kept(visible, keep):
        return "keep"
    if "digits" in drop and any(char.isdigit() for char in visible):
        return "digits"
    if "latin" in drop and any(_is_latin(char) for char in visible):
        return "latin"
    return None


def _is_kept(visible: str, keep: KeptPieces) -> bool:
    if keep == "all":
        return True
    if keep == "non_ascii":
        return not visible.isascii() and not any("!" <= char <= "~" for char in visible)
    return any(map(is_cjk, visible)) and all(
        is_cjk(char) or char in SHARED_PUNCTUATION for char in visible
    )


def _is_latin(char: str) -> bool:
    """Letters of the Latin script, accented and full-width ones included."""
    return char.isalpha() and "LATIN" in unicodedata.name(char, "")
