"""Real engines on CPU: what a draft proposes changes the time of an answer and nothing else."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from vllm import LLM, SamplingParams, TokensPrompt

from altiplano.config.serving import DraftSettings, ModelSettings
from altiplano.serving.engine.arguments import engine_arguments
from altiplano.serving.engine.sampler import carry_refused
from altiplano.serving.speculation.proposer import Proposer
from tests.helpers.llama2c import write_base

PROMPTS = [[1], [1, 403], [1, 407, 261], [1, *range(300, 420)]]
"""The last is longer than one step takes (`max_num_batched_tokens`)."""


class Guesser(Proposer):
    """Our proposer, or somebody who proposes what `mode` says instead."""

    mode: ClassVar[str] = "draft"
    made: ClassVar["Guesser"]
    answers: ClassVar[list[list[int]]] = []
    """Prompts with their right answers, for `right` and `wrong`."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        Guesser.made = self
        self.proposed: dict[tuple[int, ...], int] = {}
        self.tried = self.right = 0
        self.draw = torch.Generator().manual_seed(0)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        lengths = num_tokens_no_spec[: len(sampled_token_ids)]
        texts = [ids[:length].tolist() for ids, length in zip(token_ids_cpu, lengths, strict=False)]
        self.count(texts, sampled_token_ids)
        if self.mode == "draft":
            made = super().propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        else:
            rows = zip(texts, sampled_token_ids, strict=True)
            made = [self.guess(text) if fresh else [] for text, fresh in rows]
        self.proposed = {tuple(t): m[0] for t, m in zip(texts, made, strict=True) if m}
        return made

    def count(self, texts: list[list[int]], sampled: list[list[int]]) -> None:
        """Count how often the first token proposed in the last step was right."""
        for text, fresh in zip(texts, sampled, strict=True):
            guess = self.proposed.get(tuple(text[: len(text) - len(fresh)]))
            if guess is not None and fresh:
                self.tried += 1
                self.right += guess == fresh[0]

    def guess(self, so_far: list[int]) -> list[int]:
        """At most four ids after `so_far`."""
        count = int(torch.randint(5, (), generator=self.draw))
        if self.mode == "random":
            return torch.randint(512, (count,), generator=self.draw).tolist()
        known = [text for text in self.answers if text[: len(so_far)] == so_far]
        right = known[0][len(so_far) :][:4] if known else []
        return right if self.mode == "right" else [(token + 1) % 512 for token in right]


@pytest.fixture(scope="module")
def pair(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft that were really trained, on the same text with one tokenizer."""
    models, root = shared / "models", tmp_path_factory.mktemp("pair")
    return (
        write_base(models / "stories260K.bin", models / "tok512.model", root / "target"),
        write_base(models / "llama2xs_279K.bin", models / "tok512.model", root / "draft"),
    )


@pytest.fixture(scope="module")
def vllm_here() -> Iterator[None]:
    """Let vLLM run in this process, and put back what it changes here."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.envs import disable_envs_cache

    # Another test's engine may have made vLLM remember its environment.
    disable_envs_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        for owner, name in (
            (torch, "set_num_threads"),
            (torch.accelerator, "synchronize"),
            (torch.accelerator, "empty_cache"),
        ):
            patch.setattr(owner, name, getattr(owner, name))
        yield
        cleanup_dist_env_and_memory()


def start(pair: tuple[Path, Path], *, drafted: bool) -> LLM:
    """Return the engine that the service would start, in this process."""
    draft = DraftSettings(tokens=4, adaptive=False, cache_gib=0.02)
    entry = ModelSettings(
        name="pair",
        path="",
        draft=draft,
        dtype="float32",
        kv_cache_gib=0.05,
        max_model_len=256,
        max_ongoing_requests=16,
    )
    arguments = engine_arguments(
        entry, pair[0], pair[1] if drafted else None, channel="ipc://" + str(pair[0] / "channel")
    )
    if drafted:
        arguments["speculative_config"]["model"] = f"{__name__}.Guesser"
    return LLM(
        **arguments
        | {"distributed_executor_backend": "uni", "max_num_batched_tokens": 64, "seed": 0}
    )


@pytest.fixture(scope="module")
def plain(pair: tuple[Path, Path], vllm_here: None) -> LLM:
    return start(pair, drafted=False)


@pytest.fixture(scope="module")
def drafted(pair: tuple[Path, Path], vllm_here: None) -> LLM:
    return start(pair, drafted=True)


def rules() -> list[SamplingParams]:
    """One per prompt, together in each batch."""
    common: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "detokenize": False}
    return [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=1, seed=1, logprobs=2, **common),
        SamplingParams(temperature=0.8, top_p=0.9, seed=2, presence_penalty=0.5, **common),
        SamplingParams(temperature=1.2, top_k=20, min_p=0.02, seed=3, **common),
        SamplingParams(temperature=0.7, seed=4, logit_bias={263: 2.0}, min_tokens=20, **common),
    ]


def answers(engine: LLM, *, exact: bool) -> list[Any]:
    """Return the completion of every prompt by every rule, in one batch."""
    params = [one for one in rules() for _ in PROMPTS]
    if exact:
        for one in params:
            carry_refused(one, 512)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for _ in rules() for prompt in PROMPTS]
    return [output.outputs[0] for output in engine.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(plain: LLM) -> list[Any]:
    made = answers(plain, exact=False)
    prompts = [prompt for _ in rules() for prompt in PROMPTS]
    Guesser.answers = [[*prompt, *one.token_ids] for prompt, one in zip(prompts, made, strict=True)]
    return made


@pytest.mark.parametrize("mode", ["right", "wrong", "random", "draft"])
def test_greedy_and_seeded_answers_are_those_without_a_draft(
    expected: list[Any], drafted: LLM, mode: str
) -> None:
    Guesser.mode = mode
    before = Guesser.made.right
    made = answers(drafted, exact=True)
    assert [one.token_ids for one in made] == [one.token_ids for one in expected]
    for one, other in zip(made, expected, strict=True):
        for here, there in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert here.keys() == there.keys()
            for token, entry in here.items():
                assert math.isclose(entry.logprob, there[token].logprob, abs_tol=1e-3)
                assert entry.rank == there[token].rank
    if mode in ("draft", "right"):
        assert Guesser.made.right > before + 100, "the draft did not take part"


@pytest.mark.parametrize(("temperature", "least", "most"), [(0.0, 0.66, 0.86), (1.0, 0.3, 0.7)])
def test_a_trained_pair_agrees_as_often_as_it_should(
    drafted: LLM, temperature: float, least: float, most: float
) -> None:
    Guesser.mode = "draft"
    guesser = Guesser.made
    tried, right = guesser.tried, guesser.right
    params = SamplingParams(temperature=temperature, max_tokens=100, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=[1, token]) for token in range(403, 435)]
    drafted.generate(prompts, params, use_tqdm=False)
    share = (guesser.right - right) / (guesser.tried - tried)
    assert least < share < most
