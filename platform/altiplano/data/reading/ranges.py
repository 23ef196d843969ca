"""Documents of a byte range of a text file: lines, or blocks between blank lines.

A document belongs to the range that holds the separator before it (the first belongs to the range
that starts at 0), so ranges that cover a file give every document once, wherever they are cut.
Whether a byte is a separator never depends on what stands before it. Knows bytes, not encodings.
Memory is bounded by a piece and a block of reading.
"""

import re
from collections.abc import Iterator
from typing import IO

BOM = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20
LINES = re.compile(rb"\n")
PARAGRAPHS = re.compile(rb"\n(?=[ \t\r\v\f]*\n)")
"""A line end before a blank line."""


def read_range(
    handle: IO[bytes],
    separator: re.Pattern[bytes] | None,
    start: int,
    stop: int | None,
    piece_bytes: int | None,
) -> Iterator[tuple[int, bytes]]:
    """Documents of one range and the bytes they start at; blank ones included.

    Args:
        handle: a file that can seek.
        separator: `LINES`, `PARAGRAPHS`, or None for the whole file.
        start, stop: the range in bytes; `None` for the end of the file.
        piece_bytes: longer documents come in pieces of at most this, cut at the last line end or
            else between characters; None keeps them whole.
    """
    if start == 0 or separator is None:
        first: int | None = _skip_bom(handle)
    else:
        first = _after_separator(handle, separator, start, stop)
    if first is None:
        return
    handle.seek(first)
    offset, held = first, b""
    while block := handle.read(READ_BYTES):
        *whole, held = _split(separator, held + block)
        for raw in whole:
            if piece_bytes is None or len(raw) <= piece_bytes:
                yield offset, raw
            else:
                yield from _pieces(offset, raw, piece_bytes)
            offset += len(raw) + 1
            if stop is not None and offset > stop:
                return
        if piece_bytes is not None and len(held) > piece_bytes:
            *ready, (offset, held) = _pieces(offset, held, piece_bytes)
            yield from ready
    if held:
        yield offset, held


def _skip_bom(handle: IO[bytes]) -> int:
    return len(BOM) if handle.read(len(BOM)) == BOM else 0


def _split(separator: re.Pattern[bytes] | None, data: bytes) -> list[bytes]:
    """Lines are split without their pattern, which would be several times slower."""
    if separator is None:
        return [data]
    return data.split(b"\n") if separator is LINES else separator.split(data)


def _after_separator(
    handle: IO[bytes], separator: re.Pattern[bytes], start: int, stop: int | None
) -> int | None:
    """First byte after the first separator in [start, stop)."""
    handle.seek(start)
    offset, held = start, b""
    while (stop is None or offset < stop) and (block := handle.read(READ_BYTES)):
        data = held + block
        if found := separator.search(data):
            after = offset + found.end()
            return after if stop is None or after <= stop else None
        # The last line end may be a separator whose blank line is still to come.
        last = data.rfind(b"\n")
        held = data[last:] if last >= 0 else b""
        offset += len(data) - len(held)
    return None


def _pieces(offset: int, raw: bytes, piece_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Cut while more than spaces lies beyond a piece; the last is what is left."""
    while len(raw.rstrip()) > piece_bytes:
        border = raw.rfind(b"\n", 0, piece_bytes) + 1 or _character_border(raw, piece_bytes)
        yield offset, raw[:border]
        offset, raw = offset + border, raw[border:]
    yield offset, raw


def _character_border(raw: bytes, limit: int) -> int:
    """Last border between two UTF-8 characters at or before `limit`."""
    for border in range(limit, max(0, limit - 4), -1):
        if raw[border] & 0xC0 != 0x80:
            return border
    return limit
