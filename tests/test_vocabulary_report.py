"""The tokenizer report: its numbers, what it says changed, its tables and its picture."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.errors import DataError
from altiplano.vocabulary.bytelevel.extend import extend_bytelevel
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import merge_sentencepiece
from altiplano.vocabulary.proto import read_model
from altiplano.vocabulary.report import Report, report
from altiplano.vocabulary.report_view import plot_report, report_tables
from tests.helpers.bytelevel import train_byte_base
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    english_lines,
    train_tiny_addition,
    train_tiny_base,
)

TEXTS = {"zh": "\n".join(chinese_lines(20)), "en": "\n".join(english_lines(20))}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary]:
    """A base, and the same with an addition merged in."""
    folder = tmp_path_factory.mktemp("vocabularies")
    base = train_tiny_base(folder)
    merged = merge_sentencepiece(base, [train_tiny_addition(folder)])
    save_tokenizer(merged.proto, folder / "merged")
    return {"base": Vocabulary(base), "merged": Vocabulary(folder / "merged")}


def test_it_counts_what_it_says(vocabularies: dict[str, Vocabulary]) -> None:
    measured = report(vocabularies, {"zh": "河流\n\n小船"})
    row = measured.coverage["zh"]["base"]
    # Four characters of three bytes, all spelled in bytes, and a "▁" before each of two lines.
    assert (row.lines, row.characters, row.bytes, row.tokens) == (2, 4, 12, 14)
    assert row.tokens_per_character == pytest.approx(3.5)
    assert row.tokens_per_byte == pytest.approx(14 / 12)
    assert row.byte_fallback_share == 1.0
    assert row.single_character_share == pytest.approx(2 / 14)
    assert measured.coverage["zh"]["merged"].byte_fallback_share == 0.0
    with pytest.raises(DataError, match="zh is empty"):
        report(vocabularies, {"zh": "\n"})


def test_it_compares_pieces(vocabularies: dict[str, Vocabulary]) -> None:
    base, merged = report(vocabularies, TEXTS).pieces.values()
    assert (base.size, base.in_first, base.byte_pieces, base.unreachable) == (320, 320, 256, 0)
    assert (merged.in_first, merged.byte_pieces, merged.unreachable) == (320, 256, 0)
    assert (merged.family, merged.form) == ("sentencepiece", "sentencepiece")
    lengths = [len(text.strip()) for text in merged.longest_new]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 1


def test_it_finds_pieces_that_no_text_gives(tmp_path: Path) -> None:
    """Reference scores keep what no merge can build: here a word without its parts."""
    base, merged = train_tiny_base(tmp_path), tmp_path / "merged"
    addition = tmp_path / "orphan.model"
    proto = merge_sentencepiece(base, []).proto
    orphan = read_model(proto)
    orphan.pieces.add(piece="龘靐齉", score=-1000.0)
    addition.write_bytes(orphan.SerializeToString())
    tied = merge_sentencepiece(base, [addition], scores="reference", keep="all")
    save_tokenizer(tied.proto, merged)
    measured = report({"base": Vocabulary(base), "merged": Vocabulary(merged)}, TEXTS)
    assert measured.pieces["merged"].unreachable == 1
    assert measured.pieces["merged"].unreachable_examples == ("龘靐齉",)


def test_it_says_whether_a_text_changed(vocabularies: dict[str, Vocabulary]) -> None:
    measured = report(vocabularies, TEXTS)
    same, changed = measured.coverage["en"]["merged"], measured.coverage["zh"]["merged"]
    assert same.lines_as_first == same.lines == 20 and same.changed_example is None
    assert changed.lines_as_first == 0 and changed.changed_example in TEXTS["zh"].splitlines()
    assert measured.coverage["zh"]["base"].lines_as_first == 20
    # Only a directory has two forms that could differ.
    assert same.lines_forms_differ == 0
    assert measured.coverage["en"]["base"].lines_forms_differ is None


def test_pieces_are_compared_and_not_ids(vocabularies: dict[str, Vocabulary]) -> None:
    """The same vocabulary in another order gives other ids for the same pieces."""
    backwards = {"merged": vocabularies["merged"], "base": vocabularies["base"]}
    assert report(backwards, TEXTS).coverage["en"]["base"].lines_as_first == 20


@given(st.lists(st.text(alphabet="河流小船 the river\t😀é", min_size=1), min_size=1, max_size=4))
def test_shares_are_shares(vocabularies: dict[str, Vocabulary], lines: list[str]) -> None:
    text = "\n".join(lines)
    for row in report(vocabularies, {"text": text}).coverage["text"].values():
        assert 0 <= row.byte_fallback_share <= 1 and 0 <= row.single_character_share <= 1
        assert 0 <= row.lines_as_first <= row.lines
        assert row.tokens == pytest.approx(row.tokens_per_byte * row.bytes)
        assert (row.changed_example is None) == (row.lines_as_first == row.lines)


def test_a_byte_level_vocabulary_is_measured_alike(tmp_path: Path) -> None:
    base, grown = train_byte_base(tmp_path / "base"), tmp_path / "grown"
    extend_bytelevel(base, grown, texts=chinese_lines(), new_pieces=80, words=["apple树"])
    measured = report({"old": Vocabulary(base), "new": Vocabulary(grown)}, TEXTS)
    old, new = measured.coverage["zh"]["old"], measured.coverage["zh"]["new"]
    assert measured.pieces["new"].family == "bytelevel"
    assert measured.pieces["new"].in_first == measured.pieces["old"].size
    assert old.byte_fallback_share > 0.9 > 0.1 > new.byte_fallback_share
    assert measured.coverage["en"]["new"].lines_as_first == 20
    assert new.lines_forms_differ is None
    assert any(len(text) > 1 for text in measured.pieces["new"].longest_new)


def _shown(measured: Report) -> str:
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=200, force_terminal=True, color_system="standard", highlight=False
    )
    with console.capture() as captured:
        for part in report_tables(measured):
            console.print(part)
    return captured.get()


def test_what_changed_is_red_with_a_line_where_it_matters(
    vocabularies: dict[str, Vocabulary], tmp_path: Path
) -> None:
    whole = _shown(report(vocabularies, TEXTS))
    assert "\x1b[32m20 of 20" in whole and "\x1b[31m" not in whole
    merged = merge_sentencepiece(vocabularies["base"].source, [], words=["wr"])
    save_tokenizer(merged.proto, tmp_path / "other")
    both = {"base": vocabularies["base"], "other": Vocabulary(tmp_path / "other")}
    changed = _shown(report(both, {"en": "under snowriver\nsnow"}))
    assert "\x1b[31m1 of 2" in changed
    assert "changed by other in en: under snowriver" in changed


def test_the_report_is_plain_data_and_a_picture(
    vocabularies: dict[str, Vocabulary], tmp_path: Path
) -> None:
    measured = report(vocabularies, TEXTS | {"中文": "河流"})
    again = json.loads(json.dumps(measured.to_json()))
    assert again["coverage"]["zh"]["base"]["tokens"] == measured.coverage["zh"]["base"].tokens
    assert again["pieces"]["merged"]["size"] == vocabularies["merged"].size
    plot_report(measured, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_the_published_vocabularies(shared: Path) -> None:
    """Tokens of the CMRC paragraphs and of English, as counted independently."""
    llama = Vocabulary(shared / "tokenizers" / "llama_32000.model")
    second = Vocabulary(shared / "tokenizers" / "chinese_llama2_55296.model")
    squad = json.loads((shared / "text" / "cmrc2018_dev_squad.json").read_text(encoding="utf-8"))
    zh = "\n".join(p["context"] for entry in squad["data"] for p in entry["paragraphs"])
    en = (shared / "text" / "wiki_en_demo.txt").read_text(encoding="utf-8")[:100_000]
    measured = report({"llama": llama, "second": second}, {"zh": zh, "en": en})
    rows = measured.coverage["zh"]
    assert rows["llama"].tokens_per_character == pytest.approx(1.420, abs=5e-4)
    assert rows["second"].tokens_per_character == pytest.approx(0.749, abs=5e-4)
    english = measured.coverage["en"]["second"]
    assert english.lines_as_first == english.lines
