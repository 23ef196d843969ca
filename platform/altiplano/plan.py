"""What a run will train and need, from its config alone: no weight is read or made.

Counts are exact for the shape (`model.counts`), with one exception that the plan states: how many
pieces a vocabulary gains is known only once it is made, so until then all of them are counted.
Memory is an estimate of one worker's; activations are rough. Costs milliseconds; reads at most the
base model's config.json and the sizes of ready-made `.model` files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.config.loader import Project
from altiplano.config.schema import Config
from altiplano.config.training import TrainSettings
from altiplano.model.counts import Counts, LlamaShape, count_parameters, trainable_parameters
from altiplano.train.schedule import make_schedule

if TYPE_CHECKING:
    from rich.console import Group

_FP32 = 4
_LOSS_CHUNK_TOKENS = 1024
"""Default of `model.loss`: rows of logits that exist at a time."""


@dataclass(frozen=True)
class StagePlan:
    """One training stage."""

    name: str
    trains: str
    """In words: `all`, `new rows`, `all rows`, `LoRA r=8` ..."""
    parameters: Counts
    trainable: Counts
    memory_bytes: dict[str, int]
    """Of one worker, by component."""
    tokens_per_step: int
    """Whole blocks over all workers, so not always the number configured."""
    steps: int | None
    """None where `epochs` of data whose size is not known yet decides."""
    epochs: float | None
    micro_batch_tokens: int
    """Of one forward pass of one worker."""

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole stage, where the config says."""
        return None if self.steps is None else self.steps * self.tokens_per_step


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
    """Plan a run from its config."""
    config, resolve = project.config, project.resolve
    notes: list[str] = []
    base = _base_shape(config, resolve, notes)
    added = _pieces_added(config, resolve, notes)
    vocab_old = base[1] if base else None
    vocab_new = vocab_old + added if vocab_old is not None and added is not None else None
    stages: list[StagePlan] = []
    if base and vocab_old is not None and vocab_new is not None:
        stages = _plan_stages(config, base[0], vocab_old, vocab_new)
        notes.append(
            f"the new vocabulary holds at most {vocab_new:,} pieces ({vocab_old:,} + {added:,}); "
            f"pieces the base already has are dropped when it is made"
        )
    if any(stage.steps is None for stage in stages):
        notes.append(
            "stages without `steps` make `epochs` passes over their data, whose tokens are counted "
            "when it is prepared"
        )
    return Plan(config.name, config.cluster.worker_range[0], vocab_old, vocab_new, stages, notes)


def plan_table(planned: Plan) -> "Group":
    """The plan for people: one column per stage, then the notes."""
    from rich.console import Group

    from altiplano.console import simple_table

    stages = planned.stages
    parts: list[Any] = []
    if stages:
        title = f"{planned.name}: plan; memory (an estimate) is of each of {planned.num_workers}"
        parts.append(
            simple_table(
                f"{title} worker{'s' if planned.num_workers > 1 else ''}",
                ("", *(stage.name for stage in stages)),
                [*_count_rows(stages), *_memory_rows(stages)],
            )
        )
    return Group(*parts, *(f"note: {note}" for note in planned.notes))


def _count_rows(stages: Sequence[StagePlan]) -> list[list[object]]:
    trained = [sum(stage.trainable.values()) for stage in stages]
    totals = [sum(stage.parameters.values()) for stage in stages]
    shares = [f"{part / whole:.2%}" for part, whole in zip(trained, totals, strict=True)]
    return [
        ["trains", *(stage.trains for stage in stages)],
        ["parameters", *totals],
        *_component_rows([stage.parameters for stage in stages]),
        ["trained", *trained],
        *_component_rows([stage.trainable for stage in stages]),
        ["trained share", *shares],
        ["tokens per step", *(stage.tokens_per_step for stage in stages)],
        ["steps", *(stage.steps for stage in stages)],
        ["epochs", *(stage.epochs for stage in stages)],
        ["tokens", *(stage.tokens for stage in stages)],
    ]


def _memory_rows(stages: Sequence[StagePlan]) -> list[list[object]]:
    mib = [{name: b / 2**20 for name, b in stage.memory_bytes.items()} for stage in stages]
    totals = [sum(found.values()) for found in mib]
    return [["memory, MiB", *totals], *_component_rows(mib)]


def _component_rows(found: Sequence[Mapping[str, float]]) -> list[list[object]]:
    """One row per component that any stage has; a dash where a stage has none of it."""
    return [
        [f"  {name}", *(counts[name] or None for counts in found)]
        for name in found[0]
        if any(counts[name] for counts in found)
    ]


def _base_shape(
    config: Config, resolve: Callable[[str], str], notes: list[str]
) -> tuple[LlamaShape, int] | None:
    """Shape and vocabulary size of the base model, where they are known."""
    scratch = config.base_model.scratch
    if scratch is not None:
        return LlamaShape.from_config(scratch.shape.model_dump()), scratch.tokenizer.vocab_size
    assert config.base_model.path is not None, "the config's validator wants one of the two"
    directory = Path(resolve(config.base_model.path))
    if not (directory / "config.json").is_file():
        notes.append(f"base {config.base_model.path} is not on disk: counts are not available")
        return None
    from altiplano.model.load import read_config

    found = read_config(directory)
    return LlamaShape.from_config(found), int(found["vocab_size"])


def _pieces_added(config: Config, resolve: Callable[[str], str], notes: list[str]) -> int | None:
    """Most pieces that the tokenizer section can add; None where a `.model` is not there."""
    section = config.tokenizer
    added = (section.vocab_size or 0) + (1 if section.pad_piece else 0)
    if section.words is not None:
        notes.append(
            f"{section.words}: domain words, and pieces they need on the way, are not counted"
        )
    for path in section.add:
        file = Path(resolve(path))
        if not file.is_file():
            notes.append(f"{path} is not on disk: the new vocabulary's size is not known")
            return None
        from altiplano.vocabulary.load import Vocabulary

        added += Vocabulary(file).size
    return added


def _plan_stages(
    config: Config, shape: LlamaShape, vocab_old: int, vocab_new: int
) -> list[StagePlan]:
    stages = []
    scratch = config.base_model.scratch
    padding = -vocab_new % config.extend.pad_to_multiple
    if scratch is not None:
        stages.append(_plan_stage(config, "base", scratch.train, shape, vocab_old, vocab_old))
    for settings in config.pretrain.stages if config.pretrain else []:
        name = f"pretrain-{settings.name}"
        stages.append(_plan_stage(config, name, settings, shape, vocab_old, vocab_new, padding))
    if config.sft is not None:
        stages.append(_plan_stage(config, "sft", config.sft, shape, vocab_old, vocab_new, padding))
    if config.draft is not None:
        small = LlamaShape(**{**asdict(shape), "num_hidden_layers": config.draft.layers})
        teacher = shape if config.draft.loss == "distill" else None
        settings = config.draft.train
        # It is cut from the merged model, which has no padding rows.
        stages.append(
            _plan_stage(config, "draft", settings, small, vocab_new, vocab_new, 0, teacher)
        )
    return stages


def _plan_stage(
    config: Config,
    name: str,
    settings: TrainSettings,
    shape: LlamaShape,
    vocab_old: int,
    vocab_new: int,
    padding: int = 0,
    teacher: LlamaShape | None = None,
) -> StagePlan:
    parameters = count_parameters(shape, vocab_new + padding)
    trainable = trainable_parameters(shape, vocab_old, vocab_new, settings, rows_padding=padding)
    compute_bytes = _compute_bytes(settings, on_gpu=config.cluster.gpus_per_worker > 0)
    taught = sum(count_parameters(teacher, vocab_new).values()) if teacher else 0
    length = config.data.sequence_length
    schedule = make_schedule(settings, num_blocks=1, sequence_length=length)
    blocks_per_worker = -(-schedule.blocks_per_step // config.cluster.worker_range[0])
    batch = min(schedule.blocks_per_micro_batch, blocks_per_worker) * length
    trained = sum(trainable.values())
    frozen = sum(parameters.values()) - (trained - trainable["lora"])
    memory = {
        "weights": frozen * compute_bytes + trained * _FP32,
        # A flat copy of the gradients is summed over the workers.
        "gradients": 2 * trained * _FP32,
        "optimizer": 2 * trained * _FP32,  # AdamW's two moments
        "activations": _activation_bytes(shape, settings, batch, compute_bytes),
        # Logits and their gradient, of one chunk.
        "logits": 2 * min(batch, _LOSS_CHUNK_TOKENS) * (vocab_new + padding) * _FP32,
        "teacher": taught * compute_bytes,
    }
    return StagePlan(
        name=name,
        trains=_in_words(settings),
        parameters={**parameters, "lora": trainable["lora"]},
        trainable=trainable,
        memory_bytes=memory,
        tokens_per_step=schedule.blocks_per_step * length,
        steps=settings.steps,
        epochs=None if settings.steps else settings.epochs,
        micro_batch_tokens=batch,
    )


def _compute_bytes(settings: TrainSettings, *, on_gpu: bool) -> int:
    """Bytes of a value in the forward pass; `auto` is bfloat16 on GPUs, else float32 at worst."""
    narrow = settings.precision == "bfloat16" or (settings.precision == "auto" and on_gpu)
    return 2 if narrow else _FP32


def _activation_bytes(
    shape: LlamaShape, settings: TrainSettings, batch_tokens: int, compute_bytes: int
) -> int:
    """What the backward pass needs of a micro-batch: six values of the stream's width, keys and
    values, and four of the MLP's per token and block; attention weights are never kept."""
    keys = shape.num_key_value_heads * shape.head_dim
    block = 6 * shape.hidden_size + 2 * keys + 4 * shape.intermediate_size
    if settings.gradient_checkpointing != "none":
        kept = shape.num_hidden_layers * shape.hidden_size + block
    else:
        kept = shape.num_hidden_layers * block
    return batch_tokens * kept * compute_bytes


def _in_words(settings: TrainSettings) -> str:
    if settings.full:
        return "all"
    words = [] if settings.rows == "none" else [f"{settings.rows} rows"]
    if settings.lora is not None:
        words.append(f"LoRA r={settings.lora.r}")
    return " + ".join(words)
