"""Chat templates that Altiplano brings: each declared once, as spans to train on and as Jinja.

Both come from one declaration, so the text a model was trained on is the text a server gives it.
Deliberately knows no files and no tokens but the special ones' names. Costs string work.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from altiplano.errors import DataError

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""
LossOn = Literal["all_answers", "last_answer"]


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered conversation."""

    text: str
    """Special tokens stand in it by name (`</s>`); what people wrote holds none."""
    trained: bool
    """Whether its tokens are training targets."""


@dataclass(frozen=True)
class ChatTemplate(ABC):
    """How a conversation becomes text, for training (`spans`) and for a server (`jinja`)."""

    control_ids: Mapping[str, int]
    """Special tokens by name. A space replaces them in what people write, or they would act."""
    bos: str
    """Name of BOS; empty where the tokenizer has none."""
    eos: str
    """Name of the token that ends an answer."""
    system_prompt: str
    """System message of conversations that bring none; empty for none."""

    @property
    @abstractmethod
    def jinja(self) -> str:
        """Jinja source, as `chat_template` in a tokenizer's directory expects it."""

    @abstractmethod
    def spans(self, messages: Sequence[Message], loss_on: LossOn = "all_answers") -> list[Span]:
        """A conversation as spans; each trained one is an answer that ends in `eos`.

        Args:
            messages: [system,] user, assistant, user, ...; without a last answer the spans are
                the prompt that a server would build.
            loss_on: which answers are trained.

        Raises:
            DataError: the roles do not alternate.
        """

    def clean(self, content: str) -> str:
        """What people wrote as it stands in a rendered conversation."""
        for piece in self.control_ids:
            content = content.replace(piece, " ")
        return content.strip()

    def clean_macro(self) -> str:
        """`clean` as a Jinja macro of the name `altiplano_clean`."""
        # A Llama-3 has 256 special tokens: most texts have none of their first characters.
        firsts = sorted({piece[0] for piece in self.control_ids})
        suspicious = " or ".join(f"{first!r} in text" for first in firsts)
        return (
            "{% macro altiplano_clean(text) %}{% set cleaned = namespace(text=text) %}"
            f"{{% if {suspicious} %}}{{% for piece in {list(self.control_ids)!r} %}}"
            "{% set cleaned.text = cleaned.text|replace(piece, ' ') %}{% endfor %}{% endif %}"
            "{{ cleaned.text|trim }}{% endmacro %}"
        )


@dataclass(frozen=True)
class Form:
    """Texts around the contents; a pair stands before and after its content.

    A turn is `start`, in the first turn the system message, the user's message, the answer, EOS.
    """

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    before_answer: str
    """Belongs to the answer, not to the prompt: a space must be encoded with the word after it."""
    bos_every_turn: bool
    system_prompt: str
    """The usual one."""


FORMS = {
    # System prompt: Chinese-LLaMA-Alpaca-2.
    "llama-2": Form(
        start="[INST] ",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("", " [/INST]"),
        before_answer=" ",
        bos_every_turn=True,
        system_prompt="You are a helpful assistant. 你是一个乐于助人的助手。",
    ),
    # System prompt: Stanford Alpaca, for instructions without input.
    "alpaca": Form(
        start="",
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n### Response:\n"),
        before_answer="",
        bos_every_turn=False,
        system_prompt=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
    ),
    # System prompt: Vicuna v1.1.
    "vicuna": Form(
        start="",
        system=("", " "),
        user=("USER: ", " ASSISTANT:"),
        before_answer=" ",
        bos_every_turn=False,
        system_prompt=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    # The markers are special tokens where the vocabulary has them (Qwen), else plain text. EOS
    # takes the place of an answer's `<|im_end|>`.
    "chatml": Form(
        start="",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        before_answer="",
        bos_every_turn=False,
        system_prompt="",
    ),
}


@dataclass(frozen=True)
class FormTemplate(ChatTemplate):
    """A template declared as a `Form`."""

    form: Form

    def spans(self, messages: Sequence[Message], loss_on: LossOn = "all_answers") -> list[Span]:
        given, turns = split_system(messages)
        system = self.clean(self.system_prompt if given is None else given)
        form, spans = self.form, []
        for index, message in enumerate(turns):
            content = self.clean(message["content"])
            if message["role"] == "assistant":
                trained = loss_on == "all_answers" or index == len(turns) - 1
                spans.append(Span(form.before_answer + content + self.eos, trained))
                continue
            bos = self.bos if index == 0 or form.bos_every_turn else ""
            head = form.system[0] + system + form.system[1] if system and index == 0 else ""
            text = bos + form.start + head + form.user[0] + content + form.user[1]
            spans.append(Span(text, False))
        return spans

    @property
    def jinja(self) -> str:
        form = self.form
        bos = "bos_token" if form.bos_every_turn else "(bos_token if loop.first else '')"
        before, after = form.system
        user = " + ".join(
            (
                *([bos] if self.bos else []),
                repr(form.start),
                f"({before!r} + system + {after!r} if system and loop.first else '')",
                f"{form.user[0]!r} + content + {form.user[1]!r}",
            )
        )
        return (
            f"{self.clean_macro()}"
            f"{{% set system = altiplano_clean({self.system_prompt!r}) %}}"
            "{% if messages and messages[0]['role'] == 'system' %}"
            "{% set system = altiplano_clean(messages[0]['content']) %}"
            "{% set messages = messages[1:] %}{% endif %}"
            "{% for message in messages %}"
            "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
            "{{ raise_exception('roles must be user, assistant, user, ... after at most one"
            " system message') }}{% endif %}"
            "{% set content = altiplano_clean(message['content']) %}"
            f"{{% if message['role'] == 'user' %}}{{{{ {user} }}}}"
            f"{{% else %}}{{{{ {form.before_answer!r} + content + eos_token }}}}{{% endif %}}"
            "{% endfor %}"
        )


def split_system(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """The system message, where there is one, and the turns.

    Raises:
        DataError: the turns do not alternate between user and assistant.
    """
    turns, system = list(messages), None
    if turns and turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    roles = [message["role"] for message in turns]
    expected = ["user", "assistant"] * (len(roles) // 2 + 1)
    if not roles or roles != expected[: len(roles)]:
        raise DataError(
            f"roles must be user, assistant, user, ... after at most one system message, "
            f"got {[message['role'] for message in messages]}"
        )
    return system, turns
