"""One answer's steps, whatever happens to the replica that makes them.

A replica may die in the middle of an answer. The job is then given, once, to another: as a
continuation where that is the same answer (greedy, or sampled without a seed), else from the start,
where what was already sent must come again. Nobody else retries. Knows jobs and steps, not text and
not HTTP. Costs microseconds per step; an answer that is continued pays for its prompt once more.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.models import ServedModel, TargetClient, TargetLost
from altiplano.serving.link import Inbox, Stream
from altiplano.serving.messages import Job, Outcome, Sampling, Step

_LAST_STEPS_S = 5.0
"""How long steps may take that a finished job has sent: they go another way than its end."""
_ENGINE_BIAS = 100.0
"""Largest bias of a token that the engine takes."""


def new_id() -> str:
    """An id of 128 random bits."""
    return secrets.token_hex(16)


async def generate(
    model: ServedModel,
    job: Job,
    *,
    lost: Callable[[], None] | None = None,
    restart: Callable[[], None] | None = None,
) -> AsyncGenerator[Step, None]:
    """Run a job; close the iterator (or cancel who awaits it) to end the job early.

    Args:
        model: which model.
        job: its `id` is replaced by a new one, and `reply_to` by the inbox's.
        lost: called when the first replica is lost.
        restart: called where the answer must begin anew and nothing of it has left this process:
            everything yielded so far is void. Without it, what was yielded is compared with what
            comes again and not yielded twice.

    Yields:
        Steps in order; the last one has `finish`. Together they have each token once.

    Raises:
        ApiError: 400, the engine refuses the job; 503, no replica could finish it.
    """
    made: list[int] = []
    try:
        async with aclosing(_attempt(model.client, model.inbox, job)) as steps:
            async for step in steps:
                made += step.tokens
                yield step
        return
    except TargetLost:
        if lost is not None:
            lost()
    if made and (rest := continuation(job, made)) is not None:
        again = rest
        skip: list[int] = []
    else:
        again, skip = job, made
        if made and restart is not None:
            restart()
            skip = []
    if again.sampling.max_tokens == 0:
        yield Step(job.id, [], "length")
        return
    try:
        async with aclosing(_attempt(model.client, model.inbox, again)) as steps:
            async for step in steps:
                if skip:
                    step, skip = _without(step, skip)
                if not skip:
                    yield step
    except TargetLost:
        raise ApiError(
            503,
            "two replicas of the model were lost while they made this answer: ask again",
            code="replica_lost",
            retry_after_s=1,
        ) from None


def continuation(job: Job, made: list[int]) -> Job | None:
    """The job that makes the rest of an answer, or None where that would be another answer.

    A seed counts draws from its beginning, and a grammar knows its state only from there. The
    engine counts penalties of presence and frequency in the answer alone: the frequency of what
    was made can be said as a bias (Counter(made) · penalty, subtracted from the logits as the
    engine would), as long as nothing multiplies the logits in between; presence cannot, because a
    token that comes again would pay twice.
    """
    sampling = job.sampling
    bias = dict(sampling.logit_bias)
    if sampling.frequency_penalty:
        for token, count in Counter(made).items():
            bias[token] = bias.get(token, 0.0) - count * sampling.frequency_penalty
    inexact = (
        sampling.guided is not None
        or (sampling.seed is not None and sampling.temperature > 0)
        or sampling.presence_penalty != 0
        or (sampling.frequency_penalty != 0 and sampling.repetition_penalty != 1)
        or any(abs(value) > _ENGINE_BIAS for value in bias.values())
    )
    if inexact:
        return None
    rest = msgspec.structs.replace(
        sampling,
        max_tokens=max(0, sampling.max_tokens - len(made)),
        min_tokens=max(0, sampling.min_tokens - len(made)),
        logit_bias=bias,
        prompt_logprobs=None,
    )
    return msgspec.structs.replace(job, prompt=[*job.prompt, *made], sampling=rest)


def answers(job: Job, count: int) -> list[Job]:
    """The jobs of `count` answers to one prompt; with a seed, answer i has seed + i."""
    return [
        msgspec.structs.replace(job, id=new_id(), sampling=_nth(job.sampling, index))
        for index in range(count)
    ]


def _nth(sampling: Sampling, index: int) -> Sampling:
    if sampling.seed is None or index == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=sampling.seed + index)


async def _attempt(client: TargetClient, inbox: Inbox, job: Job) -> AsyncGenerator[Step, None]:
    """Run a job on one replica.

    Raises:
        TargetLost: the replica died, or not all that it made has come.
    """
    job = msgspec.structs.replace(job, id=new_id(), reply_to=inbox.address)
    stream = inbox.expect(job.id)
    call = asyncio.ensure_future(client.call(job))
    call.add_done_callback(lambda _: stream.wake())
    count = 0
    try:
        while True:
            step = await _next(stream, call)
            count += len(step.tokens)
            if step.finish is None:
                yield step
                continue
            _require_whole(count, await call)
            yield step
            return
    finally:
        stream.close()
        call.cancel()


async def _next(stream: Stream, call: "asyncio.Future[Outcome]") -> Step:
    """The next step; fails where the call has ended and none will come."""
    step = await stream.get_unless(call.done)
    if step is not None:
        return step
    outcome = call.result()
    if outcome.status == "invalid":
        raise ApiError(400, outcome.message, code="invalid_request")
    if outcome.status == "lost":
        raise TargetLost(outcome.message)
    try:
        async with asyncio.timeout(_LAST_STEPS_S):
            return await stream.get()
    except TimeoutError:
        raise TargetLost("the end of the answer did not come") from None


def _require_whole(count: int, outcome: Outcome) -> None:
    """A step that was lost on its way is a hole in the answer: the rest may not follow it."""
    if outcome.status == "done" and outcome.tokens != count:
        raise ApiError(
            503,
            f"{outcome.tokens - count} tokens of the answer were lost on their way: ask again",
            code="tokens_lost",
            retry_after_s=1,
        )


def _without(step: Step, skip: list[int]) -> tuple[Step, list[int]]:
    """A step without the tokens that were already yielded, and which of those are still to come."""
    count = min(len(step.tokens), len(skip))
    if step.tokens[:count] != skip[:count] or (step.finish is not None and count < len(skip)):
        raise ApiError(
            503,
            "the model's replica was lost in the middle of this answer, and another one would go "
            "on differently: ask again",
            code="replica_lost",
            retry_after_s=1,
        )
    rest = msgspec.structs.replace(
        step,
        tokens=step.tokens[count:],
        logprobs=step.logprobs[count:] if step.logprobs is not None else None,
        prompt_logprobs=None,
    )
    return rest, skip[count:]
