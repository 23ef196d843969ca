"""What becomes of input that cannot be used: an error with its place, or a line of the quarantine.

Knows places and reasons, not what is read. Costs nothing until something is wrong; the line number
in an error costs one pass over the file up to there.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from altiplano.errors import DataError
from altiplano.storage import open_binary

OnError = Literal["fail", "skip"]

QUARANTINE_CHARACTERS = 200
"""The quarantine shows this much of a text."""
_AT_BYTE = " at byte "
_COUNTED_BYTES = 1 << 30
"""Lines are counted up to here: a second or so from a disk."""
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Dropped:
    """One line of the quarantine."""

    reason: str
    origin: str
    detail: str
    text: str
    """Its beginning."""


@dataclass
class Problems:
    """What could not be used or was left out while one chunk was read."""

    on_error: OnError
    dropped: list[Dropped] = field(default_factory=list)

    def report(self, reason: str, origin: str, message: str, text: str = "") -> None:
        """Stop at something that cannot be read, or leave it out.

        Args:
            reason: short name, for the counts.
            origin: where it stands.
            message: what is wrong, without the origin.
            text: the text, as far as there is one.

        Raises:
            DataError: `on_error` is `fail`.
        """
        if self.on_error == "fail":
            raise DataError(
                f"{_place(origin)}: {message}; "
                f"mend it, or set `data.on_error: skip` to leave it out"
            )
        self.drop(reason, origin, message, text)

    def drop(self, reason: str, origin: str, detail: str, text: str) -> None:
        """Leave out by a rule: recorded, never an error."""
        # JSON texts may hold lone surrogates, which no file can.
        shown = text[:QUARANTINE_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
        self.dropped.append(Dropped(reason, origin, detail, shown))

    @property
    def counts(self) -> Counter[str]:
        """How many were left out, by reason."""
        return Counter(item.reason for item in self.dropped)


def at_byte(path: str, offset: int) -> str:
    """Origin of what starts at a byte of a file."""
    return f"{path}{_AT_BYTE}{offset}"


def _place(origin: str) -> str:
    """`file:line` of an origin that is a byte of a file: what an editor can go to."""
    path, marker, offset = origin.rpartition(_AT_BYTE)
    if not marker or not offset.isdecimal() or int(offset) > _COUNTED_BYTES:
        return origin
    lines, left = 1, int(offset)
    with open_binary(path) as handle:
        while left and (block := handle.read(min(left, _READ_BYTES))):
            lines += block.count(b"\n")
            left -= len(block)
    return f"{path}:{lines}"
