"""Prompts, answers piece by piece, stop strings: as training and whole decoding have them. 5 s."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.data.chat.encode import encode_spans, make_template
from altiplano.data.chat.templates import FORMS
from altiplano.errors import ServeError
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.text import Detokenizer, StopScan, TextCodec
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.fastform import open_fast
from altiplano.vocabulary.load import Vocabulary
from tests.helpers.bytelevel import TEMPLATE, train_byte_base
from tests.helpers.tiny_vocabulary import HARD_TEXTS, write_tiny_tokenizer

KINDS = ("sentencepiece", "llama3", "qwen")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": write_tiny_tokenizer(root),
        "llama3": train_byte_base(root / "llama3", "llama3"),
        "qwen": train_byte_base(root / "qwen", "qwen"),
    }


@pytest.fixture(scope="module")
def made(directories: dict[str, Path]) -> dict[str, TextCodec]:
    return {kind: TextCodec(directory) for kind, directory in directories.items()}


def _in_pieces(codec: TextCodec, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(codec, prompt)
    pieces = [detokenizer.feed([id_]) for id_ in ids]
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_the_ids_that_training_saw(
    directories: dict[str, Path], made: dict[str, TextCodec], kind: str, text: str
) -> None:
    vocabulary = Vocabulary(directories[kind])
    bos = [vocabulary.bos_id] if vocabulary.bos_id >= 0 and kind != "qwen" else []
    assert made[kind].encode(text) == [*bos, *vocabulary.encode(text)]
    assert made[kind].encode(text, add_bos=False) == vocabulary.encode(text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=40))
@settings(deadline=None, max_examples=150)
def test_an_answer_in_pieces_is_the_text_whole(
    made: dict[str, TextCodec], directories: dict[str, Path], kind: str, text: str
) -> None:
    codec = made[kind]
    ids = codec.encode(text, add_bos=False)
    whole = open_fast(directories[kind] / "tokenizer.json").decode(ids)
    pieces = _in_pieces(codec, ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_it_makes_no_difference_how_tokens_are_grouped(
    made: dict[str, TextCodec], kind: str, data: st.DataObject
) -> None:
    """Speculation brings several at once; ids may be any, also broken characters."""
    codec = made[kind]
    ids = data.draw(st.lists(st.integers(0, codec.size + 3), max_size=20))
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(codec, [5])
    grouped = detokenizer.feed(ids[:cut]) + detokenizer.feed(ids[cut:]) + detokenizer.finish()
    assert grouped == "".join(_in_pieces(codec, ids, [5]))


def test_only_the_beginning_of_a_text_loses_its_first_space(made: dict[str, TextCodec]) -> None:
    codec = made["sentencepiece"]
    word = codec.encode("river", add_bos=False)
    assert "".join(_in_pieces(codec, word, codec.encode("the"))) == " river"
    assert "".join(_in_pieces(codec, word, codec.encode("", add_bos=True))) == "river"


def test_a_character_begun_in_the_prompt_is_no_error_of_the_answer(
    made: dict[str, TextCodec],
) -> None:
    codec = made["sentencepiece"]
    ids = codec.encode("the 龘 river")
    at = next(place for place, id_ in enumerate(ids) if codec.text_of(id_)[1] == b"\xe9")
    assert "".join(_in_pieces(codec, ids[at + 1 :], ids[: at + 1])) == "龘 river"


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    include=st.booleans(),
)
@settings(deadline=None, max_examples=400)
def test_stop_strings_are_found_across_pieces_and_never_shown(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    """The reference: add letters one by one until a stop string ends the text."""
    expected, found = text, None
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            found = max(ending, key=len)
            expected = text[:end] if include else text[: end - len(found)]
            break
    scan = StopScan(stops, include)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    shown = "".join(scan.feed(text[a:b]) for a, b in pairwise(bounds))
    assert expected.startswith(shown)
    assert shown + scan.finish() == expected
    assert scan.found == found


def test_text_is_held_back_only_while_a_stop_string_may_begin() -> None:
    scan = StopScan(["\n\nUser"])
    assert scan.feed("one\n") == "one"
    assert scan.feed("two") == "\ntwo"
    assert scan.feed("\n\nUs") == ""
    assert scan.feed("age") == "\n\nUsage"


@pytest.mark.parametrize("name", FORMS)
def test_conversations_have_the_ids_that_training_saw(tmp_path: Path, name: str) -> None:
    """Also what people write in control pieces' places stays without effect, in both alike."""
    vocabulary = Vocabulary(write_tiny_tokenizer(tmp_path))
    template = make_template(name, None, vocabulary)
    save_tokenizer(
        (tmp_path / "merged" / "tokenizer.model").read_bytes(),
        tmp_path / "served",
        chat_template=template.jinja,
    )
    codec = TextCodec(tmp_path / "served")
    messages = [
        {"role": "user", "content": "the river </s><s> 小船"},
        {"role": "assistant", "content": "a small boat\n\nruns"},
        {"role": "user", "content": " under snow "},
    ]
    text = codec.render(messages, add_generation_prompt=True)
    expected = encode_spans(template.spans(messages), template.control_ids, vocabulary).ids
    assert codec.encode(text, add_bos=False) == expected.tolist()


def test_templates_render_as_transformers_renders_them(tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    from altiplano.serving.front.template import Template

    source = (
        "{%- for m in messages %}\n  {%- if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "{{ bos_token }}{% generation %}{{ m['content'] | trim }}{% endgeneration %}\n"
        "    {% if tools %}{{ tools | tojson(indent=2) }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": f" <é & 雪> {number} "} for number in range(8)]
    tools = [{"type": "function", "function": {"name": "get", "description": "<ü>"}}]
    (expected,), _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    template = Template(source, {"bos_token": "<s>"})
    assert template.render(messages, tools=tools, add_generation_prompt=True) == expected


def test_a_conversation_the_template_refuses_is_the_clients_fault(
    made: dict[str, TextCodec],
) -> None:
    assert made["llama3"].template is not None and made["llama3"].template.source == TEMPLATE
    with pytest.raises(ApiError, match="base model") as refused:
        made["sentencepiece"].render([{"role": "user", "content": "hello"}])
    assert refused.value.status == 400


def test_a_lone_sentencepiece_model_is_enough(
    tmp_path: Path, made: dict[str, TextCodec], directories: dict[str, Path]
) -> None:
    model = (directories["sentencepiece"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert TextCodec(tmp_path).encode("the river 雪") == made["sentencepiece"].encode(
        "the river 雪"
    )


def test_a_tokenizer_that_decodes_otherwise_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ServeError, match="WordPiece"):
        TextCodec(tmp_path)


def test_the_real_tokenizer_streams_real_text(shared: Path, tmp_path: Path) -> None:
    model = shared / "tokenizers" / "chinese_llama2_55296.model"
    save_tokenizer(model.read_bytes(), tmp_path)
    codec = TextCodec(tmp_path)
    text = next(iter(sorted((shared / "text").glob("hongloumeng.txt")))).read_text("utf-8")[:4000]
    ids = codec.encode(text, add_bos=False)
    assert "".join(_in_pieces(codec, ids)) == text
