"""Tokens as people can read them: the bytes of one character shown as that character.

Knows how the two families of vocabularies write bytes; colours and layout are `preview`'s. Costs
a decoding per token.
"""

import re
from collections.abc import Sequence

from altiplano.vocabulary.load import Vocabulary

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_MOST_BYTES = 4
"""Of one character in UTF-8."""
_BROKEN = "\ufffd"
_COUNTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_VISIBLE = str.maketrans({" ": "▁", "\n": "↵", "\t": "⇥", "\r": "␍"})


def readable_pieces(ids: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """What each token stands for: `▁` is a space, `↵` a line end.

    Tokens that make one character only together are one entry, with their number above: `文³`.
    A token that is no whole character even so is named by its piece.
    """
    shown, at = [], 0
    while at < len(ids):
        for count in range(1, _MOST_BYTES + 1):
            text = _text(ids[at : at + count], vocabulary)
            if text is not None:
                break
        else:
            text, count = vocabulary.piece(ids[at]), 1
        shown.append(text + (str(count).translate(_COUNTS) if count > 1 else ""))
        at += count
    return shown


def _text(ids: Sequence[int], vocabulary: Vocabulary) -> str | None:
    """The text of some tokens, or None where it is not whole characters."""
    pieces = [vocabulary.piece(id_) for id_ in ids]
    if len(pieces) == 1 and pieces[0] in vocabulary.control_pieces:
        return pieces[0]
    if vocabulary.family == "bytelevel":
        text = vocabulary.decode(ids)
    elif matches := [match for piece in pieces if (match := _BYTE_PIECE.fullmatch(piece))]:
        raw = bytes(int(match[1], 16) for match in matches)
        text = raw.decode(errors="replace") if len(matches) == len(pieces) else _BROKEN
    else:
        text = "".join(pieces)
    return None if _BROKEN in text else text.translate(_VISIBLE)
