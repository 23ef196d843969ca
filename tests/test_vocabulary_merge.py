"""Merging vocabularies: the published hashes, base ids untouched, pieces that can be reached."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.config.schema import KeptPieces
from altiplano.errors import ArtifactError, MismatchError
from altiplano.vocabulary.characters import is_cjk, piece_wanted
from altiplano.vocabulary.merge import MergeResult, merge_sentencepiece
from altiplano.vocabulary.proto import BYTE, CONTROL, NORMAL, read_model, tied_pieces
from altiplano.vocabulary.train import train_sentencepiece
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    english_lines,
    train_tiny_addition,
    train_tiny_base,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def addition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_addition(tmp_path_factory.mktemp("addition"))


def _processor(result: MergeResult) -> spm.SentencePieceProcessor:
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(result.proto)
    return processor


@pytest.mark.parametrize(
    ("pad_piece", "size", "sha256"),
    [
        (None, 49953, "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"),
        ("[PAD]", 49954, "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"),
    ],
)
def test_the_reference_merge_gives_the_published_bytes(
    shared: Path, pad_piece: str | None, size: int, sha256: str
) -> None:
    result = merge_sentencepiece(
        shared / "tokenizers/llama_32000.model",
        [shared / "tokenizers/chinese_sp_20000.model"],
        scores="reference",
        pad_piece=pad_piece,
        keep="all",
    )
    assert hashlib.sha256(result.proto).hexdigest() == sha256
    assert (result.old_size, result.new_size) == (32000, size)
    assert (result.added, result.overlap) == (17953, 2047)


def test_distinct_drops_only_pieces_that_text_never_uses(shared: Path) -> None:
    llama = shared / "tokenizers/llama_32000.model"
    chinese = shared / "tokenizers/chinese_sp_20000.model"
    distinct = merge_sentencepiece(llama, [chinese], keep="all")
    assert distinct.added + distinct.unreachable == 17953
    assert distinct.unreachable == 343
    kept = {piece.piece for piece in read_model(distinct.proto).pieces}
    reference = merge_sentencepiece(llama, [chinese], scores="reference", keep="all")
    whole = _processor(reference)
    text = (shared / "text/luxun_quanji.txt").read_text(encoding="utf-8-sig")[:200_000]
    used = {piece for ids in whole.encode(text.split(), out_type=str) for piece in ids}
    assert used <= kept


def _real_lines(shared: Path) -> list[str]:
    text = (shared / "text/wiki_en_demo.txt").read_text(encoding="utf-8")
    return [sentence for line in text.splitlines() for sentence in line.split(". ")]


@pytest.mark.parametrize(("keep", "touched"), [("cjk", is_cjk), ("non_ascii", lambda c: c > "~")])
def test_text_outside_the_language_is_untouched(
    shared: Path, keep: KeptPieces, touched: Callable[[str], bool]
) -> None:
    llama = shared / "tokenizers/llama_32000.model"
    result = merge_sentencepiece(llama, [shared / "tokenizers/chinese_sp_20000.model"], keep=keep)
    assert result.filtered["keep"] > 600
    lines = [line for line in _real_lines(shared) if not any(map(touched, line))]
    assert len(lines) > 3000
    before = spm.SentencePieceProcessor(model_file=str(llama)).encode(lines)
    assert _processor(result).encode(lines) == before


def test_all_pieces_do_change_english(shared: Path) -> None:
    llama = shared / "tokenizers/llama_32000.model"
    additions = [shared / "tokenizers/chinese_sp_20000.model"]
    result = merge_sentencepiece(llama, additions, keep="all")
    lines = _real_lines(shared)[:500]
    assert _processor(result).encode(lines) != spm.SentencePieceProcessor(
        model_file=str(llama)
    ).encode(lines)


def test_base_ids_scores_and_types_stay(base: Path, addition: Path) -> None:
    before = read_model(base)
    after = read_model(merge_sentencepiece(base, [addition]).proto)
    size = len(before.pieces)
    assert [p.SerializeToString() for p in after.pieces[:size]] == [
        p.SerializeToString() for p in before.pieces
    ]
    assert after.normalizer_spec == before.normalizer_spec


def test_counts_add_up_and_added_scores_are_distinct_and_on_top(base: Path, addition: Path) -> None:
    result = merge_sentencepiece(base, [addition, addition], pad_piece="[PAD]")
    proto = read_model(result.proto)
    added = proto.pieces[result.old_size : -1]
    normal = sum(p.type == NORMAL for p in read_model(addition).pieces)
    assert result.new_size == len(proto.pieces) == result.old_size + result.added + 1
    assert result.added + result.unreachable <= normal
    assert min(p.score for p in added) > max(p.score for p in proto.pieces[: result.old_size])
    assert tied_pieces(proto) == 0
    assert all(p.type == NORMAL for p in added)
    assert not any(p.type in (CONTROL, BYTE) for p in added)


def test_pad_is_control_in_distinct_and_normal_in_reference(base: Path, addition: Path) -> None:
    distinct = read_model(merge_sentencepiece(base, [addition], pad_piece="[PAD]").proto)
    assert distinct.pieces[-1].type == CONTROL
    assert distinct.trainer_spec.pad_id == len(distinct.pieces) - 1
    merged = merge_sentencepiece(
        base, [addition], scores="reference", pad_piece="[PAD]", keep="all"
    )
    reference = read_model(merged.proto)
    assert (reference.pieces[-1].piece, reference.pieces[-1].type) == ("[PAD]", NORMAL)
    assert reference.trainer_spec.pad_id == -1


def test_chinese_gets_shorter_and_english_stays(base: Path, addition: Path) -> None:
    before = spm.SentencePieceProcessor(model_file=str(base))
    after = _processor(merge_sentencepiece(base, [addition]))
    chinese, english = chinese_lines(20, seed=9), english_lines(20, seed=9)
    assert sum(map(len, after.encode(chinese))) < sum(map(len, before.encode(chinese))) / 3
    assert after.encode(english) == before.encode(english)


def test_unreachable_pieces_are_counted_and_left_out(base: Path, tmp_path: Path) -> None:
    addition = tmp_path / "gap.model"
    train_sentencepiece(chinese_lines(), vocab_size=50, output=addition)
    proto = read_model(addition)
    proto.pieces.add(piece="甲乙丙", score=-99.0)
    addition.write_bytes(proto.SerializeToString())
    distinct = merge_sentencepiece(base, [addition])
    reference = merge_sentencepiece(base, [addition], scores="reference", keep="all")
    assert distinct.unreachable == reference.unreachable == 1
    assert reference.new_size == distinct.new_size + 1
    assert "甲乙丙" not in {p.piece for p in read_model(distinct.proto).pieces}


def test_merging_again_adds_nothing(base: Path, addition: Path) -> None:
    once = merge_sentencepiece(base, [addition], pad_piece="[PAD]")
    again = merge_sentencepiece(once.proto, [addition], pad_piece="[PAD]")
    assert again.added == 0
    assert again.proto == once.proto


def test_a_unigram_base_is_refused(addition: Path, tmp_path: Path) -> None:
    unigram = tmp_path / "unigram.model"
    train_sentencepiece(chinese_lines(), vocab_size=40, output=unigram, model_type="unigram")
    with pytest.raises(MismatchError, match="not a BPE model"):
        merge_sentencepiece(unigram, [addition])


@pytest.mark.parametrize("content", [None, b"version https://git-lfs", b""])
def test_an_unreadable_model_is_named(base: Path, tmp_path: Path, content: bytes | None) -> None:
    broken = tmp_path / "broken.model"
    if content is not None:
        broken.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"broken\.model"):
        merge_sentencepiece(base, [broken])


def test_a_truncated_model_is_refused(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.model"
    broken.write_bytes(base.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="cut short"):
        merge_sentencepiece(base, [broken])


# Text without a Chinese character: other scripts, digits, emoji with joiners, runs of spaces.
_NOT_CHINESE = st.lists(
    st.sampled_from(
        ["été ", "Страна ", "the  river", "2024", "👩\u200d👧", "\t", "\n", "▁", "“—…”", "ß"]
    )
    | st.characters(exclude_categories=["Cs"]).filter(lambda char: not is_cjk(char)),
    max_size=20,
).map("".join)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An addition that could change anything: Latin, digits, punctuation, Chinese, all mixed."""
    output = tmp_path_factory.mktemp("mixed") / "mixed.model"
    lines = [
        f"{a}“{b}”——1984年 {a}été，２０{b}ＡＢ。" * 2
        for a, b in zip(chinese_lines(), english_lines(), strict=True)
    ]
    train_sentencepiece(lines, vocab_size=220, output=output, split_digits=False)
    return output


@pytest.fixture(scope="module")
def cjk_only(base: Path, mixed: Path) -> tuple[Any, Any]:
    """The base's processor, and that of a merge with `keep="cjk"`."""
    before = spm.SentencePieceProcessor(model_file=str(base))
    return before, _processor(merge_sentencepiece(base, [mixed], keep="cjk"))


@given(text=_NOT_CHINESE)
@settings(max_examples=300)
def test_text_without_chinese_keeps_its_ids(cjk_only: tuple[Any, Any], text: str) -> None:
    before, after = cjk_only
    assert after.encode(text) == before.encode(text)


@given(text=st.text(st.characters(max_codepoint=127), max_size=40))
@settings(max_examples=200)
def test_ascii_keeps_its_ids(base: Path, mixed: Path, text: str) -> None:
    before = spm.SentencePieceProcessor(model_file=str(base))
    after = _processor(merge_sentencepiece(base, [mixed], keep="non_ascii"))
    assert after.encode(text) == before.encode(text)


@pytest.mark.parametrize(
    ("text", "non_ascii", "cjk", "no_digits", "no_latin"),
    [
        ("河流", True, True, True, True),
        ("▁河", True, True, True, True),
        ("：“", True, True, True, True),
        ("——", True, False, True, True),
        ("été", False, False, True, False),
        ("é", True, False, True, False),
        ("年2", False, False, False, True),
        ("２０", True, True, False, True),
        ("Ａ股", True, True, True, False),
        ("▁▁", False, False, True, True),
        ("GPU", False, False, True, False),
        ("\U00020000", True, True, True, True),
    ],
)
def test_which_pieces_are_wanted(
    text: str, non_ascii: bool, cjk: bool, no_digits: bool, no_latin: bool
) -> None:
    assert piece_wanted(text, "all", ())
    assert piece_wanted(text, "non_ascii", ()) is non_ascii
    assert piece_wanted(text, "cjk", ()) is cjk
    assert piece_wanted(text, "all", ["digits"]) is no_digits
    assert piece_wanted(text, "all", ["latin"]) is no_latin


_TERMS = st.lists(
    st.text(st.sampled_from("河流小船山上量子纠缠GPUriver5"), min_size=1, max_size=6),
    max_size=6,
    unique=True,
)


@given(words=_TERMS, keep=st.sampled_from(["all", "non_ascii", "cjk"]), digits=st.booleans())
@settings(max_examples=60)
def test_the_counts_add_up(
    base: Path, addition: Path, mixed: Path, words: list[str], keep: KeptPieces, digits: bool
) -> None:
    result = merge_sentencepiece(
        base,
        [mixed, addition],
        pad_piece="[PAD]",
        keep=keep,
        drop=["digits"] if digits else [],
        words=words,
    )
    present = {piece.piece for piece in read_model(base).pieces}
    offered = {
        piece.piece
        for source in (mixed, addition)
        for piece in read_model(source).pieces
        if piece.type == NORMAL
    } | set(words)
    proto = read_model(result.proto)
    texts = [piece.piece for piece in proto.pieces]
    assert len(offered - present) + result.helpers == (
        result.added + result.unreachable + sum(result.filtered.values())
    )
    assert result.new_size == len(texts) == len(set(texts)) == result.old_size + result.added + 1
    assert result.words == len(set(words) - present)
    assert set(words) <= set(texts)
    assert tied_pieces(proto) == 0


def test_reference_scores_go_with_nothing_else(base: Path, addition: Path) -> None:
    with pytest.raises(MismatchError, match=r"keep='non_ascii' and 1 words would change it"):
        merge_sentencepiece(base, [addition], scores="reference", words=["河流"])
