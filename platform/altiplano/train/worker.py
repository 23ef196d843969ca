"""What runs inside each Ray Train worker: build the trainee, resume, run the loop, write the end.

Ray Train starts the workers again when one dies; where they go on is decided here, by the newest
whole checkpoint. Knows Ray Train's context; the driver's side is `train/run.py`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError
from altiplano.train.strategy import Rank, Sharing

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from altiplano.model.adapt import Trainee
    from altiplano.train.checkpoints import Checkpoints
    from altiplano.train.held_out import HeldOut
    from altiplano.train.loop import Engine, Objective
    from altiplano.train.machine import Machine
    from altiplano.train.state import TrainState

WEIGHTS = "weights"
"""Folder below a run's work directory: the trained tensors of a finished training."""


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs; small and picklable."""

    settings: TrainSettings
    model_dir: Path
    adapter_dirs: tuple[Path, ...]
    """Earlier stages, folded in before training starts."""
    vocab_old: int
    store_dir: Path | str
    seed: int
    run_key: str
    """Hash of settings and inputs; a checkpoint of another run is refused."""
    num_threads: int
    use_gpu: bool
    teacher_dir: Path | None = None
    """Model whose distribution is learned instead of the data's next token."""
    held_out_dir: Path | None = None
    """Tokens artifact whose held-out texts are measured every `evaluate_steps`."""
    held_out_bytes: int = 200_000
    """Of each language."""
    sharing: Sharing = field(default_factory=Sharing)
    stall_timeout_s: float = 1800
    profile_steps: tuple[int, int] | None = None


def run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function Ray Train starts on every worker.

    Args:
        config: {"job": TrainJob, "work_dir": shared folder of this run, "checkpoints": where its
            states lie, "board": actor handle that takes log records}.

    Returns:
        {"stopped": reason or None, "machine": what was chosen and why, "finished": whether the
        training came to its end}.
    """
    import torch

    job: TrainJob = config["job"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(job.num_threads)
    try:
        return _Worker(job, config["work_dir"], config["checkpoints"], config["board"]).run()
    except TrainingError as error:
        # A useless run is not a failure to retry: every worker sees the same global loss and stops.
        return {"stopped": str(error), "machine": "", "finished": False}
    except RuntimeError as error:
        # torch.OutOfMemoryError on a GPU; on a CPU a plain RuntimeError of the allocator.
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            first = str(error).strip().splitlines()[0]
            return {"stopped": first, "machine": "", "finished": False, "out_of_memory": True}
        raise


class _Worker:
    """One worker's part of one training."""

    def __init__(self, job: TrainJob, work_dir: Path, checkpoints: str, board: Any) -> None:
        import ray.train

        self._job, self._work_dir = job, work_dir
        context = ray.train.get_context()
        self._rank = make_rank(context.get_world_rank(), context.get_world_size())
        self._first = self._rank.index == 0
        self._board = board if self._first else None
        self._checkpoints = _open_checkpoints(job, checkpoints, self._say)

    def run(self) -> dict[str, Any]:
        """Train to the end of the schedule, or until told to stop."""
        from altiplano.train.loop import train
        from altiplano.train.observe import WorkerObserver

        state = self._newest_state()
        machine = self._agree_on_machine(state)
        engine = self._build(machine, state)
        start = state.step if state else engine.schedule.first_step
        observer = WorkerObserver(
            self._job, engine, self._checkpoints, self._held_out(engine), self._board,
            work_dir=self._work_dir, progress=state.progress if state else {},
        )  # fmt: skip
        with engine.feed, observer:
            observer.start(start)
            done = start
            if not observer.ended_early:
                done = train(engine, observer, start_step=start)
        finished = done == engine.schedule.steps or observer.ended_early
        if self._first:
            self._finish(engine.trainee, finished=finished)
        return {"stopped": None, "machine": machine.reason, "finished": finished, "step": done}

    def _say(self, text: str) -> None:
        if self._board is not None:
            self._board.push.remote({"event": "say", "text": text})

    def _newest_state(self) -> "TrainState | None":
        """The state to go on from: worker 0 decides which, every worker reads it."""
        step: int | None = _agreed(self._checkpoints.newest_step)
        return None if step is None else self._checkpoints.read(step)

    def _agree_on_machine(self, state: "TrainState | None") -> "Machine":
        """What worker 0 chooses, for all workers: a probe on each could come out differently.

        A resumed run goes on in the precision it began in.
        """
        from altiplano.model.load import load_config
        from altiplano.train.machine import choose_machine

        settings = self._job.settings
        if state is not None:
            precision = state.progress["precision"]
            settings = settings.model_copy(update={"precision": precision})
        width = load_config(self._job.model_dir).hidden_size
        use_gpu = self._job.use_gpu
        machine: Machine = _agreed(lambda: choose_machine(settings, width, use_gpu=use_gpu))
        return machine

    def _build(self, machine: "Machine", state: "TrainState | None") -> "Engine":
        from altiplano.data.tokens.store import TokenStore
        from altiplano.train.begin import read_beginning
        from altiplano.train.feed import Feed
        from altiplano.train.loop import Engine
        from altiplano.train.schedule import make_schedule
        from altiplano.train.strategy import make_strategy

        job = self._job
        trainee = build_trainee(job, machine)
        beginning = read_beginning(job.settings, trainee) if job.settings.begin else None
        store = TokenStore.open(job.store_dir)
        schedule = make_schedule(
            job.settings, store.num_blocks, store.sequence_length,
            earlier=beginning.earlier if beginning else None,
        )  # fmt: skip
        strategy = make_strategy(trainee, job.sharing, self._rank, machine.device)
        if state is not None:
            strategy.restore(state)
        elif beginning is not None and beginning.state is not None:
            strategy.restore(beginning.state)
        feed = Feed(store, schedule, machine, self._rank, job.seed, lockstep=strategy.lockstep)
        objective = make_objective(job.teacher_dir, machine)
        return Engine(trainee, strategy, feed, schedule, machine, self._rank, job.seed, objective)

    def _held_out(self, engine: "Engine") -> "HeldOut | None":
        from altiplano.train.held_out import HeldOut

        job = self._job
        if job.settings.evaluate_steps is None or job.held_out_dir is None:
            return None
        return HeldOut.open(
            job.held_out_dir,
            job.model_dir,
            max_bytes=job.held_out_bytes,
            sequence_length=engine.feed.sequence_length,
            model_config=engine.trainee.model.config,
        )

    def _finish(self, trainee: "Trainee", *, finished: bool) -> None:
        """Wait for the last checkpoint; where the training is over, write what it trained."""
        from altiplano.train.begin import OPTIMIZER
        from altiplano.train.checkpoint import write_state

        self._checkpoints.wait()
        if not finished:
            return
        state = self._checkpoints.best_or_last(best=self._job.settings.keep_best)
        trainee.write(state.weights, self._work_dir / WEIGHTS)
        if self._job.settings.keep_optimizer:
            (self._work_dir / OPTIMIZER).mkdir(exist_ok=True)
            write_state(self._work_dir / OPTIMIZER, state)


def make_rank(index: int, count: int) -> Rank:
    """This worker's place; sums go over torch's process group, which Ray Train has joined."""

    def reduce_sum(tensor: "torch.Tensor") -> None:
        if count > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    return Rank(index, count, reduce_sum)


def _agreed(choose: Any) -> Any:
    """What worker 0 chooses, on every worker.

    Raises:
        TrainingError: what `choose` raised; on every worker, so that none waits.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    choice: Any = None
    if ray.train.get_context().get_world_rank() == 0:
        try:
            choice = choose()
        except TrainingError as error:
            choice = error
    agreed = broadcast_from_rank_zero(choice)
    if isinstance(agreed, TrainingError):
        raise agreed
    return agreed


def _open_checkpoints(job: TrainJob, location: str, say: Any) -> "Checkpoints":
    from altiplano.train.checkpoints import Checkpoints

    return Checkpoints(location, run_key=job.run_key, keep_last=job.settings.keep_last, say=say)


def build_trainee(job: TrainJob, machine: "Machine") -> "Trainee":
    """The model with earlier stages folded in and this stage's trainable parts in place."""
    import torch

    from altiplano.model import attention
    from altiplano.model.adapt import make_trainee
    from altiplano.model.fold import AdapterStack, fold_into
    from altiplano.model.load import load_model
    from altiplano.model.quantize import quantize_blocks
    from altiplano.model.recompute import apply_recompute, compile_blocks
    from altiplano.train.schedule import stream_seed

    settings = job.settings
    # Full training keeps fp32 masters; a frozen base is stored in the type it is computed in.
    stored = torch.float32 if settings.full else machine.compute
    model = load_model(job.model_dir, str(stored).removeprefix("torch."))
    fold_into(model, AdapterStack(job.adapter_dirs, job.vocab_old))
    if settings.quantize != "none":
        quantize_blocks(model, settings.quantize, machine.device)
    attention.register()
    model.config._attn_implementation = machine.attention
    trainee = make_trainee(model, settings, job.vocab_old, stream_seed(job.seed, "lora"))
    trainee.model.to(machine.device)
    apply_recompute(trainee.model, settings.gradient_checkpointing)
    if settings.compile:
        compile_blocks(trainee.model)
    return trainee


def make_objective(teacher_dir: Path | None, machine: "Machine") -> "Objective":
    """The next token of the data, or what a teacher says of it."""
    from altiplano.model.loss import summed_cross_entropy, summed_distillation
    from altiplano.train.batch import Inputs

    if teacher_dir is None:

        def learn_data(trainee: "Trainee", inputs: Inputs) -> "torch.Tensor":
            return summed_cross_entropy(trainee.hidden(**inputs.model), inputs.labels, trainee.head)

        return learn_data

    teacher = _load_teacher(teacher_dir, machine)

    def learn_teacher(trainee: "Trainee", inputs: Inputs) -> "torch.Tensor":
        import torch

        with torch.no_grad():
            taught = teacher.model(use_cache=False, **inputs.model).last_hidden_state
        return summed_distillation(
            trainee.hidden(**inputs.model), inputs.labels, trainee.head, taught, teacher.lm_head
        )

    return learn_teacher


def _load_teacher(directory: Path, machine: "Machine") -> "LlamaForCausalLM":
    from altiplano.model.load import load_model

    teacher = load_model(directory, str(machine.compute).removeprefix("torch."))
    teacher.requires_grad_(False)
    teacher.config._attn_implementation = machine.attention
    return teacher.to(machine.device)
