"""What a stage begins with: weights alone, or all of an earlier stage; wrong parts are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from altiplano.artifact import Artifact, Manifest, open_artifact, write_artifact
from altiplano.config.training import BeginSettings, LoraSettings, TrainSettings
from altiplano.data.tokens.store import TokenStore
from altiplano.errors import MismatchError, TrainingError
from altiplano.model.adapt import Trainee, make_trainee
from altiplano.model.attention import DOCUMENTS, register
from altiplano.model.load import load_model
from altiplano.model.loss import summed_cross_entropy
from altiplano.train.batch import make_inputs
from altiplano.train.begin import OPTIMIZER, STEPS, check_beginning, read_beginning
from altiplano.train.checkpoint import write_state
from altiplano.train.schedule import Earlier, Schedule, learning_rate_factor, make_schedule
from altiplano.train.state import TrainState
from altiplano.train.strategy import Rank, Sharing, Strategy, make_strategy
from tests.helpers.tiny_run import LENGTH, VOCAB_OLD, write_model, write_store

CPU = torch.device("cpu")
OLD_BLOCKS, NEW_BLOCKS = 4, 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "m")
    write_store(tmp_path / "old", OLD_BLOCKS, seed=1)
    write_store(tmp_path / "new", NEW_BLOCKS, seed=2)
    return tmp_path


def settings(**given) -> TrainSettings:
    """One block per step, so that as many steps as blocks pass over the data."""
    values = {
        "rows": "new", "lora": LoraSettings(r=4), "learning_rate": 1e-2, "warmup_steps": 2,
        "tokens_per_step": LENGTH, "micro_batch_tokens": LENGTH,
    }  # fmt: skip
    return TrainSettings(**{**values, **given})


def begins(folder: Path, mode: str, **given) -> TrainSettings:
    return settings(begin=BeginSettings(mode=mode, path=str(folder / "earlier")), **given)


def build(folder: Path, chosen: TrainSettings, seed: int = 1) -> Trainee:
    register()
    model = load_model(folder / "m")
    model.config._attn_implementation = DOCUMENTS
    return make_trainee(model, chosen, VOCAB_OLD, seed)


def share(trainee: Trainee) -> Strategy:
    return make_strategy(trainee, Sharing(), Rank(0, 1, lambda tensor: None), CPU)


def take_steps(
    trainee: Trainee, strategy: Strategy, store_dir: Path, schedule: Schedule, steps: range
) -> None:
    """Train on the blocks of a store in their order, from its first one on."""
    store = TokenStore.open(store_dir)
    for step in steps:
        batch = store.batch(np.array([step - schedule.first_step]))
        inputs = make_inputs(batch, DOCUMENTS, CPU)
        hidden = trainee.hidden(**inputs.model)
        loss = summed_cross_entropy(hidden, inputs.labels, trainee.head)
        strategy.backward(loss / int((inputs.labels >= 0).sum()), last=True)
        strategy.step(learning_rate_factor(step, schedule.steps, trainee.settings), 1.0)


def state_after(strategy: Strategy, step: int, steps: int) -> TrainState:
    copied = strategy.snapshot()
    assert copied is not None
    return TrainState(step, *copied, {STEPS: steps})


def write_earlier(
    folder: Path, trainee: Trainee, state: TrainState | None = None, **given
) -> Artifact:
    """An earlier stage's artifact, as `stages/learn.py` leaves it."""
    manifest = Manifest(
        "adapter", "pretrain-a", {"train": trainee.settings.model_dump(mode="json")}, {},
        tokenizer_fingerprint="t" * 64, vocab_new=80,
        metrics={"base_weights_fingerprint": "w" * 64},
    )  # fmt: skip
    for name, value in given.items():
        setattr(manifest, name, value)
    with write_artifact(folder / "earlier", manifest) as output:
        trainee.save(output)
        if state is not None:
            (output / OPTIMIZER).mkdir()
            write_state(output / OPTIMIZER, state)
    return open_artifact(folder / "earlier")


def trained_earlier(folder: Path, steps: int = OLD_BLOCKS, of: int = OLD_BLOCKS) -> Trainee:
    """Train on the old data, and leave an artifact that can be continued."""
    trainee = build(folder, settings())
    strategy = share(trainee)
    take_steps(trainee, strategy, folder / "old", Schedule(of, 1, 1), range(steps))
    write_earlier(folder, trainee, state_after(strategy, steps, of))
    return trainee


def weights(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainee.trainable().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_warm_start_takes_the_weights_and_nothing_else(folder: Path) -> None:
    earlier = trained_earlier(folder)
    chosen = begins(folder, "warm_start")
    trainee = build(folder, chosen, seed=2)
    fresh = weights(trainee)
    beginning = read_beginning(chosen, trainee)
    assert beginning.earlier is None and beginning.state is None
    assert_same(weights(trainee), weights(earlier))
    assert any(not torch.equal(fresh[name], value) for name, value in weights(earlier).items())


@pytest.mark.parametrize(("stopped", "of"), [(OLD_BLOCKS, OLD_BLOCKS), (3, 20)])
def test_a_continued_stage_is_one_training_on_the_old_data_then_the_new(
    folder: Path, stopped: int, of: int
) -> None:
    """Moments, step and curve go on: bit by bit what one run over both would have made."""
    trained_earlier(folder, stopped, of)
    chosen = begins(folder, "continue")
    trainee = build(folder, chosen, seed=2)
    beginning = read_beginning(chosen, trainee)
    assert beginning.earlier == Earlier(stopped, of) and beginning.state is not None
    schedule = make_schedule(chosen, NEW_BLOCKS, LENGTH, earlier=beginning.earlier)
    total = max(of, NEW_BLOCKS)
    assert (schedule.first_step, schedule.steps) == (stopped, total)
    strategy = share(trainee)
    strategy.restore(beginning.state)
    last = min(total, stopped + NEW_BLOCKS)
    take_steps(trainee, strategy, folder / "new", schedule, range(stopped, last))

    whole = build(folder, settings())
    strategy = share(whole)
    take_steps(whole, strategy, folder / "old", Schedule(of, 1, 1), range(stopped))
    take_steps(
        whole, strategy, folder / "new", Schedule(total, 1, 1, stopped), range(stopped, last)
    )
    assert_same(weights(trainee), weights(whole))


def test_an_artifact_of_other_tensors_is_refused_when_it_is_read(folder: Path) -> None:
    trained_earlier(folder)
    for other in ({"lora": LoraSettings(r=8)}, {"rows": "all"}):
        chosen = begins(folder, "warm_start", **other)
        with pytest.raises(TrainingError, match=r"earlier"):
            read_beginning(chosen, build(folder, chosen))


# ---------------------------------------------------------------- what fits, by manifests alone


def write_part(path: Path, kind: str, **given) -> Artifact:
    manifest = Manifest(kind, path.name, {}, {}, tokenizer_fingerprint="t" * 64, vocab_new=80)
    for name, value in given.items():
        setattr(manifest, name, value)
    with write_artifact(path, manifest) as output:
        (output / "data").write_text(path.name)
    return open_artifact(path)


def base(folder: Path, **given) -> Artifact:
    return write_part(folder / "extend", "model", **{"weights_fingerprint": "w" * 64, **given})


def test_an_artifact_of_the_same_place_in_the_chain_fits(folder: Path) -> None:
    first = write_part(folder / "pretrain-a", "adapter")
    inputs = {"model": base(folder).as_input, "adapter-0": first.as_input}
    begin = write_earlier(folder, build(folder, settings()), inputs=inputs)
    check_beginning(begins(folder, "warm_start"), begin, base(folder), [first])


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"rows": "all"}, "`rows`: new in {earlier}, all here"),
        ({"lora": LoraSettings(r=8)}, "`lora.r`: 4 in {earlier}, 8 here"),
        ({"lora": LoraSettings(r=4, alpha=32)}, "`lora.alpha`: 16.0 in {earlier}, 32.0 here"),
        ({"lora": LoraSettings(r=4, modules=["q_proj"])}, "['q_proj'] here"),
        ({"lora": LoraSettings(r=4, init="pissa")}, "`lora.init`: zero in {earlier}, pissa here"),
        ({"lora": None}, "`lora.r`: 4 in {earlier}, None here"),
        ({"full": True, "lora": None, "rows": "none"}, "`full`: False in {earlier}, True here"),
    ],
)
def test_another_trained_part_is_refused_by_name(folder: Path, other: dict, told: str) -> None:
    begin = write_earlier(folder, build(folder, settings()))
    with pytest.raises(TrainingError) as caught:
        check_beginning(begins(folder, "warm_start", **other), begin, base(folder), [])
    assert told.format(earlier=folder / "earlier") in str(caught.value)


def test_what_does_not_change_the_trained_parts_may_differ(folder: Path) -> None:
    begin = write_earlier(folder, build(folder, settings()))
    modules = list(reversed(LoraSettings().modules))
    lora = LoraSettings(r=4, dropout=0.1, b_learning_rate_ratio=16, modules=modules)
    chosen = begins(folder, "warm_start", lora=lora, learning_rate=1e-5, quantize="8bit")
    check_beginning(chosen, begin, base(folder), [])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tokenizer_fingerprint": "u" * 64}, "tokenizer uuuuuuuuuuuuuuuu"),
        ({"weights_fingerprint": "v" * 64}, "weights vvvvvvvvvvvvvvvv"),
    ],
)
def test_another_base_is_refused(folder: Path, given: dict, told: str) -> None:
    begin = write_earlier(folder, build(folder, settings()))
    with pytest.raises(MismatchError, match=told):
        check_beginning(begins(folder, "warm_start"), begin, base(folder, **given), [])


def test_an_adapter_that_is_folded_into_the_base_already_is_refused(folder: Path) -> None:
    begin = write_earlier(folder, build(folder, settings()))
    with pytest.raises(TrainingError, match="would count twice"):
        check_beginning(begins(folder, "warm_start"), begin, base(folder), [begin])


def test_an_adapter_of_another_place_in_the_chain_is_refused(folder: Path) -> None:
    begin = write_earlier(folder, build(folder, settings()))
    first = write_part(folder / "pretrain-x", "adapter")
    with pytest.raises(TrainingError, match=r"(?s)trained after none.*trains after pretrain-x"):
        check_beginning(begins(folder, "warm_start"), begin, base(folder), [first])


def test_continuing_needs_the_optimizers_state(folder: Path) -> None:
    begin = write_earlier(folder, build(folder, settings()))
    with pytest.raises(TrainingError, match="`keep_optimizer: true`"):
        check_beginning(begins(folder, "continue"), begin, base(folder), [])
    check_beginning(begins(folder, "warm_start"), begin, base(folder), [])


def test_an_artifact_that_nothing_was_trained_for_is_refused(folder: Path) -> None:
    begin = write_part(folder / "earlier", "model")
    with pytest.raises(TrainingError, match="stage earlier, which trains nothing"):
        check_beginning(begins(folder, "warm_start"), begin, base(folder), [])


def test_a_stage_that_trains_everything_needs_only_the_same_vocabulary(folder: Path) -> None:
    full = {"full": True, "rows": "none", "lora": None}
    begin = write_earlier(folder, build(folder, settings(**full)), kind="model", metrics={})
    first = write_part(folder / "pretrain-x", "adapter")
    check_beginning(begins(folder, "warm_start", **full), begin, base(folder), [first])
