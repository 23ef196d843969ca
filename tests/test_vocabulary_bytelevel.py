"""Byte-level BPE bases: what an extension may change, and what it must not."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from altiplano.errors import ArtifactError, DataError, MismatchError
from altiplano.vocabulary.bytelevel.bpe import BYTE_OF, LETTER_OF, text_of, to_bytes, to_letters
from altiplano.vocabulary.bytelevel.extend import adopt_bytelevel, extend_bytelevel, is_bytelevel
from altiplano.vocabulary.bytelevel.learn import Filter
from altiplano.vocabulary.characters import is_cjk
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.proto import read_model
from tests.helpers.bytelevel import TEMPLATE, Family, train_byte_base
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    english_lines,
    train_tiny_addition,
    train_tiny_base,
)

FAMILIES: tuple[Family, ...] = ("llama3", "qwen")
_WORDS = "“ ” …… —— · 😀 👩‍💻 é 龘 𠀀 ，。 。。。 ： １２ Ａ the river 河流 小船 山上下雪 苹果 «»"
_SPACES = (" ", "  ", "\n", "\r\n", "\t", "\0", "\x85", "\u3000", "\u200b", "\u2028", "\ufffd")
_HARD = st.lists(
    st.sampled_from([*_SPACES, *_WORDS.split(), "<|eot_id|>", "<|im_end|>", "[PAD]"])
    | st.characters(exclude_categories=["Cs"]),
    max_size=16,
).map("".join)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def base(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_byte_base(tmp_path_factory.mktemp("base") / "base", family)


@pytest.fixture(scope="module")
def grown(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grown")
    extend_bytelevel(
        base,
        directory,
        texts=chinese_lines(),
        new_pieces=60,
        keep="cjk",
        min_count=2,
        pad_piece="[PAD]",
    )
    return directory


def _fast(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


_OPEN: dict[Path, Vocabulary] = {}


def _open(directory: Path) -> Vocabulary:
    if directory not in _OPEN:
        _OPEN[directory] = Vocabulary(directory)
    return _OPEN[directory]


def _normal(directory: Path, text: str) -> str:
    """NFC for Qwen, as it is for Llama-3."""
    normalizer = _fast(directory).normalizer
    return str(normalizer.normalize_str(text)) if normalizer else text


def test_letters_spell_every_byte() -> None:
    assert sorted(BYTE_OF.values()) == list(range(256))
    assert to_letters(b" a\n") == "Ġa\u010a"
    assert to_bytes("Ġa") == b" a"
    assert to_bytes("<a b>") is None
    assert text_of(to_letters("你".encode()[:2])) is None
    assert all(len(letter) == 1 and not letter.isspace() for letter in LETTER_OF.values())


def test_old_ids_stay_and_new_ones_follow(base: Path, grown: Path) -> None:
    old, new = Vocabulary(base), Vocabulary(grown)
    assert [new.piece(i) for i in range(old.size)] == [old.piece(i) for i in range(old.size)]
    assert (new.bos_id, new.eos_id) == (old.bos_id, old.eos_id)
    assert new.piece(new.pad_id) == "[PAD]"
    assert new.pad_id == new.size - 1
    assert _fast(grown).get_vocab_size() == new.size
    added = json.loads((grown / "tokenizer.json").read_text())["added_tokens"]
    assert all(_fast(grown).token_to_id(token["content"]) == token["id"] for token in added)


def test_counts_add_up(base: Path, tmp_path: Path) -> None:
    result = extend_bytelevel(
        base,
        tmp_path,
        texts=chinese_lines(),
        new_pieces=60,
        words=["苹果", "<tool>"],
        pad_piece="[PAD]",
    )
    assert result.old_size == Vocabulary(base).size
    assert result.new_size == Vocabulary(tmp_path).size
    assert result.new_size == result.old_size + result.added + result.words + 1
    assert result.words == 2
    assert 0 < result.beginnings < result.added <= 60
    assert result.counts()["added"] == result.added


@given(text=_HARD)
@settings(max_examples=300)
def test_any_text_comes_back(grown: Path, text: str) -> None:
    vocabulary = _open(grown)
    assert vocabulary.decode(vocabulary.encode(text)) == _normal(grown, text)


@given(text=_HARD)
@settings(max_examples=300)
def test_text_without_chinese_tokenises_as_before(base: Path, grown: Path, text: str) -> None:
    foreign = "".join(char for char in _normal(grown, text) if not is_cjk(char))
    assert _open(grown).encode(foreign) == _open(base).encode(foreign)


@pytest.fixture(scope="module")
def russian(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("russian")
    texts = ["река и  лодка\tснег — «гора», лодка и река 12 раз the river"] * 20
    extend_bytelevel(base, directory, texts=texts, new_pieces=60, keep="non_ascii")
    return directory


@given(text=st.text(st.characters(max_codepoint=127)) | st.sampled_from(english_lines(20)))
def test_ascii_tokenises_as_before_whatever_was_learned(
    base: Path, russian: Path, text: str
) -> None:
    assert _open(russian).encode(text) == _open(base).encode(text)


def test_words_of_alphabetic_languages_take_their_space(russian: Path) -> None:
    vocabulary = Vocabulary(russian)
    pieces = [text_of(vocabulary.piece(id_)) for id_ in vocabulary.encode("и лодка река")]
    assert " лодка" in pieces
    assert " река" in pieces


def test_new_tokens_are_whole_kept_characters_or_their_beginnings(
    base: Path, grown: Path, russian: Path
) -> None:
    for directory, filter_ in ((grown, Filter("cjk")), (russian, Filter("non_ascii"))):
        old, new = Vocabulary(base), Vocabulary(directory)
        for id_ in range(old.size, new.size):
            piece = new.piece(id_)
            text, data = text_of(piece), to_bytes(piece)
            if piece in new.control_pieces:
                continue
            assert data is not None
            assert filter_.wanted(text) if text is not None else filter_.safe(data)


def test_a_beginning_that_others_share_is_refused() -> None:
    quote, han = "“".encode()[:2], "你".encode()[:2]
    assert Filter("cjk").safe(han)
    assert not Filter("cjk").safe(quote)
    assert Filter("non_ascii").safe(quote)
    assert Filter("cjk").safe("，".encode() + quote)
    assert not Filter("cjk").safe("—".encode() + quote)
    assert Filter("cjk").safe("—".encode() + han)


@pytest.mark.parametrize("min_count", [0, 5, 40])
def test_every_new_token_occurs_often_enough(base: Path, tmp_path: Path, min_count: int) -> None:
    lines = [*chinese_lines(150), "河流龘", "麤"]
    result = extend_bytelevel(
        base, tmp_path, texts=lines, new_pieces=80, min_count=min_count, keep="cjk"
    )
    old, new = Vocabulary(base), Vocabulary(tmp_path)
    counts = np.bincount(new.encode_flat(lines)[0], minlength=new.size)[old.size :]
    whole = np.array([text_of(new.piece(id_)) is not None for id_ in range(old.size, new.size)])
    rare = int((whole & (counts < min_count)).sum())
    assert rare == result.rare_parts
    assert result.untrained == int((~whole & (counts == 0)).sum())
    if min_count:
        assert counts[whole].min() > 0
    assert min_count < 40 or result.pruned > 0


def test_a_token_that_never_occurs_gives_way_no_further_than_it_must(
    base: Path, tmp_path: Path
) -> None:
    # 红楼 is learned on the way to 红楼梦 and then never stands alone: the longer one goes.
    texts = ["红楼梦"] * 40
    extend_bytelevel(base, tmp_path / "all", texts=texts, new_pieces=16, min_count=0)
    result = extend_bytelevel(base, tmp_path / "pruned", texts=texts, new_pieces=16, min_count=3)
    assert len(Vocabulary(tmp_path / "all").encode("，红楼梦，")) < len(
        Vocabulary(base).encode("，红楼梦，")
    )
    vocabulary = Vocabulary(tmp_path / "pruned")
    ids = vocabulary.encode("红楼梦")
    old_size = Vocabulary(base).size
    assert result.pruned > 0
    for id_ in range(old_size, vocabulary.size):
        if text_of(vocabulary.piece(id_)) is not None:
            assert id_ in ids


def test_the_same_texts_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    lines = chinese_lines()
    for name, texts in (("a", lines), ("b", iter(lines)), ("c", lines[::-1])):
        extend_bytelevel(base, tmp_path / name, texts=texts, new_pieces=60, seed=3)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        written = {(tmp_path / name / file).read_bytes() for name in "abc"}
        assert len(written) == 1


def test_a_sample_follows_the_seed(base: Path, tmp_path: Path) -> None:
    lines = chinese_lines(300)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        extend_bytelevel(base, tmp_path / name, texts=lines, new_pieces=60, max_lines=20, seed=seed)
    a, b, c = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "abc")
    assert a == b != c


def test_streamed_text_never_shows_half_a_character(grown: Path) -> None:
    vocabulary = Vocabulary(grown)
    text = "龘河流 😀小船，𠀀é 山上下雪。"
    stream, fast = DecodeStream(skip_special_tokens=True), _fast(grown)
    steps = [stream.step(fast, id_) or "" for id_ in vocabulary.encode(text)]
    assert "".join(steps) == text
    assert not any("\ufffd" in step for step in steps)


def test_pieces_are_never_longer_than_asked(base: Path, tmp_path: Path) -> None:
    extend_bytelevel(
        base, tmp_path, texts=["山上下雪市场里"] * 50, new_pieces=80, max_piece_length=3
    )
    old, new = Vocabulary(base), Vocabulary(tmp_path)
    texts = [text_of(new.piece(id_)) for id_ in range(old.size, new.size)]
    assert max(len(text) for text in texts if text is not None) == 3


def test_dropped_characters_are_left_to_the_base(base: Path, tmp_path: Path) -> None:
    texts = ["第１２章Ａ河流"] * 50
    extend_bytelevel(base, tmp_path / "kept", texts=texts, new_pieces=60)
    extend_bytelevel(
        base, tmp_path / "dropped", texts=texts, new_pieces=60, drop=["digits", "latin"]
    )
    kept, dropped = Vocabulary(tmp_path / "kept"), Vocabulary(tmp_path / "dropped")
    for char in "１Ａ":
        assert len(kept.encode(char)) == 1
        assert dropped.encode(char) == Vocabulary(base).encode(char)
    assert len(dropped.encode("河")) == 1


def test_rare_characters_are_left_to_the_base(base: Path, tmp_path: Path) -> None:
    texts = [*["河流小船"] * 100, "龘"]
    extend_bytelevel(base, tmp_path, texts=texts, new_pieces=60, character_coverage=0.99)
    assert Vocabulary(tmp_path).encode("龘") == Vocabulary(base).encode("龘")


def test_characters_that_would_be_pruned_take_no_places(base: Path, tmp_path: Path) -> None:
    rare = "".join(chr(0x4E00 + 64 * index) for index in range(300))
    texts = [*chinese_lines(400), rare]
    results = [
        extend_bytelevel(
            base,
            tmp_path / name,
            texts=given,
            new_pieces=90,
            min_count=5,
            character_coverage=1.0,
        )
        for name, given in (("with", texts), ("without", texts[:-1]))
    ]
    assert results[0].added == results[1].added
    assert results[0].pruned == results[1].pruned


def test_pieces_of_trained_models_become_tokens(base: Path, tmp_path: Path) -> None:
    addition = train_tiny_addition(tmp_path)
    result = extend_bytelevel(
        base, tmp_path / "out", texts=None, new_pieces=None, additions=[addition, addition]
    )
    vocabulary = Vocabulary(tmp_path / "out")
    for word in ("河流", "小船", "苹果"):
        assert len(vocabulary.encode(word)) == 1
    whole = result.added - result.beginnings
    assert whole + result.overlap + result.unreachable + sum(result.filtered.values()) == 57


def test_what_no_pretoken_can_hold_is_unreachable(base: Path, tmp_path: Path) -> None:
    proto = read_model(train_tiny_addition(tmp_path))
    proto.pieces[-1].piece, proto.pieces[-2].piece, proto.pieces[-3].piece = "河", "河。", "。河"
    model = tmp_path / "joined.model"
    model.write_bytes(proto.SerializeToString())
    extend_bytelevel(base, tmp_path / "out", texts=None, new_pieces=None, additions=[model])
    vocabulary = Vocabulary(tmp_path / "out")
    pieces = {text_of(vocabulary.piece(id_)) for id_ in range(vocabulary.size)}
    assert "。河" in pieces
    assert "河。" not in pieces
    assert len(vocabulary.encode("河")) == 1


def test_words_are_found_anywhere_and_decoded(base: Path, tmp_path: Path) -> None:
    words = ["机器学习", "GPU", "深度learning"]
    extend_bytelevel(base, tmp_path, texts=chinese_lines(), new_pieces=60, words=words)
    vocabulary, base_size = Vocabulary(tmp_path), Vocabulary(base).size
    assert set(words) <= vocabulary.words
    for text in ("我爱机器学习和GPU", "深度learning的机器学习。"):
        ids = vocabulary.encode(text)
        assert sum(vocabulary.piece(id_) in words for id_ in ids if id_ >= base_size) == 2
        assert vocabulary.decode(ids) == text
    assert not set(words) & set(vocabulary.control_pieces)


def test_a_word_that_would_be_garbled_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'café' cannot be a token.*decoded as 'caf.'"):
        extend_bytelevel(base, tmp_path, texts=None, new_pieces=None, words=["GPU", "café"])
    assert not list(tmp_path.iterdir())


def test_a_padding_piece_of_ordinary_text_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"'a' is an ordinary token.*\[PAD\]"):
        extend_bytelevel(base, tmp_path, texts=None, new_pieces=None, pad_piece="a")
    assert not list(tmp_path.iterdir())


def test_a_special_token_that_text_becomes_is_refused(tmp_path: Path) -> None:
    base = train_byte_base(tmp_path / "base", "llama3")
    with pytest.raises(MismatchError, match=r"'PAD' is a word of ordinary text.*\[PAD\]"):
        extend_bytelevel(
            base, tmp_path / "out", texts=None, new_pieces=None, pad_piece="PAD", words=["词"]
        )


def test_the_bases_own_padding_is_used(tmp_path: Path) -> None:
    base = train_byte_base(tmp_path / "base", "qwen")
    extend_bytelevel(
        base,
        tmp_path / "out",
        texts=chinese_lines(),
        new_pieces=40,
        pad_piece="<|endoftext|>",
    )
    assert Vocabulary(tmp_path / "out").pad_id == Vocabulary(base).pad_id


def test_adopted_bytes_are_the_bases_and_the_config_is_ours(base: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("stale")
    adopt_bytelevel(base, tmp_path)
    name = "tokenizer.json"
    assert (tmp_path / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == TEMPLATE
    assert Vocabulary(tmp_path).chat_template == TEMPLATE
    assert Vocabulary(tmp_path).fingerprint == Vocabulary(base).fingerprint


def test_the_template_may_come_from_a_file_or_from_the_caller(tmp_path: Path) -> None:
    base = train_byte_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ 'file' }}")
    adopt_bytelevel(base, tmp_path / "a")
    assert Vocabulary(tmp_path / "a").chat_template == "{{ 'file' }}"
    adopt_bytelevel(base, tmp_path / "b", chat_template="{{ 'mine' }}")
    assert Vocabulary(tmp_path / "b").chat_template == "{{ 'mine' }}"


def test_what_is_not_byte_level_is_refused_by_name(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    from altiplano.vocabulary.convert import save_tokenizer

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    for refused in (is_bytelevel, lambda path: adopt_bytelevel(path, tmp_path / "out")):
        with pytest.raises(MismatchError, match=r"'WordLevel'.*'Whitespace'.*Llama or Qwen"):
            refused(tmp_path)
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        adopt_bytelevel(tmp_path / "nowhere", tmp_path / "out")
    save_tokenizer(train_tiny_base(tmp_path).read_bytes(), tmp_path / "sentencepiece")
    assert not is_bytelevel(tmp_path / "sentencepiece")
    assert not is_bytelevel(tmp_path / "nowhere")
    assert is_bytelevel(train_byte_base(tmp_path / "base"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token": None}, "names no `eos_token`"),
        ({"bos_token": "<s>"}, r"`bos_token` '<s>', which is not among the"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    base = train_byte_base(tmp_path / "base")
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(MismatchError, match=message):
        adopt_bytelevel(base, tmp_path / "out")


def test_transformers_loads_the_same_ids(grown: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    for file in grown.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    vocabulary = Vocabulary(grown)
    LlamaConfig(vocab_size=vocabulary.size).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    bos = [vocabulary.bos_id] if vocabulary.bos_id >= 0 else []
    for text in ["a  b", " 河流 小船\n\n龘😀", *chinese_lines(5), *english_lines(5)]:
        ids = loaded(text).input_ids
        assert ids == [*bos, *vocabulary.encode(text)]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (vocabulary.eos_id, vocabulary.pad_id)
    assert len(loaded) == vocabulary.size
    rendered = loaded.apply_chat_template([{"role": "user", "content": "河"}], tokenize=False)
    assert rendered == "user: 河\n"


def test_vllm_loads_the_same_ids(grown: Path) -> None:
    tokenizers = pytest.importorskip("vllm.tokenizers")
    loaded = tokenizers.get_tokenizer(str(grown))
    vocabulary = Vocabulary(grown)
    for text in ["a  b", " 河流 小船\n\n龘😀", *chinese_lines(5)]:
        assert loaded.encode(text, add_special_tokens=False) == vocabulary.encode(text)


def test_older_files_write_merges_as_strings(base: Path, tmp_path: Path) -> None:
    data = json.loads((base / "tokenizer.json").read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/tokenizer.json").write_text(json.dumps(data))
    config = (base / "tokenizer_config.json").read_text()
    (tmp_path / "old/tokenizer_config.json").write_text(config)
    for name, source in (("a", base), ("b", tmp_path / "old")):
        extend_bytelevel(source, tmp_path / name, texts=chinese_lines(), new_pieces=40)
    assert Vocabulary(tmp_path / "a").fingerprint == Vocabulary(tmp_path / "b").fingerprint


def test_a_pre_tokenizer_with_its_own_regex(base: Path, tmp_path: Path) -> None:
    data = json.loads((base / "tokenizer.json").read_text())
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    data["pre_tokenizer"] = {"type": "ByteLevel", **options}
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "tokenizer.json").write_text(json.dumps(data))
    (gpt2 / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    extend_bytelevel(gpt2, tmp_path / "new", texts=chinese_lines(), new_pieces=60)
    old, new = Vocabulary(gpt2), Vocabulary(tmp_path / "new")
    text = "".join(chinese_lines(3, seed=9))
    assert len(new.encode(text)) < 0.5 * len(old.encode(text))
    assert new.decode(new.encode(text)) == text
    assert new.encode("the river's") == old.encode("the river's")


def test_old_tokens_across_characters_stay_and_do_no_harm(tmp_path: Path) -> None:
    # A base that has seen a little Chinese: "，" with the beginning of what follows is one token.
    lines = [*english_lines(), *["，我", "，你", "，他", "，们"] * 50]
    base = train_byte_base(tmp_path / "base", lines=lines, vocab_size=330)
    old = Vocabulary(base)
    assert any(
        (data := to_bytes(old.piece(id_))) and data.startswith("，".encode()) and len(data) == 4
        for id_ in range(old.size)
    )
    extend_bytelevel(
        base, tmp_path / "new", texts=["河，我河", "河，仅河"] * 9, new_pieces=40, keep="cjk"
    )
    new = Vocabulary(tmp_path / "new")
    for text in ("，仅", "河，仅", "，河，我", "，伙"):
        assert new.decode(new.encode(text)) == text
    assert len(new.encode("，仅")) == 1
    assert new.encode("the river 😀") == old.encode("the river 😀")


def test_no_text_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        extend_bytelevel(base, tmp_path, texts=["\n"], new_pieces=40)


def _lines(file: Path) -> Iterator[str]:
    yield from (line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())


def test_real_text(shared: Path, tmp_path: Path) -> None:
    english = list(_lines(shared / "text/wiki_en_demo.txt"))[:12]
    chinese = list(_lines(shared / "text/luxun_quanji.txt"))[:1500]
    base = train_byte_base(tmp_path / "base", lines=english, vocab_size=2000)
    extend_bytelevel(base, tmp_path / "new", texts=chinese[::2], new_pieces=1500, keep="cjk")
    old, new = Vocabulary(base), Vocabulary(tmp_path / "new")
    foreign = ["".join(c for c in line if not is_cjk(c)) for line in english]
    assert old.encode_batch(foreign) == new.encode_batch(foreign)
    held_out = chinese[1::2]
    before, after = (int(v.encode_flat(held_out)[1].sum()) for v in (old, new))
    assert after < 0.45 * before
    assert [new.decode(ids) for ids in new.encode_batch(held_out)] == held_out
