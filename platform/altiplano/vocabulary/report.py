"""Compares vocabularies: how well they cover texts, and what the later ones change of the first.

Knows `Vocabulary` and strings; draws nothing (`report_view`) and reads no texts from files. Cost:
one encoding of every text by every vocabulary, two where a directory has both forms, and two
encodings of every piece beyond the first vocabulary's.
"""

from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from altiplano.errors import DataError
from altiplano.vocabulary.agree import compare_forms
from altiplano.vocabulary.bytelevel.bpe import to_bytes
from altiplano.vocabulary.fastform import FAST_FILE
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.proto import MODEL_FILE, SPACE

EXAMPLES = 8
"""Pieces shown as examples."""

Content = bytes | str
"""What a piece stands for: UTF-8 bytes; its name, for byte pieces, control pieces and words."""


@dataclass(frozen=True)
class Coverage:
    """One vocabulary on one text. Lines with text are counted, line ends, BOS and EOS are not."""

    lines: int
    characters: int
    bytes: int
    """In UTF-8."""
    tokens: int
    tokens_per_character: float
    tokens_per_byte: float
    byte_fallback_share: float
    """Share of the bytes in tokens that are not whole characters: SentencePiece's byte pieces,
    parts of characters in a byte-level BPE."""
    single_character_share: float
    """Share of the tokens that stand for one character."""
    lines_as_first: int
    """Lines that are the same pieces as in the first vocabulary."""
    changed_example: str | None
    """A line that is not, the first of the shortest."""
    lines_forms_differ: int | None
    """Lines whose ids differ between SentencePiece and the fast form; None where there is one."""


@dataclass(frozen=True)
class Pieces:
    """One vocabulary in itself and beside the first."""

    size: int
    family: str
    form: str
    """What encodes: "sentencepiece" or "fast"."""
    in_first: int
    """Pieces that the first vocabulary has too."""
    byte_pieces: int
    """Pieces that are not whole characters."""
    unreachable: int
    """Pieces beyond the first vocabulary's that never come out of encoding their own text."""
    unreachable_examples: tuple[str, ...]
    longest_new: tuple[str, ...]
    """Longest pieces beyond the first vocabulary's (of the first: its longest)."""


@dataclass(frozen=True)
class Report:
    """Everything that was measured: `pieces[vocabulary]`, `coverage[text][vocabulary]`."""

    pieces: dict[str, Pieces]
    coverage: dict[str, dict[str, Coverage]]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def report(vocabularies: Mapping[str, Vocabulary], texts: Mapping[str, str]) -> Report:
    """Measure vocabularies, by name, on texts, by name; the first is what others are held against.

    Raises:
        DataError: a text is empty.
    """
    tables = {name: _Table(vocabulary) for name, vocabulary in vocabularies.items()}
    first = next(iter(tables.values()))
    return Report(
        pieces={name: _pieces(table, first) for name, table in tables.items()},
        coverage={key: _cover(tables, first, key, text) for key, text in texts.items()},
    )


class _Table:
    """A vocabulary and, by id, what its pieces stand for."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        named = frozenset(vocabulary.control_pieces)
        self.contents = [_content(vocabulary, id_, named) for id_ in range(vocabulary.size)]
        self.texts = [_text(content) for content in self.contents]
        """None for what is no whole characters."""
        self.partial_bytes = np.array(
            [
                0 if text is not None else 1 if isinstance(content, str) else len(content)
                for content, text in zip(self.contents, self.texts, strict=True)
            ]
        )
        self.is_character = np.array([text is not None and len(text) == 1 for text in self.texts])
        self.id_of = {content: id_ for id_, content in enumerate(self.contents)}

    def encode(self, lines: list[str]) -> list[npt.NDArray[np.int32]]:
        flat, lengths = self.vocabulary.encode_flat(lines)
        return np.split(flat, np.cumsum(lengths)[:-1])


def _content(vocabulary: Vocabulary, id_: int, named: Container[str]) -> Content:
    piece = vocabulary.piece(id_)
    if vocabulary.family == "bytelevel":
        data = None if piece in named or piece in vocabulary.words else to_bytes(piece)
        return piece if data is None else data
    return piece if piece in named or _is_byte(piece) else piece.replace(SPACE, " ").encode()


def _is_byte(piece: str) -> bool:
    """Whether a piece is a byte such as `<0xE4>`."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _text(content: Content) -> str | None:
    if isinstance(content, str):
        return None if _is_byte(content) else content
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _pieces(table: _Table, first: _Table) -> Pieces:
    vocabulary = table.vocabulary
    known = first.id_of if table is not first else {}
    new = {
        id_: text
        for id_, (content, text) in enumerate(zip(table.contents, table.texts, strict=True))
        if isinstance(content, bytes) and text and content not in known
    }
    unreachable = _unreachable(vocabulary, new) if table is not first else []
    return Pieces(
        size=vocabulary.size,
        family=vocabulary.family,
        form=vocabulary.form,
        in_first=sum(content in first.id_of for content in table.contents),
        byte_pieces=sum(text is None for text in table.texts),
        unreachable=len(unreachable),
        unreachable_examples=tuple(unreachable[:EXAMPLES]),
        longest_new=tuple(sorted(new.values(), key=lambda text: -len(text.strip()))[:EXAMPLES]),
    )


def _unreachable(vocabulary: Vocabulary, pieces: Mapping[int, str]) -> list[str]:
    """Texts of pieces that come out of encoding it neither at the start nor after a line end."""
    found: set[int] = set()
    for before in ("", "\n"):
        missing = {id_: text for id_, text in pieces.items() if id_ not in found}
        ids = vocabulary.encode_batch([before + text for text in missing.values()])
        found |= {id_ for id_, own in zip(missing, ids, strict=True) if id_ in own}
    return [text for id_, text in pieces.items() if id_ not in found]


def _cover(tables: Mapping[str, _Table], first: _Table, key: str, text: str) -> dict[str, Coverage]:
    lines = [line for line in text.splitlines() if line]
    if not lines:
        raise DataError(f"the text {key} is empty: there is nothing to measure.")
    expected = first.encode(lines)
    return {name: _measure(table, first, expected, lines) for name, table in tables.items()}


def _measure(
    table: _Table, first: _Table, expected: list[npt.NDArray[np.int32]], lines: list[str]
) -> Coverage:
    encoded = table.encode(lines)
    ids = np.concatenate(encoded)
    in_first = np.array([first.id_of.get(content, -1) for content in table.contents])
    changed = [
        line
        for line, own, others in zip(lines, encoded, expected, strict=True)
        if not np.array_equal(in_first[own], others)
    ]
    characters = sum(map(len, lines))
    size_bytes = sum(len(line.encode()) for line in lines)
    return Coverage(
        lines=len(lines),
        characters=characters,
        bytes=size_bytes,
        tokens=len(ids),
        tokens_per_character=len(ids) / characters,
        tokens_per_byte=len(ids) / size_bytes,
        byte_fallback_share=float(table.partial_bytes[ids].sum() / size_bytes),
        single_character_share=float(table.is_character[ids].mean()),
        lines_as_first=len(lines) - len(changed),
        changed_example=min(changed, key=len, default=None),
        lines_forms_differ=_forms_differ(table.vocabulary, lines),
    )


def _forms_differ(vocabulary: Vocabulary, lines: list[str]) -> int | None:
    directory = vocabulary.source
    if not all((directory / name).is_file() for name in (MODEL_FILE, FAST_FILE)):
        return None
    return compare_forms(directory, lines).differing
