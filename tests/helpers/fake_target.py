"""A model's replicas without an engine: tokens by rule, deaths by plan."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from altiplano.config.serving import KeySettings, LimitSettings, ModelSettings
from altiplano.serving.front.keys import KeyRing
from altiplano.serving.front.models import ServedModel, TargetLost, open_model
from altiplano.serving.front.state import FrontState
from altiplano.serving.front.telemetry import MemoryMeters, Telemetry
from altiplano.serving.link import Inbox
from altiplano.serving.messages import About, Embedding, Job, Outcome, Step

Rule = Callable[[Sequence[int], Job], int | None]
"""The token that follows a sequence; None ends the answer."""


def fixed(answer: Sequence[int], prompt_length: int) -> Rule:
    """Say `answer` to a prompt of that length, and go on where a continuation stands."""

    def rule(sequence: Sequence[int], _: Job) -> int | None:
        place = len(sequence) - prompt_length
        return answer[place] if place < len(answer) else None

    return rule


@dataclass
class FakeTarget:
    """Implements `TargetClient`."""

    inbox: Inbox
    rule: Rule
    deaths: list[int] = field(default_factory=list)
    """Tokens after which the call number i dies; calls beyond the list live."""
    per_step: int = 1
    outcome: Outcome | None = None
    """What calls return at once instead of an answer."""
    pause: float = 0.0
    """Seconds between steps."""
    jobs: list[Job] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    eos: int = 2

    async def call(self, job: Job) -> Outcome:
        """Answer by the rule."""
        number = len(self.jobs)
        self.jobs.append(job)
        self.running += 1
        try:
            if self.outcome is not None:
                return self.outcome
            return await self._run(job, self.deaths[number] if number < len(self.deaths) else None)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _run(self, job: Job, death: int | None) -> Outcome:
        sequence, made = list(job.prompt), 0
        while True:
            await asyncio.sleep(self.pause)
            tokens: list[int] = []
            finish = None
            while len(tokens) < self.per_step and finish is None:
                if death is not None and made + len(tokens) >= death:
                    self._send(job, tokens, None)
                    await asyncio.sleep(0)
                    raise TargetLost("killed by the test")
                token = self.rule(sequence, job)
                tokens.append(self.eos if token is None else token)
                sequence.append(tokens[-1])
                if token is None:
                    finish = "stop"
                elif made + len(tokens) == job.sampling.max_tokens:
                    finish = "length"
            made += len(tokens)
            self._send(job, tokens, finish)
            if finish is not None:
                return Outcome("done", tokens=made)

    def _send(self, job: Job, tokens: list[int], finish: str | None) -> None:
        top = job.sampling.logprobs
        logprobs = None
        if top is not None:
            logprobs = [
                [(token, -0.5, 1), *((token + i, -1.0 - i, 1 + i) for i in range(1, top))]
                for token in tokens
            ]
        prompt_logprobs = None
        if job.sampling.prompt_logprobs is not None:
            prompt_logprobs = [None, *([(token, -2.0, 1)] for token in job.prompt[1:])]
        self.inbox.deliver(
            [
                Step(
                    job.id,
                    tokens,
                    finish,
                    logprobs=logprobs,  # type: ignore[arg-type]
                    prompt_logprobs=prompt_logprobs,  # type: ignore[arg-type]
                )
            ]
        )

    async def embed(self, job: Job) -> Embedding:
        """The prompt's length and its first id."""
        return Embedding("done", vector=[float(len(job.prompt)), float(job.prompt[0])])

    async def describe(self) -> About:
        """A small engine."""
        return About(256, 400, "float32", "fake 1", "generate", 0.0)


def fake_model(
    directory: Path, rule: Rule, *, name: str = "tiny", task: str = "generate", **how: object
) -> ServedModel:
    """A served model of that directory whose client is a `FakeTarget`."""
    inbox = Inbox()
    client = FakeTarget(inbox, rule, **how)  # type: ignore[arg-type]
    entry = ModelSettings(name=name, path=str(directory), task=task)  # type: ignore[arg-type]
    return open_model(entry, directory, client, inbox)


def fake_state(*models: ServedModel, **limits: object) -> FrontState:
    """Routes' state without keys, its counters in memory."""
    return FrontState(
        models=models,
        limits=LimitSettings(**limits),  # type: ignore[arg-type]
        keys=KeyRing(KeySettings()),
        telemetry=Telemetry(MemoryMeters()),
    )
