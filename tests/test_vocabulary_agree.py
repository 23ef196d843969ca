"""One tokenizer, three readers: SentencePiece, our fast form and vLLM's loader; and its streaming.

The strings try to break it: spaces, line ends, controls, joiners, marks, rare and wide characters.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from altiplano.errors import ArtifactError
from altiplano.vocabulary.agree import compare_forms
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import merge_sentencepiece
from altiplano.vocabulary.proto import BYTE, read_model
from tests.helpers.tiny_vocabulary import train_tiny_addition, train_tiny_base

_SPACES = (
    " ",
    "  ",
    "     ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "\x01",
    "\x7f",
    "\u3000",
    "\ufeff",
    "\u200b",
)
_EMOJI = ("😀", "👩\u200d👩\u200d👧", "🇨🇳", "👍🏽", "❤\ufe0f")
_RARE = (
    "龘",
    "𠀀",
    "\U0003134a",
    "Ａ",
    "５",
    "：“",
    "——",
    "e\u0301",
    "\u0301",
    "ﷺ",
    "\ufffd",
    "▁",
    "▁▁",
)
_WORDS = (
    "the river",
    "河流",
    "河",
    "流小",
    "山上下雪",
    "量子纠缠",
    "量子",
    "GPU",
    " GPU",
    "2024",
    "de",
)
_CONTROLS = ("</s>", "<s>", "[PAD]", "<0x41>", "<unk>")
_PLAIN = st.lists(
    st.sampled_from([*_SPACES, *_EMOJI, *_RARE, *_WORDS, "<0x41>"])
    | st.characters(exclude_categories=["Cs"]),
    max_size=16,
).map("".join)
_HARD = st.lists(_PLAIN | st.sampled_from(_CONTROLS), max_size=4).map("".join)

Encode = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged tokenizer with words, helpers, a padding piece, and the config beside a model."""
    folder = tmp_path_factory.mktemp("agree")
    base, addition = train_tiny_base(folder), train_tiny_addition(folder)
    words = ["量子纠缠", "GPU", "龘龘", "市场里有", "river2024"]
    merged = merge_sentencepiece(base, [addition], words=words, pad_piece="[PAD]")
    save_tokenizer(merged.proto, folder / "tokenizer")
    return folder / "tokenizer"


def _slow(directory: Path) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def _fast(directory: Path) -> Tokenizer:
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.encode_special_tokens = True
    return fast


def _served(directory: Path) -> Any:
    """The tokenizer as vLLM loads it, which needs a model's `config.json` beside it."""
    registry = pytest.importorskip("vllm.tokenizers")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return registry.get_tokenizer(str(directory))


@pytest.fixture(scope="module")
def readers(directory: Path) -> tuple[Encode, Encode, Any]:
    fast = _fast(directory)
    return (
        _slow(directory).encode,
        lambda text: fast.encode(text, add_special_tokens=False).ids,
        _served(directory),
    )


@given(text=_HARD)
@settings(max_examples=400)
def test_sentencepiece_and_our_form_agree(readers: tuple[Encode, Encode, Any], text: str) -> None:
    slow, fast, _ = readers
    assert fast(text) == slow(text)


@given(text=_PLAIN)
@settings(max_examples=200)
def test_vllm_sees_the_ids_of_training(readers: tuple[Encode, Encode, Any], text: str) -> None:
    slow, _, served = readers
    assert served.encode(text) == [1, *slow(text)]
    assert served.encode(text, add_special_tokens=False) == slow(text)


@given(left=_PLAIN, right=_PLAIN)
@settings(max_examples=50)
def test_vllm_recognises_control_pieces_between_texts(
    readers: tuple[Encode, Encode, Any], left: str, right: str
) -> None:
    """The documented difference: chat templates need `</s>` to be the id, so a text must not."""
    slow, _, served = readers
    ids = served.encode(f"{left}</s>{right}", add_special_tokens=False)
    assert ids == [*slow(left), 2, *slow(right)]


@pytest.mark.parametrize(
    ("base", "keep"),
    [("tokenizers/llama_32000.model", "cjk"), ("models/tok512.model", "non_ascii")],
)
def test_all_three_agree_on_real_text(shared: Path, tmp_path: Path, base: str, keep: Any) -> None:
    additions = [shared / "tokenizers/chinese_sp_20000.model"]
    words = ["林黛玉", "孔乙己", "人工智能", "Wikipedia", "大观园"]
    merged = merge_sentencepiece(shared / base, additions, keep=keep, words=words)
    assert merged.split_words == ()
    save_tokenizer(merged.proto, tmp_path)
    lines = _sample(shared)
    report = compare_forms(tmp_path, lines)
    assert (report.lines, report.differing) == (len(lines), 0)
    assert report.sentencepiece_tokens == report.fast_tokens
    served = _served(tmp_path)
    slow = _slow(tmp_path)
    assert served(lines, add_special_tokens=False).input_ids == slow.encode(lines)
    assert served.decode(slow.encode(lines[0])) == lines[0]


def _sample(shared: Path) -> list[str]:
    """Every fortieth line of the books and the records, and whole long lines of English."""
    lines: list[str] = []
    for name in ("hongloumeng", "sanguoyanyi", "luxun_quanji"):
        text = (shared / f"text/{name}.txt").read_text(encoding="utf-8-sig")
        lines += text.splitlines()[::40]
    lines += (shared / "text/wiki_en_demo.txt").read_text(encoding="utf-8").splitlines()[::6]
    squad = json.loads((shared / "text/cmrc2018_dev_squad.json").read_text(encoding="utf-8"))
    lines += [p["context"] for entry in squad["data"][::40] for p in entry["paragraphs"]]
    for path in sorted((shared / "instruct").glob("alpaca_??_demo.json")):
        records = json.loads(path.read_text(encoding="utf-8"))
        lines += [line for r in records[::40] for line in r["output"].splitlines()]
    return [line for line in lines if line]


def test_reference_scores_make_the_forms_differ(shared: Path, tmp_path: Path) -> None:
    merged = merge_sentencepiece(
        shared / "tokenizers/llama_32000.model",
        [shared / "tokenizers/chinese_sp_20000.model"],
        scores="reference",
        keep="all",
    )
    save_tokenizer(merged.proto, tmp_path)
    report = compare_forms(tmp_path, ["\n".join(_sample(shared)), ""])
    assert 0 < report.differing < report.lines
    assert report.sentencepiece_tokens != report.fast_tokens


@pytest.mark.parametrize("missing", ["tokenizer.model", "tokenizer.json"])
def test_a_missing_form_is_named(directory: Path, tmp_path: Path, missing: str) -> None:
    for file in directory.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ArtifactError, match=rf"it has no {missing}"):
        compare_forms(tmp_path, ["text"])


@given(text=_HARD)
@settings(max_examples=200)
@example(text=" leading and trailing ")
def test_decoding_gives_the_text_back(directory: Path, text: str) -> None:
    """Always, leading spaces and line ends too, but for `▁`, which is written as a space."""
    vocabulary = Vocabulary(directory)
    expected = text.replace("▁", " ")
    assert vocabulary.decode(vocabulary.encode(text)) == expected
    fast = _fast(directory)
    ids = fast.encode(text, add_special_tokens=False).ids
    assert fast.decode(ids) == expected


def _stream(fast: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    """The chunks that vLLM sends: it steps such a stream, primed with the prompt's ids."""
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    return [stream.step(fast, id_) or "" for id_ in ids]


@given(text=_HARD.filter(lambda text: not text.endswith("\ufffd")))
@settings(max_examples=300)
def test_streaming_never_shows_half_a_character(directory: Path, text: str) -> None:
    """Of any text; one that ends in U+FFFD itself is shown without it."""
    fast = _fast(directory)
    chunks = _stream(fast, fast.encode(text).ids)
    assert "".join(chunks) == text.replace("▁", " ")
    assert ("\ufffd" in text) or not any("\ufffd" in chunk for chunk in chunks)


@given(prompt=_PLAIN, answer=_PLAIN.filter(lambda text: not text.endswith("\ufffd")))
@settings(max_examples=150)
def test_an_answer_streams_after_its_prompt(directory: Path, prompt: str, answer: str) -> None:
    fast = _fast(directory)
    before = fast.encode(prompt + "[/INST]").ids
    ids = fast.encode(answer, add_special_tokens=False).ids
    shown = "".join(_stream(fast, ids, before))
    assert fast.decode(before) + shown == fast.decode([*before, *ids])


@given(data=st.data())
@settings(max_examples=200)
def test_random_ids_stream_as_they_decode(directory: Path, data: st.DataObject) -> None:
    """Any pieces in any order, characters spelled in bytes among them."""
    fast = _fast(directory)
    types = [piece.type for piece in read_model(directory / "tokenizer.model").pieces]
    pieces = st.sampled_from([[id_] for id_, type_ in enumerate(types) if type_ != BYTE])
    spelled = st.characters(exclude_categories=["Cs"]).map(
        lambda char: [3 + byte for byte in char.encode()]
    )
    ids = [id_ for part in data.draw(st.lists(pieces | spelled, max_size=20)) for id_ in part]
    whole = fast.decode(ids)
    assert "".join(_stream(fast, ids)) == whole.rstrip("\ufffd")


@given(ids=st.lists(st.integers(3, 258), max_size=12))
@settings(max_examples=200)
def test_broken_bytes_are_never_shown_as_half_a_character(directory: Path, ids: list[int]) -> None:
    """Bytes that are no UTF-8: U+FFFD is shown only where the whole decodes to it."""
    fast = _fast(directory)
    shown = "".join(_stream(fast, ids))
    assert "\ufffd" not in shown or "\ufffd" in fast.decode(ids)
