"""The JSON of an answer, in chat's form and in that of completions, whole and in events.

Knows what OpenAI's clients read, and vLLM's additions (`stop_reason`, token ids). Knows neither how
answers are made nor how they are sent.
"""

from typing import Any

from altiplano.serving.front.answer import Answer, Cursor, chat_logprobs, completion_logprobs
from altiplano.serving.front.asking import Asked
from altiplano.serving.front.calls import Reader
from altiplano.serving.front.schemas import ChatRequest, CompletionRequest
from altiplano.serving.front.sse import Chunks
from altiplano.serving.front.tools import ToolUse


class ChatForm:
    """Chat's."""

    chat = True
    kind = "chat.completion"
    prefix = "chatcmpl"

    def __init__(self, asked: Asked, body: ChatRequest, tools: ToolUse | None) -> None:
        self._asked = asked
        self._body = body
        self._tools = tools
        self._readers: dict[int, Reader] = {}
        self.plain = not body.logprobs and not body.return_token_ids and tools is None
        """Whether events are text and nothing else."""

    def opening(self, chunks: Chunks, answer: Answer) -> bytes:
        """What goes out before an answer's first piece, together with it."""
        extra = None
        if self._body.return_token_ids:
            extra = {"prompt_token_ids": self._asked.prompts[0]}
        delta = {"delta": {"role": "assistant", "content": ""}}
        return chunks.change(answer.index, delta, extra=extra)

    def event(self, chunks: Chunks, answer: Answer, piece: str, since: int) -> bytes:
        """A step's event where it is more than a piece of text.

        Args:
            piece: the text that the step made sure.
            since: number of the step's first token.
        """
        if self._tools is None:
            return _event(self, chunks, answer, piece, since)
        reader = self._reader(answer)
        deltas = reader.feed(piece)
        if answer.finish is not None:
            deltas += reader.finish()
        events = [chunks.change(answer.index, {"delta": delta}) for delta in deltas]
        last: dict[str, Any] = {
            "logprobs": self.logprobs(answer, since),
            "finish": reader.finish_reason(answer.finish),
            "stop_reason": answer.stop_reason,
            "extra": self.ids(answer, since),
        }
        if last["logprobs"] or last["finish"] or last["extra"]:
            events.append(chunks.change(answer.index, {"delta": {}}, **last))
        return b"".join(events)

    def logprobs(self, answer: Answer, since: int) -> dict[str, Any] | None:
        """Logprobs from token number `since` on; asked once for each token, in order."""
        if self._body.top is None:
            return None
        return {"content": chat_logprobs(answer.codec, answer.logprobs[since:], self._body.top)}

    def ids(self, answer: Answer, since: int) -> dict[str, Any]:
        """Ids from token number `since` on, where they are wanted."""
        return {"token_ids": answer.ids[since:]} if self._body.return_token_ids else {}

    def choice(self, answer: Answer) -> dict[str, Any]:
        """An answer that is over."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        finish = answer.finish
        if self._tools is not None:
            reader = self._reader(answer)
            reader.feed(answer.text)
            reader.finish()
            message, finish = reader.message(), reader.finish_reason(finish)
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self.logprobs(answer, 0),
            "finish_reason": finish,
            "stop_reason": answer.stop_reason,
            **self.ids(answer, 0),
        }

    def beside(self) -> dict[str, Any]:
        """What a whole response has beside its choices."""
        return {"prompt_token_ids": self._asked.prompts[0]} if self._body.return_token_ids else {}

    def _reader(self, answer: Answer) -> Reader:
        assert self._tools is not None, "only answers that may call are read"
        if answer.index not in self._readers:
            self._readers[answer.index] = self._tools.reader()
        return self._readers[answer.index]


class CompletionForm:
    """That of completions; its methods are `ChatForm`'s."""

    chat = False
    kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, asked: Asked, body: CompletionRequest) -> None:
        self._asked = asked
        self._body = body
        self._cursors: dict[int, Cursor] = {}
        self.plain = body.logprobs is None and not body.return_token_ids
        """Whether events are text and nothing else."""

    def opening(self, chunks: Chunks, answer: Answer) -> bytes:
        """The prompt, where it is to come back."""
        extra = self._prompt_ids(answer)
        if not self._body.echo:
            return chunks.full(answer.index, "", extra=extra) if extra else b""
        logprobs = self._prompt_logprobs(answer)
        return chunks.full(answer.index, self._echo(answer), logprobs=logprobs, extra=extra)

    def event(self, chunks: Chunks, answer: Answer, piece: str, since: int) -> bytes:
        """As in `ChatForm`."""
        return _event(self, chunks, answer, piece, since)

    def logprobs(self, answer: Answer, since: int) -> dict[str, Any] | None:
        """As in `ChatForm`."""
        top = self._body.logprobs
        if top is None:
            return None
        ids, positions = answer.ids[since:], answer.logprobs[since:]
        return completion_logprobs(answer.codec, ids, positions, top, self._cursor(answer))

    def ids(self, answer: Answer, since: int) -> dict[str, Any]:
        """As in `ChatForm`."""
        return {"token_ids": answer.ids[since:]} if self._body.return_token_ids else {}

    def choice(self, answer: Answer) -> dict[str, Any]:
        """As in `ChatForm`."""
        prompt = self._prompt_logprobs(answer)
        made = self.logprobs(answer, 0)
        if prompt is not None and made is not None:
            made = {name: prompt[name] + made[name] for name in prompt}
        return {
            "index": answer.index,
            "text": self._echo(answer) + answer.text,
            "logprobs": made,
            "finish_reason": answer.finish,
            "stop_reason": answer.stop_reason,
            **self._prompt_ids(answer),
            **self.ids(answer, 0),
        }

    def beside(self) -> dict[str, Any]:
        """As in `ChatForm`: nothing, because every choice has its own prompt."""
        return {}

    def _prompt(self, answer: Answer) -> list[int]:
        return self._asked.jobs[answer.index].prompt

    def _prompt_ids(self, answer: Answer) -> dict[str, Any]:
        wanted = self._body.return_token_ids
        return {"prompt_token_ids": self._prompt(answer)} if wanted else {}

    def _echo(self, answer: Answer) -> str:
        return answer.codec.decode(self._prompt(answer)) if self._body.echo else ""

    def _prompt_logprobs(self, answer: Answer) -> dict[str, Any] | None:
        top = self._body.logprobs
        if top is None or answer.prompt_logprobs is None:
            return None
        prompt, cursor = self._prompt(answer), self._cursor(answer)
        return completion_logprobs(answer.codec, prompt, answer.prompt_logprobs, top, cursor)

    def _cursor(self, answer: Answer) -> Cursor:
        if answer.index not in self._cursors:
            codec = answer.codec
            begins = self._body.echo or codec.starts_text(self._prompt(answer))
            self._cursors[answer.index] = Cursor(begins=begins and codec.strips)
        return self._cursors[answer.index]


Form = ChatForm | CompletionForm


def _event(form: Form, chunks: Chunks, answer: Answer, piece: str, since: int) -> bytes:
    return chunks.full(
        answer.index,
        piece,
        logprobs=form.logprobs(answer, since),
        finish=answer.finish,
        stop_reason=answer.stop_reason,
        extra=form.ids(answer, since),
    )
