"""Drawing and sample-then-agree on made-up logits: the right distribution, the plain tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from altiplano.serving.engine.draw import InverseDraw
from altiplano.serving.engine.sampler import ExactSampler, carry_refused, restore_refused

VOCAB = 12
STOP = 3


def target_logits(context: list[int]) -> torch.Tensor:
    """A model: logits that depend on all ids so far."""
    generator = torch.Generator().manual_seed(hash(tuple(context)) & 0xFFFFFFFF)
    return 3 * torch.randn(VOCAB, generator=generator)


def make_samplers() -> tuple[Sampler, ExactSampler]:
    """Plain and verifying, as the worker puts them together."""
    plain = Sampler()
    plain.topk_topp_sampler = InverseDraw()
    return plain, ExactSampler(plain)


def metadata_of(
    params: list[SamplingParams],
    prompts: list[list[int]],
    outputs: list[list[int]],
    generators: dict[int, torch.Generator],
) -> SamplingMetadata:
    """What vLLM's batch makes of these requests, with its own processors."""
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(params)))
    processors = LogitsProcessors(
        make(config, torch.device("cpu"), False) for make in BUILTIN_LOGITS_PROCESSORS
    )
    rows = list(zip(range(len(params)), params, prompts, outputs, strict=True))
    for processor in processors.all:
        processor.update_state(BatchUpdate(len(params), removed=[], added=rows, moved=[]))

    def column(name: str) -> torch.Tensor:
        return torch.tensor([float(getattr(one, name)) for one in params])

    top_k = torch.tensor([one.top_k or VOCAB for one in params])
    greedy = [one.temperature == 0 for one in params]
    penalties = [
        one.presence_penalty or one.frequency_penalty or one.repetition_penalty != 1
        for one in params
    ]
    longest = max(map(len, prompts))
    allowed = [one.allowed_token_ids or range(VOCAB) for one in params]
    forbidden = torch.tensor([[token not in some for token in range(VOCAB)] for some in allowed])
    counts = [one.logprobs for one in params if one.logprobs is not None]
    return SamplingMetadata(
        temperature=None if all(greedy) else column("temperature"),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=column("top_p") if any(one.top_p < 1 for one in params) else None,
        top_k=top_k if any(one.top_k for one in params) else None,
        generators=generators,
        max_num_logprobs=max(counts) if counts else None,
        no_penalties=not any(penalties),
        prompt_token_ids=torch.tensor([p + [VOCAB] * (longest - len(p)) for p in prompts]),
        frequency_penalties=column("frequency_penalty"),
        presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"),
        output_token_ids=outputs,
        allowed_token_ids_mask=forbidden if forbidden.any() else None,
        bad_words_token_ids={
            row: one._bad_words_token_ids
            for row, one in enumerate(params)
            if one._bad_words_token_ids
        },
        logitsprocs=processors,
    )


def decode(
    params: list[SamplingParams], prompts: list[list[int]], length: int, guess: Any
) -> tuple[list[list[int]], list[list[Any]]]:
    """Decode every request to `length` tokens, with `guess(row, so far)` as draft.

    Returns:
        Tokens per row, and per token its logprobs: (ids, values, rank).
    """
    plain, exact = make_samplers()
    outputs: list[list[int]] = [[] for _ in params]
    logprobs: list[list[Any]] = [[] for _ in params]
    generators = {
        row: torch.Generator().manual_seed(one.seed)
        for row, one in enumerate(params)
        if one.seed is not None and one.temperature > 0
    }
    while min(map(len, outputs)) < length:
        drafts = [guess(row, out) for row, out in enumerate(outputs)]
        rows = metadata_of(params, prompts, outputs, generators)
        flat = torch.stack(
            [
                target_logits(prompt + out + draft[:position])
                for prompt, out, draft in zip(prompts, outputs, drafts, strict=True)
                for position in range(len(draft) + 1)
            ]
        )
        if any(drafts):
            made = exact(SpecDecodeMetadata.make_dummy(drafts, "cpu"), None, flat, rows)
        else:
            made = plain(flat, rows)
        for row, drawn in enumerate(made.sampled_token_ids.tolist()):
            width = len(drawn)
            fresh = [token for token in drawn if token >= 0]
            outputs[row] += fresh
            if made.logprobs_tensors is not None:
                ids, values, ranks, *_ = made.logprobs_tensors
                for place in range(row * width, row * width + len(fresh)):
                    entry = (ids[place].tolist(), values[place].tolist(), int(ranks[place]))
                    logprobs[row].append(entry)
    return [out[:length] for out in outputs], [entries[:length] for entries in logprobs]


def no_draft(row: int, so_far: list[int]) -> list[int]:
    return []


def a_guesser(prompts: list[list[int]], seed: int, counts: list[int]) -> Any:
    """Guess the likeliest id, often enough right; now and then any id; `counts[row]` at most."""
    draw = torch.Generator().manual_seed(seed)

    def guess(row: int, so_far: list[int]) -> list[int]:
        drafts: list[int] = []
        for _ in range(int(torch.randint(counts[row] + 1, (), generator=draw))):
            likeliest = int(target_logits(prompts[row] + so_far + drafts).argmax())
            wild = int(torch.randint(VOCAB, (), generator=draw))
            drafts.append(wild if torch.rand((), generator=draw) < 0.3 else likeliest)
        return drafts

    return guess


@st.composite
def requests(draw: st.DrawFn) -> SamplingParams:
    """Greedy or seeded, with any of the rules."""
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        seed=draw(st.integers(0, 2**31)),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 1, 5])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        logit_bias=draw(st.sampled_from([None, {5: 4.0, 1: -100.0}])),
        allowed_token_ids=draw(st.sampled_from([None, [1, 2, 3, 5, 8, 9]])),
        min_tokens=(least := draw(st.sampled_from([0, 2, 7]))),
        max_tokens=max(least, 10),
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )
    params._all_stop_token_ids = {STOP}
    params._bad_words_token_ids = draw(st.sampled_from([None, [[5], [1, 8], [2, 2, 9]]]))
    return params


@settings(deadline=None, max_examples=30)
@given(
    params=st.lists(requests(), min_size=1, max_size=5),
    counts=st.lists(st.integers(0, 4), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_greedy_and_seeded_tokens_are_those_without_a_draft(
    params: list[SamplingParams], counts: list[int], seed: int
) -> None:
    prompts = [[row, 4, 7][: 1 + row % 3] for row in range(len(params))]
    tokens, logprobs = decode(params, prompts, 10, no_draft)

    drafted, drafted_logprobs = decode(params, prompts, 10, a_guesser(prompts, seed, counts))

    assert drafted == tokens
    assert drafted_logprobs == logprobs


def test_a_seeded_request_is_the_same_in_any_company() -> None:
    one = SamplingParams(temperature=1.0, seed=7)
    others = [SamplingParams(temperature=t, top_p=p) for t, p in [(0.0, 1.0), (1.0, 0.5), (2.0, 1)]]
    alone, _ = decode([one], [[4]], 12, no_draft)
    among, _ = decode([*others, one], [[1], [2], [3], [4]], 12, no_draft)
    assert among[3] == alone[0]


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the statistic over the ids that can occur; fail if another did."""
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float((((counts - expected) ** 2) / expected).sum())


RULES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=4),
    SamplingParams(temperature=1.3, top_p=0.7),
    SamplingParams(temperature=1.0, min_p=0.15, logit_bias={2: 1.5}),
]


@pytest.mark.parametrize("rules", RULES, ids=["plain", "top-k", "top-p", "min-p and bias"])
def test_unseeded_tokens_have_the_targets_distribution(rules: SamplingParams) -> None:
    rows, draft = 6000, [int(target_logits([0]).argmax())]
    draft.append(int(target_logits([0, *draft]).argmax()))
    torch.manual_seed(1)
    _, exact = make_samplers()
    contexts = [[0], [0, draft[0]], [0, *draft]]
    logits = torch.stack([target_logits(context) for context in contexts])
    batch = metadata_of([rules] * rows, [[0]] * rows, [[] for _ in range(rows)], {})
    drafts = SpecDecodeMetadata.make_dummy([draft] * rows, "cpu")

    tokens = exact(drafts, None, logits.repeat(rows, 1), batch).sampled_token_ids

    for position in range(3):
        drawn = tokens[tokens[:, position] >= 0, position]
        assert len(drawn) > 200, "too few to judge"
        expected = len(drawn) * masked_probabilities(logits[position], rules)
        statistic = chi_squared(torch.bincount(drawn, minlength=VOCAB).float(), expected)
        assert statistic < 45, position  # 11 degrees of freedom: p < 1e-5
    agreed = tokens[:, 0] == draft[0]
    assert torch.equal(agreed, tokens[:, 1] >= 0), "a token after a disagreement, or none after one"


def masked_probabilities(logits: torch.Tensor, rules: SamplingParams) -> torch.Tensor:
    """The rules' definitions, in float64 and one id at a time."""
    logits = logits.double().clone()
    for token, bias in (rules.logit_bias or {}).items():
        logits[token] += bias
    probabilities = (logits / rules.temperature).softmax(0)
    kept = torch.zeros(VOCAB, dtype=torch.bool)
    passed = 0.0
    for rank, token in enumerate(probabilities.argsort(descending=True).tolist()):
        if passed < rules.top_p and (not rules.top_k or rank < rules.top_k):
            kept[token] = probabilities[token] >= rules.min_p * probabilities.max()
        passed += float(probabilities[token])
    return torch.where(kept, probabilities, 0) / probabilities[kept].sum()


def test_a_draw_takes_one_number_and_inverts_the_distribution() -> None:
    logits = torch.tensor([[0.1, 0.0, 0.5, 0.4]]).log()
    generator, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    draw = InverseDraw()
    for _ in range(200):
        token, _ = draw(logits.clone(), {0: generator}, None, None)
        uniform = float(torch.empty(1, dtype=torch.float64).uniform_(generator=same))
        assert token.tolist() == [0 if uniform < 0.1 else 2 if uniform < 0.6 else 3]


def test_rare_ids_of_a_large_vocabulary_are_drawn_as_often_as_they_should() -> None:
    size, rows = 50_000, 64
    logits = torch.full((rows, size), -20.0)  # together as likely as the first id, 5e-9 * size
    logits[:, 0] = torch.tensor(float(size)).log() - 20
    torch.manual_seed(0)
    drawn = torch.cat([InverseDraw()(logits, {}, None, None)[0] for _ in range(30)])
    share = float((drawn > 0).float().mean())
    assert abs(share - 0.5) < 0.06
    assert len(drawn[drawn > 0].unique()) > 0.95 * (drawn > 0).sum()


def test_what_vllm_refuses_travels_and_comes_back() -> None:
    params = SamplingParams(min_p=0.2, logit_bias={3: 1.0}, extra_args={"other": 1})
    carry_refused(params, VOCAB)
    assert (params.min_p, params.logit_bias) == (0.0, None)
    restore_refused(params)
    assert (params.min_p, params.logit_bias) == (0.2, {3: 1.0})
    untouched = SamplingParams()
    carry_refused(untouched, VOCAB)
    assert untouched.extra_args is None
    with pytest.raises(ValueError, match=r"\[12\].*12 ids"):
        carry_refused(SamplingParams(logit_bias={12: 1.0}), VOCAB)
