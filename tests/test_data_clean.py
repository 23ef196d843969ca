"""Cleaning: what is removed, what stays, and which texts are left out."""

import pickle
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.data import CleanSection
from altiplano.data.cleaning.clean import Cleaner, repetition

LAUGHTER = "哈" * 12


def cleaner(**settings: Any) -> Cleaner:
    return Cleaner(CleanSection(**settings))


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("\ufeff你\u200b好\x00！", "你好！"),
        ("soft\xadhyphen", "softhyphen"),
        ("\u202eab\u202c \u2066c\u2069", "ab c"),
        ("one\r\ntwo\rthree\x0cfour\u2028five\x85six", "one\ntwo\nthree\nfour\nfive\nsix"),
        ("a\tb\n\nc", "a\tb\n\nc"),
        ("\u3000\u3000缩进\u3000字 \n", "缩进\u3000字"),
        ("👨\u200d👩\u200d👧 ❤\ufe0f", "👨\u200d👩\u200d👧 ❤\ufe0f"),
        ("क्\u200dष می\u200cخواهم", "क्\u200dष می\u200cخواهم"),
        ("葛\U000e0100", "葛\U000e0100"),
        ("\ue000 private", "\ue000 private"),
        ("e\u200b\u0301", "é"),
        ("\x1b[31mred\x7f", "[31mred"),
        ("hidden\U000e0041\U000e0042", "hidden"),
    ],
)
def test_control_and_invisible_characters(dirty: str, clean: str) -> None:
    assert cleaner().clean(dirty) == clean
    assert cleaner(strip_control=False, unicode="keep").clean(dirty) == dirty.strip()


@pytest.mark.parametrize(
    ("form", "expected"),
    [("keep", "e\u0301 ＡＢ１ ﬁ ㎏"), ("NFC", "é ＡＢ１ ﬁ ㎏"), ("NFKC", "é AB1 fi kg")],
)
def test_unicode_forms(form: str, expected: str) -> None:
    assert cleaner(unicode=form).clean("e\u0301 ＡＢ１ ﬁ ㎏") == expected


def test_chinese_is_converted() -> None:
    assert cleaner(chinese="simplified").clean("漢語與頭髮，發展 ABC") == "汉语与头发，发展 ABC"
    assert cleaner(chinese="traditional").clean("汉语与头发，发展 ABC") == "漢語與頭髮，發展 ABC"
    assert cleaner().clean("漢語汉语") == "漢語汉语"


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    form=st.sampled_from(["keep", "NFC", "NFKC"]),
    strip_control=st.booleans(),
)
def test_a_clean_text_stays_as_it_is(text: str, form: str, strip_control: bool) -> None:
    rules = cleaner(unicode=form, strip_control=strip_control)
    once = rules.clean(text)
    assert rules.clean(once) == once
    assert form == "keep" or unicodedata.is_normalized(form, once)
    assert once == once.strip()
    if strip_control:
        kept = {c for c in once if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"}
        assert not {c for c in kept if unicodedata.category(c) == "Cc"}
        assert not kept & set("\u200b\ufeff\xad\u202e\u2060")


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("", {}, ("too_short", "0 characters, at least 1")),
        ("三个字", {"min_characters": 4}, ("too_short", "3 characters, at least 4")),
        ("三个字", {"min_characters": 3, "max_characters": 3}, None),
        ("四个汉字", {"max_characters": 3}, ("too_long", "4 characters, at most 3")),
        (LAUGHTER, {"max_repetition": 0.3}, ("repetitive", "0.92 repeated, at most 0.3")),
        (LAUGHTER, {}, None),
    ],
)
def test_reasons_to_leave_out(
    text: str, settings: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    assert cleaner(**settings).reason_to_drop(text) == expected


def test_rules_can_be_sent_to_other_processes() -> None:
    rules = cleaner(chinese="simplified")
    rules.clean("漢")
    assert pickle.loads(pickle.dumps(rules)).clean("漢") == "汉"


@given(text=st.text(min_size=30, max_size=200), times=st.integers(2, 5))
def test_a_text_said_several_times_is_repeated_but_for_once(text: str, times: int) -> None:
    share = repetition(text * times)
    assert share >= (times - 1) / times - 1e-9 if len(text.encode()) >= 32 else share >= 0
    assert 0 <= share < 1


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("哈" * 300, 0.95, 1),
        ("买一送一，点击这里领取红包！\n" * 10, 0.85, 0.95),
        ("Click here to accept all cookies and go on.\n" * 10, 0.85, 0.95),
        ("The cat sat on the mat. The dog lay on the rug by the door.", 0, 0),
        ("短", 0, 0),
    ],
)
def test_repetition_of_examples(text: str, low: float, high: float) -> None:
    assert low <= repetition(text) <= high


def test_books_and_articles_do_not_repeat_themselves(shared: Path) -> None:
    for name in ("hongloumeng.txt", "luxun_quanji.txt", "wiki_en_demo.txt"):
        text = (shared / "text" / name).read_text("utf-8-sig")
        parts = [text[start : start + 3000] for start in range(0, 300_000, 3000)]
        strict = sum(repetition(part) > 0.3 for part in parts)
        assert strict <= 1, f"{strict} of {len(parts)} parts of {name}"
