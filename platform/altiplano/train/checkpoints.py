"""A run's checkpoints: which one is read after a death, and saving while the training goes on.

Whatever dies at whatever moment, the newest whole checkpoint is found: a new one appears in one
piece (`train/places.py`), and old ones go only once it is there. A save that fails is said and
costs nothing but the checkpoint. Knows neither workers nor what is trained; worker 0 saves, all
read. Costs: one state in memory while it is written, `keep_last` + 2 of them on disk.
"""

import threading
from collections.abc import Callable
from dataclasses import replace

from altiplano.errors import TrainingError
from altiplano.train.checkpoint import BrokenStateError
from altiplano.train.places import open_place
from altiplano.train.state import TrainState

_RUN_KEY = "run_key"


class Checkpoints:
    """The checkpoints of one run at one place."""

    def __init__(
        self, location: str, *, run_key: str, keep_last: int, say: Callable[[str], None]
    ) -> None:
        """Open the place; nothing is looked at yet.

        Args:
            location: this run's own directory, or fsspec URL, seen by every node.
            run_key: hash of settings and inputs; checkpoints of another one are refused.
            keep_last: how many of the newest are kept, beside the best.
            say: takes messages for the user; also called from the writing thread.

        Raises:
            TrainingError: the URL cannot be used here.
        """
        assert keep_last >= 1
        self.location, self._run_key, self._keep_last = location, run_key, keep_last
        self._say = say
        self._place = open_place(location)
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._broken: set[int] = set()
        self._found: TrainState | None = None

    def newest_step(self) -> int | None:
        """Step of the newest whole checkpoint, None without any; for worker 0.

        Checks every byte, says which ones are broken, and deletes what killed saves left.

        Raises:
            TrainingError: it is another run's, or a newer Altiplano's.
            OSError: the place cannot be reached; nothing is said about its checkpoints then.
        """
        self._place.sweep()
        self._found = self._newest_of(self._place.steps())
        return None if self._found is None else self._found.step

    def read(self, step: int) -> TrainState:
        """The checkpoint that worker 0 has chosen; on any worker.

        Raises:
            TrainingError: it is broken, another run's or a newer Altiplano's.
        """
        found, self._found = self._found, None
        return found if found is not None and found.step == step else self._load(step)

    def newest(self) -> TrainState | None:
        """`newest_step` and `read` in one, for a single process."""
        step = self.newest_step()
        return None if step is None else self.read(step)

    def best_or_last(self, best: bool) -> TrainState:
        """What a finished run has trained.

        Args:
            best: the one that was saved as the best; the last without such a one.

        Raises:
            TrainingError: there is no whole checkpoint.
        """
        steps = self._place.steps()
        found = None
        if best:
            found = self._newest_of([step for step in steps if self._is_best(step)])
        found = found or self._newest_of(steps)
        if found is None:
            raise TrainingError(f"{self.location} holds no whole checkpoint: run the stage again")
        return found

    def save(self, state: TrainState, *, best: bool = False) -> None:
        """Begin to write a state and return; waits for the save before, if it still runs.

        Args:
            state: must not change any more.
            best: whether it is better than all before it; kept until a better one is there.
        """
        self._join()
        state = replace(state, progress={**state.progress, _RUN_KEY: self._run_key})
        self._thread = threading.Thread(
            target=self._write, args=(state, best), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the last save.

        Raises:
            TrainingError: it failed.
        """
        self._join()
        if self._failure is not None:
            raise TrainingError(
                f"{self._failure}; mend that and run the stage again: it goes on from there"
            )

    def clear(self) -> None:
        """Delete all checkpoints, once the run's artifact is in place."""
        self._join()
        for step in self._place.steps():
            self._place.delete(step)
        self._place.sweep()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _newest_of(self, steps: list[int]) -> TrainState | None:
        for step in reversed(steps):
            try:
                return self._load(step)
            except BrokenStateError as error:
                self._broken.add(step)
                self._say(f"checkpoint at step {step} is broken and not used: {error}")
        if steps:
            self._say(f"none of the {len(steps)} checkpoints in {self.location} can be used")
        return None

    def _load(self, step: int) -> TrainState:
        state = self._place.read(step)
        found = str(state.progress.get(_RUN_KEY))
        if found != self._run_key:
            raise TrainingError(
                f"checkpoint at step {step} in {self.location} is of run {found[:12]}, this is run "
                f"{self._run_key[:12]}: go on with that run's settings and data, or delete it"
            )
        return state

    def _is_best(self, step: int) -> bool:
        try:
            return self._place.summary(step).best
        except BrokenStateError:
            return False

    def _write(self, state: TrainState, best: bool) -> None:
        """The writing thread. A library's own errors must not end a training, whatever they are."""
        try:
            if self._make_room(state.step):
                self._place.write(state, best=best)
            self._failure = None
        except Exception as error:
            self._failure = (
                f"checkpoint at step {state.step} was not written to {self.location}: "
                f"{error or type(error).__name__}; {self._last_before()}"
            )
            self._say(f"{self._failure}; training goes on")
            return
        try:
            self._delete_old(state.step)
        except Exception as error:
            self._say(f"old checkpoints in {self.location} were not deleted: {error}")

    def _make_room(self, step: int) -> bool:
        """Whether a step is to be written: after a fallback it may be there, whole or broken."""
        if step in self._place.steps():
            try:
                self._load(step)
                return False
            except BrokenStateError:
                pass
        self._place.delete(step)
        return True

    def _last_before(self) -> str:
        try:
            steps = [step for step in self._place.steps() if step not in self._broken]
        except Exception as error:
            return f"{self.location} cannot be read either ({error})"
        return f"the last one is of step {steps[-1]}" if steps else "there is none before it"

    def _delete_old(self, newest: int) -> None:
        """Delete all up to the newest but those to keep. Later ones are broken, or another's."""
        steps = [step for step in self._place.steps() if step <= newest]
        whole = [step for step in steps if step not in self._broken or step == newest]
        keep = {*whole[-self._keep_last :], *[s for s in whole if self._is_best(s)][-1:]}
        for step in steps:
            if step not in keep:
                self._place.delete(step)
        self._broken -= {*steps}
