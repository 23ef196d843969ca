"""Conversations as tokens: the template chosen, the loss on the answers, the whole made to fit.

The ids that are trained on are the ids a server gives for the same conversation. An answer is
never cut and never loses its EOS. Deliberately knows nothing of files or blocks. Costs two
encodings of each prompt; a record that is too long is encoded about log2(its characters) times.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from altiplano.data.chat.base_template import ModelTemplate
from altiplano.data.chat.templates import (
    FORMS,
    ChatTemplate,
    FormTemplate,
    LossOn,
    Message,
    Span,
    split_system,
)
from altiplano.errors import DataError

if TYPE_CHECKING:
    from altiplano.vocabulary.load import Vocabulary

Overlong = Literal["fail", "drop", "truncate_prompt", "split"]
Fate = Literal["whole", "truncated", "split", "too_long", "answer_too_long"]
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class Encoded:
    """Tokens of a conversation or of a part of it, and what became of it."""

    ids: npt.NDArray[np.int32]
    loss: npt.NDArray[np.uint8]
    """1 where the token is a training target; as long as `ids`."""
    fate: Fate = "whole"

    @property
    def kept(self) -> bool:
        """Whether it fits; if not, `ids` is what did not fit, for messages, and not trained on."""
        return self.fate not in ("too_long", "answer_too_long")


def make_template(name: str, system_prompt: str | None, vocabulary: "Vocabulary") -> ChatTemplate:
    """A chat template for a vocabulary; it can be sent to workers.

    Args:
        name: key of `FORMS`, or `model` for the one in the vocabulary's directory.
        system_prompt: system message of conversations that bring none; the template's usual one
            by default (a `model` template decides itself), empty for none.
        vocabulary: its special tokens are the template's.

    Raises:
        DataError: no such template, no EOS, or a `model` template that cannot be trained on.
    """
    names = {
        role: vocabulary.piece(id_)
        for role, id_ in (
            ("bos_token", vocabulary.bos_id),
            ("eos_token", vocabulary.eos_id),
            ("unk_token", vocabulary.unk_id),
            ("pad_token", vocabulary.pad_id),
        )
        if id_ >= 0
    }
    if "eos_token" not in names:
        raise DataError(
            f"the tokenizer {vocabulary.source} has no EOS: a model could not learn to stop; name "
            f"`eos_token` in its tokenizer_config.json"
        )
    pieces = {*vocabulary.control_pieces, *names.values()}
    ids = (id_ for id_ in range(vocabulary.size) if vocabulary.piece(id_) in pieces)
    control_ids = {vocabulary.piece(id_): id_ for id_ in ids}
    bos, eos = names.get("bos_token", ""), names["eos_token"]
    if name != "model":
        if name not in FORMS:
            raise DataError(f"no chat template {name!r}: choose one of {[*FORMS, 'model']}")
        usual = FORMS[name].system_prompt
        prompt = usual if system_prompt is None else system_prompt
        return FormTemplate(control_ids, bos, eos, prompt, FORMS[name])
    if vocabulary.chat_template is None:
        raise DataError(
            f"`data.template: model`, but the tokenizer {vocabulary.source} brings no chat "
            f"template: choose one of {[*FORMS]}"
        )
    template = ModelTemplate(
        control_ids, bos, eos, system_prompt or "", vocabulary.chat_template, names
    )
    template.spans(_PROBE)
    return template


def encode_record(
    messages: Sequence[Message],
    template: ChatTemplate,
    vocabulary: "Vocabulary",
    *,
    sequence_length: int,
    overlong: Overlong,
    loss_on: LossOn,
) -> list[Encoded]:
    """Tokens of a conversation that ends in an answer; several parts where it is split.

    Args:
        messages: [system,] user, assistant, ...
        template: made for this vocabulary.
        vocabulary: encodes.
        sequence_length: most tokens of a part.
        overlong: what is done to a conversation with more. `truncate_prompt` cuts the middle of the
            longest user messages, as little as possible. `split` starts a new part, system message
            first, before a turn that does not fit any more, then cuts; where only the last answer
            is trained, it keeps as many of the last turns as fit.
        loss_on: which answers are trained.

    Returns:
        Parts in order. With `fail` and `drop` one of fate `too_long`; an answer that leaves no
        room for any prompt is `answer_too_long`.

    Raises:
        DataError: the roles do not alternate, or the template loses an answer's EOS.
    """

    def encode(part: Sequence[Message]) -> Encoded:
        encoded = encode_spans(template.spans(part, loss_on), template.control_ids, vocabulary)
        require_eos(encoded, template.control_ids[template.eos])
        return encoded

    assert messages[-1]["role"] == "assistant", "records end in an answer"
    whole = encode(messages)
    if len(whole.ids) <= sequence_length:
        return [whole]
    if overlong in ("fail", "drop"):
        return [replace(whole, fate="too_long")]
    if overlong == "truncate_prompt":
        return [_cut(messages, encode, sequence_length)]
    if loss_on == "last_answer":
        return [_last_turns(messages, encode, sequence_length)]
    return _split(messages, encode, sequence_length)


def encode_spans(
    spans: Sequence[Span], control_ids: Mapping[str, int], vocabulary: "Vocabulary"
) -> Encoded:
    """Tokens of a rendered conversation, with the loss on exactly the trained spans.

    The text between two special tokens is encoded as one, as a server does when the conversation
    comes back as history. Should a merge reach across the prompt's end, the prompt keeps the ids
    it has without an answer, because those are what the model is asked to continue.
    """
    ids: list[int] = []
    loss: list[int] = []
    prompt = ""
    for trained, group in groupby(spans, key=lambda span: span.trained):
        joined = "".join(span.text for span in group)
        for text in filter(None, _control_pattern(tuple(control_ids)).split(joined)):
            if text in control_ids:
                piece_ids, prompt = [control_ids[text]], ""
            elif trained:
                piece_ids = _continue(prompt, text, vocabulary)
            else:
                piece_ids, prompt = vocabulary.encode(text), text
            ids += piece_ids
            loss += [int(trained)] * len(piece_ids)
    return Encoded(np.array(ids, np.int32), np.array(loss, np.uint8))


def require_eos(encoded: Encoded, eos_id: int) -> None:
    """Check that every trained answer ends in EOS: without it a model never learns to stop.

    Raises:
        DataError: one does not.
    """
    loss = np.append(encoded.loss, 0)
    ends = encoded.ids[(loss[:-1] == 1) & (loss[1:] == 0)]
    if len(ends) == 0 or (ends != eos_id).any():
        raise DataError(
            f"a trained answer ends in id {ends.tolist()}, not in EOS ({eos_id}): "
            f"the chat template and the tokenizer do not belong together"
        )


@lru_cache(maxsize=8)
def _control_pattern(pieces: tuple[str, ...]) -> re.Pattern[str]:
    """Splits a text before and after every special token in it, the longest first."""
    longest_first = sorted(pieces, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _continue(prompt: str, answer: str, vocabulary: "Vocabulary") -> list[int]:
    """Ids of an answer after its prompt."""
    before = vocabulary.encode(prompt)
    whole = vocabulary.encode(prompt + answer)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # SentencePiece puts a space before every text itself.
    alone = answer.lstrip() if vocabulary.family == "sentencepiece" else answer
    return vocabulary.encode(alone)


_Encode = Callable[[Sequence[Message]], Encoded]


def _cut(messages: Sequence[Message], encode: _Encode, sequence_length: int) -> Encoded:
    """The conversation with its longest user messages shortened; questions stand at their ends."""

    def shortened(characters: int) -> Encoded:
        return encode(
            [
                message | {"content": _without_middle(message["content"], characters)}
                if message["role"] == "user"
                else message
                for message in messages
            ]
        )

    longest = max(len(m["content"]) for m in messages if m["role"] == "user")
    found = _largest(longest - 1, shortened, sequence_length)
    if found is None:
        return replace(encode(messages), fate="answer_too_long")
    return replace(found[1], fate="truncated")


def _last_turns(messages: Sequence[Message], encode: _Encode, sequence_length: int) -> Encoded:
    """As many of the last turns as fit."""
    system, spoken = _parts(messages)

    def last(more: int) -> Encoded:
        return encode([*system, *spoken[-2 * (more + 1) :]])

    found = _largest(len(spoken) // 2 - 1, last, sequence_length)
    if found is None:
        return _cut([*system, *spoken[-2:]], encode, sequence_length)
    return replace(found[1], fate="split")


def _split(messages: Sequence[Message], encode: _Encode, sequence_length: int) -> list[Encoded]:
    """The conversation in parts of as many turns as fit."""
    system, spoken = _parts(messages)

    def first(more: int) -> Encoded:
        return encode([*system, *spoken[: 2 * (more + 1)]])

    parts = []
    while spoken:
        found = _largest(len(spoken) // 2 - 1, first, sequence_length)
        if found is None:
            more, part = 0, _cut([*system, *spoken[:2]], encode, sequence_length)
        else:
            more, part = found[0], replace(found[1], fate="split")
        parts.append(part)
        spoken = spoken[2 * (more + 1) :]
    return parts


def _parts(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system message, if any, and the rest: a question and an answer per turn."""
    spoken = split_system(messages)[1]
    return list(messages[: len(messages) - len(spoken)]), spoken


def _largest(
    limit: int, encode: Callable[[int], Encoded], sequence_length: int
) -> tuple[int, Encoded] | None:
    """The largest of 0 ... limit whose encoding fits, and that encoding; None where none does."""
    best = None
    low, high = 0, limit
    while low <= high:
        middle = (low + high) // 2
        encoded = encode(middle)
        if len(encoded.ids) <= sequence_length:
            best, low = (middle, encoded), middle + 1
        else:
            high = middle - 1
    return best


def _without_middle(text: str, characters: int) -> str:
    """A text of which so many characters are kept, half of them at each end."""
    if len(text) <= characters:
        return text
    return text[: (characters + 1) // 2] + "…" + text[len(text) - characters // 2 :]
