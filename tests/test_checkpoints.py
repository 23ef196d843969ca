"""Checkpoints: whatever is killed, broken or full, the newest whole one is found (6 s)."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from altiplano.errors import TrainingError
from altiplano.train.checkpoint import (
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    BrokenStateError,
    read_state,
    write_state,
)
from altiplano.train.checkpoints import Checkpoints
from altiplano.train.state import TrainState

RUN = "0123456789abcdef"


def make_state(step: int, **progress) -> TrainState:
    """A state that no other step has, with a scalar, an empty and a transposed tensor."""
    generator = torch.Generator().manual_seed(step)
    weights = {
        "blocks.0.weight": torch.randn(5, 3, generator=generator).t(),
        "norm": torch.randn(7, generator=generator),
        "empty": torch.zeros(0, 4),
    }
    moments = {
        name: {"exp_avg": weight + 1, "exp_avg_sq": weight**2, "step": torch.tensor(float(step))}
        for name, weight in weights.items()
    }
    return TrainState(step, weights, moments, {"precision": "float32", **progress})


def assert_equal(found: TrainState | None, expected: TrainState) -> None:
    assert found is not None and found.step == expected.step
    assert {k: v for k, v in found.progress.items() if k != "run_key"} == expected.progress
    assert found.weights.keys() == expected.weights.keys()
    assert found.moments.keys() == expected.moments.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight)
        assert found.moments[name].keys() == expected.moments[name].keys()
        for moment, value in expected.moments[name].items():
            assert torch.equal(found.moments[name][moment], value)


class Run:
    """Checkpoints at a place, and what they said."""

    def __init__(self, location: str | Path, *, run_key: str = RUN, keep_last: int = 2) -> None:
        self.said: list[str] = []
        self.checkpoints = Checkpoints(
            str(location), run_key=run_key, keep_last=keep_last, say=self.said.append
        )

    def save(self, *steps: int, best: bool = False) -> "Run":
        for step in steps:
            self.checkpoints.save(make_state(step), best=best)
        self.checkpoints.wait()
        return self

    def newest(self) -> TrainState | None:
        return self.checkpoints.newest()


def folders(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def folder(step: int) -> str:
    return f"step-{step:08d}"


# One checkpoint


def test_a_state_comes_back_bit_for_bit_and_others_can_read_its_files(tmp_path: Path) -> None:
    state = make_state(3, bits={"zh": 1.5}, stop=False)
    write_state(tmp_path, state)
    assert_equal(read_state(tmp_path), state)
    assert torch.equal(load_file(tmp_path / WEIGHTS_FILE)["norm"], state.weights["norm"])
    assert "exp_avg_sq:norm" in load_file(tmp_path / OPTIMIZER_FILE)
    assert folders(tmp_path) == sorted([OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE])


def test_a_state_without_moments_is_a_state(tmp_path: Path) -> None:
    state = TrainState(0, {"a": torch.ones(2)}, {}, {})
    write_state(tmp_path, state)
    assert read_state(tmp_path).moments == {}


def test_what_is_read_may_be_changed_in_memory(tmp_path: Path) -> None:
    write_state(tmp_path, make_state(1))
    read_state(tmp_path).weights["norm"].add_(1)
    assert_equal(read_state(tmp_path), make_state(1))


@hypothesis_settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from([WEIGHTS_FILE, OPTIMIZER_FILE]))
def test_any_changed_or_missing_byte_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    directory = tmp_path_factory.mktemp("state")
    write_state(directory, make_state(1))
    content = bytearray((directory / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    (directory / name).write_bytes(content)
    with pytest.raises(BrokenStateError, match=name):
        read_state(directory)


# Which one is read


def test_a_new_run_has_none(tmp_path: Path) -> None:
    run = Run(tmp_path / "not" / "made")
    assert run.newest() is None and run.said == []
    assert not (tmp_path / "not").exists()


def test_the_newest_is_read_and_as_many_are_kept_as_asked(tmp_path: Path) -> None:
    Run(tmp_path, keep_last=2).save(1, 2, 3, 4)
    assert folders(tmp_path) == [folder(3), folder(4)]
    run = Run(tmp_path)
    assert run.checkpoints.newest_step() == 4
    assert_equal(run.checkpoints.read(4), make_state(4))
    assert_equal(Run(tmp_path).checkpoints.read(3), make_state(3))


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1).save(1, best=True).save(2, 3)
    assert folders(tmp_path) == [folder(1), folder(3)]
    assert_equal(run.checkpoints.best_or_last(True), make_state(1))
    assert_equal(run.checkpoints.best_or_last(False), make_state(3))
    run.save(4, best=True).save(5)
    assert folders(tmp_path) == [folder(4), folder(5)]


def test_without_a_whole_best_the_last_is_taken_aloud(tmp_path: Path) -> None:
    run = Run(tmp_path).save(1, best=True).save(2)
    (tmp_path / folder(1) / WEIGHTS_FILE).unlink()
    assert_equal(run.checkpoints.best_or_last(True), make_state(2))
    assert "step 1 is broken" in run.said[0] and "is missing" in run.said[0]


def _cut_short(directory: Path) -> None:
    os.truncate(directory / WEIGHTS_FILE, 20)


def _flip(directory: Path) -> None:
    with (directory / OPTIMIZER_FILE).open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x7f")


def _empty_state(directory: Path) -> None:
    (directory / STATE_FILE).write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_cut_short, "has 20 bytes"),
        (_flip, "was changed"),
        (_empty_state, "cannot be read"),
        (lambda directory: (directory / WEIGHTS_FILE).unlink(), "is missing"),
    ],
)
def test_a_broken_newest_is_said_and_the_one_before_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    Run(tmp_path).save(5, 9)
    damage(tmp_path / folder(9))
    run = Run(tmp_path, keep_last=1)
    assert_equal(run.newest(), make_state(5))
    assert "checkpoint at step 9 is broken" in run.said[0] and named in run.said[0]
    assert str(tmp_path / folder(9)) in run.said[0]

    # A save between the two must not push the only good one out in favour of the broken one.
    run.save(7)
    assert_equal(Run(tmp_path).newest(), make_state(7))
    run.save(9)
    assert_equal(Run(tmp_path).newest(), make_state(9))
    assert folders(tmp_path) == [folder(9)]


def test_a_broken_one_does_not_count_among_those_to_keep(tmp_path: Path) -> None:
    Run(tmp_path).save(5, 9)
    _flip(tmp_path / folder(9))
    run = Run(tmp_path, keep_last=2)
    assert_equal(run.newest(), make_state(5))
    run.save(11)
    assert folders(tmp_path) == [folder(5), folder(11)]


def test_all_broken_is_said_and_the_run_begins_anew(tmp_path: Path) -> None:
    Run(tmp_path).save(5, 9)
    for step in (5, 9):
        _flip(tmp_path / folder(step))
    run = Run(tmp_path)
    assert run.newest() is None
    assert run.said[-1] == f"none of the 2 checkpoints in {tmp_path} can be used"
    with pytest.raises(TrainingError, match="holds no whole checkpoint"):
        run.checkpoints.best_or_last(False)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, run_key="fedcba9876543210").save(3)
    with pytest.raises(TrainingError, match="step 3 .* is of run fedcba987654, this is run 012345"):
        Run(tmp_path).newest()
    assert folders(tmp_path) == [folder(3)]


def test_a_newer_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    Run(tmp_path).save(2, 3)
    file = tmp_path / folder(3) / STATE_FILE
    file.write_text(json.dumps({"format_version": 3, "something": "else"}))
    with pytest.raises(TrainingError, match="has checkpoint format 3, this Altiplano reads 2"):
        Run(tmp_path).newest()


def test_an_unreachable_place_is_no_reason_to_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path).save(3)
    run = Run(tmp_path)

    def refuse(directory: Path) -> TrainState:
        raise PermissionError(errno.EACCES, "Permission denied", str(directory))

    monkeypatch.setattr("altiplano.train.places.read_state", refuse)
    with pytest.raises(PermissionError):
        run.newest()


# Saving


def test_the_training_goes_on_while_a_state_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, order = threading.Event(), []

    def slow(directory: Path, state: TrainState, *, best: bool) -> None:
        assert may_write.wait(10)
        order.append(state.step)
        write_state(directory, state, best=best)

    monkeypatch.setattr("altiplano.train.places.write_state", slow)
    run = Run(tmp_path)
    run.checkpoints.save(make_state(1))
    assert order == []  # `save` has returned before anything was written
    threading.Timer(0.1, may_write.set).start()
    run.checkpoints.save(make_state(2))
    assert order[0] == 1 and folder(1) in folders(tmp_path)  # and the second waited for the first
    run.checkpoints.wait()
    assert folders(tmp_path) == [folder(1), folder(2)]


def test_a_full_disk_costs_the_checkpoint_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path).save(1)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        run.checkpoints.save(make_state(2))
        with pytest.raises(TrainingError, match=r"step 2 was not written .*go(es)? on from there"):
            run.checkpoints.wait()
    assert folders(tmp_path) == [folder(1)]
    (said,) = run.said
    assert "No space left on device: 0.00 MB needed, 0.00 MB free" in said
    assert said.endswith("the last one is of step 1; training goes on")
    run.save(3)  # raises no more once a save succeeds
    assert_equal(Run(tmp_path).newest(), make_state(3))


def test_a_write_that_fails_halfway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path).save(1)

    def fail(directory: Path, state: TrainState, *, best: bool) -> None:
        (directory / WEIGHTS_FILE).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("altiplano.train.places.write_state", fail)
    run.checkpoints.save(make_state(2))
    with pytest.raises(TrainingError, match="No space left"):
        run.checkpoints.wait()
    assert folders(tmp_path) == [folder(1)]


def test_a_step_that_is_there_whole_is_not_written_again(tmp_path: Path) -> None:
    Run(tmp_path).save(4)
    written = (tmp_path / folder(4)).stat().st_ino
    Run(tmp_path).save(4)
    assert (tmp_path / folder(4)).stat().st_ino == written


def test_clear_deletes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    run = Run(tmp_path).save(1, 2)
    for name in ("log.jsonl", "step-00000003-copy", ".writing-step-00000003-abc"):
        (tmp_path / name).mkdir()
    run.checkpoints.clear()
    assert folders(tmp_path) == ["log.jsonl", "step-00000003-copy"]


# Killed at every point

_KILLED_SAVES = """
import os, resource, signal, sys
from pathlib import Path
from altiplano.train.checkpoint import OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE
from tests.test_checkpoints import Run, make_state

# Ends a child at its n-th call that changes the place, or when a file grows beyond n bytes.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
FILES = (OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE)

def save_until_killed(place, *, call=None, size=None):
    child = os.fork()
    if child == 0:
        calls = 0
        def hook(event, arguments):
            nonlocal calls
            # shutil.rmtree names files relative to an open directory.
            if event in CHANGES and str(arguments[0]).startswith((str(place), *FILES)):
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
        if size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        run = Run(place, keep_last=1)
        assert run.newest().step == 8
        sys.addaudithook(hook)
        run.save(9)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0

root = Path(sys.argv[1])
makers = [{"call": n} for n in range(1, 100)] + [{"size": n} for n in range(0, 2000, 100)]
ended = {"call": False, "size": False}
for how in makers:
    (kind, number), = how.items()
    if ended[kind]:
        continue
    place = root / f"{kind}-{number}"
    Run(place).save(8)
    ended[kind] = save_until_killed(place, **how)
assert all(ended.values()), ended
"""


def test_a_save_killed_at_any_point_leaves_the_old_or_the_new_checkpoint_whole(
    root: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-c", _KILLED_SAVES, tmp_path], check=True, cwd=root)
    places = list(tmp_path.iterdir())
    assert len(places) > 20
    found, leftovers = set(), 0
    for place in places:
        leftovers += any(name.startswith(".writing-") for name in folders(place))
        for state_file in place.glob(f"step-*/{STATE_FILE}"):
            read_state(state_file.parent)  # what says it is a checkpoint is one
        run = Run(place, keep_last=1)
        state = run.newest()
        assert state is not None
        assert_equal(state, make_state(state.step))
        assert run.said == []
        found.add(state.step)
        run.save(9)
        assert folders(place) == [folder(9)]
    assert found == {8, 9} and leftovers > 5
