"""Packing: no token lost or repeated, no segment across documents, blocks as full as can be."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.data.tokens.fit import WORTH_A_CUT, best_fit
from altiplano.data.tokens.pack import (
    FIRST,
    TARGET,
    TOKEN,
    Blocks,
    Sequences,
    pack_records,
    pack_text,
)

document_lengths = st.lists(st.integers(0, 60), max_size=40)
block_lengths = st.integers(2, 24)
windows = st.integers(1, 400)


def numbered(lengths: Sequence[int], loss: np.ndarray | None = None) -> Sequences:
    """Sequences whose ids count on from 1, so that every token can be told apart."""
    return Sequences(np.arange(1, sum(lengths) + 1, dtype=np.int32), np.array(lengths, int), loss)


def joined(blocks: Sequence[Blocks], length: int) -> Blocks:
    tokens = [np.empty((0, length), np.int32), *(part.tokens for part in blocks)]
    flags = [np.empty((0, length), np.uint8), *(part.flags for part in blocks)]
    return Blocks(np.concatenate(tokens), np.concatenate(flags))


def text_blocks(sequences: Sequences, length: int, **given) -> Blocks:
    return joined(list(pack_text([sequences], length, **given)), length)


def segments(blocks: Blocks) -> list[list[int]]:
    """Tokens of every segment, checked to have padding only at the end of a block."""
    found: list[list[int]] = []
    for tokens, flags in zip(blocks.tokens, blocks.flags, strict=True):
        used = int((flags & TOKEN != 0).sum())
        assert not flags[used:].any() and not tokens[used:].any()
        assert flags[0] & FIRST
        starts = np.flatnonzero(flags & FIRST)
        found += [part.tolist() for part in np.split(tokens[:used], starts[1:])]
    return found


@given(lengths=document_lengths, length=block_lengths, window=windows)
def test_text_packing_loses_and_repeats_nothing(
    lengths: list[int], length: int, window: int
) -> None:
    blocks = text_blocks(numbered(lengths), length, window_tokens=window)
    kept = blocks.tokens[blocks.flags & TOKEN != 0]
    assert sorted(kept.tolist()) == list(range(1, sum(lengths) + 1))


@given(lengths=document_lengths, length=block_lengths, window=windows)
def test_segments_are_pieces_of_documents(lengths: list[int], length: int, window: int) -> None:
    """In order and never of two documents; each begins anew, all else in it is a target."""
    blocks = text_blocks(numbered(lengths), length, window_tokens=window)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for ids in segments(blocks):
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert document_of[ids[0] - 1] == document_of[ids[-1] - 1]
    is_first = blocks.flags & FIRST != 0
    is_token = blocks.flags & TOKEN != 0
    assert ((blocks.flags & TARGET != 0) == (is_token & ~is_first)).all()


@given(
    lengths=document_lengths,
    length=block_lengths,
    window=windows,
    cuts=st.lists(st.integers(0, 40), max_size=5),
    how=st.sampled_from(["text", "joined text", "records"]),
)
def test_blocks_do_not_depend_on_how_the_stream_is_delivered(
    lengths: list[int], length: int, window: int, cuts: list[int], how: str
) -> None:
    if how == "records":
        lengths = [min(n, length) for n in lengths]
    ends = np.cumsum([0, *lengths])
    borders = [0, *sorted(min(cut, len(lengths)) for cut in cuts), len(lengths)]
    whole = numbered(lengths)
    parts = [
        Sequences(whole.ids[ends[a] : ends[b]], whole.lengths[a:b])
        for a, b in itertools.pairwise(borders)
    ]
    found = []
    for stream in ([whole], parts):
        if how == "records":
            blocks = list(pack_records(stream, length, window_tokens=window))
        else:
            cross = how == "joined text"
            blocks = list(pack_text(stream, length, cross_documents=cross, window_tokens=window))
        found.append(joined(blocks, length))
    assert np.array_equal(found[0].tokens, found[1].tokens)
    assert np.array_equal(found[0].flags, found[1].flags)


@given(lengths=document_lengths, length=st.integers(2, 400))
def test_text_blocks_are_full(lengths: list[int], length: int) -> None:
    blocks = text_blocks(numbered(lengths), length)
    wasted = int((blocks.flags & TOKEN == 0).sum())
    not_worth_a_cut = max(2, length // WORTH_A_CUT) - 1
    assert wasted < len(blocks.tokens) * not_worth_a_cut + length


def test_documents_that_fit_together_are_not_cut() -> None:
    blocks = text_blocks(numbered([10, 8, 6, 16, 20, 8, 12]), 16)
    assert len(blocks.tokens) == 5
    assert sorted(len(ids) for ids in segments(blocks)) == [4, 6, 8, 8, 10, 12, 16, 16]


def test_far_fewer_documents_are_cut_than_by_cutting_at_every_block() -> None:
    lengths = np.random.default_rng(0).integers(2, 500, 2_000)
    ends = np.cumsum(lengths)
    cut_by_joining = ((ends - lengths) // 512 != (ends - 1) // 512).mean()
    blocks = text_blocks(numbered(lengths.tolist()), 512)
    extra_pieces = len(segments(blocks)) - len(lengths)
    assert extra_pieces / len(lengths) < cut_by_joining / 10


@given(lengths=document_lengths, length=block_lengths)
def test_joined_documents_keep_their_order(lengths: list[int], length: int) -> None:
    """One segment per block, and every token but its first is a target."""
    blocks = text_blocks(numbered(lengths), length, cross_documents=True)
    assert blocks.tokens[blocks.flags & TOKEN != 0].tolist() == list(range(1, sum(lengths) + 1))
    assert len(segments(blocks)) == len(blocks.tokens) == -(-sum(lengths) // length)
    assert (blocks.flags[:, 0] == FIRST | TOKEN).all()
    assert np.isin(blocks.flags[:, 1:], [TARGET | TOKEN, 0]).all()


@given(
    lengths=st.lists(st.integers(0, 16), max_size=40),
    window=windows,
    seed=st.integers(0, 99),
)
def test_records_stay_whole_and_keep_their_loss(lengths: list[int], window: int, seed: int) -> None:
    loss = np.random.default_rng(seed).integers(0, 2, sum(lengths), np.uint8)
    records = numbered(lengths, loss)
    blocks = joined(list(pack_records([records], 16, window_tokens=window)), 16)
    told = np.split(records.ids, np.cumsum(records.lengths)[:-1])
    assert sorted(segments(blocks)) == [ids.tolist() for ids in told if len(ids)]
    used = blocks.flags & TOKEN != 0
    expected = loss[blocks.tokens[used] - 1] & (blocks.flags[used] & FIRST == 0)
    assert ((blocks.flags[used] & TARGET != 0) == expected).all()


def test_a_record_longer_than_a_block_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="record of 17 tokens, T is 16"):
        list(pack_records([numbered([3, 17])], 16))


def fills_by_the_book(lengths: list[int], capacity: int) -> list[int]:
    """Best fit decreasing, one piece at a time."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda number: fills[number])] += length
        else:
            fills.append(length)
    return sorted(fills)


@given(st.lists(st.integers(1, 30), max_size=120), st.integers(30, 64))
def test_groups_of_blocks_are_filled_as_single_blocks_would_be(
    lengths: list[int], capacity: int
) -> None:
    bins = best_fit(np.array(lengths, int), capacity)
    fills = np.bincount(bins, weights=lengths).astype(int)
    assert sorted(fills.tolist()) == fills_by_the_book(lengths, capacity)


def encoded(shared: Path, texts: list[str]) -> Sequences:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = shared / "tokenizers" / "chinese_llama2_55296.model"
    ids = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(
        texts, add_bos=True, add_eos=True
    )
    return Sequences(
        np.concatenate([np.array(row, np.int32) for row in ids]),
        np.array([len(row) for row in ids]),
    )


def test_a_real_book_fills_its_blocks(shared: Path) -> None:
    text = (shared / "text" / "luxun_quanji.txt").read_text(encoding="utf-8-sig")
    for separator in (r"\n", r"\n\s*\n", r"\Z"):
        documents = [part.strip() for part in re.split(separator, text) if part.strip()]
        sequences = encoded(shared, documents)
        for length in (256, 512, 2048):
            blocks = text_blocks(sequences, length)
            assert len(sequences.ids) / blocks.tokens.size > 0.99


def test_real_records_fill_their_blocks(shared: Path) -> None:
    rows = json.loads((shared / "instruct" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    texts = ["".join(str(value) for value in row.values()) for row in rows]
    sequences = encoded(shared, texts)
    for length in (640, 1024):
        blocks = joined(list(pack_records([sequences], length)), length)
        assert len(sequences.ids) / blocks.tokens.size > 0.97
