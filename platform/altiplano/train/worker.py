"""What runs inside each Ray Train worker: build the trainee, resume, run the loop, report.

Knows Ray Train's context; the driver's side is `train/run.py`.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from altiplano.model.adapt import Trainee
    from altiplano.train.loop import Objective, StepRecord
    from altiplano.train.machine import Machine


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


def run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function Ray Train starts on every worker.

    Args:
        config: {"job": TrainJob, "board": actor handle that takes log records}.

    Returns:
        {"stopped": reason or None, "machine": what was chosen and why}.
    """
    import torch

    job: TrainJob = config["job"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(job.num_threads)
    try:
        return _train(job, config["board"])
    except TrainingError as error:
        # A useless run is not a failure to retry: every worker sees the same global loss and stops.
        return {"stopped": str(error), "machine": ""}


def _train(job: TrainJob, board: Any) -> dict[str, Any]:
    import ray.train

    from altiplano.data.tokens.store import TokenStore
    from altiplano.train.checkpoint import load_checkpoint
    from altiplano.train.loop import make_optimizer, train
    from altiplano.train.schedule import make_schedule

    context = ray.train.get_context()
    machine = _agree_on_machine(job)
    trainee = _build_trainee(job, machine.compute, machine.attention)
    trainee.model.to(machine.device)
    store = TokenStore.open(job.store_dir)
    schedule = make_schedule(job.settings, store.num_blocks, store.sequence_length)
    optimizer = make_optimizer(trainee)
    start_step = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as directory:
            start_step = load_checkpoint(Path(directory), trainee, optimizer, run_key=job.run_key)
    reporter = _Reporter(
        job, trainee, optimizer, machine, board if context.get_world_rank() == 0 else None
    )
    reporter.start(start_step, schedule.steps)
    train(
        trainee,
        optimizer,
        store,
        schedule,
        machine=machine,
        rank=_rank(context),
        seed=job.seed,
        start_step=start_step,
        objective=_objective(job, machine.device, machine.compute),
        on_step=reporter.on_step,
        on_checkpoint=reporter.on_checkpoint,
    )
    return {"stopped": None, "machine": machine.reason}


def _agree_on_machine(job: TrainJob) -> "Machine":
    """What rank 0 chooses, for all workers: a probe on each could come out differently.

    Raises:
        TrainingError: what was asked for is not here; on every worker, so that none waits.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    choice: Machine | TrainingError | None = None
    if ray.train.get_context().get_world_rank() == 0:
        try:
            choice = _choose_machine(job)
        except TrainingError as error:
            choice = error
    agreed: Machine | TrainingError = broadcast_from_rank_zero(choice)
    if isinstance(agreed, TrainingError):
        raise agreed
    return agreed


def _choose_machine(job: TrainJob) -> "Machine":
    """A resumed run goes on in the precision it began in."""
    import ray.train

    from altiplano.model.load import load_config
    from altiplano.train.checkpoint import saved_precision
    from altiplano.train.machine import choose_machine

    settings = job.settings
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as directory:
            precision = saved_precision(Path(directory))
        settings = settings.model_copy(update={"precision": precision})
    width = load_config(job.model_dir).hidden_size
    return choose_machine(settings, width, use_gpu=job.use_gpu)


def _build_trainee(job: TrainJob, compute: "torch.dtype", attention: str) -> "Trainee":
    import torch

    from altiplano.model.adapt import make_trainee
    from altiplano.model.fold import AdapterStack, fold_into
    from altiplano.model.load import load_model
    from altiplano.train.schedule import stream_seed

    # Full training keeps fp32 masters; a frozen base is stored in the type it is computed in.
    stored = torch.float32 if job.settings.full else compute
    model = load_model(job.model_dir, str(stored).removeprefix("torch."))
    fold_into(model, AdapterStack(job.adapter_dirs, job.vocab_old))
    model.config._attn_implementation = attention
    if job.settings.gradient_checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return make_trainee(model, job.settings, job.vocab_old, stream_seed(job.seed, "lora"))


def _objective(job: TrainJob, device: "torch.device", compute: "torch.dtype") -> "Objective":
    from altiplano.model.loss import summed_cross_entropy, summed_distillation
    from altiplano.train.batch import Inputs

    if job.teacher_dir is None:

        def learn_data(trainee: "Trainee", inputs: Inputs) -> "torch.Tensor":
            return summed_cross_entropy(trainee.hidden(**inputs.model), inputs.labels, trainee.head)

        return learn_data

    teacher = _load_teacher(job.teacher_dir, device, compute)

    def learn_teacher(trainee: "Trainee", inputs: Inputs) -> "torch.Tensor":
        import torch

        with torch.no_grad():
            taught = teacher.model(use_cache=False, **inputs.model).last_hidden_state
        return summed_distillation(
            trainee.hidden(**inputs.model), inputs.labels, trainee.head, taught, teacher.lm_head
        )

    return learn_teacher


def _load_teacher(
    directory: Path, device: "torch.device", compute: "torch.dtype"
) -> "LlamaForCausalLM":
    from altiplano.model.load import load_model

    teacher = load_model(directory, str(compute).removeprefix("torch."))
    teacher.requires_grad_(False)
    return teacher.to(device)


def _rank(context: Any) -> Any:
    import torch.distributed as dist

    from altiplano.train.loop import Rank

    def reduce_sum(tensor: "torch.Tensor") -> None:
        if context.get_world_size() > 1:
            dist.all_reduce(tensor)

    return Rank(context.get_world_rank(), context.get_world_size(), reduce_sum)


class _Reporter:
    """Sends records to the board (rank 0 only) and checkpoints to Ray Train (all ranks)."""

    def __init__(
        self, job: TrainJob, trainee: "Trainee", optimizer: Any, machine: "Machine", board: Any
    ) -> None:
        self._job, self._trainee, self._optimizer, self._board = job, trainee, optimizer, board
        self._machine = machine
        self._gauges: dict[str, Any] = {}
        self._last: StepRecord | None = None

    def start(self, start_step: int, steps: int) -> None:
        """Tell the board where the run begins."""
        if self._board is None:
            return
        from ray.util.metrics import Gauge

        for name in ("loss", "tokens_per_second", "learning_rate", "grad_norm"):
            self._gauges[name] = Gauge(f"altiplano_train_{name}", tag_keys=("stage",))
        begin = {"step": start_step, "steps": steps, "pid": os.getpid()}
        record = {"event": "start", "machine": self._machine.reason, **begin}
        self._board.push.remote(record)

    def on_step(self, record: "StepRecord") -> None:
        """Log a step: the first, every `log_steps`-th and the last."""
        self._last = record
        if self._board is None:
            return
        due = record.step % self._job.settings.log_steps == 0
        if due or record.step in (1, record.steps):
            values = dict(vars(record))
            for name, gauge in self._gauges.items():
                gauge.set(values[name], tags={"stage": self._job.settings.name})
            self._board.push.remote({"event": "step", **values})

    def on_checkpoint(self, step: int) -> None:
        """Save on rank 0 and report on all: Ray Train waits for every worker here."""
        import ray.train

        from altiplano.train.checkpoint import save_checkpoint

        metrics = {"step": step, "loss": self._last.loss if self._last else None}
        if ray.train.get_context().get_world_rank() != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(
                Path(folder),
                self._trainee,
                self._optimizer,
                step=step,
                run_key=self._job.run_key,
                precision=str(self._machine.compute).removeprefix("torch."),
            )
            name = f"checkpoint-{step:08d}"
            ray.train.report(
                metrics, ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name
            )
