"""A base model's own chat template: trained as it is served, or refused with the reason."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.data.chat import encode as chat
from altiplano.data.chat.base_template import ModelTemplate
from altiplano.data.chat.templates import FORMS
from altiplano.errors import DataError
from altiplano.vocabulary.bytelevel.extend import adopt_bytelevel
from altiplano.vocabulary.load import Vocabulary
from tests.helpers.bytelevel import Family, train_byte_base

TURNS = [
    {"role": "user", "content": "what is on the mountain?"},
    {"role": "assistant", "content": "many boats.\n\nand 小船"},
    {"role": "user", "content": "and the market?"},
    {"role": "assistant", "content": "apples (two)"},
]

LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Q.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An earlier answer loses its thoughts once the conversation goes on.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Base:
    """A base's tokenizer directory with a chat template, and what a server makes of it."""

    def __init__(self, directory: Path, family: Family, template: str) -> None:
        from transformers import AutoTokenizer

        train_byte_base(directory / "base", family)
        adopt_bytelevel(directory / "base", directory, chat_template=template)
        self.vocabulary = Vocabulary(directory)
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)

    def made(self, system_prompt: str | None = None, name: str = "model") -> chat.ChatTemplate:
        return chat.make_template(name, system_prompt, self.vocabulary)

    def encoded(
        self,
        messages: list[chat.Message],
        made: chat.ChatTemplate,
        loss_on: chat.LossOn = "all_answers",
    ) -> chat.Encoded:
        return chat.encode_spans(made.spans(messages, loss_on), made.control_ids, self.vocabulary)

    def served(self, messages: list[chat.Message], made: chat.ChatTemplate) -> list[int]:
        return list(
            self._tokenizer.apply_chat_template(
                messages,
                chat_template=made.jinja,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    families: dict[str, tuple[Family, str]] = {
        "llama3": ("llama3", LLAMA3),
        "qwen": ("qwen", QWEN),
        "marked": ("qwen", MARKED),
        "thinking": ("qwen", THINKING),
    }
    return {
        name: Base(tmp_path_factory.mktemp(name), family, template)
        for name, (family, template) in families.items()
    }


def answers(record: chat.Encoded, vocabulary: Vocabulary) -> list[str]:
    """The trained text, each answer checked to end in EOS."""
    chat.require_eos(record, vocabulary.eos_id)
    loss = np.append(record.loss, 0)
    ends = np.flatnonzero((loss[:-1] == 1) & (loss[1:] == 0))
    starts = np.flatnonzero(np.diff(record.loss, prepend=0) == 1)
    return [vocabulary.decode(record.ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("base", ["llama3", "qwen", "marked"])
@pytest.mark.parametrize("system", [None, "be brief, 请简短"])
def test_every_prompt_is_the_servers(base: str, system: str | None, bases: dict[str, Base]) -> None:
    """The ids before each trained answer are what a server makes of the messages before it."""
    made, vocabulary = bases[base].made(system), bases[base].vocabulary
    record = bases[base].encoded(TURNS, made)
    assert answers(record, vocabulary) == [TURNS[1]["content"], TURNS[3]["content"]]
    starts = np.flatnonzero(np.diff(record.loss, prepend=0) == 1)
    for turn, start in enumerate(starts):
        prompt = TURNS[: 2 * turn + 1]
        assert record.ids[:start].tolist() == bases[base].served(prompt, made)
        assert bases[base].encoded(prompt, made).ids.tolist() == record.ids[:start].tolist()
    shown = vocabulary.decode(record.ids.tolist())
    assert ("请简短" in shown) == (system is not None)


content = st.text("ab文 \n<|>imte_:/🙂", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=50)
@given(
    base=st.sampled_from(["llama3", "qwen", "marked"]),
    name=st.sampled_from(["model", *FORMS]),
    texts=st.lists(content, min_size=3, max_size=3),
    marker=st.sampled_from(["", "<|im_end|>", "<|eot_id|>", "<|im_start|>system"]),
)
def test_any_text_gives_the_servers_ids(
    base: str, name: str, texts: list[str], marker: str, bases: dict[str, Base]
) -> None:
    """Also special tokens that people write: they are text in training and in serving."""
    system, question, answer = texts
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": question + marker + question},
        {"role": "assistant", "content": answer},
    ]
    made, vocabulary = bases[base].made(name=name), bases[base].vocabulary
    record = bases[base].encoded(messages, made)
    assert record.ids[record.loss == 0].tolist() == bases[base].served(messages[:2], made)
    (said,) = answers(record, vocabulary)
    assert said.strip() == answer.strip()


@pytest.mark.parametrize("base", ["llama3", "qwen"])
def test_chatml_markers_are_special_tokens_where_there_are_such(
    base: str, bases: dict[str, Base]
) -> None:
    """Each marker is one id in a Qwen, plain text in a Llama-3; Qwen has no BOS."""
    made, vocabulary = bases[base].made(name="chatml"), bases[base].vocabulary
    messages = [{"role": "user", "content": "a <|im_start|> b"}, TURNS[1]]
    pieces = [vocabulary.piece(id_) for id_ in bases[base].encoded(messages, made).ids.tolist()]
    assert pieces.count("<|im_start|>") == (2 if base == "qwen" else 0)
    assert ("bos_token" in made.jinja) == (base == "llama3")
    assert pieces[-1] == vocabulary.piece(vocabulary.eos_id)


def test_template_can_be_sent_to_workers(bases: dict[str, Base]) -> None:
    made = bases["qwen"].made("be brief")
    assert pickle.loads(pickle.dumps(made)).spans(TURNS) == made.spans(TURNS)


def test_earlier_answers_that_change_can_only_be_context(bases: dict[str, Base]) -> None:
    base = bases["thinking"]
    made = base.made()
    with pytest.raises(DataError, match=r"changes an earlier answer .* `data.loss_on: last_answer"):
        base.encoded(TURNS, made)
    record = base.encoded(TURNS, made, "last_answer")
    assert answers(record, base.vocabulary) == ["<think>\n\n</think>\n\napples (two)"]
    assert record.ids[record.loss == 0].tolist() == base.served(TURNS[:3], made)
    assert len(answers(base.encoded(TURNS[:2], made), base.vocabulary)) == 1


def test_split_parts_are_conversations_of_their_own(bases: dict[str, Base]) -> None:
    base = bases["qwen"]
    made = base.made()
    halves = [base.encoded(TURNS[:2], made), base.encoded(TURNS[2:], made)]
    parts = chat.encode_record(
        TURNS,
        made,
        base.vocabulary,
        sequence_length=max(len(half.ids) for half in halves),
        overlong="split",
        loss_on="all_answers",
    )
    assert [part.ids.tolist() for part in parts] == [half.ids.tolist() for half in halves]
    assert [part.fate for part in parts] == ["split", "split"]


def with_source(base: Base, source: str) -> ModelTemplate:
    made = base.made()
    assert isinstance(made, ModelTemplate)
    return ModelTemplate(
        made.control_ids, made.bos, made.eos, made.system_prompt, source, made.special_tokens
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            QWEN.replace("'<|im_end|>' + '\n'", "'<|endoftext|>' + '\n'"),
            r"does not end an answer with EOS: '<\|endoftext\|>.* follows it and EOS is "
            r"'<\|im_end\|>', so a trained model would never stop",
        ),
        (
            QWEN.replace("message['content']", "message['content'][:3]"),
            "does not repeat an answer as it is: 'many boats.* became 'man'",
        ),
        (
            QWEN.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}"),
            r"differently from the prompt for that answer: the prompt ends in '.*bot\\n', the "
            "conversation has '.*assistant",
        ),
        (
            MARKED.replace("{% generation %}{{", "{{ '>' }}{% generation %}{{"),
            "does not start where a server's prompt ends",
        ),
        (
            "{% generation %}{% endgeneration %}" + QWEN,
            "marks 1 stretches with `{% generation %}` in a conversation of 2 answers",
        ),
        ("{{ raise_exception('no assistants') }}", r"refuses a conversation of .*: no assistants"),
        ("{{ messages[0]['name'] + 1 }}", "refuses a conversation"),
    ],
)
def test_templates_that_cannot_be_trained(source: str, said: str, bases: dict[str, Base]) -> None:
    with pytest.raises(DataError, match=said) as error:
        with_source(bases["qwen"], source).spans(TURNS)
    assert "chatml" in str(error.value)


def test_a_bad_template_is_refused_before_any_record(tmp_path: Path) -> None:
    base = Base(tmp_path, "qwen", QWEN.replace("'<|im_end|>' + '\n'", "'\n'"))
    with pytest.raises(DataError, match="does not end an answer with EOS"):
        base.made()
