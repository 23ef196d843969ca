"""One real engine: its tokens are the model's, refusals harm nobody, ends and deaths are told."""

import asyncio
import copy
import json
import os
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from altiplano.config.serving import ModelSettings
from altiplano.errors import ServeError
from altiplano.serving.engine.base import EngineLost, InvalidJob
from altiplano.serving.messages import Job, Sampling, Step
from tests.helpers.adapters import write_adapter
from tests.helpers.served_run import write_served_run

pytestmark = pytest.mark.skipif(
    not Path("/proc").is_dir(), reason="finds the engine's processes in /proc"
)
T = TypeVar("T")
PROMPT = [1, 300, 301, 302]


class Served:
    """An engine and the event loop it lives in."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.loop = engine, loop
        self.count = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end, or fail."""
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def job(self, prompt: list[int] = PROMPT, **sampling: Any) -> Job:
        """A greedy job of a few tokens, unless `sampling` says otherwise."""
        self.count += 1
        settings = {"max_tokens": 6, "temperature": 0.0, **sampling}
        return Job(f"job{self.count}", prompt, Sampling(**settings))

    async def collect(self, job: Job) -> list[Step]:
        """All steps of a job."""
        return [step async for step in self.engine.generate(job)]

    def tokens(self, prompt: list[int] = PROMPT, **sampling: Any) -> list[int]:
        """The tokens of a job."""
        return flat(self.run(self.collect(self.job(prompt, **sampling))))


def flat(steps: list[Step]) -> list[int]:
    """The tokens of steps."""
    return [token for step in steps for token in step.tokens]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with its draft."""
    return write_served_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(run_dir: Path) -> Iterator[Served]:
    """The target in vLLM, one engine for all tests of this file."""
    from altiplano.serving.engine.vllm import VllmEngine

    entry = ModelSettings(
        name="tiny",
        path=str(run_dir),
        dtype="float32",
        kv_cache_gib=0.05,
        max_ongoing_requests=8,
        max_adapters=2,
        max_adapter_rank=8,
    )
    engine = VllmEngine(entry, run_dir / "merge")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.start())
    yield Served(engine, loop)
    engine.shutdown()
    # vLLM's tasks hear of it in the loop.
    loop.run_until_complete(asyncio.sleep(0.1))
    loop.close()


@pytest.fixture(scope="module")
def model(run_dir: Path) -> Any:
    """The same target in transformers."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(run_dir / "merge").eval()


def test_greedy_tokens_and_logprobs_are_the_models_own(served: Served, model: Any) -> None:
    import torch

    steps = served.run(served.collect(served.job(logprobs=3, prompt_logprobs=2)))
    tokens = flat(steps)
    ids = torch.tensor([PROMPT + tokens])
    with torch.no_grad():
        own = model(ids).logits[0].log_softmax(-1)
    assert tokens == own[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert steps[-1].finish == "length" and all(step.finish is None for step in steps[:-1])
    positions = [each for step in steps for each in step.logprobs or []]
    for row, position in zip(own[len(PROMPT) - 1 : -1], positions, strict=True):
        values, likely = row.topk(3)
        assert [each[0] for each in position] == [likely[0].item(), *likely.tolist()]
        assert [each[2] for each in position] == [1, 1, 2, 3]
        assert [each[1] for each in position[1:]] == pytest.approx(values.tolist(), abs=1e-4)
    first, *rest = steps[0].prompt_logprobs or []
    assert first is None
    for token, row, position in zip(PROMPT[1:], own, rest, strict=False):
        assert position is not None and len(position) == 3
        rank = int((row > row[token]).sum()) + 1
        assert position[0] == (token, pytest.approx(row[token].item(), abs=1e-4), rank)
    assert all(step.prompt_logprobs is None for step in steps[1:])


def test_end_and_stop_tokens_end_an_answer(served: Served) -> None:
    eos, stop = 2, 350
    ended = served.run(served.collect(served.job(logit_bias={eos: 100.0})))
    assert flat(ended) == [eos] and ended[-1].finish == "stop" and ended[-1].stop_token is None
    assert len(served.tokens(logit_bias={eos: 100.0}, ignore_eos=True)) == 6
    stopped = served.run(
        served.collect(served.job(logit_bias={stop: 100.0}, stop_token_ids=[stop], min_tokens=3))
    )
    assert flat(stopped)[-1] == stop and len(flat(stopped)) == 4
    assert stopped[-1].finish == "stop" and stopped[-1].stop_token == stop


def test_a_seed_decides_a_sampled_answer(served: Served) -> None:
    first, again, other = (served.tokens(seed=s, temperature=1.0, max_tokens=20) for s in (7, 7, 8))
    assert first == again != other
    for seed in (2**63 - 1, -(2**63)):
        assert len(served.tokens(seed=seed, temperature=1.0)) == 6


@pytest.mark.parametrize(
    "prompt, sampling, word",
    [
        ([], {}, "prompt"),
        ([1, 400], {}, "vocabulary"),
        ([1, -1], {}, "vocabulary"),
        ([1] * 300, {}, "256"),
        (PROMPT, {"seed": 2**64}, "seed"),
        (PROMPT, {"temperature": float("nan")}, "temperature"),
        (PROMPT, {"top_p": 0.0}, "top_p"),
        (PROMPT, {"max_tokens": 0}, "max_tokens"),
        (PROMPT, {"logprobs": 100}, "logprobs"),
        (PROMPT, {"stop_token_ids": [4000]}, "stop_token_ids"),
        (PROMPT, {"logit_bias": {400: 1.0}}, "logit_bias"),
        (PROMPT, {"logit_bias": {3: float("nan")}}, "logit_bias"),
        (PROMPT, {"guided": {"regex": "(a"}}, "regex"),
        (PROMPT, {"guided": {"regex": "(" * 2000 + ")" * 2000}}, "regex"),
        (PROMPT, {"guided": {"json": {"enum": [f"value{i}" for i in range(9999)]}}}, "allowed"),
        (PROMPT, {"guided": {"grammar": "root ::= nothing"}}, "grammar"),
        (PROMPT, {"guided": {"grammar": "root ::= " + "(" * 2000 + '"a"' + ")" * 2000}}, "grammar"),
        (PROMPT, {"guided": {"json": {"$ref": "#/nothing"}}}, "json"),
        (PROMPT, {"guided": {"choice": []}}, "hoice"),
    ],
)
def test_a_job_the_engine_refuses_says_why_and_harms_nobody(
    served: Served, prompt: list[int], sampling: dict[str, Any], word: str
) -> None:
    with pytest.raises(InvalidJob, match=word):
        served.tokens(prompt, **sampling)
    served.run(served.engine.check_health())
    assert len(served.tokens()) == 6


@pytest.mark.parametrize(
    "guided, check",
    [
        ({"choice": ["baba", "bebe"]}, lambda text: text in ("baba", "bebe")),
        ({"regex": "[bd]{3}"}, lambda text: len(text) == 3 and set(text) <= set("bd")),
        ({"grammar": 'root ::= "k" "i" | "ko"'}, lambda text: text in ("ki", "ko")),
        (
            {"json": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}},
            lambda text: json.loads(text)["a"] in (1, 2),
        ),
    ],
)
def test_a_guided_answer_fits_its_grammar(
    served: Served, run_dir: Path, guided: dict[str, Any], check: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "merge")
    tokens = served.tokens(guided=guided, max_tokens=60)
    assert check(tokenizer.decode(tokens, skip_special_tokens=True).strip()), tokens


def test_a_prompt_that_was_there_is_taken_from_the_cache(served: Served) -> None:
    prompt = [1, *range(260, 399)]
    first, again = (served.run(served.collect(served.job(prompt))) for _ in range(2))
    assert first[0].cached_tokens == 0 and again[0].cached_tokens == 128
    assert flat(first) == flat(again)


def test_a_cancelled_job_ends_in_the_engine(served: Served) -> None:
    async def cancel_after_one() -> int:
        job = served.job(max_tokens=240, ignore_eos=True)
        seen = asyncio.Event()

        async def read() -> None:
            async for _ in served.engine.generate(job):
                seen.set()

        task = asyncio.create_task(read())
        await seen.wait()
        task.cancel()
        await asyncio.wait([task])
        return int(served.engine._running().get_num_unfinished_requests())

    assert served.run(cancel_after_one()) == 0


def test_an_iterator_that_is_closed_ends_its_job(served: Served) -> None:
    async def close_after_one() -> int:
        steps = served.engine.generate(served.job(max_tokens=240, ignore_eos=True))
        await anext(steps)
        await steps.aclose()
        return int(served.engine._running().get_num_unfinished_requests())

    assert served.run(close_after_one()) == 0


def test_a_loaded_adapter_answers_as_in_peft(served: Served, model: Any, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    base = served.tokens()
    answers = []
    for seed in (1, 2, 3):
        write_adapter(tmp_path / str(seed), seed=seed)
        address = served.run(served.engine.load_adapter(f"a{seed}", str(tmp_path / str(seed))))
        job = served.job()
        job.adapter, job.adapter_path = f"a{seed}", address
        answers.append(flat(served.run(served.collect(job))))
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / str(seed))
        with torch.no_grad():
            logits = adapted(torch.tensor([PROMPT + answers[-1]])).logits[0]
        assert answers[-1] == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert len({tuple(each) for each in (base, *answers)}) == 4
    assert served.tokens() == base


def test_an_adapter_that_does_not_fit_is_refused_and_harms_nobody(
    served: Served, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "wide", width=96)
    with pytest.raises(InvalidJob, match=r"wide.*\[4, 96\]"):
        served.run(served.engine.load_adapter("wide", str(tmp_path / "wide")))
    with pytest.raises(InvalidJob, match="no adapter at"):
        served.run(served.engine.load_adapter("none", str(tmp_path / "none")))
    served.run(served.engine.check_health())
    assert len(served.tokens()) == 6


def test_what_is_served_is_told(served: Served) -> None:
    about = served.engine.about()
    assert (about.max_model_len, about.vocab_size, about.dtype) == (256, 400, "float32")
    assert about.engine.startswith("vllm 0.29") and 0 < about.weights_gib < 0.1


def test_a_cache_too_small_for_one_request_is_refused_with_both_numbers(run_dir: Path) -> None:
    from altiplano.serving.engine.vllm import VllmEngine

    entry = ModelSettings(name="tiny", path=str(run_dir), dtype="float32", kv_cache_gib=0.0001)
    with pytest.raises(ServeError, match=r"256 tokens.* 0.01 GiB.*kv_cache_gib.*max_model_len"):
        asyncio.run(VllmEngine(entry, run_dir / "merge").start())


def test_a_dead_engine_is_told_to_its_jobs_and_to_later_ones(served: Served) -> None:
    """The last test of the file: it kills the engine."""

    async def kill_after_one() -> int:
        steps = served.engine.generate(served.job(max_tokens=240, ignore_eos=True))
        made = len((await anext(steps)).tokens)
        [pid] = children_of(os.getpid())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineLost):
            async for step in steps:
                made += len(step.tokens)
        return made

    assert 0 < served.run(kill_after_one()) < 240
    with pytest.raises(EngineLost):
        served.run(served.engine.check_health())
    with pytest.raises(EngineLost):
        served.tokens()


def children_of(pid: int) -> list[int]:
    """Processes that run an engine core for this one, whichever of its threads started them."""
    children = [
        child
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text().split()
    ]
    return [
        int(child)
        for child in children
        if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
