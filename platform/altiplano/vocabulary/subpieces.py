"""What new pieces are made of in the old vocabulary: where their rows can start from.

Knows two vocabularies of one family, not models. Cost: one short encoding per new piece.
"""

from altiplano.errors import MismatchError
from altiplano.vocabulary.load import Vocabulary


def old_subpieces(old: Vocabulary, new: Vocabulary) -> list[list[int]]:
    """For every id that `new` has beyond `old`'s, the old ids its content is made of.

    A byte-level piece that is only the beginning of a character has ids too. Control and padding
    pieces stand for no content and have none.

    Raises:
        MismatchError: the vocabularies are of two families, or `new` does not begin with `old`.
    """
    _require_extension(old, new)
    control = frozenset(new.control_pieces)
    return [_ids(old, new, new.piece(id_), control) for id_ in range(old.size, new.size)]


def _ids(old: Vocabulary, new: Vocabulary, piece: str, control: frozenset[str]) -> list[int]:
    if piece in control or not piece:
        return []
    return old.encode(piece) if piece in new.words else old.ids_of_piece(piece)


def _require_extension(old: Vocabulary, new: Vocabulary) -> None:
    if old.family != new.family:
        raise MismatchError(
            f"{new.source} is a {new.family} vocabulary, {old.source} a {old.family} one: the "
            "first is no extension of the second. Make the tokenizer again from this base."
        )
    both = min(old.size, new.size)
    moved = next((id_ for id_ in range(both) if old.piece(id_) != new.piece(id_)), both)
    if moved < old.size:
        theirs = repr(new.piece(moved)) if moved < new.size else "nothing"
        raise MismatchError(
            f"{new.source} does not extend {old.source}: id {moved} is {old.piece(moved)!r} there "
            f"and {theirs} here. Make the tokenizer again from this base."
        )
