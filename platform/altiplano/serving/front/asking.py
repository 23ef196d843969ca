"""From a request to its jobs: which model, which ids, within which bounds; and what they cost.

The same for chat and completions, streamed or not. Knows neither how answers are made nor how they
are written. Costs the encoding of the prompt (36 MB/s) and some 20 µs.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from altiplano.serving.front.answer import Answer, Wish
from altiplano.serving.front.beam import search_answers
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.generation import answers, generate, new_id
from altiplano.serving.front.keys import Caller
from altiplano.serving.front.limits import check_request
from altiplano.serving.front.models import ServedModel
from altiplano.serving.front.schemas import ChatRequest, CompletionRequest
from altiplano.serving.front.state import FrontState
from altiplano.serving.front.text import TextCodec
from altiplano.serving.messages import Job, Sampling, Step

_LONG_TEXT = 50_000
"""Characters from which a prompt is encoded by a thread, so that other answers go on."""
_COMPLETION_TOKENS = 16
"""OpenAI's answer length for completions that name none."""


@dataclass
class Asked:
    """A request that may be answered: one job per answer."""

    state: FrontState
    caller: Caller
    model: ServedModel
    name: str
    """The model's, as the request has it (an adapter's name where it names one)."""
    prompts: list[list[int]]
    jobs: list[Job]
    """`n` for each prompt, in order."""
    wish: Wish
    arrived: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0
    completion_tokens: int = 0
    proposed: int = 0
    accepted: int = 0

    def answer(self, index: int) -> Answer:
        """A fresh answer for job `index`."""
        return Answer(index, self.model.codec, self.jobs[index].prompt, self.wish)

    async def steps(self, answer: Answer, *, streamed: bool) -> AsyncGenerator[str, None]:
        """Run an answer's job to its end: for each step the text that it made sure.

        Whatever ends it, its tokens are counted once.

        Args:
            streamed: what comes out leaves at once, so the answer cannot begin anew.
        """
        job, telemetry = self.jobs[answer.index], self.state.telemetry
        first_s = last_s = None
        telemetry.began(self.model.name)
        try:
            restart = None if streamed else answer.reset
            steps = generate(self.model, job, lost=self._lost, restart=restart)
            async with aclosing(steps):
                async for step in steps:
                    if step.tokens:
                        last_s = time.monotonic() - self.arrived
                        first_s = last_s if first_s is None else first_s
                    yield answer.add(step)
                    if answer.finish is not None:
                        return
        finally:
            self._count(answer, len(job.prompt), first_s, last_s)

    async def beams(self, body: ChatRequest | CompletionRequest) -> list[Answer]:
        """The answers of a beam search, best first."""
        answers = [self.answer(index) for index in range(len(self.jobs))]
        telemetry = self.state.telemetry
        for _ in answers:
            telemetry.began(self.model.name)
        found: list[Step] = []
        try:
            found = await search_answers(self.model, self.jobs[0], body)
            for answer, step in zip(answers, found, strict=False):
                answer.add(step)
        finally:
            seconds = time.monotonic() - self.arrived if found else None
            for answer in answers:
                self._count(answer, len(self.prompts[0]), seconds, seconds)
        return answers[: len(found)]

    def usage(self) -> dict[str, Any]:
        """Tokens so far, as OpenAI counts them: each prompt once, a draft's as predictions."""
        prompt_tokens = sum(map(len, self.prompts))
        drafted = {
            "accepted_prediction_tokens": self.accepted,
            "rejected_prediction_tokens": self.proposed - self.accepted,
        }
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **({"completion_tokens_details": drafted} if self.proposed else {}),
        }

    def _lost(self) -> None:
        self.state.telemetry.retried(self.model.name, "replica_lost")

    def _count(
        self, answer: Answer, prompt_tokens: int, first_s: float | None, last_s: float | None
    ) -> None:
        is_first = answer.index % (len(self.jobs) // len(self.prompts)) == 0
        made = len(answer.ids)
        self.completion_tokens += made
        self.proposed += answer.proposed
        self.accepted += answer.accepted
        self.cached_tokens += answer.cached_tokens if is_first else 0
        self.caller.charge(made + (prompt_tokens if is_first else 0))
        self.state.telemetry.ended(
            self.model.name,
            prompt_tokens=prompt_tokens if is_first else 0,
            completion_tokens=made,
            first_s=first_s,
            last_s=last_s,
        )


def open_request(
    state: FrontState, request: Request, name: str | None, task: str
) -> tuple[Caller, ServedModel, str | None]:
    """Who asks which model; counts the request.

    Raises:
        ApiError: 404, no such model; 400, one for another task; 429, too many requests.
    """
    caller: Caller = request.state.caller
    model, adapter = state.find(name, caller)
    request.state.model = model.name
    if model.entry.task != task:
        route = "/v1/embeddings" if model.entry.task == "embed" else "/v1/completions"
        raise ApiError(
            400, f"the model {model.name} is served for {route}", code="wrong_task", param="model"
        )
    caller.admit()
    return caller, model, adapter


async def encode(codec: TextCodec, text: str, *, add_bos: bool) -> list[int]:
    """Ids of a text; a long one is encoded by a thread."""
    if len(text) < _LONG_TEXT:
        return codec.encode(text, add_bos=add_bos)
    return await asyncio.to_thread(codec.encode, text, add_bos=add_bos)


def ask(
    state: FrontState,
    opened: tuple[Caller, ServedModel, str | None],
    body: ChatRequest | CompletionRequest,
    prompts: list[list[int]],
    guided: dict[str, object] | None,
) -> Asked:
    """The jobs of a request.

    Args:
        opened: from `open_request`.
        guided: for `Sampling.guided`.

    Raises:
        ApiError: 400, more is asked for than may be.
    """
    caller, model, adapter = opened
    width = model.about.vocab_size if model.about is not None else model.codec.size
    jobs: list[Job] = []
    for prompt in prompts:
        _check_ids("prompt", prompt, width)
        job = Job(
            id=new_id(),
            prompt=prompt,
            sampling=_sampling(state, model, body, len(prompt), len(prompts), guided),
            adapter=adapter,
            adapter_path=model.adapters[adapter] if adapter is not None else None,
        )
        jobs += answers(job, body.n)
    _check_ids("logit_bias", jobs[0].sampling.logit_bias, width)
    _check_ids("stop_token_ids", body.stop_token_ids, width)
    wish = Wish(
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        min_tokens=body.min_tokens,
        special=not body.skip_special_tokens,
        top=body.top,
        only_prompt=body.longest == 0,
    )
    return Asked(state, caller, model, adapter or model.name, prompts, jobs, wish)


def _sampling(
    state: FrontState,
    model: ServedModel,
    body: ChatRequest | CompletionRequest,
    prompt_tokens: int,
    num_prompts: int,
    guided: dict[str, object] | None,
) -> Sampling:
    completion = isinstance(body, CompletionRequest)
    usual = _COMPLETION_TOKENS if completion else None
    allowed = check_request(
        state.limits,
        model.context,
        prompt_tokens=prompt_tokens,
        # Nothing is asked for where only the prompt is: the engine makes one token all the same.
        max_tokens=max(1, body.longest) if body.longest is not None else None,
        answers=body.n * num_prompts,
        default_max_tokens=state.limits.default_max_tokens or usual,
    )
    sampling = body.sampling(allowed)
    sampling.guided = guided
    sampling.logprobs = body.top
    if isinstance(body, CompletionRequest) and body.echo:
        sampling.prompt_logprobs = body.top
    return sampling


def _check_ids(param: str, ids: Sequence[int] | dict[int, float], width: int) -> None:
    largest = max(ids, default=0)
    if largest >= width:
        raise ApiError(
            400,
            f"`{param}` has the token id {largest}; this model's go from 0 to {width - 1}",
            param=param,
        )
