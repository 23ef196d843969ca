"""The loop: one trajectory for any workers, exact resume, no attention across documents."""

from pathlib import Path

import numpy as np
import pytest
import torch

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.data.tokens.pack import FIRST, TOKEN, Blocks
from altiplano.data.tokens.store import StoreWriter, TokenStore
from altiplano.errors import TrainingError
from altiplano.model.adapt import Trainee, make_trainee
from altiplano.model.attention import DOCUMENTS
from altiplano.model.load import load_model
from altiplano.train.batch import make_inputs
from altiplano.train.checkpoint import read_state, write_state
from altiplano.train.local import train_here
from altiplano.train.loop import Asked, StepRecord
from altiplano.train.machine import Machine, choose_machine
from altiplano.train.schedule import make_schedule, stream_seed
from altiplano.train.state import TrainState
from altiplano.train.watch import Watchdog
from tests.helpers.tiny_run import LENGTH, VOCAB_OLD, write_model, write_store
from tests.helpers.worlds import losses_of_groups
from tests.helpers.worlds import train as train_alone

CPU = Machine(torch.device("cpu"), torch.float32, DOCUMENTS, "test")
STEPS = 12


def settings(**given) -> TrainSettings:
    values = {
        "rows": "new", "lora": LoraSettings(r=4, dropout=0.0), "steps": STEPS,
        "tokens_per_step": 4 * LENGTH, "micro_batch_tokens": LENGTH, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainSettings(**{**values, **given})


def build(folder: Path, chosen: TrainSettings) -> Trainee:
    return make_trainee(load_model(folder / "m"), chosen, VOCAB_OLD, seed=1)


def run(
    folder: Path,
    chosen: TrainSettings,
    *,
    start: TrainState | None = None,
    stop_after: int | None = None,
) -> tuple[list[StepRecord], TrainState]:
    """Train in this process; the steps and the last state."""
    records, state = train_here(
        build(folder, chosen), TokenStore.open(folder / "s"), seed=5, machine=CPU,
        start=start, stop_after=stop_after,
    )  # fmt: skip
    assert state is not None
    return records, state


def steps_of(folder: Path, chosen: TrainSettings) -> list[StepRecord]:
    return run(folder, chosen)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "m")
    write_store(tmp_path / "s")
    return tmp_path


def test_the_trajectory_does_not_depend_on_the_number_of_workers(folder: Path) -> None:
    """Unequal target counts per block; with five workers one of them has no block at all."""
    alone = train_alone(folder, 0, 1)
    assert len(alone) == 20
    for losses in losses_of_groups(folder, [5, 4, 2]).values():
        np.testing.assert_allclose(losses, alone, rtol=2e-5)


def test_the_trajectory_does_not_depend_on_the_micro_batch(folder: Path) -> None:
    small = steps_of(folder, settings())
    large = steps_of(folder, settings(micro_batch_tokens=4 * LENGTH))
    np.testing.assert_allclose([r.loss for r in small], [r.loss for r in large], rtol=2e-5)
    assert len({r.targets for r in small}) > 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_uninterrupted_run(folder: Path, dropout: float) -> None:
    chosen = settings(lora=LoraSettings(r=4, dropout=dropout))
    whole, end = run(folder, chosen)
    before, state = run(folder, chosen, stop_after=5)
    assert state.step == 5
    (folder / "c").mkdir()
    write_state(folder / "c", state)
    after, same_end = run(folder, chosen, start=read_state(folder / "c"))
    assert [r.step for r in before + after] == list(range(1, STEPS + 1))
    assert [r.loss for r in before + after] == [r.loss for r in whole]
    assert [r.grad_norm for r in before + after] == [r.grad_norm for r in whole]
    assert all(torch.equal(end.weights[name], same_end.weights[name]) for name in end.weights)


def test_training_learns(folder: Path) -> None:
    records = steps_of(folder, settings(full=True, rows="none", lora=None, steps=60))
    assert records[-1].loss < 0.5 * records[0].loss


def test_packed_documents_do_not_see_each_other(folder: Path) -> None:
    """Hidden states of a packed block equal those of each document alone."""
    trainee = build(folder, settings())
    trainee.model.eval()
    batch = TokenStore.open(folder / "s").batch(np.array([0]))
    inputs = make_inputs(batch, DOCUMENTS, CPU.device)
    ids, segments = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.segment_ids)
    with torch.no_grad():
        packed = trainee.hidden(**inputs.model)
        for segment in (1, 2):
            chosen = segments[0] == segment
            alone = trainee.hidden(input_ids=ids[:, chosen])
            torch.testing.assert_close(packed[0, chosen], alone[0], atol=1e-5, rtol=1e-4)


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


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(step, 99, loss, 1e-3, 1e-3, 1.0, 10, 100.0, 0.1, 0.0, Asked())


def test_a_loss_that_rises_for_long_is_called_diverging() -> None:
    """One bad step is nothing; a rise of the smoothed loss is."""
    watchdog = Watchdog(settings(max_loss_rise=1.0))
    for step, loss in enumerate([5.0, 4.0, 9.0, 4.0, 3.0], 1):
        watchdog.check(record(step, loss))
    with pytest.raises(TrainingError, match=r"diverges.*learning_rate.*max_loss_rise"):
        for step in range(6, 40):
            watchdog.check(record(step, 6.5))
