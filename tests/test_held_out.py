"""Held-out bits while training: the report's numbers on any number of workers; what is best."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.training import EarlyStop, LoraSettings, TrainSettings
from altiplano.errors import TrainingError
from altiplano.evaluate.bits import bits_per_byte
from altiplano.model.adapt import Trainee, make_trainee
from altiplano.model.attention import DOCUMENTS, register
from altiplano.train.best import Progress, evaluation_due
from altiplano.train.held_out import HeldOut, has_held_out
from altiplano.train.machine import Machine
from altiplano.train.strategy import Rank
from altiplano.vocabulary.load import Vocabulary
from tests.helpers.tiny_vocabulary import chinese_lines, english_lines, write_tiny_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CPU = Machine(torch.device("cpu"), torch.float32, DOCUMENTS, "test")
ALONE = Rank(0, 1, lambda tensor: None)
LENGTH = 32
TEXTS = {"en": english_lines(20, seed=5), "zh": ["", *chinese_lines(12, seed=5)]}
# One document needs many windows, the others share blocks.
TEXTS["en"][4] = " ".join(english_lines(8, seed=6))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    for language, texts in TEXTS.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (folder / f"held_out.{language}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def trainee(tiny_llama: Callable[..., "LlamaForCausalLM"], tokenizer: Path) -> Trainee:
    """In training mode, with dropout, its new rows and adapters no longer as they began."""
    register()
    model = tiny_llama(vocab_size=Vocabulary(tokenizer).size)
    model.config._attn_implementation = DOCUMENTS
    chosen = TrainSettings(
        rows="new", lora=LoraSettings(r=4, dropout=0.5), micro_batch_tokens=2 * LENGTH
    )
    made = make_trainee(model, chosen, 320, seed=1)
    torch.manual_seed(3)
    for parameter in made.trainable().values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    made.model.train()
    return made


def open_texts(tokens: Path, tokenizer: Path, trainee: Trainee, **given) -> HeldOut:
    chosen = {"max_bytes": 100_000, "sequence_length": LENGTH, **given}
    return HeldOut.open(tokens, tokenizer, model_config=trainee.model.config, **chosen)


@pytest.mark.parametrize("max_bytes", [150, 100_000])
def test_the_numbers_are_the_reports(
    tokens: Path, tokenizer: Path, trainee: Trainee, max_bytes: int
) -> None:
    held_out = open_texts(tokens, tokenizer, trainee, max_bytes=max_bytes)
    found = held_out.measure(trainee, ALONE, CPU)
    assert trainee.model.training
    trainee.model.eval()
    assert list(found) == ["en", "zh"]
    for language, texts in TEXTS.items():
        report = bits_per_byte(
            trainee.model, Vocabulary(tokenizer), texts, max_bytes=max_bytes,
            sequence_length=LENGTH,
        )  # fmt: skip
        assert held_out.sizes[language] == report["bytes"]
        assert found[language] == pytest.approx(report["bits_per_byte"], rel=1e-5)


def test_windows_are_no_longer_than_the_model(
    tokens: Path, tokenizer: Path, trainee: Trainee
) -> None:
    trainee.model.config.max_position_embeddings = 8
    assert open_texts(tokens, tokenizer, trainee).blocks["en"].labels.shape[1] == 8


@pytest.mark.parametrize("count", [2, 3, 20])
def test_any_number_of_workers_finds_the_same_numbers(
    tokens: Path, tokenizer: Path, trainee: Trainee, count: int
) -> None:
    """To the last bit, and with as many forward passes on each, even with more than batches."""
    held_out = open_texts(tokens, tokenizer, trainee)
    parts: list[torch.Tensor] = []
    passes = [0] * count

    def measure(index: int, reduce_sum: Callable[[torch.Tensor], None]) -> dict[str, float]:
        def forward(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
            passes[index] += 1
            return compute()

        rank = Rank(index, count, reduce_sum)
        return held_out.measure(trainee, rank, CPU, forward=forward)

    for index in range(count):
        measure(index, lambda tensor: parts.append(tensor.clone()))
    assert len(set(passes)) == 1
    assert len(parts[0]) > 4
    together = measure(count - 1, lambda tensor: tensor.copy_(torch.stack(parts).sum(0)))
    assert together == held_out.measure(trainee, ALONE, CPU)


def test_a_failed_evaluation_leaves_the_model_training(
    tokens: Path, tokenizer: Path, trainee: Trainee
) -> None:
    def fail(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        assert not trainee.model.training and not torch.is_grad_enabled()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        open_texts(tokens, tokenizer, trainee).measure(trainee, ALONE, CPU, forward=fail)
    assert trainee.model.training and torch.is_grad_enabled()


def test_without_held_out_text_it_is_refused(
    tmp_path: Path, tokens: Path, tokenizer: Path, trainee: Trainee
) -> None:
    (tmp_path / "held_out.en.jsonl").touch()
    assert has_held_out(tokens) and not has_held_out(tmp_path)
    with pytest.raises(TrainingError, match=r"needs held-out text.*raise `data.held_out`"):
        open_texts(tmp_path, tokenizer, trainee)


# ---------------------------------------------------------------- the best, and when to stop


def watched(patience: int = 2, min_delta: float = 0.0) -> TrainSettings:
    stop = EarlyStop(patience=patience, min_delta=min_delta)
    return TrainSettings(rows="new", evaluate_steps=5, early_stop=stop)


def follow(values: list[float], settings: TrainSettings) -> tuple[list[bool], list[bool], Progress]:
    """What is best and whether to stop, after every evaluation."""
    progress = Progress.from_json(None, settings)
    best, stop = [], []
    for number, value in enumerate(values, 1):
        best.append(progress.update(5 * number, {"a": value - 0.5, "b": value + 0.5}))
        stop.append(progress.should_stop)
    return best, stop, progress


def test_the_best_has_the_fewest_bits_in_the_mean_over_languages() -> None:
    best, stop, progress = follow([3.0, 2.0, 2.0, 2.5, 1.9], watched(patience=3))
    assert best == [True, True, False, False, True]
    assert stop == [False] * 5
    assert (progress.best, progress.best_step) == (pytest.approx(1.9), 25)


def test_a_stage_stops_after_evaluations_without_gain() -> None:
    assert follow([3.0, 2.0, 2.1, 2.0], watched())[1] == [False, False, False, True]


def test_a_stage_without_early_stop_never_stops() -> None:
    settings = TrainSettings(rows="new", evaluate_steps=5)
    assert follow([1.0] + [2.0] * 20, settings)[1] == [False] * 21


def test_gains_too_small_to_count_alone_are_best_and_add_up() -> None:
    best, stop, _ = follow([2.0, 1.96, 1.92, 1.88], watched(patience=3, min_delta=0.1))
    assert best == [True] * 4
    assert stop == [False] * 4
    assert follow([2.0, 1.99, 1.98, 1.97], watched(patience=3, min_delta=0.1))[1][-1]


@given(
    st.lists(st.floats(0.5, 4.0), min_size=1, max_size=12),
    st.integers(0, 11),
    st.integers(1, 3),
    st.floats(0, 0.5),
)
def test_a_resumed_run_decides_as_the_uninterrupted_one(
    values: list[float], cut: int, patience: int, min_delta: float
) -> None:
    settings = watched(patience, min_delta)
    progress = Progress.from_json(None, settings)
    told = []
    for number, value in enumerate(values):
        if number == cut:
            progress = Progress.from_json(json.loads(json.dumps(progress.to_json())), settings)
        bits = {"a": value - 0.5, "b": value + 0.5}
        told.append((progress.update(number, bits), progress.should_stop))
    best, stop, _ = follow(values, settings)
    assert [stopped for _, stopped in told] == stop
    assert [was_best for was_best, _ in told] == best


def test_bits_that_are_not_finite_end_the_stage() -> None:
    with pytest.raises(TrainingError, match=r"step 5: .* in zh are not finite"):
        Progress(watched()).update(5, {"en": 1.0, "zh": float("nan")})


def test_evaluations_fall_on_their_steps_and_the_last() -> None:
    due = [step for step in range(1, 13) if evaluation_due(watched(), step, 12)]
    assert due == [5, 10, 12]
    assert not evaluation_due(TrainSettings(rows="new"), 12, 12)
