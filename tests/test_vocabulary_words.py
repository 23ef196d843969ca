"""Words: whole pieces in any surroundings, with as few pieces on the way as possible."""

from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import given
from hypothesis import strategies as st

from altiplano.vocabulary.merge import MergeResult, merge_sentencepiece
from altiplano.vocabulary.proto import NORMAL, USER_DEFINED, read_model
from altiplano.vocabulary.train import train_sentencepiece
from altiplano.vocabulary.words import fewest_parts, merge_steps
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    train_tiny_addition,
    train_tiny_base,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def addition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_addition(tmp_path_factory.mktemp("addition"))


def _processor(result: MergeResult) -> Any:
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(result.proto)
    return processor


def test_words_become_whole_pieces_in_any_surroundings(base: Path, addition: Path) -> None:
    words = ["量子纠缠", "龘", "河流山上", "GPU", "5G网络", "market2"]
    result = merge_sentencepiece(base, [addition], words=words, keep="cjk")
    assert result.split_words == ()
    processor = _processor(result)
    for word in words:
        for text in (word, f"山上{word}很多", f"the {word} runs", f"。{word}{word}"):
            found = "".join(processor.encode(text, out_type=str)).count(word)
            pieces = processor.encode(text, out_type=str)
            assert found == sum(piece in (word, f"▁{word}") for piece in pieces), (text, pieces)
    scores = {piece.piece: piece.score for piece in read_model(result.proto).pieces}
    ordinary = scores["小船"]
    assert scores["量子纠缠"] > scores["量子纠"] > ordinary


def test_words_of_an_addition_are_words(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "terms.model"
    train_sentencepiece(chinese_lines(), vocab_size=60, output=output, words=["量子纠缠", "GPU"])
    types = {piece.piece: piece.type for piece in read_model(output).pieces}
    assert types["量子纠缠"] == types["GPU"] == USER_DEFINED
    result = merge_sentencepiece(base, [output])
    assert (result.words, result.split_words) == (2, ())
    assert result.counts()["words"] == 2
    assert "GPU" in _processor(result).encode("用GPU", out_type=str)


def test_words_that_overlap_are_reported(base: Path) -> None:
    result = merge_sentencepiece(base, [], words=["的河流", "河流"])
    # In 的河流 the shorter word loses; it is whole only where the longer one is not.
    assert result.split_words == ("河流",)


def test_latin_words_change_no_text_without_them_and_their_helpers(shared: Path) -> None:
    llama = shared / "tokenizers/llama_32000.model"
    result = merge_sentencepiece(llama, [], words=["GPU", "transformer", "ChatGPT"])
    assert result.split_words == ()
    added = [piece.piece for piece in read_model(result.proto).pieces[result.old_size :]]
    text = (shared / "text/wiki_en_demo.txt").read_text(encoding="utf-8")
    lines = [
        line for line in text.split(". ") if not any(piece.strip("▁") in line for piece in added)
    ]
    assert len(lines) > 6000
    before = spm.SentencePieceProcessor(model_file=str(llama)).encode(lines)
    assert _processor(result).encode(lines) == before


def test_pieces_built_from_a_word_stay(base: Path) -> None:
    proto = read_model(base)
    del proto.pieces[3:]
    for text in ("人民币", "人民", "人", "民", "币"):
        proto.pieces.add(piece=text)
    result = merge_sentencepiece(base, [proto.SerializeToString()], words=["人民"])
    assert (result.unreachable, result.helpers) == (0, 0)
    assert "人民币" in _processor(result).encode("人民币", out_type=str)


@given(text=st.text(st.sampled_from("河流小船山上 the river"), max_size=12))
def test_merge_steps_are_sentencepiece_s(base: Path, addition: Path, text: str) -> None:
    result = merge_sentencepiece(base, [addition])
    scores = {p.piece: p.score for p in read_model(result.proto).pieces if p.type == NORMAL}
    symbols, built = merge_steps("▁" + text.replace(" ", "▁"), scores.get)
    pieces = _processor(result).encode(text, out_type=str) if text else ["▁"]
    assert [s for s in symbols if s in scores] == [p for p in pieces if not p.startswith("<0x")]
    assert built <= scores.keys()


@pytest.mark.parametrize(
    ("known", "parts"),
    [
        ((), ["abc", "ab"]),
        (("bc",), ["abc", "bc"]),
        (("ab", "cd"), ["ab", "cd"]),
        (("bcd", "bc"), ["bcd", "bc"]),
    ],
)
def test_as_few_new_parts_as_possible(known: tuple[str, ...], parts: list[str]) -> None:
    assert fewest_parts("abcd", known) == parts
