"""What a new row starts from: the old pieces of its content, in both families."""

from pathlib import Path

import pytest

from altiplano.errors import MismatchError
from altiplano.vocabulary.bytelevel.bpe import text_of, to_letters
from altiplano.vocabulary.bytelevel.extend import extend_bytelevel
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import merge_sentencepiece
from altiplano.vocabulary.subpieces import old_subpieces
from tests.helpers.bytelevel import Family, train_byte_base
from tests.helpers.tiny_vocabulary import chinese_lines, train_tiny_addition, train_tiny_base


@pytest.fixture
def sentencepieces(tmp_path: Path) -> tuple[Vocabulary, Vocabulary]:
    base = train_tiny_base(tmp_path)
    save_tokenizer(base.read_bytes(), tmp_path / "old")
    merged = merge_sentencepiece(base, [train_tiny_addition(tmp_path)], pad_piece="[PAD]")
    save_tokenizer(merged.proto, tmp_path / "new")
    return Vocabulary(tmp_path / "old"), Vocabulary(tmp_path / "new")


def _bytelevels(directory: Path, family: Family) -> tuple[Vocabulary, Vocabulary]:
    base = train_byte_base(directory / "old", family)
    extend_bytelevel(
        base,
        directory / "new",
        texts=[*chinese_lines(), "你 的 苹果 的" * 9],
        new_pieces=60,
        words=["机器学习"],
        pad_piece="[PAD]",
    )
    return Vocabulary(base), Vocabulary(directory / "new")


def _spelled(vocabulary: Vocabulary, ids: list[int]) -> str:
    return "".join(vocabulary.piece(id_) for id_ in ids)


def test_sentencepiece_pieces_are_their_bytes(
    sentencepieces: tuple[Vocabulary, Vocabulary],
) -> None:
    old, new = sentencepieces
    pieces = old_subpieces(old, new)
    assert len(pieces) == new.size - old.size
    assert pieces[new.pad_id - old.size] == []
    for offset, ids in enumerate(pieces):
        text = new.piece(old.size + offset)
        if old.size + offset != new.pad_id:
            assert _spelled(old, ids) == "".join(f"<0x{byte:02X}>" for byte in text.encode())


@pytest.mark.parametrize("family", ["llama3", "qwen"])
def test_bytelevel_pieces_are_spelled_by_their_parts(tmp_path: Path, family: Family) -> None:
    old, new = _bytelevels(tmp_path, family)
    pieces = old_subpieces(old, new)
    assert len(pieces) == new.size - old.size
    assert pieces[new.pad_id - old.size] == []
    words = beginnings = 0
    for offset, ids in enumerate(pieces):
        piece = new.piece(old.size + offset)
        if old.size + offset == new.pad_id:
            continue
        if piece in new.words:
            words += 1
            assert _spelled(old, ids) == to_letters(piece.encode())
            continue
        assert _spelled(old, ids) == piece
        assert max(ids) < old.size
        beginnings += text_of(piece) is None
        if text := text_of(piece):
            assert ids == old.encode(text)
    assert words == 1
    assert beginnings > 0


def test_vocabularies_that_do_not_belong_together_are_refused(
    sentencepieces: tuple[Vocabulary, Vocabulary], tmp_path: Path
) -> None:
    old, new = sentencepieces
    byte_old, byte_new = _bytelevels(tmp_path / "bytes", "qwen")
    with pytest.raises(MismatchError, match="is a bytelevel vocabulary, .* a sentencepiece one"):
        old_subpieces(old, byte_new)
    with pytest.raises(MismatchError, match=r"id \d+ is .* there and nothing here"):
        old_subpieces(new, old)
    other = Vocabulary(train_byte_base(tmp_path / "other", "llama3"))
    with pytest.raises(MismatchError, match=r"id \d+ is '<\|begin_of_text\|>' there and"):
        old_subpieces(other, byte_new)
    assert old_subpieces(byte_old, byte_old) == []
