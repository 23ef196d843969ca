"""What becomes of an answer when the replica that makes it dies: same text, told once. 3 s."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from altiplano.serving.front import generation
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.generation import answers, continuation, generate
from altiplano.serving.front.models import ServedModel
from altiplano.serving.messages import Job, Outcome, Sampling, Step
from tests.helpers.fake_target import FakeTarget, fake_model, fixed
from tests.helpers.served_run import write_small_model

PROMPT = [1, 300, 301]
ANSWER = list(range(310, 322))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("models") / "tiny")


def _target(model: ServedModel) -> FakeTarget:
    assert isinstance(model.client, FakeTarget)
    return model.client


def _job(**sampling: Any) -> Job:
    return Job("job", PROMPT, Sampling(max_tokens=50, **sampling))


def _collect(model: ServedModel, job: Job, restart: Callable[[], None] | None = None) -> list[Step]:
    async def run() -> list[Step]:
        return [step async for step in generate(model, job, restart=restart)]

    return asyncio.run(asyncio.wait_for(run(), 20))


def _tokens(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("death", [0, 1, 5, 12])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"seed": 7}, {"guided": {"regex": "a"}}]
)
def test_a_death_changes_no_token(
    directory: Path, death: int, per_step: int, sampling: dict[str, Any]
) -> None:
    model = fake_model(directory, fixed(ANSWER, len(PROMPT)), deaths=[death], per_step=per_step)
    steps = _collect(model, _job(**sampling))
    assert _tokens(steps) == [*ANSWER, 2]
    assert [step.finish for step in steps if step.finish] == ["stop"]
    first, second = _target(model).jobs
    assert first.id != second.id
    continued = "temperature" in sampling
    assert second.prompt == [*PROMPT, *(ANSWER[:death] if continued else [])]
    assert second.sampling.max_tokens == 50 - (death if continued else 0)


def test_an_answer_that_would_go_on_differently_is_an_error_not_a_mixture(directory: Path) -> None:
    calls: list[str] = []

    def rule(sequence: list[int], job: Job) -> int:
        if job.id not in calls:
            calls.append(job.id)
        return 310 + len(sequence) + 20 * (len(calls) - 1)

    model = fake_model(directory, rule, deaths=[4])  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="differently") as refused:
        _collect(model, _job(seed=1))
    assert refused.value.status == 503


def test_what_nobody_has_seen_may_begin_anew(directory: Path) -> None:
    calls: list[str] = []
    restarts: list[int] = []

    def rule(sequence: list[int], job: Job) -> int:
        if job.id not in calls:
            calls.append(job.id)
        return 310 + 20 * (len(calls) - 1)

    model = fake_model(directory, rule, deaths=[4])  # type: ignore[arg-type]
    steps = _collect(model, _job(guided={"regex": "a"}), lambda: restarts.append(1))
    assert restarts == [1]
    assert _tokens(steps) == [310] * 4 + [330] * 50


def test_two_deaths_are_an_error_that_says_so(directory: Path) -> None:
    model = fake_model(directory, fixed(ANSWER, len(PROMPT)), deaths=[2, 2])
    with pytest.raises(ApiError, match="two replicas") as refused:
        _collect(model, _job())
    assert (refused.value.status, refused.value.code) == (503, "replica_lost")
    assert len(_target(model).jobs) == 2


def test_a_death_after_the_last_token_that_was_allowed_ends_the_answer(directory: Path) -> None:
    model = fake_model(directory, fixed(ANSWER, len(PROMPT)), deaths=[6])
    job = msgspec.structs.replace(_job(), sampling=Sampling(max_tokens=6, temperature=0.0))
    steps = _collect(model, job)
    assert (_tokens(steps), steps[-1].finish) == (ANSWER[:6], "length")
    assert len(_target(model).jobs) == 1


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome("invalid", "no such grammar"), 400), (Outcome("lost", "the engine died"), 503)],
)
def test_a_refusal_is_told_and_a_dead_engine_is_tried_once_more(
    directory: Path, outcome: Outcome, status: int
) -> None:
    model = fake_model(directory, fixed(ANSWER, len(PROMPT)), outcome=outcome)
    with pytest.raises(ApiError) as refused:
        _collect(model, _job())
    assert refused.value.status == status
    assert len(_target(model).jobs) == (1 if status == 400 else 2)


def test_an_end_that_never_comes_is_a_loss(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_LAST_STEPS_S", 0.05)
    model = fake_model(directory, fixed(ANSWER, len(PROMPT)), outcome=Outcome("done", tokens=3))
    with pytest.raises(ApiError, match="two replicas"):
        _collect(model, _job())


def test_who_stops_listening_frees_the_place(directory: Path) -> None:
    model = fake_model(directory, lambda *_: 310, pause=0.001)

    async def run() -> None:
        async with aclosing(generate(model, _job())) as steps:
            async for _ in steps:
                assert _target(model).running == 1
                break
        await asyncio.sleep(0.01)
        assert _target(model).running == 0 and _target(model).cancelled == 1

    asyncio.run(run())


def test_frequency_becomes_a_bias_and_the_rest_shrinks() -> None:
    job = _job(frequency_penalty=0.5, min_tokens=4, logit_bias={7: 1.0}, prompt_logprobs=2)
    rest = continuation(job, [7, 7, 8])
    assert rest is not None
    assert rest.sampling.logit_bias == {7: 0.0, 8: -0.5}
    assert (rest.sampling.min_tokens, rest.sampling.max_tokens) == (1, 47)
    assert rest.sampling.prompt_logprobs is None
    assert job.sampling.logit_bias == {7: 1.0}


@pytest.mark.parametrize(
    "sampling",
    [
        {"seed": 1},
        {"guided": {"json_object": True}},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1, "repetition_penalty": 1.1},
    ],
)
def test_what_would_be_another_answer_is_not_continued(sampling: dict[str, Any]) -> None:
    assert continuation(_job(**sampling), [5]) is None


def test_answers_differ_in_id_and_seed_only() -> None:
    jobs = answers(_job(seed=10), 3)
    assert [job.sampling.seed for job in jobs] == [10, 11, 12]
    assert len({job.id for job in jobs}) == 3
    assert {tuple(job.prompt) for job in jobs} == {tuple(PROMPT)}
