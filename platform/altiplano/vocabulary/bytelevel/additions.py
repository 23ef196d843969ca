"""Pieces of trained SentencePiece models as tokens of a byte-level BPE, where merges reach them.

Knows pieces and merges. Costs one encoding of the pieces' own texts per round, two or three rounds.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from altiplano.vocabulary.bytelevel.bpe import ByteBpe, text_of, to_letters
from altiplano.vocabulary.bytelevel.corpus import Cutter
from altiplano.vocabulary.bytelevel.learn import Filter, join
from altiplano.vocabulary.characters import refusal
from altiplano.vocabulary.proto import NORMAL, SPACE, read_model


@dataclass(frozen=True)
class Taken:
    """Tokens with the additions' pieces, and what became of these."""

    tokens: list[str]
    overlap: int
    unreachable: int
    filtered: dict[str, int]


def take_pieces(
    bpe: ByteBpe,
    first_id: int,
    tokens: Sequence[str],
    additions: Sequence[Path],
    filter_: Filter,
    cutter: Cutter,
    words: Collection[str],
) -> Taken:
    """Append the additions' wanted NORMAL pieces in file order, and what single characters need.

    A piece must be one pre-token of the base and what its own text encodes to; others no text
    could produce. As in `merge`, parts that are no pieces are not added for its sake.

    Args:
        bpe: the base.
        first_id: of new tokens.
        tokens: new ones so far, in byte letters.
        additions: SentencePiece models, in order of priority.
        filter_: which pieces are wanted.
        cutter: the base's pre-tokenizer.
        words: texts that are taken out of any text before.
    """
    filtered: Counter[str] = Counter()
    wanted: dict[str, None] = {}
    for text in _texts(additions):
        reason = refusal(text.replace(" ", SPACE), filter_.keep, filter_.drop)
        if reason is None and not filter_.wanted(text):
            reason = "keep"
        if reason is not None:
            filtered[reason] += 1
        elif text not in words:
            wanted[to_letters(text.encode())] = None
    present = bpe.vocab.keys() | set(tokens)
    new = [token for token in wanted if token not in present]
    possible = [token for token in new if list(cutter.cut(_text(token))) == [token]]
    characters = [token for token in possible if len(_text(token)) == 1]
    parts = _parts(bpe.grown(tokens, first_id), characters)
    spelled: list[str] = []
    for token in possible:
        spelled += join(parts[token], filter_) if token in parts else [token]
    reached = _reachable(bpe, first_id, tokens, list(dict.fromkeys(spelled)))
    overlap = len(wanted) - len(new)
    return Taken(
        tokens=[*tokens, *reached],
        overlap=overlap,
        unreachable=len(set(new) - set(reached)),
        filtered=dict(filtered),
    )


def _texts(additions: Sequence[Path]) -> Iterator[str]:
    """Texts of all NORMAL pieces."""
    for addition in additions:
        for piece in read_model(addition).pieces:
            if piece.type == NORMAL:
                yield piece.piece.replace(SPACE, " ")


def _text(token: str) -> str:
    text = text_of(token)
    assert text is not None, "pieces are whole characters"
    return text


def _parts(bpe: ByteBpe, characters: Sequence[str]) -> dict[str, list[str]]:
    """What each character is made of."""
    names = {id_: name for name, id_ in bpe.vocab.items()}
    encoded = bpe.encode(characters)
    ids = iter(encoded.ids.tolist())
    return {
        character: [names[next(ids)] for _ in range(length)]
        for character, length in zip(characters, encoded.lengths.tolist(), strict=True)
    }


def _reachable(
    bpe: ByteBpe, first_id: int, tokens: Sequence[str], candidates: list[str]
) -> list[str]:
    """Candidates whose own text is merged to them, and the beginnings of characters among them.

    That a whole pre-token may skip the merges does not count: inside a phrase it could not.
    """
    bpe = replace(bpe, ignore_merges=False)
    while True:
        grown = bpe.grown([*tokens, *candidates], first_id)
        lengths = grown.encode(candidates).lengths.tolist()
        reached = [
            token
            for token, length in zip(candidates, lengths, strict=True)
            if length == 1 or text_of(token) is None
        ]
        if len(reached) == len(candidates):
            return candidates
        candidates = reached
