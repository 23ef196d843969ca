"""Pruning: what is left occurs often enough or is needed, can be built, and keeps its score."""

from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import MergeResult, merge_sentencepiece
from altiplano.vocabulary.proto import CONTROL, read_model
from altiplano.vocabulary.prune import PruneResult, prune_sentencepiece
from tests.helpers.tiny_vocabulary import chinese_lines, train_tiny_addition, train_tiny_base

_WORDS = ["量子纠缠", "GPU"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> MergeResult:
    directory = tmp_path_factory.mktemp("merged")
    base, addition = train_tiny_base(directory), train_tiny_addition(directory)
    return merge_sentencepiece(base, [addition], pad_piece="[PAD]", words=_WORDS)


def _counts(proto: bytes, texts: list[str]) -> dict[str, int]:
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)
    counts = {piece.piece: 0 for piece in read_model(proto).pieces}
    for pieces in processor.encode(texts, out_type=str):
        for piece in pieces:
            if piece in counts:
                counts[piece] += 1
    return counts


@given(
    min_count=st.integers(1, 60),
    texts=st.lists(
        st.lists(st.sampled_from([*chinese_lines(20), "河", "小船", "\n", "GPU"]), max_size=9).map(
            "".join
        ),
        max_size=12,
    ),
    protect=st.booleans(),
)
@settings(max_examples=60)
def test_every_piece_left_is_frequent_or_needed(
    merged: MergeResult, min_count: int, texts: list[str], protect: bool
) -> None:
    protected = _WORDS if protect else []
    result = prune_sentencepiece(
        merged.proto,
        iter(texts),
        old_size=merged.old_size,
        min_count=min_count,
        protected=protected,
    )
    _require_consistent(merged, result, protected)
    # Counted on whole texts, line ends and all: cutting into lines must not have changed a thing.
    counts = _counts(result.proto, texts)
    for piece in read_model(result.proto).pieces[merged.old_size : -1]:
        text, count = piece.piece, counts[piece.piece]
        if text in result.rare_parts:
            assert count == result.rare_parts[text] < min_count
            assert any(
                text in other and counts[other] >= min_count for other in counts if other != text
            )
        elif text in result.rare_protected:
            assert count == result.rare_protected[text] < min_count
            assert any(text in f"▁{word}" for word in protected)
        else:
            assert count >= min_count


def _require_consistent(merged: MergeResult, result: PruneResult, protected: list[str]) -> None:
    before, after = read_model(merged.proto), read_model(result.proto)
    left = {piece.piece: piece.SerializeToString() for piece in after.pieces}
    order = [p.piece for p in before.pieces if p.piece in left]
    assert order == [p.piece for p in after.pieces]
    assert all(p.SerializeToString() == left[p.piece] for p in before.pieces if p.piece in left), (
        "a score or a type changed"
    )
    assert order[: merged.old_size] == [p.piece for p in before.pieces[: merged.old_size]]
    assert set(protected) <= set(left)
    assert (order[-1], after.pieces[-1].type) == ("[PAD]", CONTROL)
    assert after.trainer_spec.pad_id == len(order) - 1
    assert result.new_size == len(order) == merged.new_size - result.removed
    known = set(left)
    assert all(known.issuperset(text) for text in order[merged.old_size : -1])


def test_both_forms_agree_on_what_is_left(merged: MergeResult, tmp_path: Path) -> None:
    texts = chinese_lines(40)
    result = prune_sentencepiece(
        merged.proto, texts, old_size=merged.old_size, min_count=25, protected=_WORDS
    )
    assert result.removed > 0
    save_tokenizer(result.proto, tmp_path)
    fast = tmp_path / "tokenizer.model"
    slow = Vocabulary(fast)
    encoded = slow.encode_batch([*texts, "用GPU算量子纠缠"])
    fast.unlink()
    assert Vocabulary(tmp_path).encode_batch([*texts, "用GPU算量子纠缠"]) == encoded


def test_a_rare_part_of_a_frequent_piece_stays_and_is_told(tmp_path: Path) -> None:
    """咱 is a token once, 咱们 often: without the character there would be no 咱们."""
    base = train_tiny_base(tmp_path)
    proto = read_model(train_tiny_addition(tmp_path))
    for text in ("咱们", "咱", "们"):
        proto.pieces.add(piece=text)
    merged = merge_sentencepiece(base, [proto.SerializeToString()])
    texts = ["咱们有很多小船"] * 9 + ["们们们们们们们们们", "咱有"]
    result = prune_sentencepiece(merged.proto, texts, old_size=merged.old_size, min_count=5)
    assert result.rare_parts["咱"] == 1
    assert {"咱", "咱们", "们"} <= {piece.piece for piece in read_model(result.proto).pieces}
    never = prune_sentencepiece(merged.proto, texts[:-1], old_size=merged.old_size, min_count=5)
    assert never.rare_parts["咱"] == 0
    assert never.untrained == sum(count == 0 for count in never.rare_parts.values()) > 0
    rare = prune_sentencepiece(merged.proto, texts, old_size=merged.old_size, min_count=11)
    assert not {"咱", "咱们"} & {piece.piece for piece in read_model(rare.proto).pieces}


def test_counting_a_sample_leaves_out_no_fewer(merged: MergeResult) -> None:
    texts = chinese_lines(200)
    whole, sample, again = (
        prune_sentencepiece(
            merged.proto, texts, old_size=merged.old_size, min_count=60, max_lines=limit
        )
        for limit in (1000, 50, 50)
    )
    assert (whole.lines, sample.lines) == (200, 50)
    assert sample.removed > whole.removed
    assert sample.proto == again.proto


def test_no_text_leaves_nothing_but_words(merged: MergeResult) -> None:
    result = prune_sentencepiece(
        merged.proto, [], old_size=merged.old_size, min_count=1, protected=_WORDS
    )
    assert set(_WORDS) <= set(result.rare_protected)
    assert result.counts()["untrained"] == len(result.rare_protected)
    assert result.rare_parts == {}
    assert result.new_size == merged.old_size + len(result.rare_protected) + 1
