"""The chat template that a base model brings: where its answers are, and whether it can be trained.

The trained spans are found in what the template itself renders, with the environment that serves
it, never from token counts. A template that a server would not repeat, or that never ends an
answer with EOS, is refused. Costs three renderings per answer, about
0.4 ms each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from altiplano.data.chat.templates import ChatTemplate, LossOn, Message, Span, split_system
from altiplano.errors import DataError

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")
_OTHERWISE = "choose another `data.template`, for instance chatml"


@dataclass(frozen=True)
class ModelTemplate(ChatTemplate):
    """A Jinja template from elsewhere, given cleaned messages and, if set, a system message."""

    source: str
    """As the base model ships it."""
    special_tokens: Mapping[str, str]
    """The variables `bos_token`, `eos_token`, ... that a server gives it."""

    @property
    def jinja(self) -> str:
        """The template with cleaned contents and the default system prompt before it."""
        # Contents that are no text (images, tool calls) pass as they are.
        system = f"{{'role': 'system', 'content': {self.system_prompt!r}}}"
        missing = "not messages or messages[0]['role'] != 'system'"
        return (
            f"{self.clean_macro()}{{% set altiplano = namespace(messages=[]) %}}"
            + (
                f"{{% if {missing} %}}{{% set messages = [{system}] + messages %}}{{% endif %}}"
                if self.system_prompt
                else ""
            )
            + "{% for message in messages %}{% if message['content'] is string %}"
            "{% set message = dict(message, content=altiplano_clean(message['content'])) %}"
            "{% endif %}{% set altiplano.messages = altiplano.messages + [message] %}{% endfor %}"
            "{% set messages = altiplano.messages %}" + self.source
        )

    def spans(self, messages: Sequence[Message], loss_on: LossOn = "all_answers") -> list[Span]:
        """The conversation as text, marked where the loss counts."""
        _, turns = split_system(messages)
        if turns[-1]["role"] == "user":
            return [Span(self._prompt(messages), False)]
        whole, marked = self._render(messages, generation_prompt=False)
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if _GENERATION_TAG.search(self.source):
            starts = self._marked_starts(messages, whole, marked)
        else:
            starts = {answers[-1]: self._last_start(messages, whole)}
            if loss_on == "all_answers":
                starts |= {at: self._earlier_start(messages, at, whole) for at in answers[:-1]}
        spans, done = [], 0
        for at in answers if loss_on == "all_answers" else answers[-1:]:
            end = self._end(whole, starts[at], messages[at]["content"])
            spans.append(Span(whole[done : starts[at]], False))
            spans.append(Span(whole[starts[at] : end], True))
            done = end
        return spans

    def _last_start(self, messages: Sequence[Message], whole: str) -> int:
        """Where the last answer starts: where a server's prompt ends."""
        prompt = self._prompt(messages[:-1])
        if not whole.startswith(prompt):
            raise DataError(
                f"the base model's chat template renders an answered conversation differently from "
                f"the prompt for that answer: the prompt ends in {prompt[-40:]!r}, the "
                f"conversation has {_difference(whole, prompt)!r} there; {_OTHERWISE}"
            )
        return len(prompt)

    def _earlier_start(self, messages: Sequence[Message], at: int, whole: str) -> int:
        """Where an earlier answer starts, if it stands there as when it was the last."""
        alone, _ = self._render(messages[: at + 1], generation_prompt=False)
        start = self._last_start(messages[: at + 1], alone)
        end = self._end(alone, start, messages[at]["content"])
        if not whole.startswith(alone[:end]):
            raise DataError(
                f"the base model's chat template changes an earlier answer when the conversation "
                f"goes on: {alone[start:end][:60]!r} becomes "
                f"{_difference(whole, alone[:end])!r}; only the last answer can be trained: set "
                f"`data.loss_on: last_answer`"
            )
        return start

    def _marked_starts(
        self, messages: Sequence[Message], whole: str, marked: Sequence[int]
    ) -> dict[int, int]:
        """Where the template's `generation` tags start, by the answer's place in `messages`."""
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marked) != len(answers):
            raise DataError(
                f"the base model's chat template marks {len(marked)} stretches with "
                f"`{{% generation %}}` in a conversation of {len(answers)} answers; {_OTHERWISE}"
            )
        if whole[: marked[-1]] != (prompt := self._prompt(messages[:-1])):
            raise DataError(
                f"the base model's chat template marks an answer with `{{% generation %}}` that "
                f"does not start where a server's prompt ends: {whole[: marked[-1]][-40:]!r} "
                f"against {prompt[-40:]!r}; {_OTHERWISE}"
            )
        return dict(zip(answers, marked, strict=True))

    def _end(self, whole: str, start: int, content: str) -> int:
        """Where an answer's EOS ends; nothing but space may stand between the two."""
        end = whole.find(self.eos, start)
        answer = whole[start : end if end >= 0 else len(whole)]
        content = self.clean(content)
        if content not in answer:
            raise DataError(
                f"the base model's chat template does not repeat an answer as it is: "
                f"{content[:60]!r} became {answer[:60]!r}; {_OTHERWISE}"
            )
        if end < 0 or not answer.rstrip().endswith(content):
            after = answer[answer.rindex(content) + len(content) :]
            raise DataError(
                f"the base model's chat template does not end an answer with EOS: {after[:40]!r} "
                f"follows it and EOS is {self.eos!r}, so a trained model would never stop; make "
                f"the token that ends it `eos_token` in the base's tokenizer_config.json, or "
                f"{_OTHERWISE}"
            )
        return end + len(self.eos)

    def _prompt(self, messages: Sequence[Message]) -> str:
        return self._render(messages, generation_prompt=True)[0]

    def _render(
        self, messages: Sequence[Message], *, generation_prompt: bool
    ) -> tuple[str, list[int]]:
        """(text, where each stretch marked by the template starts), as `apply_chat_template`."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), marked = render_jinja_template(
                [list(messages)],
                chat_template=self.jinja,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=bool(_GENERATION_TAG.search(self.source)),
                **self.special_tokens,
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise DataError(
                f"the base model's chat template refuses a conversation of {roles}: {error}; "
                f"mend the records, or {_OTHERWISE}"
            ) from None
        return text, [start for stretches in marked for start, _ in stretches]


def _difference(whole: str, prefix: str) -> str:
    """What stands in `whole` where it first differs from what should be its beginning."""
    pairs = enumerate(zip(whole, prefix, strict=False))
    equal = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(prefix)))
    return whole[max(0, equal - 10) : equal + 50]
