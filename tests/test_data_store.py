"""Token store, packing and order: no token lost, none duplicated, labels within a document."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.data.order import block_order, blocks_at
from altiplano.data.pack import Block, TokenSequence, pack_records, pack_text
from altiplano.data.store import IGNORE_INDEX, StoreWriter, TokenStore
from altiplano.errors import ArtifactError

PAD = 0
documents_strategy = st.lists(
    st.lists(st.integers(1, 70_000), min_size=2, max_size=40).map(lambda ids: np.array(ids)),
    max_size=12,
)


def write(directory: Path, blocks: list[Block], length: int, vocab_size: int = 100_000) -> None:
    writer = StoreWriter(directory, sequence_length=length, vocab_size=vocab_size, pad_id=PAD)
    with writer:
        for block in blocks:
            writer.add(block)


@given(documents=documents_strategy, length=st.integers(2, 24))
def test_text_packing_loses_and_repeats_nothing(documents: list[np.ndarray], length: int) -> None:
    blocks = list(pack_text(documents, length))
    told = [int(id_) for document in documents for id_ in document]
    assert [int(id_) for block in blocks for id_ in block.ids] == told
    assert all(len(block.ids) == length for block in blocks[:-1])
    for block in blocks:
        first = np.diff(block.segments, prepend=0) == 1
        assert (block.loss == ~first).all(), "every token but a segment's first is a target"


@given(documents=documents_strategy, length=st.integers(2, 24))
def test_segments_are_pieces_of_documents(documents: list[np.ndarray], length: int) -> None:
    """A segment never holds tokens of two documents."""
    numbered = [np.full(len(document), number) for number, document in enumerate(documents)]
    for block in pack_text(numbered, length):
        for segment in np.unique(block.segments):
            assert len(np.unique(block.ids[block.segments == segment])) == 1


@given(
    lengths=st.lists(st.integers(1, 16), max_size=40),
    window=st.integers(1, 50),
)
def test_records_stay_whole(lengths: list[int], window: int) -> None:
    records = [
        TokenSequence(np.full(n, number), np.full(n, number % 2))
        for number, n in enumerate(lengths, start=1)
    ]
    blocks = list(pack_records(records, 16, window))
    seen: list[int] = []
    for block in blocks:
        assert len(block.ids) <= 16
        for segment in np.unique(block.segments):
            (number,) = np.unique(block.ids[block.segments == segment])
            assert (block.segments == segment).sum() == lengths[number - 1]
            assert (block.loss[block.segments == segment] == number % 2).all()
            seen.append(int(number))
    assert sorted(seen) == list(range(1, len(lengths) + 1))


def test_records_are_packed_by_best_fit() -> None:
    lengths = [6, 10, 5, 11, 3, 13, 16]
    records = [TokenSequence(np.full(n, 1), np.ones(n, int)) for n in lengths]
    assert len(list(pack_records(records, 16))) == 4


@settings(max_examples=30)
@given(documents=documents_strategy, length=st.integers(2, 24))
def test_store_gives_back_what_was_packed(
    documents: list[np.ndarray], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("store")
    blocks = list(pack_text(documents, length))
    write(directory, blocks, length)
    store = TokenStore.open(directory)
    assert store.num_blocks == len(blocks)
    assert store.sequence_length == length
    assert store.num_tokens == sum(len(block.ids) for block in blocks)
    assert store.num_targets == sum(int(block.loss.sum()) for block in blocks)
    batch = store.batch(np.arange(store.num_blocks))
    assert batch.input_ids.dtype == batch.labels.dtype == np.int64
    assert (batch.labels != IGNORE_INDEX).sum() == store.num_targets
    for row, block in enumerate(blocks):
        used = len(block.ids)
        assert (batch.input_ids[row, :used] == block.ids).all()
        assert (batch.segment_ids[row, used:] == 0).all()
        assert (batch.labels[row, used:] == IGNORE_INDEX).all()


def test_labels_and_positions_by_hand(tmp_path: Path) -> None:
    block = Block(
        ids=np.array([1, 7, 2, 1, 9, 8, 2]),
        segments=np.array([1, 1, 1, 2, 2, 2, 2]),
        loss=np.array([0, 1, 1, 0, 0, 1, 1]),
    )
    write(tmp_path, [block], length=8)
    batch = TokenStore.open(tmp_path).batch(np.array([0]))
    no = IGNORE_INDEX
    assert batch.labels.tolist() == [[7, 2, no, no, 8, 2, no, no]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(65_536, 2), (65_537, 4)])
def test_ids_take_as_few_bytes_as_they_can(
    vocab_size: int, bytes_per_token: int, tmp_path: Path
) -> None:
    ids = np.array([1, vocab_size - 1])
    write(tmp_path, [Block(ids, np.ones(2), np.ones(2))], 2, vocab_size)
    assert (tmp_path / "tokens.bin").stat().st_size == 2 * bytes_per_token
    assert TokenStore.open(tmp_path).batch(np.array([0])).input_ids.tolist() == [ids.tolist()]


def test_truncated_store_is_refused_with_both_sizes(tmp_path: Path) -> None:
    write(tmp_path, [Block(np.arange(8), np.ones(8), np.ones(8))], 8)
    file = tmp_path / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"tokens\.bin has 29 bytes, 32 are expected"):
        TokenStore.open(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"tokens\.bin is missing, 32 are expected"):
        TokenStore.open(tmp_path)


def test_store_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"index\.json is missing"):
        TokenStore.open(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        TokenStore.open(tmp_path)
    write(tmp_path, [], 8)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format_version": 99}))
    with pytest.raises(ArtifactError, match="format version 99"):
        TokenStore.open(tmp_path)


def test_writer_that_fails_leaves_no_index(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError),
        StoreWriter(tmp_path, sequence_length=4, vocab_size=10, pad_id=PAD),
    ):
        raise KeyError("stop")
    assert not (tmp_path / "index.json").exists()


@given(num_blocks=st.integers(1, 60), seed=st.integers(), epoch=st.integers(0, 1000))
def test_order_is_a_permutation_and_pure(num_blocks: int, seed: int, epoch: int) -> None:
    order = block_order(num_blocks, seed, epoch)
    assert sorted(order) == list(range(num_blocks))
    assert (order == block_order(num_blocks, seed, epoch)).all()


def test_order_does_not_change_between_releases() -> None:
    """A run that is resumed after an update must see the same blocks."""
    assert block_order(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert block_order(8, seed=0, epoch=1).tolist() != block_order(8, seed=0, epoch=0).tolist()
    assert block_order(8, seed=1, epoch=0).tolist() != block_order(8, seed=0, epoch=0).tolist()


@given(num_blocks=st.integers(1, 20), blocks_per_step=st.integers(1, 50), seed=st.integers(0, 99))
def test_steps_run_through_epochs_without_gaps(
    num_blocks: int, blocks_per_step: int, seed: int
) -> None:
    steps = [blocks_at(num_blocks, blocks_per_step, seed, step) for step in range(6)]
    stream = np.concatenate(steps)
    for epoch in range(len(stream) // num_blocks):
        part = stream[epoch * num_blocks : (epoch + 1) * num_blocks]
        assert (part == block_order(num_blocks, seed, epoch)).all()
