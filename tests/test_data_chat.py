"""Chat templates that are declared here: trained ids are served ids, and only answers train."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.data.chat import encode as chat
from altiplano.data.chat.templates import FORMS, Message
from altiplano.errors import DataError
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import merge_sentencepiece
from tests.helpers.tiny_vocabulary import train_tiny_addition, train_tiny_base

TEMPLATES = sorted(FORMS)
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
    messages: Sequence[Message],
    template: str,
    vocabulary: Vocabulary,
    system: str | None = "",
    loss_on: chat.LossOn = "all_answers",
) -> chat.Encoded:
    made = chat.make_template(template, system, vocabulary)
    return chat.encode_spans(made.spans(messages, loss_on), made.control_ids, vocabulary)


class Server:
    """What a server makes of messages: the stored template and the Hugging Face tokenizer."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._vocabulary = Vocabulary(directory)

    def ids(self, messages: Sequence[Message], template: str, system: str | None = "") -> list[int]:
        made = chat.make_template(template, system, self._vocabulary)
        return list(
            self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=made.jinja,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        )


@pytest.fixture(scope="module")
def server(tokenizer_dir: Path) -> Server:
    return Server(tokenizer_dir)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", ["", None, SYSTEM])
def test_prompt_ids_are_the_servers(
    template: str, system: str | None, vocabulary: Vocabulary, server: Server
) -> None:
    """For the first answer and for the second, whose prompt holds the first as history."""
    record = encoded(TURNS, template, vocabulary, system)
    starts = np.flatnonzero(np.diff(record.loss, prepend=0) == 1)
    assert len(starts) == 2
    for turn, start in enumerate(starts):
        prompt = server.ids(TURNS[: 2 * turn + 1], template, system)
        assert record.ids[:start].tolist() == prompt
        assert encoded(TURNS[: 2 * turn + 1], template, vocabulary, system).ids.tolist() == prompt
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


def trained_answers(record: chat.Encoded, vocabulary: Vocabulary) -> list[str]:
    """The text of every trained stretch, each checked to end in EOS."""
    loss = np.append(record.loss, 0)
    ends = np.flatnonzero((loss[:-1] == 1) & (loss[1:] == 0)) + 1
    starts = np.flatnonzero(np.diff(record.loss, prepend=0) == 1)
    assert (record.ids[ends - 1] == vocabulary.eos_id).all()
    spans = zip(starts, ends - 1, strict=True)
    return [vocabulary.decode(record.ids[a:b].tolist()).strip() for a, b in spans]


@pytest.mark.parametrize("template", TEMPLATES)
def test_loss_is_on_every_answer_and_its_eos_only(template: str, vocabulary: Vocabulary) -> None:
    record = encoded(TURNS, template, vocabulary, SYSTEM)
    assert trained_answers(record, vocabulary) == ["很多小船。", "苹果 (two)"]
    assert (record.ids == vocabulary.eos_id).sum() == 2
    chat.require_eos(record, vocabulary.eos_id)


@pytest.mark.parametrize("template", TEMPLATES)
def test_loss_on_the_last_answer_only(template: str, vocabulary: Vocabulary) -> None:
    """The ids stay those of a conversation whose answers are all trained."""
    last = encoded(TURNS, template, vocabulary, SYSTEM, "last_answer")
    assert trained_answers(last, vocabulary) == ["苹果 (two)"]
    assert last.ids.tolist() == encoded(TURNS, template, vocabulary, SYSTEM).ids.tolist()


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


def test_rendered_text_by_hand(vocabulary: Vocabulary) -> None:
    def text(template: str, system: str | None = "S") -> str:
        spans = chat.make_template(template, system, vocabulary).spans(TURNS[:2])
        return "".join(f"{{{span.text}}}" if span.trained else span.text for span in spans)

    assert (
        text("llama-2") == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n山上有什么？ [/INST]{ 很多小船。</s>}"
    )
    assert text("vicuna") == "<s>S USER: 山上有什么？ ASSISTANT:{ 很多小船。</s>}"
    assert (
        text("alpaca")
        == "<s>S\n\n### Instruction:\n山上有什么？\n\n### Response:\n{很多小船。</s>}"
    )
    assert text("chatml") == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\n山上有什么？<|im_end|>\n"
        "<|im_start|>assistant\n{很多小船。</s>}"
    )
    assert text("llama-2", None).startswith(
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n山"
    )
    assert text("alpaca", None).startswith(
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n山"
    )
    assert text("vicuna", None).startswith("<s>A chat between a curious user and an artificial")
    assert text("chatml", None).startswith("<s><|im_start|>user\n山")


@pytest.mark.parametrize("roles", [[], ["assistant"], ["user", "user"], ["system"], ["user", "x"]])
def test_roles_must_alternate(roles: list[str], server: Server, vocabulary: Vocabulary) -> None:
    messages = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(DataError, match="roles must be user, assistant"):
        encoded(messages, "llama-2", vocabulary)
    if "user" in roles or "assistant" in roles:
        from jinja2 import TemplateError

        with pytest.raises(TemplateError, match="roles must be user, assistant"):
            server.ids(messages, "llama-2")


def test_template_that_is_none(vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template 'llama': choose one of .*'model'"):
        chat.make_template("llama", None, vocabulary)
    with pytest.raises(DataError, match="brings no chat template: choose one of"):
        chat.make_template("model", None, vocabulary)


def test_template_can_be_sent_to_workers(vocabulary: Vocabulary) -> None:
    made = chat.make_template("vicuna", None, vocabulary)
    sent = pickle.loads(pickle.dumps(made))
    assert sent == made and sent.spans(TURNS) == made.spans(TURNS)


def test_answer_without_eos_is_refused() -> None:
    ids, loss = np.array([1, 5, 6, 2], np.int32), np.array([0, 0, 1, 0], np.uint8)
    with pytest.raises(DataError, match=r"ends in id \[6\], not in EOS \(2\)"):
        chat.require_eos(chat.Encoded(ids, loss), eos_id=2)
    with pytest.raises(DataError, match="not in EOS"):
        chat.require_eos(chat.Encoded(ids, np.zeros(4, np.uint8)), eos_id=2)


# ---------------------------------------------------------------- too long for a block


def fitted(
    messages: Sequence[Message],
    vocabulary: Vocabulary,
    sequence_length: int,
    *,
    template: str = "llama-2",
    system: str = "",
    overlong: chat.Overlong = "truncate_prompt",
    loss_on: chat.LossOn = "all_answers",
) -> list[chat.Encoded]:
    return chat.encode_record(
        messages,
        chat.make_template(template, system, vocabulary),
        vocabulary,
        sequence_length=sequence_length,
        overlong=overlong,
        loss_on=loss_on,
    )


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
    (cut,) = fitted(messages, vocabulary, limit, template=template)
    assert cut.fate == "truncated" and cut.kept
    assert limit - 8 <= len(cut.ids) <= limit
    assert cut.ids[cut.loss == 1].tolist() == whole.ids[whole.loss == 1].tolist()
    prompt = vocabulary.decode(cut.ids[cut.loss == 0].tolist())
    assert "前山" in prompt and "山后" in prompt and "…" in prompt


def test_cutting_takes_from_all_long_questions(vocabulary: Vocabulary) -> None:
    """Neither of two long questions could give way alone; the short one stays as it is."""
    messages = [
        {"role": role, "content": text}
        for question in ("山" * 100, "小船", "河" * 100)
        for role, text in (("user", question), ("assistant", "苹果。"))
    ]
    length = len(encoded(messages, "llama-2", vocabulary).ids)
    (cut,) = fitted(messages, vocabulary, length - 150)
    assert cut.fate == "truncated"
    assert trained_answers(cut, vocabulary) == ["苹果。"] * 3
    prompt = vocabulary.decode(cut.ids.tolist())
    assert prompt.count("…") == 2 and "[INST] 小船 [/INST]" in prompt


def test_answer_that_fills_the_block_is_dropped(vocabulary: Vocabulary) -> None:
    messages = [
        {"role": "user", "content": "山上"},
        {"role": "assistant", "content": "小船。" * 50},
    ]
    for overlong in ("truncate_prompt", "split"):
        (dropped,) = fitted(messages, vocabulary, 32, overlong=overlong)
        assert dropped.fate == "answer_too_long" and not dropped.kept
        assert len(dropped.ids) > 32


@pytest.mark.parametrize("overlong", ["fail", "drop"])
def test_record_that_is_not_made_to_fit(overlong: chat.Overlong, vocabulary: Vocabulary) -> None:
    length = len(encoded(TURNS, "llama-2", vocabulary).ids)
    (fits,) = fitted(TURNS, vocabulary, length, overlong=overlong)
    assert fits.fate == "whole" and fits.kept
    (dropped,) = fitted(TURNS, vocabulary, length - 1, overlong=overlong)
    assert dropped.fate == "too_long" and not dropped.kept
    assert len(dropped.ids) == length


def test_split_repeats_the_system_message(vocabulary: Vocabulary) -> None:
    messages = [{"role": "system", "content": SYSTEM}, *TURNS * 2]
    two = [messages[0], *TURNS[:2]]
    limit = len(encoded(TURNS, "vicuna", vocabulary, SYSTEM).ids)
    parts = fitted(messages, vocabulary, limit, template="vicuna", overlong="split")
    assert [part.fate for part in parts] == ["split", "split"]
    half = encoded([messages[0], *TURNS], "vicuna", vocabulary).ids.tolist()
    assert [part.ids.tolist() for part in parts] == [half, half]
    parts = fitted(
        messages,
        vocabulary,
        len(encoded(two, "vicuna", vocabulary).ids) + 1,
        template="vicuna",
        overlong="split",
    )
    assert parts[0].ids.tolist() == encoded(two, "vicuna", vocabulary).ids.tolist()


def test_split_for_the_last_answer_keeps_the_last_turns(vocabulary: Vocabulary) -> None:
    limit = len(encoded(TURNS, "alpaca", vocabulary).ids)
    (part,) = fitted(
        TURNS * 3, vocabulary, limit, template="alpaca", overlong="split", loss_on="last_answer"
    )
    expected = encoded(TURNS, "alpaca", vocabulary, "", "last_answer")
    assert part.fate == "split"
    assert part.ids.tolist() == expected.ids.tolist()
    assert part.loss.tolist() == expected.loss.tolist()


words = st.lists(st.sampled_from(["山上", "小船", "market ", "。", "🙂"]), min_size=1, max_size=25)
turn = st.tuples(words.map("".join), words.map("".join))


@settings(max_examples=60)
@given(
    turns=st.lists(turn, min_size=1, max_size=5),
    system=st.sampled_from(["", SYSTEM]),
    template=st.sampled_from(TEMPLATES),
    sequence_length=st.integers(16, 160),
    overlong=st.sampled_from(["drop", "truncate_prompt", "split"]),
    loss_on=st.sampled_from(["all_answers", "last_answer"]),
)
def test_every_answer_is_whole_or_dropped(
    turns: list[tuple[str, str]],
    system: str,
    template: str,
    sequence_length: int,
    overlong: chat.Overlong,
    loss_on: chat.LossOn,
    vocabulary: Vocabulary,
) -> None:
    """Kept and dropped answers are all answers, in order; each ends in EOS; every part fits."""
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    parts = fitted(
        messages,
        vocabulary,
        sequence_length,
        template=template,
        system=system,
        overlong=overlong,
        loss_on=loss_on,
    )
    expected = [answer.strip() for _, answer in turns]
    if loss_on == "last_answer":
        expected = expected[-1:]
    assert [said for part in parts for said in trained_answers(part, vocabulary)] == expected
    for part in parts:
        assert len(part.ids) == len(part.loss)
        assert part.kept == (len(part.ids) <= sequence_length)
    if overlong == "split":
        made = chat.make_template(template, system, vocabulary)
        for part in parts:
            if not part.kept:  # The answer alone: even an empty question leaves it no room.
                bare = [
                    {"role": "user", "content": "…"},
                    {"role": "assistant", "content": trained_answers(part, vocabulary)[0]},
                ]
                spans = made.spans(bare)
                ids = chat.encode_spans(spans, made.control_ids, vocabulary).ids
                assert len(ids) > sequence_length
