"""Training on Ray: the same losses as without it, after a worker's death and after the driver's."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from altiplano.artifact import open_artifact
from altiplano.config import load_config
from altiplano.config.cluster import ClusterSection
from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.data.tokens.store import TokenStore
from altiplano.errors import TrainingError
from altiplano.model.adapt import make_trainee
from altiplano.model.attention import DOCUMENTS
from altiplano.model.load import load_model
from altiplano.storage import delete_folder
from altiplano.train.follow import LOG, read_log
from altiplano.train.local import train_here
from altiplano.train.machine import Machine
from altiplano.train.run import run_training
from altiplano.train.schedule import stream_seed
from altiplano.train.strategy import Sharing
from altiplano.train.worker import TrainJob
from tests.helpers.command import Command
from tests.helpers.s3 import Bucket
from tests.helpers.tiny_config import training, write_imported_run
from tests.helpers.tiny_run import LENGTH, VOCAB_OLD, write_model, write_store

WORKERS = ClusterSection(num_workers=2)


def settings(**given) -> TrainSettings:
    values = {
        "name": "test", "lora": LoraSettings(r=4), "steps": 6, "tokens_per_step": 4 * LENGTH,
        "micro_batch_tokens": LENGTH, "learning_rate": 1e-2, "precision": "float32", "log_steps": 1,
    }  # fmt: skip
    return TrainSettings(**{**values, **given})


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(
        settings=settings(),
        model_dir=write_model(tmp_path / "model"),
        adapter_dirs=(),
        vocab_old=VOCAB_OLD,
        store_dir=write_store(tmp_path / "store"),
        seed=5,
        run_key="0123456789abcdef",
        num_threads=1,
        use_gpu=False,
    )


def losses_without_ray(job: TrainJob) -> list[float]:
    """The uninterrupted run of one worker in this process: what every other run must equal."""
    trainee = make_trainee(
        load_model(job.model_dir), job.settings, job.vocab_old, stream_seed(job.seed, "lora")
    )
    machine = Machine(
        torch.device("cpu"),
        torch.float32,
        DOCUMENTS,
        "test",
    )
    records, _ = train_here(trainee, TokenStore.open(job.store_dir), seed=job.seed, machine=machine)
    return [record.loss for record in records]


def losses_of(log_file: Path) -> list[float]:
    records = read_log(log_file)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def starts_of(log_file: Path) -> list[dict]:
    """Where workers began: once per start and restart."""
    records = [json.loads(line) for line in log_file.read_text().splitlines()]
    return [record for record in records if record["event"] == "start"]


def test_two_ray_workers_train_as_one_does_without_ray(
    job: TrainJob, tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    outcome = run_training(job, WORKERS, tmp_path / "work")
    expected = losses_without_ray(job)
    np.testing.assert_allclose(losses_of(outcome.work_dir / LOG), expected, rtol=1e-4)
    assert outcome.metrics["last_loss"] == pytest.approx(expected[-1], rel=1e-4)
    assert {path.suffix for path in outcome.weights_dir.iterdir()} <= {".safetensors", ".json"}

    # The driver may die after the last checkpoint: the run is over, nothing is trained again.
    weights = {path.name: path.read_bytes() for path in outcome.weights_dir.iterdir()}
    resumed = run_training(job, WORKERS, tmp_path / "work")
    assert {path.name: path.read_bytes() for path in resumed.weights_dir.iterdir()} == weights
    assert [record["step"] for record in starts_of(resumed.work_dir / LOG)] == [0, 6]
    assert losses_of(resumed.work_dir / LOG) == losses_of(outcome.work_dir / LOG)


def test_zero_on_ray_trains_as_one_worker_does(
    job: TrainJob, tmp_path: Path, ray_cluster: dict[str, str], s3_bucket: Bucket
) -> None:
    """DeepSpeed inside Ray's workers, checkpoints on S3; `test_strategy.py` has all of ZeRO."""
    job = replace(job, sharing=Sharing("zero2"))
    cluster = WORKERS.model_copy(update={"checkpoints": f"s3://{s3_bucket.name}/runs"})
    outcome = run_training(job, cluster, tmp_path / "work")
    assert outcome.states.startswith(f"s3://{s3_bucket.name}/runs/test-")
    kept = s3_bucket.client.list_objects_v2(Bucket=s3_bucket.name)["Contents"]
    assert {Path(item["Key"]).parent.name for item in kept} == {"step-00000006"}
    delete_folder(outcome.states)
    assert "Contents" not in s3_bucket.client.list_objects_v2(Bucket=s3_bucket.name)
    np.testing.assert_allclose(
        losses_of(outcome.work_dir / LOG), losses_without_ray(job), rtol=1e-4
    )


def has_come_far(work_dir: Path) -> bool:
    """Whether the third checkpoint is there."""
    return any(int(path.name[-8:]) >= 9 for path in work_dir.glob("states/step-*"))


def kill_first_worker(work_dir: Path) -> None:
    """Wait for some checkpoints, then kill the worker that writes them."""
    log = work_dir / "log.jsonl"
    while not (has_come_far(work_dir) and log.is_file() and starts_of(log)):
        time.sleep(0.01)
    os.kill(starts_of(work_dir / "log.jsonl")[0]["pid"], signal.SIGKILL)


def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(
    job: TrainJob, tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    # Many micro-batches: a step takes long enough for the kill to come between two of them.
    slow = settings(steps=30, checkpoint_steps=3, tokens_per_step=24 * LENGTH)
    job = replace(job, settings=slow)
    work_dir = tmp_path / "work" / "test-0123456789ab"
    killer = threading.Thread(target=kill_first_worker, args=(work_dir,), daemon=True)
    killer.start()
    outcome = run_training(job, WORKERS, tmp_path / "work")
    killer.join(timeout=5)
    assert not killer.is_alive()
    first, second = starts_of(outcome.work_dir / LOG)
    assert first["step"] == 0 and 0 < second["step"] < 30 and second["step"] % 3 == 0
    np.testing.assert_allclose(
        losses_of(outcome.work_dir / LOG), losses_without_ray(job), rtol=1e-4
    )


def test_workers_that_keep_dying_end_the_stage_with_the_reason(
    job: TrainJob, tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    job = replace(job, model_dir=tmp_path / "gone")
    with pytest.raises(TrainingError, match="stage test failed") as caught:
        run_training(job, WORKERS.model_copy(update={"max_failures": 0}), tmp_path / "work")
    assert str(tmp_path / "gone") in str(caught.value)


def test_a_useless_run_stops_with_the_reason_and_is_not_tried_again(
    job: TrainJob, tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    bad = settings(full=True, rows="none", lora=None, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"stage test, step \d: the loss is"):
        run_training(replace(job, settings=bad), WORKERS, tmp_path / "work")
    (log,) = (tmp_path / "work").glob("*/log.jsonl")
    assert len(starts_of(log)) == 1


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"num_workers": 64}, "64 CPU"), ({"num_workers": 2, "gpus_per_worker": 1}, "2 GPU")],
)
def test_more_than_the_cluster_has_is_refused_at_once(
    job: TrainJob, tmp_path: Path, ray_cluster: dict[str, str], asked: dict, named: str
) -> None:
    with pytest.raises(TrainingError, match=f"training needs {named}.*the cluster has"):
        run_training(job, ClusterSection(wait_s=0, **asked), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    stage = training(
        name="lora", lora={"r": 2}, steps=60, checkpoint_steps=3, tokens_per_step=24 * 64,
        micro_batch_tokens=64,
    )  # fmt: skip
    config = write_imported_run(tmp_path, pretrain={"stages": [stage]})
    order = ("run", config, "--until", "pretrain")
    training_dir = tmp_path / "run" / ".training"
    with Command(tmp_path, *order) as command:
        command.wait_until(
            lambda: any(
                has_come_far(work_dir) and starts_of(work_dir / "log.jsonl")
                for work_dir in training_dir.glob("pretrain-*")
            )
        )
        command.kill()
    assert not (tmp_path / "run" / "pretrain-lora").exists()

    with Command(tmp_path, *order) as command:
        assert command.exit_code() == 0, command.log
        assert "pretrain-lora: resumed after step" in command.log
    log = tmp_path / "run" / "pretrain-lora" / "logs" / "log.jsonl"
    _, second = starts_of(log)
    assert 0 < second["step"] < 60 and second["step"] % 3 == 0
    after = {r["step"]: r["loss"] for r in read_log(log) if r["step"] > second["step"]}
    expected = _losses_of_stage(config)
    np.testing.assert_allclose(
        list(after.values()), [expected[step - 1] for step in after], rtol=1e-4
    )
    assert max(after) == 60


def _losses_of_stage(config: Path) -> list[float]:
    """What the first pre-training stage of a run must show, computed without Ray."""
    project = load_config(config)
    assert project.config.pretrain is not None
    model = open_artifact(project.output / "extend")
    return losses_without_ray(
        TrainJob(
            settings=project.config.pretrain.stages[0],
            model_dir=model.path,
            adapter_dirs=(),
            vocab_old=model.manifest.vocab_old or 0,
            store_dir=project.output / "data-text" / "train",
            seed=stream_seed(project.config.seed, "pretrain-lora"),
            run_key="",
            num_threads=1,
            use_gpu=False,
        )
    )
