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

from altiplano.serving.front.answer import Answer
from altiplano.serving.front.asking import Asked, ask, encode, open_request
from altiplano.serving.front.forms import ChatForm, CompletionForm, Form
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
    form = ChatForm(asked, body)
    if body.stream:
        return _stream(asked, body, form)
    return await while_connected(request.receive, _whole(asked, form))


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
        **form.beside(),
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
        "id": f"{form.prefix}-{new_id()}",
        "object": kind,
        "created": int(time.time()),
        "model": asked.name,
        "system_fingerprint": asked.model.fingerprint,
    }
