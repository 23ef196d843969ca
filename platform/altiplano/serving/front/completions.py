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
from altiplano.serving.front.guided import guidance
from altiplano.serving.front.schemas import ChatRequest, CompletionRequest
from altiplano.serving.front.sse import Chunks, EventStream, while_connected
from altiplano.serving.front.state import FrontState
from altiplano.serving.front.together import gathered, merged
from altiplano.serving.front.tools import conversation, read_tools


async def chat(state: FrontState, request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    opened = open_request(state, request, body.model, "generate")
    codec = opened[1].codec
    tools = read_tools(body)
    source = codec.template.source if codec.template is not None else ""
    messages, variables = conversation(body, source, codec.clean)
    variables["add_generation_prompt"] = body.add_generation_prompt
    # The template writes BOS itself, as in training.
    prompt = await encode(codec, codec.render(messages, **variables), add_bos=False)
    guided = guidance(body, state.limits, tools.guided if tools is not None else None)
    asked = ask(state, opened, body, [prompt], guided)
    return await _respond(request, asked, body, ChatForm(asked, body, tools))


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
    asked = ask(state, opened, body, prompts, guidance(body, state.limits))
    return await _respond(request, asked, body, CompletionForm(asked, body))


async def _respond(
    request: Request, asked: Asked, body: ChatRequest | CompletionRequest, form: Form
) -> Response:
    if body.stream:
        return _stream(asked, body, form)
    work = asked.beams(body) if body.use_beam_search else _answers(asked)
    answers = await while_connected(request.receive, work)
    content = {
        **_shared(asked, form, form.kind),
        **form.beside(),
        "choices": [form.choice(answer) for answer in answers],
        "usage": asked.usage(),
    }
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _answers(asked: Asked) -> list[Answer]:
    """All answers, whole."""

    async def run(answer: Answer) -> Answer:
        async with aclosing(asked.steps(answer, streamed=False)) as steps:
            async for _ in steps:
                pass
        return answer

    return await gathered([run(asked.answer(index)) for index in range(len(asked.jobs))])


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
    began, since = False, 0
    async with aclosing(asked.steps(answer, streamed=True)) as steps:
        async for piece in steps:
            event = b"" if began else form.opening(chunks, answer)
            began = True
            if not form.plain or answer.finish is not None:
                event += form.event(chunks, answer, piece, since)
                since = len(answer.ids)
            elif piece:
                event += chunks.piece(answer.index, piece)
            if event:
                yield event


async def _joined(
    streams: Sequence[AsyncGenerator[bytes, None]], asked: Asked, usage: Chunks | None
) -> AsyncGenerator[bytes, None]:
    """Events of all answers as they come, then the count of tokens."""
    async with aclosing(merged(streams)) as events:
        async for event in events:
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
