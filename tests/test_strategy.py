"""Every way of sharing a step gives the same numbers, and takes over from every other one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from altiplano.config.training import TrainSettings
from altiplano.errors import ConfigError, TrainingError
from altiplano.train.state import TrainState
from altiplano.train.strategy import Rank, Sharing
from altiplano.train.zero_config import deepspeed_config
from tests.helpers.sharing import NEW_ROWS, Result, Run, run_workers, train, write_models

ALONE = Rank(0, 1, lambda tensor: None)
FULL: dict[str, Any] = {"full": True, "weight_decay": 0.1}
HEAD: dict[str, Any] = {"rows": "none", "lora": {"r": 4, "modules": ["q_proj", "lm_head"]}}

# Three sequences for two workers: one has two micro-batches, the other one.
SAME = {
    **{strategy: Run(NEW_ROWS, strategy, sequences=3) for strategy in ("ddp", "zero1", "zero2")},
    "zero3": Run(NEW_ROWS, "zero3", sequences=3),
    "zero2 offload": Run(NEW_ROWS, "zero2", offload=True),
    "zero3 offload": Run(NEW_ROWS, "zero3", offload=True),
    "zero3 tied full": Run(FULL, "zero3", tied=True),
    "zero3 all rows": Run({"rows": "all"}, "zero3"),
    "zero3 adapter on the head": Run(HEAD, "zero3"),
    "ddp with an idle worker": Run(NEW_ROWS, sequences=1),
    "ddp bfloat16": Run(NEW_ROWS, compute="bfloat16"),
}
ROUNDED = {"zero3 bfloat16": Run(NEW_ROWS, "zero3", compute="bfloat16")}
HALVES = {f"half of {strategy}": Run(NEW_ROWS, strategy, last=2) for strategy in ("ddp", "zero3")}
CHANGES = {
    f"{old} to {new}": Run(NEW_ROWS, new, first=2, after=f"half of {old}")
    for old, new in (("ddp", "zero2"), ("ddp", "zero3"), ("zero3", "zero1"), ("zero3", "ddp"))
}
RUNS = SAME | ROUNDED | HALVES | CHANGES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models on disk."""
    path = tmp_path_factory.mktemp("sharing")
    write_models(path)
    return path


@pytest.fixture(scope="module")
def workers(folder: Path) -> list[dict[str, Result]]:
    """What two workers saw in all runs."""
    pytest.importorskip("deepspeed")
    return run_workers(folder, RUNS, 2)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[Run], Result]:
    """What one worker without DeepSpeed sees in all steps of the same training."""
    known: dict[str, Result] = {}

    def of(run: Run) -> Result:
        plain = Run(run.settings, compute=run.compute, tied=run.tied, sequences=run.sequences)
        if repr(plain) not in known:
            known[repr(plain)] = train(plain, folder, ALONE, None)
        return known[repr(plain)]

    return of


def _assert_same_state(found: Result, expected: Result) -> None:
    import torch

    (weights, moments), (want_weights, want_moments) = found.snapshot, expected.snapshot
    torch.testing.assert_close(weights, want_weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments, want_moments, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SAME)
def test_two_workers_learn_what_one_learns(
    name: str, workers: list[dict[str, Result]], alone: Callable[[Run], Result]
) -> None:
    expected = alone(SAME[name])
    for worker in workers:
        assert worker[name].losses == pytest.approx(expected.losses, rel=1e-5)
        assert worker[name].norms == pytest.approx(expected.norms, rel=1e-5)
    _assert_same_state(workers[0][name], expected)
    assert workers[1][name].snapshot is None


def test_bfloat16_under_zero3_differs_by_its_rounding_only(
    workers: list[dict[str, Result]], alone: Callable[[Run], Result]
) -> None:
    # Its hooks regroup sums of bfloat16 gradients, so the last bit of a gradient may differ.
    found, expected = workers[0]["zero3 bfloat16"], alone(ROUNDED["zero3 bfloat16"])
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    assert found.norms == pytest.approx(expected.norms, rel=1e-2)


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_under_another_strategy(
    name: str, workers: list[dict[str, Result]], alone: Callable[[Run], Result]
) -> None:
    expected = alone(CHANGES[name])
    assert workers[0][name].losses == pytest.approx(expected.losses[2:], rel=1e-5)
    _assert_same_state(workers[0][name], expected)


def test_one_worker_goes_on_from_what_two_left(
    folder: Path, workers: list[dict[str, Result]], alone: Callable[[Run], Result]
) -> None:
    state = TrainState(2, *workers[0]["half of zero3"].snapshot)
    found = train(Run(NEW_ROWS, first=2), folder, ALONE, state)
    assert found.losses == pytest.approx(alone(Run(NEW_ROWS)).losses[2:], rel=1e-5)


def test_deepspeed_says_nothing(folder: Path, workers: list[dict[str, Result]]) -> None:
    said = (folder / "said.txt").read_text()
    assert "[INFO]" not in said and "FutureWarning" not in said and "[WARNING]" not in said


def test_weights_alone_are_a_warm_start(folder: Path) -> None:
    whole = train(Run(NEW_ROWS, last=2), folder, ALONE, None).snapshot
    warm = train(Run(NEW_ROWS, first=2, last=3), folder, ALONE, TrainState(2, whole[0], {}))
    steps = {float(moments["step"]) for moments in warm.snapshot[1].values()}
    assert steps == {1.0}


def _fresh(folder: Path) -> Any:
    import torch

    from altiplano.train.ddp import Replicated
    from tests.helpers.sharing import _trainee

    trainee = _trainee(Run(NEW_ROWS), folder)
    loss = trainee.hidden(input_ids=torch.arange(8)[None]).square().sum()
    return trainee, Replicated(trainee, ALONE), loss


def test_a_gradient_that_is_not_finite_changes_nothing(folder: Path) -> None:
    _, strategy, loss = _fresh(folder)
    before, _ = strategy.snapshot()
    strategy.backward(loss * math.inf, last=True)
    assert not math.isfinite(strategy.step(1.0, 1.0))
    after, moments = strategy.snapshot()
    assert moments == {} and all(bool((after[name] == before[name]).all()) for name in before)


def test_a_step_without_gradient_counts_as_zero_gradient(folder: Path) -> None:
    import torch

    trainee, strategy, loss = _fresh(folder)
    strategy.backward(loss, last=True)
    strategy.step(1.0, math.inf)
    _, first = strategy.snapshot()
    assert strategy.step(1.0, math.inf) == 0
    _, second = strategy.snapshot()
    beta = trainee.settings.betas[0]
    for name, moments in second.items():
        assert float(moments["step"]) == 2
        torch.testing.assert_close(moments["exp_avg"], beta * first[name]["exp_avg"])


def test_buckets_hold_every_parameter_once_and_one_type_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from altiplano.train import ddp

    monkeypatch.setattr(ddp, "BUCKET_BYTES", 100)
    sizes = (10, 10, 10, 200, 1, 1)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters[-1].data = parameters[-1].data.double()
    parts = ddp._parts(parameters)
    assert [[p.numel() for p in part] for part in parts] == [[10, 10, 10], [200], [1], [1]]


SETTINGS = TrainSettings(max_grad_norm=0.5)


def test_users_json_comes_first_and_auto_means_ours() -> None:
    users = {
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto", "loss_scale_window": 100},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    config = deepspeed_config(SETTINGS, Sharing("zero3", True, json.dumps(users)), 4)
    shared = config["zero_optimization"]
    assert config["train_batch_size"] == 4 and config["gradient_clipping"] == 0.5
    assert config["fp16"] == {"enabled": False, "loss_scale_window": 100}
    assert (shared["stage"], shared["reduce_bucket_size"], shared["overlap_comm"]) == (3, 7, True)
    assert shared["offload_optimizer"] == shared["offload_param"] == {"device": "cpu"}
    assert config["wall_clock_breakdown"] is True


def test_contradictions_are_all_named_at_once() -> None:
    users = {
        "train_batch_size": 64,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    with pytest.raises(ConfigError) as error:
        deepspeed_config(SETTINGS, Sharing("zero3", deepspeed=json.dumps(users)), 2)
    message = str(error.value)
    for key in ("train_batch_size", "accumulation_steps", "clipping", "bf16.enabled", "stage"):
        assert key in message
    assert "64" in message and "`optimizer`" in message and "`gradient_clipping` is 1.0" in message


@pytest.mark.parametrize(("text", "says"), [("{", "no JSON"), ("[1]", "list, not an object")])
def test_a_json_that_is_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        deepspeed_config(SETTINGS, Sharing("zero2", deepspeed=text), 1)


def test_quantised_weights_cannot_be_split(folder: Path) -> None:
    from altiplano.train.zero import _require_possible
    from tests.helpers.sharing import _trainee

    pytest.importorskip("deepspeed")
    trainee = _trainee(Run(NEW_ROWS), folder)
    trainee.settings = TrainSettings(rows="new", quantize="4bit", lora={"r": 4})  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="zero3.*cannot split.*4bit"):
        _require_possible(trainee, Sharing("zero3"))
    _require_possible(trainee, Sharing("zero2"))
