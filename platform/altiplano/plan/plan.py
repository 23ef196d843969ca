"""What every training stage of a run trains, how long and in how much memory.

Counts are exact for the shape (`model.counts`); so is the vocabulary where `tokenizer.pieces` says
its size, else it is an upper bound and a note says so. Knows configs, not tensors. Costs
milliseconds.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from altiplano.config.cluster import ClusterSection
from altiplano.config.loader import Project
from altiplano.config.training import TrainSettings
from altiplano.model.counts import Counts, LlamaShape, count_parameters, trainable_parameters
from altiplano.plan.memory import Load, Sharing, worker_memory
from altiplano.plan.sizes import Sizes, find_sizes
from altiplano.train.schedule import curve_of, learning_rate_factor, make_schedule

_CURVE_POINTS = 12
_MANY_BLOCKS = 10**9
"""Of data whose size is not known yet."""
_NOMINAL_STEPS = 1000
"""Of a learning-rate curve whose stage does not know its steps yet."""


@dataclass(frozen=True)
class StagePlan:
    """One training stage."""

    name: str
    trains: str
    """In words: `all`, `new rows`, `all rows`, `LoRA r=8` ..."""
    parameters: Counts
    trainable: Counts
    trainable_new_rows: int | None
    """What `rows: new` would train, where all rows are trained though some are new."""
    memory_bytes: dict[str, int]
    """Of one worker, by component, on the device that computes."""
    offloaded_bytes: dict[str, int]
    """Of one worker, in the CPU's memory instead."""
    tokens_per_step: int
    """Whole blocks over all workers, so not always the number configured."""
    steps: int | None
    """None where `epochs` of data whose size is not known yet decides."""
    epochs: float | None
    micro_batch_tokens: int
    """Of one forward pass of one worker."""
    peak_learning_rate: float
    learning_rate_shape: list[float]
    """Shares of the peak at evenly spaced steps, first and last included."""
    learning_rates: list[tuple[int, float]] | None
    """(0-based step, rate) at telling steps, where the number of steps is known."""

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole stage, where the config says."""
        return None if self.steps is None else self.steps * self.tokens_per_step


@dataclass(frozen=True)
class StageInputs:
    """What a stage's plan follows from."""

    name: str
    settings: TrainSettings
    shape: LlamaShape
    vocab_old: int
    vocab_new: int
    padding: int = 0
    """Rows of the matrices after the pieces."""
    teacher: LlamaShape | None = None


@dataclass(frozen=True)
class Plan:
    """All training stages of a run, and what could not be known."""

    name: str
    num_workers: int
    vocab_old: int | None
    vocab_new_at_most: int | None
    stages: list[StagePlan]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; counts get their totals."""
        found = asdict(self)
        for stage, plain in zip(self.stages, found["stages"], strict=True):
            plain["parameters_total"] = sum(stage.parameters.values())
            plain["trainable_total"] = sum(stage.trainable.values())
            plain["memory_bytes_total"] = sum(stage.memory_bytes.values())
            plain["tokens"] = stage.tokens
        return found


def make_plan(project: Project) -> Plan:
    """Plan a run from its config.

    Raises:
        ConfigError, ModelError: the config contradicts itself or the base on disk.
    """
    config = project.config
    notes: list[str] = []
    sizes = find_sizes(project, notes)
    inputs = stage_inputs(project, sizes)
    stages = [_plan_stage(stage, config.cluster, config.data.sequence_length) for stage in inputs]
    if any(stage.steps is None for stage in stages):
        notes.append(
            "stages without `steps` make `epochs` passes over their data, whose tokens are counted "
            "when it is prepared"
        )
    workers = config.cluster.worker_range[0]
    return Plan(config.name, workers, sizes.vocab_old, sizes.vocab_new, stages, notes)


def stage_inputs(project: Project, sizes: Sizes) -> list[StageInputs]:
    """The training stages in order; none where the sizes are not known."""
    if sizes.shape is None or sizes.vocab_old is None or sizes.vocab_new is None:
        return []
    return list(_stage_inputs(project, sizes.shape, sizes.vocab_old, sizes.vocab_new))


def _stage_inputs(project: Project, shape: LlamaShape, old: int, new: int) -> Iterator[StageInputs]:
    config = project.config
    padding = -new % config.extend.pad_to_multiple
    if config.base_model.scratch is not None:
        yield StageInputs("base", config.base_model.scratch.train, shape, old, old)
    for settings in config.pretrain.stages if config.pretrain else []:
        yield StageInputs(f"pretrain-{settings.name}", settings, shape, old, new, padding)
    if config.sft is not None:
        yield StageInputs("sft", config.sft, shape, old, new, padding)
    if config.draft is not None:
        small = replace(shape, num_hidden_layers=config.draft.layers)
        teacher = shape if config.draft.loss == "distill" else None
        # It is cut from the merged model, which has no padding rows.
        yield StageInputs("draft", config.draft.train, small, new, new, 0, teacher)


def _plan_stage(stage: StageInputs, cluster: ClusterSection, length: int) -> StagePlan:
    settings, shape, rows = stage.settings, stage.shape, stage.vocab_new + stage.padding
    parameters = count_parameters(shape, rows)
    trainable = _trainable(stage, settings)
    workers = cluster.worker_range[0]
    schedule = make_schedule(settings, _MANY_BLOCKS, length)
    blocks_per_worker = -(-schedule.blocks_per_step // workers)
    batch = min(schedule.blocks_per_micro_batch, blocks_per_worker) * length
    taught = sum(count_parameters(stage.teacher, stage.vocab_new).values()) if stage.teacher else 0
    sharing = Sharing(workers, cluster.strategy, cluster.offload, cluster.gpus_per_worker > 0)
    load = Load(shape, parameters, trainable, rows, batch, taught)
    memory, offloaded = worker_memory(settings, load, sharing)
    return StagePlan(
        name=stage.name,
        trains=_in_words(settings),
        parameters={**parameters, "lora": trainable["lora"]},
        trainable=trainable,
        trainable_new_rows=_trainable_with_new_rows(stage),
        memory_bytes=memory,
        offloaded_bytes=offloaded,
        tokens_per_step=schedule.blocks_per_step * length,
        steps=settings.steps,
        epochs=None if settings.steps else settings.epochs,
        micro_batch_tokens=batch,
        peak_learning_rate=settings.learning_rate,
        learning_rate_shape=_rate_shape(settings),
        learning_rates=curve_of(settings, schedule) if settings.steps else None,
    )


def _trainable(stage: StageInputs, settings: TrainSettings) -> Counts:
    return trainable_parameters(
        stage.shape, stage.vocab_old, stage.vocab_new, settings, rows_padding=stage.padding
    )


def _trainable_with_new_rows(stage: StageInputs) -> int | None:
    settings = stage.settings
    if settings.full or settings.rows != "all" or stage.vocab_new == stage.vocab_old:
        return None
    fewer = settings.model_copy(update={"rows": "new"})
    return sum(_trainable(stage, fewer).values())


def _rate_shape(settings: TrainSettings) -> list[float]:
    steps = settings.steps or max(_NOMINAL_STEPS, 10 * (settings.warmup_steps or 0))
    points = min(_CURVE_POINTS, steps)
    places = [round(point * (steps - 1) / max(1, points - 1)) for point in range(points)]
    return [round(learning_rate_factor(step, steps, settings), 4) for step in places]


def _in_words(settings: TrainSettings) -> str:
    if settings.full:
        return "all"
    words = []
    if settings.rows != "none":
        where = "" if settings.row_matrices == "both" else f" of the {settings.row_matrices}"
        words.append(f"{settings.rows} rows{where}")
    if settings.lora is not None:
        words.append(f"LoRA r={settings.lora.r}")
    return " + ".join(words)
