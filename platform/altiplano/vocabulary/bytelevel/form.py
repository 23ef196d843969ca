"""Writes new tokens, words and a padding piece into a byte-level `tokenizer.json`.

Knows the file's fields, not how tokens were found. Costs one parse of the result.
"""

from collections.abc import Sequence
from typing import Any

from altiplano.errors import DataError, MismatchError
from altiplano.vocabulary.bytelevel.bpe import BYTE_OF, ByteBpe, to_letters
from altiplano.vocabulary.fastform import added_token, open_fast


def words_to_add(words: Sequence[str], bpe: ByteBpe, data: dict[str, Any]) -> list[str]:
    """The words that are no token yet.

    Raises:
        DataError: decoding would take a word's characters for byte letters.
    """
    known = {token["content"] for token in data["added_tokens"]}
    for word in words:
        if not word.isascii() and all(letter in BYTE_OF for letter in word):
            raise DataError(
                f"the word {word!r} cannot be a token of a byte-level vocabulary: its letters are "
                "those that bytes are spelled in, so it would be decoded as "
                f"{bytes(BYTE_OF[letter] for letter in word).decode(errors='replace')!r}. Leave "
                "it out of `tokenizer.words`."
            )
    return [
        word
        for word in dict.fromkeys(words)
        if word not in known and to_letters(word.encode()) not in bpe.vocab
    ]


def with_tokens(
    data: dict[str, Any],
    grown: ByteBpe,
    next_id: int,
    words: Sequence[str],
    pad_piece: str | None,
) -> dict[str, Any]:
    """A base's `tokenizer.json` with new tokens, merges, words and the padding piece.

    Args:
        data: of the base; left as it is.
        grown: its BPE with the new tokens.
        next_id: of the first word; the padding piece comes last.
        words: ordinary added tokens.
        pad_piece: a special one, unless the base has it.

    Raises:
        MismatchError: the padding piece is an ordinary token.
    """
    added = list(data["added_tokens"])
    special = {token["content"]: token["special"] for token in added}
    wanted = [(word, False) for word in words]
    if pad_piece is not None and not special.get(pad_piece, False):
        if pad_piece in special or pad_piece in grown.vocab or pad_piece in words:
            raise MismatchError(
                f"the padding piece {pad_piece!r} is an ordinary token of the base or a word: text "
                "would be taken for padding. Choose another, for instance '[PAD]'."
            )
        wanted.append((pad_piece, True))
    for offset, (content, is_special) in enumerate(wanted):
        added.append(added_token(next_id + offset, content, special=is_special))
    # `tokenizers` gives an added token the id it has in the vocabulary, else the next free one,
    # whatever its entry says: without this the new tokens would move the base's special ids.
    vocab = grown.vocab | {token["content"]: token["id"] for token in added}
    spaced = any(isinstance(merge, str) for merge in data["model"]["merges"])
    merges = [" ".join(pair) if spaced else list(pair) for pair in grown.merges]
    model = data["model"] | {"vocab": vocab, "merges": merges}
    return data | {"added_tokens": added, "model": model}


def require_plain_text(data: dict[str, Any]) -> None:
    """Refuse special tokens that their own text would become: text must stay text.

    Raises:
        MismatchError: there is one.
    """
    special = [token for token in data["added_tokens"] if token["special"]]
    tokenizer = open_fast(data)
    for token in special:
        if token["id"] in tokenizer.encode(token["content"], add_special_tokens=False).ids:
            raise MismatchError(
                f"the special token {token['content']!r} is a word of ordinary text: the base "
                "would take that word for it. Choose one in brackets, for instance '[PAD]'."
            )
