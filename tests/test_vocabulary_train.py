"""Training SentencePiece models: conventions, determinism, sampling and clear errors."""

import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from altiplano.errors import DataError, TrainingError
from altiplano.vocabulary.proto import BYTE, NORMAL, USER_DEFINED, read_model
from altiplano.vocabulary.train import read_words, train_sentencepiece
from tests.helpers.tiny_vocabulary import chinese_lines, english_lines


def test_a_base_follows_llama_conventions(tmp_path: Path) -> None:
    output = tmp_path / "base.model"
    train_sentencepiece(english_lines(), vocab_size=320, output=output, purpose="base")
    proto = read_model(output)
    processor = spm.SentencePieceProcessor(model_file=str(output))
    assert len(proto.pieces) == 320
    assert [piece.piece for piece in proto.pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert sum(piece.type == BYTE for piece in proto.pieces) == 256
    assert proto.normalizer_spec.name == "identity"
    text = "  two  spaces\nand 龘 2024 "
    assert processor.decode(processor.encode(text)) == text


def test_digits_stay_single(tmp_path: Path) -> None:
    output = tmp_path / "base.model"
    lines = [f"year {year} year {year}" for year in range(1900, 2000)]
    train_sentencepiece(lines, vocab_size=275, output=output, purpose="base")
    processor = spm.SentencePieceProcessor(model_file=str(output))
    assert processor.encode("1984", out_type=str)[-4:] == ["1", "9", "8", "4"]


def test_an_addition_has_no_bytes_and_no_space_pieces(tmp_path: Path) -> None:
    output = tmp_path / "addition.model"
    train_sentencepiece(["\n".join(chinese_lines())], vocab_size=60, output=output)
    proto = read_model(output)
    assert all(piece.type != BYTE for piece in proto.pieces)
    assert any(len(piece.piece) > 1 for piece in proto.pieces[3:])
    assert "\n" not in "".join(piece.piece for piece in proto.pieces)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, model_type: str) -> None:
    first, second = tmp_path / "1.model", tmp_path / "2.model"
    for output in (first, second):
        train_sentencepiece(
            chinese_lines(500),
            vocab_size=40,
            output=output,
            model_type=model_type,  # type: ignore[arg-type]
            words=["量子纠缠", "GPU"],
            max_lines=100,
            seed=3,
        )
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_another_seed_draws_another_sample(tmp_path: Path) -> None:
    models = []
    lines = [chr(0x4E00 + index) * 3 for index in range(300)]
    for seed in (1, 2):
        output = tmp_path / f"{seed}.model"
        train_sentencepiece(lines, vocab_size=30, output=output, max_lines=15, seed=seed)
        models.append(output.read_bytes())
    assert models[0] != models[1]


def test_text_after_a_very_long_line_start_is_seen(tmp_path: Path) -> None:
    output = tmp_path / "long.model"
    train_sentencepiece(["你" * 30_000 + "好" * 30_000], vocab_size=20, output=output)
    pieces = {piece.piece for piece in read_model(output).pieces}
    assert {"你", "好"} <= pieces


def test_rare_characters_give_way_to_words(tmp_path: Path) -> None:
    rare = [chr(0x4E00 + index) for index in range(400)]
    output = tmp_path / "rare.model"
    train_sentencepiece([*chinese_lines(2000), *rare], vocab_size=60, output=output)
    pieces = {piece.piece for piece in read_model(output).pieces}
    assert {"苹果", "下雪"} <= pieces
    assert len(pieces & set(rare)) < 40


def test_characters_fill_an_addition_when_words_run_out(tmp_path: Path) -> None:
    rare = [chr(0x4E00 + index) for index in range(400)]
    output = tmp_path / "rare.model"
    train_sentencepiece([*["苹果苹果香蕉"] * 20, *rare], vocab_size=300, output=output)
    assert len(read_model(output).pieces) == 300


@given(size=st.integers(20, 400))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_largest_size_named_for_an_addition_can_be_trained(tmp_path: Path, size: int) -> None:
    output = tmp_path / "x.model"
    try:
        train_sentencepiece(chinese_lines(), vocab_size=size, output=output)
        assert len(read_model(output).pieces) == size
    except TrainingError as error:
        found = re.search(r"(?:at most|alone need) (\d+)", str(error))
        assert found is not None
        train_sentencepiece(chinese_lines(), vocab_size=int(found[1]), output=output)


@pytest.mark.parametrize("texts", [[], [""], [" \n\t\n", "\0"]])
def test_an_empty_corpus_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="holds no text"):
        train_sentencepiece(texts, vocab_size=40, output=tmp_path / "x.model")
    assert not (tmp_path / "x.model").exists()


def test_too_large_a_vocabulary_names_the_largest(tmp_path: Path) -> None:
    output = tmp_path / "x.model"
    with pytest.raises(TrainingError, match=r"of 4000 pieces .* at most (\d+)") as caught:
        train_sentencepiece(english_lines(), vocab_size=4000, output=output, purpose="base")
    largest = int(str(caught.value).split("at most ")[1].split(".")[0])
    train_sentencepiece(english_lines(), vocab_size=largest, output=output, purpose="base")
    assert len(read_model(output).pieces) == largest


def test_too_small_a_vocabulary_names_the_least(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"of 100 pieces is too small: .* need 2\d\d"):
        train_sentencepiece(
            english_lines(), vocab_size=100, output=tmp_path / "x.model", purpose="base"
        )


def test_a_unigram_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="must be of type 'bpe'"):
        train_sentencepiece(
            english_lines(),
            vocab_size=320,
            output=tmp_path / "x.model",
            purpose="base",
            model_type="unigram",
        )


def test_words_are_user_defined_pieces_within_the_size(tmp_path: Path) -> None:
    output = tmp_path / "x.model"
    words = ["量子纠缠", "a,b", "河流", "河流"]
    train_sentencepiece(chinese_lines(), vocab_size=60, output=output, words=words)
    pieces = read_model(output).pieces
    assert len(pieces) == 60
    assert [p.piece for p in pieces if p.type == USER_DEFINED] == ["量子纠缠", "a,b", "河流"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["GPU"]}, "takes no words .*'GPU' first"),
        ({"normalization": "nfkc"}, "must use the normalisation 'identity', not 'nfkc'"),
    ],
)
def test_a_base_keeps_to_its_conventions(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    output = tmp_path / "x.model"
    with pytest.raises(TrainingError, match=message):
        train_sentencepiece(
            english_lines(), vocab_size=320, output=output, purpose="base", **options
        )


def test_pieces_are_as_long_as_asked(tmp_path: Path) -> None:
    output = tmp_path / "x.model"
    train_sentencepiece(["市场里下雪" * 5] * 9, vocab_size=12, output=output, max_piece_length=2)
    lengths = {len(p.piece) for p in read_model(output).pieces if p.type == NORMAL}
    assert lengths == {1, 2}


def test_normalisation_and_whole_numbers_reach_the_pieces(tmp_path: Path) -> None:
    lines = ["Ａ股１９８４年在市场里"] * 20
    pieces: dict[str, set[str]] = {}
    for name, options in {
        "identity": {"normalization": "identity"},
        "nfkc": {"normalization": "nfkc"},
        "numbers": {"normalization": "nfkc", "split_digits": False},
    }.items():
        output = tmp_path / f"{name}.model"
        train_sentencepiece(lines, vocab_size=22, output=output, **options)  # type: ignore[arg-type]
        pieces[name] = {p.piece for p in read_model(output).pieces}
    assert "Ａ" in pieces["identity"]
    assert "A" in pieces["nfkc"]
    assert not any("19" in piece for piece in pieces["nfkc"])
    assert any("19" in piece for piece in pieces["numbers"])


def test_words_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeff量子纠缠\r\n\r\n GPU \n量子纠缠\nA股".encode())
    assert read_words(path) == ["量子纠缠", "GPU", "A股"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the words .*: No such file"),
        (b"\n \n", "hold no word"),
        ("量子".encode("gbk"), r"not UTF-8 \(byte 0\)"),
        ("河流\nlarge language model".encode(), r"line 2: .* SPACE character U\+0020"),
        ("河\u200b流".encode(), r"line 1: .* ZERO WIDTH SPACE character U\+200B"),
        (b"a\x01b", r"line 1: .* U\+0001"),
        ("▁GPU".encode(), r"line 1: .* U\+2581"),
    ],
)
def test_unusable_words_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_words(path)
