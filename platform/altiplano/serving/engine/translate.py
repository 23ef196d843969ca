"""Between our messages and vLLM's parameters and outputs.

Knows no engine. Imports vLLM. Translating one step of one job takes some microseconds.
"""

import json

from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from altiplano.serving.engine.base import InvalidJob
from altiplano.serving.messages import Job, Sampling, Step, TokenLogprob

_SEEDS = range(-(2**63), 2**63)
"""What torch's generators take of both signs; another would end the engine."""
_LARGEST_BIAS = 100.0
_LARGEST_GRAMMAR = 1 << 16
"""Characters: a schema with 20,000 values takes xgrammar half a minute of every CPU."""
_LARGEST = {"regex": 1024}
"""A class of 2,000 characters, repeated, takes it minutes."""


def sampling_params(sampling: Sampling) -> SamplingParams:
    """vLLM's form of how tokens are chosen.

    Raises:
        InvalidJob: a seed, a bias or a grammar that would harm the engine.
        VLLMClientError: what vLLM itself refuses.
    """
    if sampling.seed is not None and sampling.seed not in _SEEDS:
        raise InvalidJob(f"`seed` {sampling.seed} is not a signed 64-bit integer")
    for token, bias in sampling.logit_bias.items():
        if not -_LARGEST_BIAS <= bias <= _LARGEST_BIAS:
            raise InvalidJob(f"`logit_bias` of {token} is {bias}: give a number of -100 to 100")
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        logit_bias=sampling.logit_bias or None,
        structured_outputs=_structured(sampling.guided),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        # Made for one job: vLLM need not copy it.
        skip_clone=True,
    )


def step_of(job: Job, output: RequestOutput, first: bool) -> Step:
    """What vLLM made for a job in one step.

    Args:
        first: whether nothing was made before.
    """
    [made] = output.outputs
    tokens = list(made.token_ids)
    finish = made.finish_reason
    speculated = made.spec_decode_metrics
    logprobs = None
    if made.logprobs is not None:
        logprobs = [
            _chosen_first(token, likely, job.sampling.logprobs)
            for token, likely in zip(tokens, made.logprobs, strict=True)
        ]
    return Step(
        id=job.id,
        tokens=tokens,
        finish=finish if finish in (None, "stop", "length") else "error",
        logprobs=logprobs,
        prompt_logprobs=_prompt_logprobs(job, output) if first else None,
        cached_tokens=(output.num_cached_tokens or 0) if first else 0,
        proposed=speculated.num_draft_tokens if speculated else 0,
        accepted=sum(n * steps for n, steps in enumerate(speculated.histogram))
        if speculated
        else 0,
        stop_token=made.stop_reason if isinstance(made.stop_reason, int) else None,
    )


def _structured(guided: dict[str, object] | None) -> StructuredOutputsParams | None:
    if guided is None:
        return None
    for kind, grammar in guided.items():
        size, most = len(json.dumps(grammar)), _LARGEST.get(kind, _LARGEST_GRAMMAR)
        if size > most:
            raise InvalidJob(f"the answer's {kind} has {size} characters, {most} are allowed")
    return StructuredOutputsParams(**guided)


def _prompt_logprobs(job: Job, output: RequestOutput) -> list[list[TokenLogprob] | None] | None:
    """Per prompt token; vLLM gives None at the first, which nothing predicts."""
    if output.prompt_logprobs is None:
        return None
    return [
        None if likely is None else _chosen_first(token, likely, job.sampling.prompt_logprobs)
        for token, likely in zip(job.prompt, output.prompt_logprobs, strict=True)
    ]


def _chosen_first(chosen: int, likely: dict[int, Logprob], count: int | None) -> list[TokenLogprob]:
    """The chosen token, then the `count` likeliest by rank (where it may stand again)."""
    triples = [(token, one.logprob, one.rank or 0) for token, one in likely.items()]
    own = next(triple for triple in triples if triple[0] == chosen)
    triples.sort(key=lambda triple: triple[2])
    return [own, *triples[: count or 0]]
