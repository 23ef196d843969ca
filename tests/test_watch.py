"""What watches a training: stalls, the profiler, what the driver shows and passes on."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from altiplano.config.cluster import ClusterSection, TrackSection
from altiplano.config.training import TrainSettings
from altiplano.errors import MemoryShortageError, TrainingError
from altiplano.plan import explain_oom, make_plan
from altiplano.train.follow import Board, Follower, read_log, read_records
from altiplano.train.loop import Asked, StepRecord
from altiplano.train.run import _explain, _lacking, _require_end
from altiplano.train.watch import Meter, Profiler
from altiplano.train.worker import TrainJob
from tests.helpers.tiny_config import tiny_project, training

STALLS = """
    import sys, time
    from pathlib import Path
    from altiplano.train.watch import StallTimer

    timer = StallTimer(Path(sys.argv[1]), 0.5)
    for _ in range(4):
        timer.beat()
        time.sleep(0.2)
    def waits_for_a_dead_worker():
        time.sleep(60)
    waits_for_a_dead_worker() if sys.argv[2] == "stall" else timer.stop()
"""


@pytest.mark.parametrize(("end", "code"), [("stall", 1), ("stop", 0)])
def test_a_worker_that_makes_no_step_ends_itself_and_says_where_it_was(
    tmp_path: Path, end: str, code: int
) -> None:
    file = tmp_path / "stalled-0.txt"
    program = textwrap.dedent(STALLS)
    done = subprocess.run([sys.executable, "-c", program, str(file), end], timeout=50, check=False)
    assert done.returncode == code
    assert ("waits_for_a_dead_worker" in file.read_text()) if end == "stall" else not file.exists()


def test_the_profiler_writes_the_steps_it_is_asked_for(tmp_path: Path) -> None:
    profiler = Profiler((2, 3), tmp_path / "profile.json")
    for step in (1, 2, 3, 4):
        profiler.before(step)
        torch.ones(step, 7) @ torch.ones(7, 5)
        profiler.after(step)
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2
    Profiler(None, tmp_path / "none.json").before(1)
    assert not (tmp_path / "none.json").exists()


def step_record(step: int = 3) -> StepRecord:
    return StepRecord(step, 10, 2.5, 1e-3, 2e-3, 0.7, 64, 200.0, 0.5, 0.01, Asked())


def test_the_meter_tells_share_of_the_machine_and_time_left() -> None:
    found = Meter(flops_per_token=1e6, flops_per_second=1e9).measure(step_record())
    assert found["mfu"] == pytest.approx(0.2) and found["seconds_left"] == pytest.approx(3.5)
    assert found["loss"] == 2.5 and found["memory_mib"] > 50


def test_a_board_keeps_order_and_passes_the_order_to_stop_on() -> None:
    board = Board()
    assert not board.push({"event": "say", "text": "a"})
    board.stop()
    assert board.push({"event": "say", "text": "b"})
    assert [record["text"] for record in board.drain()] == ["a", "b"] and board.drain() == []


@pytest.mark.parametrize(
    ("track", "key"),
    [({"wandb_project": "p"}, "track.wandb_project"), ({"mlflow_uri": "m"}, "track.mlflow_uri")],
)
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, track: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TrainingError, match=rf"`{key}` needs the package .*`track` extra"):
        Follower(None, "sft", tmp_path, TrackSection(**track))


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    class Broken:
        def log(self, values: dict[str, float], step: int) -> None:
            raise ConnectionError("no route")

    follower = Follower(None, "sft", tmp_path, TrackSection())
    seen: list[int] = []
    working = SimpleNamespace(log=lambda values, step: seen.append(step), close=lambda: None)
    follower._sinks[:] = [Broken(), working]
    for step in (1, 2):
        follower._log({"loss": 1.0}, step)
    assert seen == [1, 2] and follower._sinks == [working]


def test_a_step_trained_twice_counts_once(tmp_path: Path) -> None:
    lines = [
        {"event": "step", "step": 1, "loss": 3.0}, {"event": "step", "step": 2, "loss": 2.0},
        {"event": "start", "step": 1}, {"event": "step", "step": 2, "loss": 2.5},
    ]  # fmt: skip
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["loss"] for record in read_log(tmp_path / "log")] == [3.0, 2.5]
    assert len(read_records(tmp_path / "log")) == 4


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(
        settings=TrainSettings(**training(name="sft")), model_dir=tmp_path, adapter_dirs=(),
        vocab_old=0, store_dir=tmp_path, seed=0, run_key="k", num_threads=1, use_gpu=False,
    )  # fmt: skip


class Ended:
    """What Ray Train gives at the end."""

    def __init__(self, **returned: object) -> None:
        self.return_value = returned


def test_an_end_before_the_end_is_told_apart(job: TrainJob) -> None:
    _require_end(Ended(finished=True), job, stopped=False)
    with pytest.raises(MemoryShortageError, match="stage sft: CUDA out of memory"):
        _require_end(Ended(stopped="CUDA out of memory.", out_of_memory=True), job, stopped=False)
    with pytest.raises(TrainingError, match="told to stop; the state after step 7 is saved"):
        _require_end(Ended(finished=False, step=7), job, stopped=True)


def test_a_stall_is_told_with_the_file_that_says_where(job: TrainJob, tmp_path: Path) -> None:
    cluster = ClusterSection(stall_timeout_s=5)
    assert "made no step" not in _explain(RuntimeError("died"), job, cluster, tmp_path)
    (tmp_path / "stalled-1.txt").write_text("Thread 0x1: all_reduce")
    told = _explain(RuntimeError("died"), job, cluster, tmp_path)
    assert "made no step for 5 s" in told and "stalled-1.txt" in told


def test_elastic_training_needs_only_its_fewest_workers() -> None:
    have = {"CPU": 3.0}
    assert _lacking(ClusterSection(num_workers=(2, 8)), have) is None
    lack = _lacking(ClusterSection(num_workers=(4, 8), cpus_per_worker=2), have)
    assert lack == "training needs 8 CPU (4 workers x 2), the cluster has 3"


def test_out_of_memory_names_the_largest_part_and_the_key(tmp_path: Path) -> None:
    """What the stage adds to a worker's message."""
    (stage,) = (stage for stage in make_plan(tiny_project(tmp_path)).stages if stage.name == "sft")
    told = explain_oom(stage)
    largest = max(stage.memory_bytes, key=lambda name: stage.memory_bytes[name])
    assert f"most of it {largest}" in told and "`" in told.split(largest, 1)[1]
