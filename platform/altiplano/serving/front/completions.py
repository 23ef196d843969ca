"""`/v1/chat/completions` and `/v1/completions`: what was asked, answered whole or as a stream.

Knows the JSON of both. What they share (models, bounds, running jobs) is in `asking.py`, the text
of an answer in `answer.py`.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from altiplano.serving.front.answer import Answer, chat_logprobs, completion_logprobs
from altiplano.serving.front.asking import Asked, ask, encode, open_request
from altiplano.serving.front.generation import new_id
from altiplano.serving.front.schemas import ChatRequest, CompletionRequest
from altiplano.serving.front.sse import Chunks, EventStream, while_connected
from altiplano.serving.front.state import FrontState
from altiplano.serving.front.together import gathered, merged


async def chat(state: FrontState, request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    opened = open_request(state, request, body.model, "generate")
    codec = opened[1].codec
    messages = [message.for_template() for message in body.messages]
    text = codec.render(messages, add_generation_prompt=body.add_generation_prompt)
    # The template writes BOS itself, as in training.
    prompt = await encode(codec, text, add_bos=False)
    asked = ask(state, opened, body, [prompt], None)
    if body.stream:
        return _stream(asked, body, ChatForm(asked, body))
    return await while_connected(request.receive, _whole(asked, ChatForm(asked, body)))


async def complete(state: FrontState, request: Request, body: CompletionRequest) -> Response:
    """Go on from prompts."""
    opened = open_request(state, request, body.model, "generate")
    codec = opened[1].codec
    prompts = [
        await encode(codec, prompt, add_bos=body.add_special_tokens)
        if isinstance(prompt, str)
        else prompt
        for prompt in body.prompts
    ]
    asked = ask(state, opened, body, prompts, None)
    form = CompletionForm(asked, body)
    if body.stream:
        return _stream(asked, body, form)
    return await while_connected(request.receive, _whole(asked, form))


class ChatForm:
    """The JSON of chat answers."""

    chat = True
    kind = "chat.completion"

    def __init__(self, asked: Asked, body: ChatRequest) -> None:
        self._asked = asked
        self._body = body
        self.plain = not body.logprobs and not body.return_token_ids
        """Whether events are text and nothing else."""

    def shared(self) -> dict[str, Any]:
        """What the answer says of itself."""
        return {"id": f"chatcmpl-{new_id()}"}

    def opening(self, chunks: Chunks, answer: Answer) -> bytes:
        """An answer's first event, which goes out with its first token."""
        extra = None
        if self._body.return_token_ids:
            extra = {"prompt_token_ids": self._asked.jobs[answer.index].prompt}
        delta = {"delta": {"role": "assistant", "content": ""}}
        return chunks.change(answer.index, delta, extra=extra)

    def choice(self, answer: Answer) -> dict[str, Any]:
        """An answer that is over."""
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self.logprobs(answer, 0),
            "finish_reason": answer.finish,
            "stop_reason": answer.stop_reason,
            **self.ids(answer, 0),
        }

    def whole(self) -> dict[str, Any]:
        """What a whole answer has beside its choices."""
        return {"prompt_token_ids": self._asked.prompts[0]} if self._body.return_token_ids else {}

    def logprobs(self, answer: Answer, since: int) -> dict[str, Any] | None:
        """Logprobs of the tokens from number `since` on."""
        if self._body.top is None:
            return None
        return {"content": chat_logprobs(answer.codec, answer.logprobs[since:], self._body.top)}

    def ids(self, answer: Answer, since: int) -> dict[str, Any]:
        """Ids of the tokens from number `since` on, where they are wanted."""
        return {"token_ids": answer.ids[since:]} if self._body.return_token_ids else {}


class CompletionForm:
    """The JSON of completions."""

    chat = False
    kind = "text_completion"

    def __init__(self, asked: Asked, body: CompletionRequest) -> None:
        self._asked = asked
        self._body = body
        self._offsets: dict[int, int] = {}
        self.plain = body.logprobs is None and not body.return_token_ids

    def shared(self) -> dict[str, Any]:
        """As in `ChatForm`."""
        return {"id": f"cmpl-{new_id()}"}

    def opening(self, chunks: Chunks, answer: Answer) -> bytes:
        """The prompt, where it is to come back."""
        prompt = self._asked.jobs[answer.index].prompt
        extra = {"prompt_token_ids": prompt} if self._body.return_token_ids else None
        if not self._body.echo:
            return chunks.full(answer.index, "", extra=extra) if extra else b""
        return chunks.full(
            answer.index,
            answer.codec.decode(prompt),
            logprobs=self._prompt_logprobs(answer),
            extra=extra,
        )

    def choice(self, answer: Answer) -> dict[str, Any]:
        """As in `ChatForm`."""
        prompt = self._asked.jobs[answer.index].prompt
        before = answer.codec.decode(prompt) if self._body.echo else ""
        only_prompt = self._body.max_tokens == 0
        return {
            "index": answer.index,
            "text": before if only_prompt else before + answer.text,
            "logprobs": self._whole_logprobs(answer, only_prompt),
            "finish_reason": "length" if only_prompt else answer.finish,
            "stop_reason": answer.stop_reason,
            **({"prompt_token_ids": prompt} if self._body.return_token_ids else {}),
            **self.ids(answer, 0),
        }

    def whole(self) -> dict[str, Any]:
        """As in `ChatForm`."""
        return {}

    def logprobs(self, answer: Answer, since: int) -> dict[str, Any] | None:
        """As in `ChatForm`; asked once for each stretch of tokens, in order."""
        top = self._body.logprobs
        if top is None:
            return None
        ids, positions = answer.ids[since:], answer.logprobs[since:]
        before = len(self._before(answer)) + len(answer.codec.decode(answer.ids[:since]))
        begins = since == 0 and answer.codec.starts_text(self._asked.jobs[answer.index].prompt)
        return completion_logprobs(answer.codec, ids, positions, top, before, begins=begins)

    def ids(self, answer: Answer, since: int) -> dict[str, Any]:
        """As in `ChatForm`."""
        return {"token_ids": answer.ids[since:]} if self._body.return_token_ids else {}

    def _whole_logprobs(self, answer: Answer, only_prompt: bool) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        prompt = self._prompt_logprobs(answer) if self._body.echo else None
        if only_prompt or prompt is None:
            return prompt or self.logprobs(answer, 0)
        made = self.logprobs(answer, 0)
        assert made is not None, "logprobs are wanted"
        return {name: prompt[name] + made[name] for name in prompt}

    def _prompt_logprobs(self, answer: Answer) -> dict[str, Any] | None:
        top = self._body.logprobs
        if top is None or answer.prompt_logprobs is None:
            return None
        prompt = self._asked.jobs[answer.index].prompt
        told = completion_logprobs(answer.codec, prompt, answer.prompt_logprobs, top)
        self._offsets[answer.index] = sum(map(len, told["tokens"]))
        return told


Form = ChatForm | CompletionForm


async def _whole(asked: Asked, form: Form) -> Response:
    """All answers in one response."""
    answers = [asked.answer(index) for index in range(len(asked.jobs))]

    async def run(answer: Answer) -> None:
        steps = asked.steps(answer, streamed=False)
        async with aclosing(steps):
            async for _ in steps:
                pass

    await gathered([run(answer) for answer in answers])
    content = {
        **_shared(asked, form, form.kind),
        **form.whole(),
        "choices": [form.choice(answer) for answer in answers],
        "usage": asked.usage(),
    }
    return Response(msgspec.json.encode(content), media_type="application/json")


def _stream(asked: Asked, body: ChatRequest | CompletionRequest, form: Form) -> Response:
    kind = f"{form.kind}.chunk" if form.chat else form.kind
    chunks = Chunks(_shared(asked, form, kind), chat=form.chat, with_usage=body.with_usage)
    events = [_events(asked, form, chunks, asked.answer(index)) for index in range(len(asked.jobs))]
    joined = _joined(events, asked, chunks if body.with_usage else None)
    return EventStream(joined, asked.state.limits.slow_client_s)


async def _events(
    asked: Asked, form: Form, chunks: Chunks, answer: Answer
) -> AsyncGenerator[bytes, None]:
    """One answer's events: one per step that made text, or anything else that is wanted."""
    opening: bytes | None = None
    steps = asked.steps(answer, streamed=True)
    since = 0
    async with aclosing(steps):
        async for piece, _ in steps:
            if opening is None:
                opening = form.opening(chunks, answer)
                head = opening
            else:
                head = b""
            if form.plain and answer.finish is None:
                if piece or head:
                    yield head + (chunks.piece(answer.index, piece) if piece else b"")
                continue
            yield head + chunks.full(
                answer.index,
                piece,
                logprobs=form.logprobs(answer, since),
                finish=answer.finish,
                stop_reason=answer.stop_reason,
                extra=form.ids(answer, since),
            )
            since = len(answer.ids)


async def _joined(
    streams: Sequence[AsyncGenerator[bytes, None]], asked: Asked, usage: Chunks | None
) -> AsyncGenerator[bytes, None]:
    """Events of all answers as they come, then the count of tokens."""
    source = merged(streams)
    async with aclosing(source):
        async for event in source:
            yield event
    if usage is not None:
        yield usage.usage(asked.usage())


def _shared(asked: Asked, form: Form, kind: str) -> dict[str, Any]:
    return {
        **form.shared(),
        "object": kind,
        "created": int(time.time()),
        "model": asked.name,
        "system_fingerprint": asked.model.fingerprint,
    }
