"""Beam search over any client of a model, by jobs of one token.

Transformers' rules (`num_beams`): a finished beam's score is its log-probability divided by
`length ** length_penalty`; the search ends when no running beam can beat the worst finished one by
its score so far, or, with `early_stopping`, once enough have finished. Knows neither text nor HTTP.
Each token costs `width` jobs of one token; the engine's prefix cache holds their beginnings.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import msgspec

from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.generation import generate
from altiplano.serving.front.models import ServedModel
from altiplano.serving.front.schemas import ChatRequest, CompletionRequest
from altiplano.serving.front.together import gathered
from altiplano.serving.messages import Job, Sampling, Step, TokenLogprob

Ask = Callable[[list[list[int]]], Awaitable[list[Sequence[TokenLogprob]]]]
"""Sequences of answer tokens -> for each, its likeliest next tokens."""


@dataclass(frozen=True)
class Beam:
    """An answer, or the beginning of one."""

    tokens: list[int]
    logprob: float
    """Natural logarithm of its probability."""
    score: float
    """What finished beams are compared by."""


async def search(
    ask: Ask,
    *,
    width: int,
    max_tokens: int,
    end_ids: frozenset[int],
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> list[Beam]:
    """The `width` best answers, best first.

    Args:
        ask: must tell at least `width + len(end_ids)` next tokens each.
        width: number of beams.
        max_tokens: an answer of so many tokens is finished.
        end_ids: tokens that finish an answer.
        length_penalty: above 0 favours long answers, below 0 short ones.
        early_stopping: end as soon as `width` answers are finished.
    """
    running = [Beam([], 0.0, 0.0)]
    finished: list[Beam] = []
    for length in range(1, max_tokens + 1):
        likely = await ask([beam.tokens for beam in running])
        candidates = sorted(_grown(running, likely, length**length_penalty), key=_by_logprob)
        ends = [length == max_tokens or beam.tokens[-1] in end_ids for beam in candidates]
        # An end counts only among the best `width`; the others are there to go on with.
        ended = [beam for beam, end in zip(candidates[:width], ends, strict=False) if end]
        finished = sorted([*finished, *ended], key=lambda beam: -beam.score)[:width]
        running = [beam for beam, end in zip(candidates, ends, strict=True) if not end][:width]
        full = len(finished) == width
        if not running or (full and (early_stopping or running[0].score <= finished[-1].score)):
            break
    return finished


def _grown(
    running: Sequence[Beam], likely: Sequence[Sequence[TokenLogprob]], divisor: float
) -> list[Beam]:
    return [
        Beam([*beam.tokens, id_], total := beam.logprob + logprob, total / divisor)
        for beam, following in zip(running, likely, strict=True)
        # The chosen token stands twice where it is among the likeliest.
        for id_, logprob in {id_: logprob for id_, logprob, _ in following}.items()
    ]


def _by_logprob(beam: Beam) -> float:
    return -beam.logprob


async def search_answers(
    model: ServedModel, job: Job, body: ChatRequest | CompletionRequest
) -> list[Step]:
    """A request's answers by beam search: one step each with all its tokens, best first.

    Args:
        job: the prompt, and in `sampling` the longest answer.
        body: `n` is the number of beams.

    Raises:
        ApiError: 400, the request wants what beams do not have; else as `generation.generate`.
    """
    _check(body)
    sampling = job.sampling
    end_ids = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        end_ids |= read_end_ids(model.directory)
    one = Sampling(max_tokens=1, temperature=0.0, logprobs=body.n + len(end_ids), ignore_eos=True)

    async def next_tokens(beam: list[int]) -> Sequence[TokenLogprob]:
        asked = msgspec.structs.replace(job, prompt=[*job.prompt, *beam], sampling=one)
        async with aclosing(generate(model, asked)) as steps:
            async for step in steps:
                if step.logprobs:
                    return step.logprobs[0]
        raise ApiError(500, "the engine told no probabilities")

    async def ask(beams: list[list[int]]) -> list[Sequence[TokenLogprob]]:
        return await gathered([next_tokens(beam) for beam in beams])

    found = await search(
        ask,
        width=body.n,
        max_tokens=sampling.max_tokens,
        end_ids=end_ids,
        length_penalty=body.length_penalty,
        early_stopping=body.early_stopping,
    )
    return [
        Step(job.id, beam.tokens, "stop" if beam.tokens[-1] in end_ids else "length")
        for beam in found
    ]


def read_end_ids(directory: Path) -> frozenset[int]:
    """Tokens that end an answer: those of config.json and generation_config.json, as in vLLM."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        ids = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else None
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


def _check(body: ChatRequest | CompletionRequest) -> None:
    """Refuse what would change probabilities, or needs what is only known while sampling."""
    usual = Sampling(max_tokens=1)
    changed = [
        name
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")
        if getattr(body, name) != getattr(usual, name)
    ]
    changed += [name for name in ("logit_bias", "stop") if getattr(body, name)]
    if body.top is not None:
        changed.append("logprobs")
    if isinstance(body, ChatRequest) and body.tools:
        changed.append("tools")
    if isinstance(body, CompletionRequest) and len(body.prompts) > 1:
        changed.append("prompt (several)")
    if changed:
        raise ApiError(
            400, f"beam search goes without {', '.join(changed)}", param=changed[0].split()[0]
        )
