"""A training survives the loss of nodes, of a worker in a save, and of its driver (90 s)."""

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from altiplano.data.tokens.store import TokenStore
from altiplano.model.adapt import make_trainee
from altiplano.model.load import load_model
from altiplano.train.follow import LOG, read_records
from altiplano.train.local import train_here
from altiplano.train.run import run_training
from altiplano.train.schedule import stream_seed
from altiplano.train.worker import TrainJob
from tests.helpers.lost_nodes import STEPS, make_job, starts_of, wait_for, work_dir_of
from tests.helpers.tiny_run import write_model
from tests.test_train_ray import WORKERS, losses_of, losses_without_ray, settings


@pytest.fixture(scope="module")
def lost(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings that lost nodes (see the helper)."""
    folder = tmp_path_factory.mktemp("lost")
    log = folder / "log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "tests.helpers.lost_nodes", str(folder)]
        code = subprocess.run(command, cwd=root, stdout=output, stderr=output, timeout=280)
    assert code.returncode == 0, log.read_text()[-3000:]
    return folder


def job_of(folder: Path) -> TrainJob:
    """The job that the helper has trained in a folder."""
    shape = make_job(folder / "again", endless=folder.name == "fewer")
    return replace(shape, model_dir=folder / "model", store_dir=folder / "store")


def test_a_lost_node_costs_only_the_steps_since_the_last_checkpoint(lost: Path) -> None:
    work_dir = work_dir_of(lost / "replaced")
    first, *_, last = starts_of(work_dir)
    assert (first["step"], first["workers"], last["workers"]) == (0, 2, 2)
    assert 0 < last["step"] < STEPS and last["step"] % 3 == 0
    expected = losses_without_ray(job_of(lost / "replaced"))
    np.testing.assert_allclose(losses_of(work_dir / LOG), expected, rtol=1e-4)


def test_a_node_that_announces_its_end_and_an_order_to_stop_both_save_first(lost: Path) -> None:
    work_dir = work_dir_of(lost / "fewer")
    first, *_, last = starts_of(work_dir)
    assert (first["step"], first["workers"], last["workers"]) == (0, 2, 1)
    assert last["step"] > 0  # although no regular checkpoint was ever due

    losses = losses_of(work_dir / LOG)
    told = (lost / "fewer" / "error").read_text()
    found = re.search(r"told to stop; the state after step (\d+) is saved", told)
    assert found is not None, told
    # The log may know later steps, made between the last save and the node's end.
    assert last["step"] < int(found[1]) <= len(losses)
    assert (work_dir / "states" / f"step-{int(found[1]):08d}").is_dir()

    job = job_of(lost / "fewer")
    seed = stream_seed(job.seed, "lora")
    trainee = make_trainee(load_model(job.model_dir), job.settings, job.vocab_old, seed)
    store = TokenStore.open(job.store_dir)
    records, _ = train_here(trainee, store, seed=job.seed, stop_after=len(losses))
    np.testing.assert_allclose(losses, [record.loss for record in records], rtol=1e-4)


def kill_writer(work_dir: Path, found: list[Path]) -> None:
    """Kill worker 0 while its second checkpoint or a later one is half-written."""
    states = work_dir / "states"
    # The driver writes the log a moment after the workers have begun.
    wait_for(lambda: any(states.glob("step-*")) and bool(starts_of(work_dir)))
    pid = starts_of(work_dir)[0]["pid"]
    while not found:
        if half := list(states.glob(".writing-*")):
            os.kill(pid, signal.SIGKILL)
            found += [folder for folder in half if folder.exists()]
            return


def test_a_worker_killed_in_the_middle_of_a_save_goes_on_from_the_one_before(
    tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    # 20,000 rows, so that a save takes long enough to be hit.
    job = replace(
        make_job(tmp_path),
        settings=settings(steps=100, checkpoint_steps=2, full=True, rows="none", lora=None),
        model_dir=write_model(tmp_path / "large", vocab=20_000),
    )
    work_dir, half = work_dir_of(tmp_path), []
    killer = threading.Thread(target=kill_writer, args=(work_dir, half), daemon=True)
    killer.start()
    run_training(job, WORKERS, tmp_path / "work")
    killer.join(timeout=5)
    (half_written,) = half
    first, second = starts_of(work_dir)
    lost_step = int(half_written.name.split("-")[2])
    assert first["step"] == 0 and second["step"] == lost_step - 2
    assert not list((work_dir / "states").glob(".writing-*"))
    assert not any("broken" in record.get("text", "") for record in read_records(work_dir / LOG))
    np.testing.assert_allclose(losses_of(work_dir / LOG), losses_without_ray(job), rtol=1e-4)
