"""Chat templates: a conversation as text with the trained parts marked, and as tokens.

Each template is declared once; from that come the spans that are trained on and the Jinja source
that is stored with the model, so the ids a model was trained on are the ids a server gives it.
Deliberately knows nothing of files or blocks. Costs two encodings of each prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from altiplano.data.pack import TokenSequence
from altiplano.errors import DataError

if TYPE_CHECKING:
    from altiplano.vocabulary.load import Vocabulary

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

CONTROL_PIECES = ("<s>", "</s>", "<unk>")
"""LLaMA's own; a space replaces them in what people write, or they would act as control ids."""
_FIRST, _THIS = "messages[0]['content']", "message['content']"


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered conversation."""

    text: str
    trained: bool
    """Whether its tokens are training targets."""
    control: Literal["bos", "eos"] | None = None
    """Stands for this control id; then `text` is empty."""


@dataclass(frozen=True)
class Template:
    """Texts around the contents; a pair stands before and after its content.

    A turn is `start`, in the first turn the system message, the user's message, the answer, EOS.
    """

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    before_answer: str
    """Belongs to the answer, not to the prompt: a space must be encoded with the word after it."""
    bos_every_turn: bool


TEMPLATES = {
    "llama-2": Template(
        start="[INST] ",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("", " [/INST]"),
        before_answer=" ",
        bos_every_turn=True,
    ),
    "alpaca": Template(
        start="",
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n### Response:\n"),
        before_answer="",
        bos_every_turn=False,
    ),
    "vicuna": Template(
        start="",
        system=("", " "),
        user=("USER: ", " ASSISTANT:"),
        before_answer=" ",
        bos_every_turn=False,
    ),
    # The markers are plain text to a Llama; EOS takes the place of an answer's `<|im_end|>`.
    "chatml": Template(
        start="",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        before_answer="",
        bos_every_turn=False,
    ),
}


def render(
    messages: Sequence[Message],
    template: str,
    system_prompt: str = "",
    control_pieces: Sequence[str] = CONTROL_PIECES,
) -> list[Span]:
    """A conversation as spans; a missing last answer leaves the prompt a server would build.

    Args:
        messages: [system,] user, assistant, user, ...
        template: key of `TEMPLATES`.
        system_prompt: system message where `messages` brings none; empty for none.
        control_pieces: replaced by a space in every content.

    Raises:
        DataError: the roles do not alternate.
    """
    form = TEMPLATES[template]
    clean = [(message["role"], _clean(message["content"], control_pieces)) for message in messages]
    system = _clean(system_prompt, control_pieces)
    if clean and clean[0][0] == "system":
        system = clean.pop(0)[1]
    expected = ["user", "assistant"] * (len(clean) // 2 + 1)
    roles = [role for role, _ in clean]
    if not roles or roles != expected[: len(roles)]:
        raise DataError(
            f"roles must be user, assistant, user, ... after at most one system message, "
            f"got {[message['role'] for message in messages]}"
        )
    spans = []
    for index, (role, content) in enumerate(clean):
        if role == "assistant":
            spans.append(Span(form.before_answer + content, True))
            spans.append(Span("", True, "eos"))
            continue
        if index == 0 or form.bos_every_turn:
            spans.append(Span("", False, "bos"))
        head = form.system[0] + system + form.system[1] if system and index == 0 else ""
        spans.append(Span(form.start + head + form.user[0] + content + form.user[1], False))
    return spans


def jinja_template(
    template: str, system_prompt: str = "", control_pieces: Sequence[str] = CONTROL_PIECES
) -> str:
    """The same template as Jinja, as `chat_template` in a tokenizer's config expects it."""
    form = TEMPLATES[template]

    def clean(variable: str) -> str:
        replaced = "".join(f"|replace({piece!r}, ' ')" for piece in control_pieces)
        return f"({variable}{replaced}|trim)"

    system = f"({form.system[0]!r} + system + {form.system[1]!r} if system and loop.first else '')"
    bos = "bos_token" if form.bos_every_turn else "(bos_token if loop.first else '')"
    user = (
        f"{{{{ {bos} + {form.start!r} + {system} + {form.user[0]!r} + content"
        f" + {form.user[1]!r} }}}}"
    )
    return (
        f"{{% set system = {clean(repr(system_prompt))} %}}"
        "{% if messages and messages[0]['role'] == 'system' %}"
        f"{{% set system = {clean(_FIRST)} %}}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{ raise_exception('roles must be user, assistant, user, ... after at most one"
        " system message') }}{% endif %}"
        f"{{% set content = {clean(_THIS)} %}}"
        f"{{% if message['role'] == 'user' %}}{user}"
        f"{{% else %}}{{{{ {form.before_answer!r} + content + eos_token }}}}{{% endif %}}"
        "{% endfor %}"
    )


def encode_spans(spans: Sequence[Span], vocabulary: "Vocabulary") -> TokenSequence:
    """Tokens of a conversation, with the loss on exactly the trained spans.

    The text between two control ids is encoded as one, as a server does when the conversation
    comes back as history. Should a merge reach across the prompt's end, the prompt keeps the ids
    it has without an answer, because those are what the model is asked to continue.

    Raises:
        DataError: the vocabulary has no BOS or EOS, or an answer would not end in EOS.
    """
    control = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id}
    ids: list[int] = []
    loss: list[int] = []
    prompt = ""
    for span in spans:
        if span.control is not None:
            piece_ids, prompt = [control[span.control]], ""
        elif span.trained:
            before = vocabulary.encode(prompt)
            whole = vocabulary.encode(prompt + span.text)
            joins = whole[: len(before)] == before
            piece_ids = whole[len(before) :] if joins else vocabulary.encode(span.text.lstrip())
        else:
            prompt = span.text
            piece_ids = vocabulary.encode(prompt)
        ids += piece_ids
        loss += [int(span.trained)] * len(piece_ids)
    return TokenSequence(np.array(ids, np.int32), np.array(loss, np.uint8))


def require_eos(record: TokenSequence, eos_id: int) -> None:
    """Check that every trained answer ends in EOS: without it a model never learns to stop.

    Raises:
        DataError: one does not.
    """
    loss = np.append(record.loss, 0)
    ends = record.ids[(loss[:-1] == 1) & (loss[1:] == 0)]
    if len(ends) == 0 or (ends != eos_id).any():
        raise DataError(
            f"a trained answer ends in id {ends.tolist()}, not in EOS ({eos_id}): "
            f"the chat template and the tokenizer do not belong together"
        )


def fit(
    messages: Sequence[Message],
    template: str,
    system_prompt: str,
    vocabulary: "Vocabulary",
    sequence_length: int,
) -> TokenSequence | None:
    """Tokens of a conversation cut to fit a block, or None when the answers leave no room.

    The middle of the longest user message gives way, as little of it as possible: questions stand
    at a message's start or end.
    """

    def encode(kept: int) -> TokenSequence:
        half = (kept + 1) // 2
        cut = longest[:half] + "…" + longest[len(longest) - kept // 2 :]
        shorter = [*messages]
        shorter[at] = {"role": "user", "content": cut}
        spans = render(shorter, template, system_prompt, vocabulary.control_pieces)
        return encode_spans(spans, vocabulary)

    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    at = max(users, key=lambda i: len(messages[i]["content"]))
    longest = messages[at]["content"]
    best = None
    low, high = 0, len(longest) - 1
    while low <= high:
        kept = (low + high) // 2
        record = encode(kept)
        if len(record.ids) <= sequence_length:
            best, low = record, kept + 1
        else:
            high = kept - 1
    return best


def _clean(content: str, control_pieces: Sequence[str]) -> str:
    for piece in control_pieces:
        content = content.replace(piece, " ")
    return content.strip()
