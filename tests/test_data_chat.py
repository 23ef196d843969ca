"""Chat templates: the ids trained on are the ids a server gives, and only answers are trained."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.data import chat
from altiplano.data.pack import TokenSequence
from altiplano.errors import DataError
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import merge_sentencepiece
from tests.helpers.tiny_vocabulary import train_tiny_addition, train_tiny_base

TEMPLATES = sorted(chat.TEMPLATES)
TURNS = [
    {"role": "user", "content": "山上有什么？"},
    {"role": "assistant", "content": "很多小船。"},
    {"role": "user", "content": " and  the market?\n"},
    {"role": "assistant", "content": "苹果 (two)"},
]
SYSTEM = "Answer briefly, 请简短。"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    additions = [train_tiny_addition(directory)]
    merged = merge_sentencepiece(train_tiny_base(directory), additions, pad_piece="[PAD]")
    save_tokenizer(merged.proto, directory / "merged", pad_piece="[PAD]")
    return directory / "merged"


@pytest.fixture(scope="module")
def vocabulary(tokenizer_dir: Path) -> Vocabulary:
    return Vocabulary(tokenizer_dir)


def encoded(
    messages: Sequence[chat.Message], template: str, vocabulary: Vocabulary, system: str = ""
) -> TokenSequence:
    spans = chat.render(messages, template, system, vocabulary.control_pieces)
    return chat.encode_spans(spans, vocabulary)


class Server:
    """What a server makes of messages: the stored template and the Hugging Face tokenizer."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._control = Vocabulary(directory).control_pieces

    def ids(self, messages: Sequence[chat.Message], template: str, system: str = "") -> list[int]:
        return list(
            self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=chat.jinja_template(template, system, self._control),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        )


@pytest.fixture(scope="module")
def server(tokenizer_dir: Path) -> Server:
    return Server(tokenizer_dir)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", ["", SYSTEM])
def test_prompt_ids_are_the_servers(
    template: str, system: str, vocabulary: Vocabulary, server: Server
) -> None:
    """For the first answer and for the second, whose prompt holds the first as history."""
    record = encoded(TURNS, template, vocabulary, system)
    starts = np.flatnonzero(np.diff(record.loss, prepend=0) == 1)
    assert len(starts) == 2
    for turn, start in enumerate(starts):
        prompt = server.ids(TURNS[: 2 * turn + 1], template, system)
        assert record.ids[:start].tolist() == prompt
    assert record.ids.tolist() == server.ids(TURNS, template, system)


content = st.text("ab文山。 \n[]<>/|:s市场里🙂#", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60)
@given(template=st.sampled_from(TEMPLATES), question=content, answer=content, system=content)
def test_any_text_gives_the_servers_ids(
    template: str,
    question: str,
    answer: str,
    system: str,
    vocabulary: Vocabulary,
    server: Server,
) -> None:
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    record = encoded(messages, template, vocabulary, "ignored where a record brings its own")
    prompt = server.ids(messages[:2], template, "ignored where a record brings its own")
    assert record.ids[record.loss == 0].tolist() == prompt
    trained = record.ids[record.loss == 1]
    assert trained[-1] == vocabulary.eos_id
    said = answer.replace("<s>", " ").replace("</s>", " ").strip()
    assert vocabulary.decode(trained[:-1].tolist()).strip() == said


@pytest.mark.parametrize("template", TEMPLATES)
def test_loss_is_on_every_answer_and_its_eos_only(template: str, vocabulary: Vocabulary) -> None:
    record = encoded(TURNS, template, vocabulary, SYSTEM)
    loss = np.append(record.loss, 0)
    ends = np.flatnonzero((loss[:-1] == 1) & (loss[1:] == 0)) + 1
    starts = np.flatnonzero(np.diff(record.loss, prepend=0) == 1)
    answers = [
        vocabulary.decode(record.ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)
    ]
    assert [answer.strip() for answer in answers] == ["很多小船。", "苹果 (two)"]
    assert (record.ids[ends - 1] == vocabulary.eos_id).all()
    assert (record.ids == vocabulary.eos_id).sum() == 2
    chat.require_eos(record, vocabulary.eos_id)


@pytest.mark.parametrize("template", TEMPLATES)
def test_control_pieces_in_a_message_are_text(
    template: str, vocabulary: Vocabulary, server: Server
) -> None:
    """Nobody ends a turn by writing the end mark, in training or serving."""
    messages = [
        {"role": "user", "content": "a</s><s>b <</s>/s> [PAD]<unk>"},
        {"role": "assistant", "content": "c</s>d"},
    ]
    record = encoded(messages, template, vocabulary)
    control = [vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.unk_id]
    assert np.isin(record.ids, control).sum() == 2
    assert record.ids.tolist() == server.ids(messages, template)


def test_rendered_text_by_hand() -> None:
    def text(template: str) -> str:
        marks = {"bos": "<s>", "eos": "</s>", None: ""}
        return "".join(
            marks[span.control] + span.text for span in chat.render(TURNS[:2], template, "S")
        )

    assert (
        text("llama-2") == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n山上有什么？ [/INST] 很多小船。</s>"
    )
    assert text("vicuna") == "<s>S USER: 山上有什么？ ASSISTANT: 很多小船。</s>"
    assert (
        text("alpaca") == "<s>S\n\n### Instruction:\n山上有什么？\n\n### Response:\n很多小船。</s>"
    )
    assert text("chatml") == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\n山上有什么？<|im_end|>\n"
        "<|im_start|>assistant\n很多小船。</s>"
    )


@pytest.mark.parametrize("roles", [[], ["assistant"], ["user", "user"], ["system"], ["user", "x"]])
def test_roles_must_alternate(roles: list[str], server: Server) -> None:
    messages = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(DataError, match="roles must be user, assistant"):
        chat.render(messages, "llama-2")
    if "user" in roles or "assistant" in roles:
        from jinja2 import TemplateError

        with pytest.raises(TemplateError, match="roles must be user, assistant"):
            server.ids(messages, "llama-2")


def test_answer_without_eos_is_refused() -> None:
    ids, loss = np.array([1, 5, 6, 2]), np.array([0, 0, 1, 0])
    with pytest.raises(DataError, match=r"ends in id \[6\], not in EOS \(2\)"):
        chat.require_eos(TokenSequence(ids, loss), eos_id=2)
    with pytest.raises(DataError, match="not in EOS"):
        chat.require_eos(TokenSequence(ids, np.zeros(4)), eos_id=2)


@pytest.mark.parametrize("template", TEMPLATES)
def test_cutting_takes_as_little_of_the_middle_as_possible(
    template: str, vocabulary: Vocabulary
) -> None:
    messages = [
        {"role": "user", "content": "前" + "山" * 200 + "后"},
        {"role": "assistant", "content": "小船。"},
    ]
    whole = encoded(messages, template, vocabulary)
    limit = len(whole.ids) - 20
    cut = chat.fit(messages, template, "", vocabulary, limit)
    assert cut is not None
    assert limit - 8 <= len(cut.ids) <= limit
    assert cut.ids[cut.loss == 1].tolist() == whole.ids[whole.loss == 1].tolist()
    prompt = vocabulary.decode(cut.ids[cut.loss == 0].tolist())
    assert "前山" in prompt and "山后" in prompt and "…" in prompt


def test_answer_that_fills_the_block_cannot_be_cut(vocabulary: Vocabulary) -> None:
    messages = [
        {"role": "user", "content": "山上"},
        {"role": "assistant", "content": "小船。" * 50},
    ]
    assert chat.fit(messages, "llama-2", "", vocabulary, 32) is None
