"""Beam search by jobs of one token finds what transformers' `num_beams` finds."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from altiplano.config.serving import ModelSettings
from altiplano.serving.front.beam import read_end_ids, search_answers
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.models import ServedModel
from altiplano.serving.front.schemas import CompletionRequest
from altiplano.serving.link import Inbox
from altiplano.serving.messages import About, Embedding, Job, Outcome, Sampling, Step

PROMPT = [1, 5, 9, 10]
ENDS = [3, 5]


class Replica:
    """A `TargetClient` that runs jobs of one token through transformers."""

    def __init__(self, model: LlamaForCausalLM, inbox: Inbox) -> None:
        self.model = model
        self.inbox = inbox
        self.running = 0
        self.most = 0

    @torch.no_grad()
    async def call(self, job: Job) -> Outcome:
        assert job.sampling.max_tokens == 1 and job.sampling.logprobs is not None
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        logits = self.model(torch.tensor([job.prompt])).logits[0, -1].float()
        best = torch.log_softmax(logits, -1).topk(job.sampling.logprobs)
        likely = [
            (id_, logprob, rank)
            for rank, (logprob, id_) in enumerate(
                zip(best.values.tolist(), best.indices.tolist(), strict=True), 1
            )
        ]
        self.running -= 1
        step = Step(job.id, [likely[0][0]], "length", logprobs=[[likely[0], *likely]])
        self.inbox.deliver([step])
        return Outcome("done", tokens=1)

    async def embed(self, job: Job) -> Embedding:
        raise AssertionError("not asked for")

    async def describe(self) -> About:
        raise AssertionError("not asked for")


def searched(
    model: LlamaForCausalLM, directory: Path, max_tokens: int, **keys: Any
) -> tuple[list[Step], Replica]:
    """Run beam search as the service does."""
    model.config.save_pretrained(directory)
    inbox = Inbox()
    replica = Replica(model, inbox)
    served = ServedModel(
        name="tiny",
        entry=ModelSettings(name="tiny", path=str(directory)),
        directory=directory,
        codec=None,  # type: ignore[arg-type]  # beams are ids
        client=replica,
        inbox=inbox,
        context=64,
        fingerprint="",
    )
    body = CompletionRequest.model_validate({"prompt": PROMPT, "use_beam_search": True, **keys})
    job = Job("a", PROMPT, Sampling(max_tokens=max_tokens, ignore_eos=body.ignore_eos))
    return asyncio.run(search_answers(served, job, body)), replica


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A tiny Llama of twelve tokens whose beams end at many lengths, seen to tell rules apart."""
    model = tiny_llama(vocab_size=12, seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    model.config.eos_token_id = ENDS
    return model


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length_penalty", [1.0, -1.0, 2.5])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_beams_are_those_of_transformers(
    model: LlamaForCausalLM,
    tmp_path: Path,
    width: int,
    length_penalty: float,
    early_stopping: bool,
) -> None:
    expected = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=8,
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=ENDS,
        pad_token_id=0,
    )
    found, replica = searched(
        model, tmp_path, 8, n=width, length_penalty=length_penalty, early_stopping=early_stopping
    )
    assert [step.tokens for step in found] == [
        _without_padding(row[len(PROMPT) :].tolist()) for row in expected
    ]
    assert replica.most <= width
    ended = [step.tokens[-1] in ENDS for step in found]
    assert [step.finish == "stop" for step in found] == ended


def _without_padding(tokens: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in ENDS]
    return tokens[: ends[0] + 1] if ends else tokens


def test_ends_can_be_ignored(model: LlamaForCausalLM, tmp_path: Path) -> None:
    found, _ = searched(model, tmp_path, 5, n=3, ignore_eos=True)
    assert [len(step.tokens) for step in found] == [5, 5, 5]
    assert len({tuple(step.tokens) for step in found}) == 3


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"stop": "x", "logprobs": 2}, "stop, logprobs"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"prompt": ["a", "b"]}, "several"),
    ],
)
def test_what_beams_do_not_have_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, keys: dict[str, Any], what: str
) -> None:
    with pytest.raises(ApiError, match=what):
        searched(model, tmp_path, 2, **keys)


def test_ends_are_read_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert read_end_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read_end_ids(tmp_path) == {2, 3, 4}
