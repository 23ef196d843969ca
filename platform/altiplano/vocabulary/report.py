"""Compares how well vocabularies cover texts.

Knows `Vocabulary` and strings; reads and writes no files. Cost: one encoding of each text by each
vocabulary.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from altiplano.errors import DataError
from altiplano.vocabulary.load import Vocabulary

if TYPE_CHECKING:
    from rich.table import Table


def report(vocabularies: Mapping[str, Vocabulary], texts: Mapping[str, str]) -> dict[str, Any]:
    """Measure every vocabulary on every text, line by line (line ends are not counted).

    Returns:
        `{name: {"size", "overlap_with_first", "texts": {text: {"characters", "bytes", "tokens",
        "tokens_per_character", "tokens_per_byte", "byte_fallback_share"}}}}`. Tokens are counted
        without BOS and EOS. `byte_fallback_share` is the share of the text's UTF-8 bytes spelled
        by byte pieces. `overlap_with_first` counts the pieces also in the first vocabulary.

    Raises:
        DataError: a text is empty.
    """
    first: set[str] = set()
    result: dict[str, Any] = {}
    for name, vocabulary in vocabularies.items():
        pieces = {vocabulary.piece(id_) for id_ in range(vocabulary.size)}
        first = first or pieces
        result[name] = {
            "size": vocabulary.size,
            "overlap_with_first": len(pieces & first),
            "texts": {key: _measure(vocabulary, key, text) for key, text in texts.items()},
        }
    return result


def _measure(vocabulary: Vocabulary, name: str, text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line]
    if not lines:
        raise DataError(f"the text {name} is empty: there is nothing to measure.")
    characters = sum(map(len, lines))
    size_bytes = sum(len(line.encode()) for line in lines)
    tokens = fallback = 0
    for ids in vocabulary.encode_batch(lines):
        tokens += len(ids)
        fallback += sum(_is_byte(vocabulary.piece(id_)) for id_ in ids)
    return {
        "characters": characters,
        "bytes": size_bytes,
        "tokens": tokens,
        "tokens_per_character": tokens / characters,
        "tokens_per_byte": tokens / size_bytes,
        "byte_fallback_share": fallback / size_bytes,
    }


def _is_byte(piece: str) -> bool:
    """Whether a piece is a byte such as `<0xE4>`."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def report_table(measured: Mapping[str, Any]) -> "Table":
    """The result of `report` as a table: a row per vocabulary and text."""
    from rich.table import Table

    table = Table(title="Vocabularies")
    table.add_column("vocabulary")
    table.add_column("pieces", justify="right")
    table.add_column("in the first", justify="right")
    table.add_column("text")
    for column in ("tokens/character", "tokens/byte", "bytes by fallback"):
        table.add_column(column, justify="right")
    for name, entry in measured.items():
        for text, row in entry["texts"].items():
            table.add_row(
                name,
                f"{entry['size']:,}",
                f"{entry['overlap_with_first']:,}",
                text,
                f"{row['tokens_per_character']:.4f}",
                f"{row['tokens_per_byte']:.4f}",
                f"{row['byte_fallback_share']:.2%}",
            )
    return table
