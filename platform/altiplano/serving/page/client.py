"""Answers from the service for the page: asked, streamed, timed, abandoned.

Knows the OpenAI routes, not who serves them nor how an answer is shown. A visitor's API key goes
into the headers of that visitor's requests and nowhere else. Costs one HTTP connection per answer.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from openai import (
    APIConnectionError,
    APIStatusError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    OpenAIError,
)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NOBODY = "none"
_LOOK_S = 0.08
_PULSE_S = 1.0


@dataclass(frozen=True)
class Settings:
    """How to answer; None leaves a value to the service."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """0 is all."""
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    beams: int = 0
    """Beam search with that many beams, which does not stream; 0 samples."""


@dataclass(frozen=True)
class Question:
    """One request: a conversation, or a text to go on with."""

    model: str
    settings: Settings
    messages: list[dict[str, str]] | None = None
    """For the chat route; None asks for a completion of `prompt`."""
    prompt: str = ""


@dataclass
class Answer:
    """An answer while it comes."""

    text: str = ""
    error: str = ""
    """One line; empty while all is well."""
    tokens: int = 0
    """As the service counted them; 0 until it said so."""
    first_s: float | None = None
    """Seconds to the first text."""
    seconds: float = 0.0
    """Seconds so far, or in all."""
    acceptance: float | None = None
    """Share of the draft's tokens that the model kept, where the service tells."""
    done: bool = False
    stopped: bool = False
    """Whether it was abandoned before its end."""
    _asked: float = field(default_factory=time.monotonic)
    _task: "asyncio.Task[None] | None" = None

    def note(self) -> str:
        """How fast it came, in one line; empty until it is complete."""
        if self.stopped:
            return f"stopped after {self.seconds:.1f} s"
        if not self.done or not self.tokens:
            return ""
        parts = [f"{self.tokens} token{'s' * (self.tokens != 1)}"]
        # The first token's time is the prompt's, so the rate is that of the others.
        first = self.first_s or 0.0
        spread = self.seconds - first
        if self.tokens > 1 and spread > 0.001 and first < 0.98 * self.seconds:
            parts.append(f"{(self.tokens - 1) / spread:.1f} tokens/s")
        elif self.seconds > 0:
            parts.append(f"{self.tokens / self.seconds:.1f} tokens/s")
        if self.first_s is not None:
            parts.append(f"first after {self.first_s:.2f} s")
        if self.acceptance is not None:
            parts.append(f"draft accepted {self.acceptance:.0%}")
        return " · ".join(parts)

    def add(self, text: str) -> None:
        """Append what came."""
        if text and self.first_s is None:
            self.first_s = time.monotonic() - self._asked
        self.text += text

    def stop(self) -> None:
        """Abandon it: the service stops generating."""
        if self._task is not None:
            self._task.cancel()

    def start(self, task: "asyncio.Task[None]") -> None:
        """Remember what fills it, for `stop`; its time runs from now."""
        self._task, self._asked = task, time.monotonic()

    def fail(self, error: str) -> None:
        """It cannot be had."""
        self.error, self.done = error, True

    def end(self) -> None:
        """Nothing more comes."""
        self.seconds = time.monotonic() - self._asked
        self.done = True


class Service:
    """The service at one address, for all visitors of a page."""

    def __init__(self, api_url: str) -> None:
        """`api_url` is the service's address, with or without `/v1`."""
        # On loopback there is no way through the environment's proxies, and nobody in between
        # whom a certificate (made for the outer name) would have to keep out.
        loopback = urlsplit(api_url).hostname in _LOOPBACK
        self._client = AsyncOpenAI(
            base_url=api_url.rstrip("/").removesuffix("/v1") + "/v1",
            api_key=_NOBODY,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(trust_env=not loopback, verify=not loopback),
        )

    async def models(self, key: str) -> list[str]:
        """Names of the models and adapters the service offers.

        Raises:
            ServiceError: it does not answer, or refuses the key.
        """
        try:
            names = [model.id async for model in self._as(key).models.list()]
        except OpenAIError as error:
            raise ServiceError(_one_line(error)) from None
        if not names:
            raise ServiceError("the service offers no model")
        return names

    async def models_or_none(self, key: str) -> list[str]:
        """As `models`; an empty list where they cannot be had."""
        try:
            return await self.models(key)
        except ServiceError:
            return []

    async def answer(self, key: str, question: Question, into: Answer) -> None:
        """Fill `into` until the answer is complete; what goes wrong becomes its `error`.

        Cancelling it closes the connection, which ends the generation at the service.
        """
        try:
            client = self._as(key)
            if question.settings.beams:
                await _whole(client, question, into)
            else:
                await _streamed(client, question, into)
        except OpenAIError as error:
            into.error = _one_line(error)
        except ServiceError as error:
            into.error = str(error)
        except asyncio.CancelledError:
            into.stopped = True
            raise
        finally:
            into.end()

    def _as(self, key: str) -> AsyncOpenAI:
        key = key.strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ServiceError("this is no API key: keys have ASCII letters, digits and signs only")
        return self._client.with_options(api_key=key or _NOBODY)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()


class ServiceError(Exception):
    """The service cannot be asked; the message is one line for the visitor."""


async def watch(
    service: Service, key: str, asked: Iterable[tuple[Question, Answer]]
) -> AsyncGenerator[None]:
    """Answer all questions at once; yield, some times a second, when there is more to show.

    Closing the iterator abandons what is not complete. It yields every second even where nothing
    came: whoever shows it learns only then that the visitor has left.
    """
    pairs = list(asked)
    tasks = []
    for question, answer in pairs:
        tasks.append(asyncio.create_task(service.answer(key, question, answer)))
        answer.start(tasks[-1])
    shown, when = -1, 0.0
    try:
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=_LOOK_S)
            length = sum(len(answer.text) for _, answer in pairs)
            if length != shown or time.monotonic() > when + _PULSE_S:
                shown, when = length, time.monotonic()
                yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _streamed(client: AsyncOpenAI, question: Question, into: Answer) -> None:
    words = _words(question, stream=True, stream_options={"include_usage": True})
    route: Any = client.completions if question.messages is None else client.chat.completions
    async with await route.create(**words) as stream:
        async for chunk in stream:
            if chunk.choices:
                choice = chunk.choices[0]
                text = choice.text if question.messages is None else choice.delta.content
                into.add(text or "")
            _count(chunk, into)


async def _whole(client: AsyncOpenAI, question: Question, into: Answer) -> None:
    words = _words(question)
    if question.messages is None:
        completion = await client.completions.create(**words)
        into.add(completion.choices[0].text)
    else:
        completion = await client.chat.completions.create(**words)
        into.add(completion.choices[0].message.content or "")
    into.first_s = None
    _count(completion, into)


def _words(question: Question, **more: Any) -> dict[str, Any]:
    """The request; what is None is left out, what OpenAI's client does not know is `extra_body`."""
    settings = question.settings
    known = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
    }
    extra: dict[str, Any] = {
        "top_k": settings.top_k,
        "repetition_penalty": settings.repetition_penalty,
    }
    if settings.beams:
        # Beams are ranked by the model's own probabilities: nothing is sampled.
        known = {"max_tokens": settings.max_tokens, "n": settings.beams}
        extra = {"use_beam_search": True}
    asked: dict[str, Any] = {"model": question.model}
    if question.messages is None:
        asked["prompt"] = question.prompt
    else:
        asked["messages"] = question.messages
    asked |= {name: value for name, value in known.items() if value is not None}
    return (
        asked
        | {"extra_body": {name: value for name, value in extra.items() if value is not None}}
        | more
    )


def _count(reply: Any, into: Answer) -> None:
    """Take the counts of a reply that has some."""
    if reply.usage is None:
        return
    into.tokens = reply.usage.completion_tokens
    if (draft := reply.usage.completion_tokens_details) is not None:
        accepted, rejected = draft.accepted_prediction_tokens, draft.rejected_prediction_tokens
        if accepted is not None and rejected is not None and accepted + rejected:
            into.acceptance = accepted / (accepted + rejected)


def _one_line(error: OpenAIError) -> str:
    if isinstance(error, APIConnectionError):
        return f"the service does not answer ({type(error.__cause__ or error).__name__}): try again"
    # What the service itself says; the library's own text quotes the whole reply.
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    line = " ".join(str(said or error).split())
    if isinstance(error, APIStatusError):
        if error.status_code == 401:
            return f"the service asks for a valid API key: type yours under Settings ({line})"
        wait = error.response.headers.get("retry-after")
        return f"{line} (try again in {wait} s)" if wait else line
    return line
