"""Duplicates: the same content once, near-duplicates by threshold, whatever the cutting."""

import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.data import CleanSection
from altiplano.data.cleaning.duplicates import (
    PERMUTATIONS,
    Duplicates,
    _KeySet,
    content_digests,
    content_key,
    held_out_mask,
    signature,
)
from altiplano.data.reading.sources import is_held_out

SPACES = "ab文é\u0301 \u3000\t\n\r\x1c\x85\u2028\u200b"


@given(texts=st.lists(st.text(SPACES, max_size=8), max_size=20))
def test_keys_agree_where_the_normalised_content_does(texts: list[str]) -> None:
    plain = [" ".join(unicodedata.normalize("NFC", text).split()) for text in texts]
    keys = [content_key(text) for text in texts]
    for number, text in enumerate(plain):
        for other, its in enumerate(plain):
            assert (keys[number] == keys[other]) == (text == its)


@given(texts=st.lists(st.text(max_size=20), max_size=20), share=st.floats(0, 0.5))
def test_digests_of_many_are_those_of_each(texts: list[str], share: float) -> None:
    digests = content_digests(texts)
    assert digests.shape == (len(texts), 2) and digests.dtype == np.uint64
    assert digests[:, 0].tolist() == [content_key(text) for text in texts]
    held = held_out_mask(digests, share)
    assert held.tolist() == [is_held_out(text, share) for text in texts]


def test_key_and_split_are_independent() -> None:
    digests = content_digests([f"text {number}" for number in range(4000)])
    held = held_out_mask(digests, 0.25)
    low_keys = digests[:, 0] < np.uint64(2**63)
    assert 0.2 < held.mean() < 0.3
    assert abs(low_keys[held].mean() - 0.5) < 0.06


def first_seen(keys: list[int]) -> list[bool]:
    seen: set[int] = set()
    return [not (key in seen or seen.add(key)) for key in keys]


@given(
    keys=st.lists(st.integers(1, 30) | st.integers(2**64 - 5, 2**64 - 1), max_size=60),
    cut=st.integers(1, 60),
)
def test_the_first_of_each_content_stays(keys: list[int], cut: int) -> None:
    array = np.array(keys, np.uint64)
    duplicates = Duplicates(CleanSection(duplicates="exact"))
    parts = [duplicates.filter(array[at : at + cut]) for at in range(0, len(array), cut)]
    assert np.concatenate([np.zeros(0, bool), *parts]).tolist() == first_seen(keys)
    assert Duplicates(CleanSection(duplicates="keep")).filter(array).all()


def test_many_keys_fit_into_few_bytes() -> None:
    """Grown many times, with keys that all want the same slots."""
    keys = np.arange(1, 200_001, dtype=np.uint64) << np.uint64(20)
    keys[::2] = np.random.default_rng(0).integers(1, 2**63, 100_000).astype(np.uint64)
    held = _KeySet()
    assert all(held.add(part).all() for part in np.split(keys, 8))
    assert not any(held.add(part).any() for part in np.split(keys, 4))
    assert held._slots.nbytes <= 24 * len(keys)


# Near-duplicates.


def near(texts: list[str], threshold: float = 0.8, cut: int = 1000) -> list[bool]:
    duplicates = Duplicates(CleanSection(duplicates="near", near_threshold=threshold))
    found: list[bool] = []
    for at in range(0, len(texts), cut):
        part = texts[at : at + cut]
        signs = np.stack([signature(text) for text in part])
        found += duplicates.filter(content_digests(part)[:, 0], signs).tolist()
    return found


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the character 5-grams, counted."""
    sets = [{text[at : at + 5] for at in range(len(text) - 4)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def made_up(seed: int, length: int = 400) -> str:
    draw = random.Random(seed)
    return "".join(chr(draw.randrange(0x4E00, 0x5E00)) for _ in range(length))


def test_signatures_estimate_the_similarity_of_texts() -> None:
    base = made_up(0)
    for edits in (0, 4, 10, 30, 80):
        other = list(base)
        for place in random.Random(edits).sample(range(400), edits):
            other[place] = "改"
        estimate = np.mean(signature(base) == signature("".join(other)))
        assert estimate == pytest.approx(similarity(base, "".join(other)), abs=0.12)
    assert signature(base).shape == (PERMUTATIONS,) and signature(base).dtype == np.uint32
    assert (signature(" ".join(base)) == signature(base)).all(), "white space is left out"


def test_small_edits_are_caught_and_different_texts_stay() -> None:
    texts = [made_up(seed) for seed in range(30)]
    edited = [text[:200] + "改" + text[201:] for text in texts]
    halves = [text[:200] + made_up(100 + seed, 200) for seed, text in enumerate(texts)]
    assert near([*texts, *edited, *halves]) == [True] * 30 + [False] * 30 + [True] * 30


def test_texts_too_short_for_a_signature_are_only_compared_exactly() -> None:
    assert near(["一二三四", "一二三五", "一二三四", "", "一"]) == [True, True, False, True, True]


def test_what_stays_does_not_depend_on_how_it_comes() -> None:
    texts = [made_up(seed // 3)[: 380 + 7 * (seed % 3)] for seed in range(30)]
    whole = near(texts)
    assert 10 <= sum(whole) < 30
    assert near(texts, cut=1) == near(texts, cut=7) == whole


def test_real_paragraphs_stay_and_their_edited_copies_go(shared: Path) -> None:
    text = (shared / "text" / "hongloumeng.txt").read_text("utf-8")
    paragraphs = [line.strip() for line in text.split("\n") if len(line) > 150][:150]
    edited = [text.replace("的", "地", 2).replace("，", "、", 1) for text in paragraphs]
    kept = near([*paragraphs, *edited])
    assert sum(kept[:150]) >= 149
    close = [similarity(a, b) for a, b in zip(paragraphs, edited, strict=True)]
    wrong = [s for s, stays in zip(close, kept[150:], strict=True) if stays == (s >= 0.8)]
    assert all(0.7 < s < 0.92 for s in wrong), "only near the threshold"
    assert sum(kept[150:]) < 30
