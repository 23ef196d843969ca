"""The two forms give the same ids; loading, fingerprints, reports and errors."""

import json
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from altiplano.errors import ArtifactError, DataError, MismatchError
from altiplano.vocabulary.convert import FORM_KEY, save_tokenizer
from altiplano.vocabulary.load import Vocabulary, tokenizer_fingerprint
from altiplano.vocabulary.merge import merge_sentencepiece
from altiplano.vocabulary.proto import read_model
from altiplano.vocabulary.train import train_sentencepiece
from tests.helpers.bytelevel import TEMPLATE, train_byte_base
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    english_lines,
    train_tiny_addition,
    train_tiny_base,
)

# Stretches where tokenizers are known to differ: spaces, lines, controls, rare and wide characters.
_SPACES = (" ", "  ", "\n", "\r\n", "\t", "\0", "\x01", "\u3000", "\ufeff", "\u2028")
_WORDS = "▁ ▁▁ 😀 é e\u0301 Ａ 𠀀 龘 ， 。。。 —— 0 2024 the river 河流 河 流小 山上下雪 苹果 人人"
_CONTROLS = "</s> <s> [PAD] <0x41> <unk>"
_HARD = st.lists(
    st.sampled_from([*_SPACES, *_WORDS.split(), *_CONTROLS.split()])
    | st.characters(exclude_categories=["Cs"]),
    max_size=16,
).map("".join)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("merged")
    base, addition = train_tiny_base(directory), train_tiny_addition(directory)
    result = merge_sentencepiece(base, [addition], pad_piece="[PAD]")
    save_tokenizer(result.proto, directory / "tokenizer", chat_template="{{ 'hi' }}")
    return directory / "tokenizer"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tied")
    base, addition = train_tiny_base(directory), train_tiny_addition(directory)
    result = merge_sentencepiece(
        base, [addition], scores="reference", pad_piece="[PAD]", keep="all"
    )
    save_tokenizer(result.proto, directory / "tokenizer", pad_piece="[PAD]")
    return directory / "tokenizer"


def _forms(directory: Path) -> tuple[spm.SentencePieceProcessor, Tokenizer]:
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.encode_special_tokens = True
    return spm.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")), fast


@given(text=_HARD)
@settings(max_examples=400)
def test_both_forms_agree_on_hard_text(merged: Path, text: str) -> None:
    slow, fast = _forms(merged)
    encoding = fast.encode(text, add_special_tokens=False)
    assert encoding.ids == slow.encode(text)
    assert fast.decode(encoding.ids) == slow.decode(encoding.ids) == text.replace("▁", " ")


@given(text=_HARD)
@settings(max_examples=150)
def test_both_forms_agree_where_spaces_are_trimmed(text: str, trimmed: Path) -> None:
    slow, fast = _forms(trimmed)
    assert fast.encode(text, add_special_tokens=False).ids == slow.encode(text)


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trimmed")
    proto = read_model(train_tiny_base(directory))
    proto.normalizer_spec.remove_extra_whitespaces = True
    save_tokenizer(proto.SerializeToString(), directory)
    return directory


@pytest.mark.parametrize(
    ("base", "addition"),
    [
        ("tokenizers/llama_32000.model", None),
        ("tokenizers/llama_32000.model", "tokenizers/chinese_sp_20000.model"),
        ("models/tok512.model", "tokenizers/chinese_sp_20000.model"),
    ],
)
def test_both_forms_agree_on_real_text(
    shared: Path, tmp_path: Path, base: str, addition: str | None
) -> None:
    additions = [shared / addition] if addition else []
    save_tokenizer(merge_sentencepiece(shared / base, additions).proto, tmp_path)
    assert Vocabulary(tmp_path).form == "sentencepiece"
    slow, fast = _forms(tmp_path)
    for name in ("hongloumeng", "sanguoyanyi", "luxun_quanji", "wiki_en_demo"):
        lines = (shared / f"text/{name}.txt").read_text(encoding="utf-8-sig").splitlines()
        encodings = fast.encode_batch_fast(lines, add_special_tokens=False)
        assert [encoding.ids for encoding in encodings] == slow.encode(lines), name


def test_known_ids_of_llama(shared: Path) -> None:
    vocabulary = Vocabulary(shared / "tokenizers/llama_32000.model")
    ids = [29871, 30919, 31076, 29892, 30275, 30356, 30210, 31688, 30769, 30505]
    ids += [232, 150, 173, 30755, 30882]
    assert vocabulary.encode("你好,中国的首都在哪里？") == ids
    assert (vocabulary.size, vocabulary.bos_id, vocabulary.eos_id) == (32000, 1, 2)


def test_the_published_55296_vocabulary_is_encoded_by_the_form_that_is_served(
    shared: Path, tmp_path: Path
) -> None:
    model = (shared / "tokenizers/chinese_llama2_55296.model").read_bytes()
    save_tokenizer(model, tmp_path, pad_piece="<pad>")
    vocabulary = Vocabulary(tmp_path)
    assert vocabulary.form == "fast"
    assert vocabulary.pad_id == 32000


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_loads_our_form(merged: Path, tmp_path: Path, with_config: bool) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    for file in merged.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if with_config:
        LlamaConfig(vocab_size=400).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = Vocabulary(merged)
    for text in ["a  b", "  河流 小船\n\n龘😀", *chinese_lines(5), *english_lines(5)]:
        ids = loaded(text).input_ids
        assert ids == [1, *vocabulary.encode(text)]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    special = (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.pad_token_id)
    assert special == (1, 2, 0, vocabulary.pad_id)
    assert len(loaded) == vocabulary.size
    assert loaded.chat_template == "{{ 'hi' }}"
    stretches = loaded("河流</s>小船", add_special_tokens=False).input_ids
    assert stretches == [*vocabulary.encode("河流"), 2, *vocabulary.encode("小船")]


@pytest.mark.parametrize("which", ["merged", "tied"])
def test_control_pieces_in_text_stay_text(which: str, request: pytest.FixtureRequest) -> None:
    vocabulary = Vocabulary(request.getfixturevalue(which))
    assert set(vocabulary.control_pieces) == {"<unk>", "<s>", "</s>", "[PAD]"}
    ids = vocabulary.encode("a</s><s>[PAD]<unk>")
    assert not {0, 1, 2, vocabulary.pad_id} & set(ids)
    assert vocabulary.decode(ids) == "a</s><s>[PAD]<unk>"


def test_tied_scores_are_encoded_by_the_fast_form(tied: Path) -> None:
    vocabulary = Vocabulary(tied)
    assert vocabulary.form == "fast"
    assert json.loads((tied / "tokenizer_config.json").read_text())[FORM_KEY] == "fast"
    lines = chinese_lines(50, seed=5)
    fast = Tokenizer.from_file(str(tied / "tokenizer.json"))
    expected = [e.ids for e in fast.encode_batch(lines, add_special_tokens=False)]
    assert vocabulary.encode_batch(lines) == expected
    assert [vocabulary.decode(ids) for ids in expected] == lines
    assert vocabulary.pad_id == vocabulary.size - 1


def test_vocabulary_basics(merged: Path) -> None:
    vocabulary = Vocabulary(merged)
    ids = vocabulary.encode("河流 river 龘")
    assert vocabulary.encode_batch(["河流 river 龘", ""], num_threads=2) == [ids, []]
    assert vocabulary.decode([1, *ids, 2]) == "河流 river 龘"
    assert vocabulary.piece(1) == "<s>"
    assert vocabulary.size == len(read_model(merged / "tokenizer.model").pieces)


def test_a_lone_surrogate_is_named(merged: Path) -> None:
    with pytest.raises(DataError, match=r"text 1 .*\(U\+D83D\)"):
        Vocabulary(merged).encode_batch(["fine", "half \ud83d"])


def test_fingerprint_follows_content_not_files(merged: Path, tmp_path: Path) -> None:
    original = tokenizer_fingerprint(merged)
    assert original == tokenizer_fingerprint(merged / "tokenizer.model")
    assert original == Vocabulary(merged).fingerprint
    seen = {original}
    for change in ("piece", "score", "type", "special"):
        proto = read_model(merged / "tokenizer.model")
        if change == "piece":
            proto.pieces[-2].piece += "x"
        elif change == "score":
            proto.pieces[-2].score += 0.5
        elif change == "type":
            proto.pieces[-2].type = 5
        else:
            proto.trainer_spec.eos_id = 1
        path = tmp_path / f"{change}.model"
        path.write_bytes(proto.SerializeToString())
        seen.add(tokenizer_fingerprint(path))
    assert len(seen) == 5


def test_fingerprint_of_a_directory_with_tokenizer_json_only(merged: Path, tmp_path: Path) -> None:
    prints = []
    data = json.loads((merged / "tokenizer.json").read_text())
    for merges in (data["model"]["merges"], data["model"]["merges"][::-1]):
        data["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
        )
        prints.append(tokenizer_fingerprint(tmp_path))
    vocabulary = Vocabulary(tmp_path)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, -1)
    assert len(set(prints)) == 2


def _changed(base: Path, directory: Path, changes: dict[str, object]) -> str:
    directory.mkdir()
    for file in base.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    data = json.loads((base / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(data | changes))
    return tokenizer_fingerprint(directory)


def test_fingerprint_of_a_bytelevel_tokenizer_covers_how_text_is_cut(tmp_path: Path) -> None:
    base = train_byte_base(tmp_path / "base", "qwen")
    data = json.loads((base / "tokenizer.json").read_text())
    digits = json.loads(json.dumps(data["pre_tokenizer"]).replace("p{N}", "p{N}{1,2}"))
    added = json.loads(json.dumps(data["added_tokens"]))
    added[-1]["single_word"] = True
    changes: list[dict[str, object]] = [
        {},
        {"normalizer": None},
        {"pre_tokenizer": digits},
        {"added_tokens": added},
        {"model": data["model"] | {"ignore_merges": True}},
        {"model": data["model"] | {"merges": data["model"]["merges"][::-1]}},
    ]
    prints = [_changed(base, tmp_path / str(i), change) for i, change in enumerate(changes)]
    assert prints[0] == tokenizer_fingerprint(base)
    assert len(set(prints)) == len(changes)


def test_a_bytelevel_vocabulary(tmp_path: Path) -> None:
    base = train_byte_base(tmp_path / "base", "qwen")
    vocabulary = Vocabulary(base)
    assert (vocabulary.family, vocabulary.form) == ("bytelevel", "fast")
    assert (vocabulary.bos_id, vocabulary.unk_id) == (-1, -1)
    assert vocabulary.piece(vocabulary.eos_id) == "<|im_end|>"
    assert vocabulary.chat_template == TEMPLATE
    assert vocabulary.control_pieces == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert vocabulary.words == {"<tool_call>"}
    text = "a<|im_end|><tool_call>b\n"
    ids = vocabulary.encode(text)
    assert vocabulary.eos_id not in ids
    assert [vocabulary.piece(id_) for id_ in ids].count("<tool_call>") == 1
    assert vocabulary.decode([*ids, vocabulary.eos_id]) == text
    flat, lengths = vocabulary.encode_flat([text, "", "the river"])
    assert flat.dtype == "int32"
    assert lengths.tolist() == [len(ids), 0, len(vocabulary.encode("the river"))]
    assert flat.tolist() == [*ids, *vocabulary.encode("the river")]


def test_padding_and_truncation_of_a_file_are_not_for_training(tmp_path: Path) -> None:
    base = train_byte_base(tmp_path / "base")
    fast = Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = fast.encode("the river runs", add_special_tokens=False).ids
    fast.enable_padding(length=50)
    fast.enable_truncation(len(ids) - 1)
    fast.save(str(base / "tokenizer.json"))
    assert Vocabulary(base).encode("the river runs") == ids


def test_chat_templates_of_either_place(merged: Path, tmp_path: Path) -> None:
    assert Vocabulary(merged).chat_template == "{{ 'hi' }}"
    assert Vocabulary(merged / "tokenizer.model").chat_template is None
    base = train_byte_base(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "plain"},
    ]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert Vocabulary(base).chat_template == "plain"
    (base / "chat_template.jinja").write_text("of the file")
    assert Vocabulary(base).chat_template == "of the file"


def test_a_missing_tokenizer_names_the_place_and_the_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere.*does not exist.*tokenizer\.json"):
        Vocabulary(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"holds neither.*tokenizer\.model"):
        tokenizer_fingerprint(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_json_is_named(merged: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((merged / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text("{")
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        Vocabulary(tmp_path)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    unigram = tmp_path / "unigram.model"
    train_sentencepiece(chinese_lines(), vocab_size=40, output=unigram, model_type="unigram")
    with pytest.raises(MismatchError, match="not BPE"):
        save_tokenizer(unigram.read_bytes(), tmp_path / "out")
    base = train_tiny_base(tmp_path).read_bytes()
    with pytest.raises(MismatchError, match=r"\[PAD\]"):
        save_tokenizer(base, tmp_path / "out", pad_piece="[PAD]")
    proto = read_model(base)
    proto.pieces[-1].type = 4
    with pytest.raises(MismatchError, match="user-defined"):
        save_tokenizer(proto.SerializeToString(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
