"""What a run will train and need, from its config alone: no weight is read or made.

Counts are exact for the shape (`model.counts`), with one exception that the plan states: how many
pieces a vocabulary gains is known only once it is made, so until then all of them are counted.
Memory is an estimate of one worker's; activations are rough. Costs milliseconds; reads at most the
base model's config.json and the sizes of ready-made `.model` files.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.config.schema import Config
from altiplano.config.training import TrainSettings
from altiplano.model.counts import Counts, LlamaShape, count_parameters, trainable_parameters

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
    steps: int | None
    """None where `epochs` of data whose size is not known yet decides."""
    epochs: float | None
    micro_batch_tokens: int

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


def plan(config: Config, resolve: Callable[[str], str]) -> Plan:
    """Plan a run.

    Args:
        config: the whole config.
        resolve: `Project.resolve`, from a path in the config to a local path or URL.
    """
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
    return Plan(config.name, config.cluster.num_workers, vocab_old, vocab_new, stages, notes)


def plan_table(planned: Plan) -> "Group":
    """The plan for people: a table of counts, one of memory, the notes."""
    from rich.console import Group

    from altiplano.console import simple_table

    counts = [
        (
            stage.name, stage.trains, sum(stage.parameters.values()),
            sum(stage.trainable.values()), _share(stage),
            stage.tokens_per_step, _length(stage),
        )
        for stage in planned.stages
    ]  # fmt: skip
    header = (
        "stage", "trains", "parameters", "trained", "share", "tokens/step", "length",
    )  # fmt: skip
    parts: list[Any] = []
    if planned.stages:
        names = list(planned.stages[0].memory_bytes)
        memory = [
            (
                stage.name,
                *(_mib(stage.memory_bytes[name]) for name in names),
                _mib(sum(stage.memory_bytes.values())),
            )
            for stage in planned.stages
        ]
        workers = f"{planned.num_workers} worker{'s' if planned.num_workers > 1 else ''}"
        parts = [
            simple_table(f"{planned.name}: what is trained", header, counts),
            simple_table(
                f"memory of each of {workers}, MiB (estimate)", ("stage", *names, "sum"), memory
            ),
        ]
    return Group(*parts, *(f"note: {note}" for note in planned.notes))


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
    if scratch is not None:
        stages.append(_plan_stage(config, "base", scratch.train, shape, vocab_old, vocab_old))
    for settings in config.pretrain.stages if config.pretrain else []:
        name = f"pretrain-{settings.name}"
        stages.append(_plan_stage(config, name, settings, shape, vocab_old, vocab_new))
    if config.sft is not None:
        stages.append(_plan_stage(config, "sft", config.sft, shape, vocab_old, vocab_new))
    if config.draft is not None:
        small = LlamaShape(**{**asdict(shape), "num_hidden_layers": config.draft.layers})
        teacher = shape if config.draft.loss == "distill" else None
        settings = config.draft.train
        stages.append(_plan_stage(config, "draft", settings, small, vocab_new, vocab_new, teacher))
    return stages


def _plan_stage(
    config: Config,
    name: str,
    settings: TrainSettings,
    shape: LlamaShape,
    vocab_old: int,
    vocab_new: int,
    teacher: LlamaShape | None = None,
) -> StagePlan:
    parameters = count_parameters(shape, vocab_new)
    trainable = trainable_parameters(shape, vocab_old, vocab_new, settings)
    compute_bytes = _compute_bytes(settings, on_gpu=config.cluster.gpus_per_worker > 0)
    taught = sum(count_parameters(teacher, vocab_new).values()) if teacher else 0
    per_worker = -(-settings.tokens_per_step // config.cluster.num_workers)
    batch = min(settings.micro_batch_tokens, per_worker)
    trained = sum(trainable.values())
    frozen = sum(parameters.values()) - (trained - trainable["lora"])
    memory = {
        "weights": frozen * compute_bytes + trained * _FP32,
        # A flat copy of the gradients is summed over the workers.
        "gradients": 2 * trained * _FP32,
        "optimizer": 2 * trained * _FP32,  # AdamW's two moments
        "activations": _activation_bytes(shape, settings, batch, compute_bytes),
        # Logits and their gradient, of one chunk.
        "logits": 2 * min(batch, _LOSS_CHUNK_TOKENS) * vocab_new * _FP32,
        "teacher": taught * compute_bytes,
    }
    return StagePlan(
        name=name,
        trains=_in_words(settings),
        parameters={**parameters, "lora": trainable["lora"]},
        trainable=trainable,
        memory_bytes=memory,
        tokens_per_step=settings.tokens_per_step,
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
    if settings.gradient_checkpointing:
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


def _share(stage: StagePlan) -> str:
    return f"{sum(stage.trainable.values()) / sum(stage.parameters.values()):.2%}"


def _length(stage: StagePlan) -> str:
    if stage.steps is not None:
        return f"{stage.steps:,} steps, {stage.tokens:,} tokens"
    return f"{stage.epochs:g} epochs"


def _mib(size: int) -> int:
    return round(size / 2**20)
