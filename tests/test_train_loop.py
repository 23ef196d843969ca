"""The loop: one trajectory for any workers, exact resume, no attention across documents."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.data.tokens.pack import FIRST, TOKEN, Blocks
from altiplano.data.tokens.store import StoreWriter, TokenStore
from altiplano.errors import TrainingError
from altiplano.model.adapt import Trainee, make_trainee
from altiplano.model.load import load_model
from altiplano.model.loss import summed_cross_entropy
from altiplano.train.batch import Inputs, document_mask, make_inputs
from altiplano.train.checkpoint import load_checkpoint, save_checkpoint, saved_precision
from altiplano.train.loop import Rank, StepRecord, make_optimizer, train
from altiplano.train.machine import Machine, choose_machine
from altiplano.train.schedule import learning_rate_factor, make_schedule, stream_seed
from tests.helpers.tiny_run import LENGTH, VOCAB_OLD, write_model, write_store

CPU = Machine(torch.device("cpu"), torch.float32, "sdpa", "test")
STEPS = 12


def settings(**given) -> TrainSettings:
    values = {
        "rows": "new", "lora": LoraSettings(r=4, dropout=0.0), "steps": STEPS,
        "tokens_per_step": 4 * LENGTH, "micro_batch_tokens": LENGTH, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainSettings(**{**values, **given})


def objective(trainee: Trainee, inputs: Inputs) -> torch.Tensor:
    return summed_cross_entropy(trainee.hidden(**inputs.model), inputs.labels, trainee.head, 16)


def build(folder: Path, chosen: TrainSettings) -> Trainee:
    return make_trainee(load_model(folder / "m"), chosen, VOCAB_OLD, seed=1)


def run(
    folder: Path,
    chosen: TrainSettings,
    rank: Rank | None = None,
    *,
    trainee: Trainee | None = None,
    start: Path | None = None,
    stop_after: int | None = None,
    save_to: Path | None = None,
) -> list[StepRecord]:
    """Train on one worker; optionally resume from, save at, and stop after a checkpoint."""
    trainee = trainee or build(folder, chosen)
    store = TokenStore.open(folder / "s")
    schedule = make_schedule(chosen, store.num_blocks, store.sequence_length)
    optimizer = make_optimizer(trainee)
    first = load_checkpoint(start, trainee, optimizer, run_key="k") if start else 0
    records: list[StepRecord] = []

    def on_checkpoint(step: int) -> None:
        if save_to is not None and step == stop_after:
            save_checkpoint(
                save_to, trainee, optimizer, step=step, run_key="k", precision="float32"
            )
            raise StopIteration

    with contextlib.suppress(StopIteration):
        train(
            trainee, optimizer, store, schedule, machine=CPU,
            rank=rank or Rank(0, 1, lambda tensor: None), seed=5, start_step=first,
            objective=objective, on_step=records.append, on_checkpoint=on_checkpoint,
        )  # fmt: skip
    return records


def run_on(count: int, folder: Path, chosen: TrainSettings) -> list[StepRecord]:
    """The same stage on `count` workers, as threads that really add their tensors up."""
    barrier = threading.Barrier(count)
    shared: dict[int, torch.Tensor] = {}
    records: list[list[StepRecord]] = [[] for _ in range(count)]

    def reducer(index: int) -> Callable[[torch.Tensor], None]:
        def reduce_sum(tensor: torch.Tensor) -> None:
            shared[index] = tensor.clone()
            barrier.wait()
            tensor.copy_(torch.stack([shared[i] for i in range(count)]).sum(0))
            barrier.wait()

        return reduce_sum

    # Built before the threads start: torch's random state is one for all of them.
    trainees = [build(folder, chosen) for _ in range(count)]

    def work(index: int) -> None:
        rank = Rank(index, count, reducer(index))
        records[index] = run(folder, chosen, rank, trainee=trainees[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([r.loss for r in found] == [r.loss for r in records[0]] for found in records)
    return records[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "m")
    write_store(tmp_path / "s")
    return tmp_path


@pytest.mark.parametrize("count", [2, 4, 5])
def test_the_trajectory_does_not_depend_on_the_number_of_workers(folder: Path, count: int) -> None:
    """Unequal target counts per block; with five workers one of them has no block at all."""
    alone, together = run(folder, settings()), run_on(count, folder, settings())
    assert len(alone) == STEPS
    np.testing.assert_allclose([r.loss for r in together], [r.loss for r in alone], rtol=2e-5)
    assert [r.targets for r in together] == [r.targets for r in alone]
    assert len({r.targets for r in alone}) > 1


def test_the_trajectory_does_not_depend_on_the_micro_batch(folder: Path) -> None:
    small, large = run(folder, settings()), run(folder, settings(micro_batch_tokens=4 * LENGTH))
    np.testing.assert_allclose([r.loss for r in small], [r.loss for r in large], rtol=2e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_uninterrupted_run(folder: Path, dropout: float) -> None:
    chosen = settings(lora=LoraSettings(r=4, dropout=dropout), checkpoint_steps=5)
    whole = run(folder, chosen)
    before = run(folder, chosen, stop_after=5, save_to=folder / "c")
    after = run(folder, chosen, start=folder / "c")
    assert saved_precision(folder / "c") == "float32"
    assert [r.step for r in before + after] == list(range(1, STEPS + 1))
    assert [r.loss for r in before + after] == [r.loss for r in whole]
    assert [r.grad_norm for r in before + after] == [r.grad_norm for r in whole]


def test_a_checkpoint_of_another_run_is_refused(folder: Path) -> None:
    chosen = settings(checkpoint_steps=5)
    run(folder, chosen, stop_after=5, save_to=folder / "c")
    trainee = build(folder, chosen)
    with pytest.raises(TrainingError, match="delete it to start anew"):
        load_checkpoint(folder / "c", trainee, make_optimizer(trainee), run_key="other")


def test_training_learns(folder: Path) -> None:
    records = run(folder, settings(full=True, rows="none", lora=None, steps=60))
    assert records[-1].loss < 0.5 * records[0].loss


def test_packed_documents_do_not_see_each_other(folder: Path) -> None:
    """Hidden states of a packed block equal those of each document alone."""
    trainee = build(folder, settings())
    trainee.model.eval()
    batch = TokenStore.open(folder / "s").batch(np.array([0]))
    inputs = make_inputs(batch, "sdpa", CPU.device)
    ids, segments = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.segment_ids)
    with torch.no_grad():
        packed = trainee.hidden(**inputs.model)
        for segment in (1, 2):
            chosen = segments[0] == segment
            alone = trainee.hidden(input_ids=ids[:, chosen])
            torch.testing.assert_close(packed[0, chosen], alone[0], atol=1e-5, rtol=1e-4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_the_mask_is_causal_and_stays_in_the_document(segments: list[int]) -> None:
    mask = document_mask(torch.tensor([segments]))[0, 0]
    for query in range(len(segments)):
        for key in range(len(segments)):
            expected = key <= query and segments[key] == segments[query]
            assert bool(mask[query, key]) is expected


@given(st.integers(1, 400), st.sampled_from(["cosine", "linear", "constant"]))
def test_learning_rates_rise_then_fall_to_the_floor(steps: int, schedule: str) -> None:
    chosen = settings(schedule=schedule, warmup_ratio=0.1, min_lr_ratio=0.2)
    factors = [learning_rate_factor(step, steps, chosen) for step in range(steps)]
    peak = factors.index(max(factors))
    assert all(0 < f <= 1 for f in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if steps > 20 and schedule != "constant":
        assert factors[-1] == pytest.approx(0.2)


def test_linear_is_the_published_curve() -> None:
    """Chinese-Vicuna's log: 100 warm-up steps of 17298, then linear to zero."""
    chosen = settings(schedule="linear", warmup_ratio=99.5 / 17299, min_lr_ratio=0.0)
    for step in (160, 5800, 11600):
        expected = (17298 - step) / (17298 - 100)
        assert learning_rate_factor(step, 17299, chosen) == pytest.approx(expected, rel=1e-9)


def test_seeds_are_separate_streams() -> None:
    assert stream_seed(1, "order") == stream_seed(1, "order")
    assert len({stream_seed(1, "order"), stream_seed(1, "lora"), stream_seed(2, "order")}) == 3


def test_a_useless_run_stops_with_the_reason(folder: Path) -> None:
    with pytest.raises(TrainingError, match="the loss is"):
        run(folder, settings(full=True, rows="none", lora=None, learning_rate=1e30))
    with StoreWriter(
        folder / "none", sequence_length=LENGTH, vocab_size=9, pad_id=0, tokenizer_fingerprint="x"
    ) as writer:
        flags = np.full((1, LENGTH), TOKEN, np.uint8)
        flags[0, 0] |= FIRST
        writer.add(Blocks(np.zeros((1, LENGTH), np.int32), flags))
    (folder / "s").rename(folder / "old")
    (folder / "none").rename(folder / "s")
    with pytest.raises(TrainingError, match="no training target"):
        run(folder, settings())


def test_no_data_is_refused_before_training() -> None:
    with pytest.raises(TrainingError, match="would train zero steps"):
        make_schedule(settings(), num_blocks=0, sequence_length=LENGTH)


def test_the_choice_of_machine_says_why() -> None:
    chosen = choose_machine(settings(precision="bfloat16"), 32, use_gpu=False)
    assert chosen.compute == torch.bfloat16 and "as configured" in chosen.reason
    assert "CPU" in choose_machine(settings(), 32, use_gpu=False).reason
    with pytest.raises(TrainingError, match="flash-attn"):
        choose_machine(settings(attention="flash_attention_2"), 32, use_gpu=False)
