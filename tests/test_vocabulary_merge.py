"""Merging vocabularies: the published hashes, base ids untouched, pieces that can be reached."""

import hashlib
from pathlib import Path

import pytest
import sentencepiece as spm

from altiplano.errors import ArtifactError, MismatchError
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
    )
    assert hashlib.sha256(result.proto).hexdigest() == sha256
    assert (result.old_size, result.new_size) == (32000, size)
    assert (result.added, result.overlap) == (17953, 2047)


def test_distinct_drops_only_pieces_that_text_never_uses(shared: Path) -> None:
    llama = shared / "tokenizers/llama_32000.model"
    chinese = shared / "tokenizers/chinese_sp_20000.model"
    distinct = merge_sentencepiece(llama, [chinese])
    assert distinct.added + distinct.unreachable == 17953
    kept = {piece.piece for piece in read_model(distinct.proto).pieces}
    reference = merge_sentencepiece(llama, [chinese], scores="reference")
    whole = _processor(reference)
    text = (shared / "text/luxun_quanji.txt").read_text(encoding="utf-8-sig")[:200_000]
    used = {piece for ids in whole.encode(text.split(), out_type=str) for piece in ids}
    assert used <= kept


def test_english_is_untouched_when_ascii_pieces_are_skipped(shared: Path) -> None:
    llama = shared / "tokenizers/llama_32000.model"
    result = merge_sentencepiece(
        llama, [shared / "tokenizers/chinese_sp_20000.model"], skip_ascii=True
    )
    assert result.skipped_ascii > 0
    text = (shared / "text/wiki_en_demo.txt").read_text(encoding="utf-8")
    # The text holds a few words in other scripts; what is ASCII must keep its ids.
    lines = text.encode("ascii", "ignore").decode().splitlines()
    before = spm.SentencePieceProcessor(model_file=str(llama)).encode(lines)
    assert _processor(result).encode(lines) == before


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
    reference = read_model(
        merge_sentencepiece(base, [addition], scores="reference", pad_piece="[PAD]").proto
    )
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
    reference = merge_sentencepiece(base, [addition], scores="reference")
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
