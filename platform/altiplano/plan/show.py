"""A plan as people read it, and what to change when a worker's memory does not suffice."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from altiplano.plan.plan import Plan, StagePlan

if TYPE_CHECKING:
    from rich.console import Group

_BARS = "▁▂▃▄▅▆▇█"
_GIB = 2**30

_REMEDIES = {
    "weights": "store the frozen ones in fewer bits (`quantize: 4bit`) or share them "
    "(`cluster.strategy: zero3`)",
    "gradients": "train less (`rows: new`, a smaller `lora.r`) or share them "
    "(`cluster.strategy: zero2`)",
    "optimizer": "train less (`rows: new`, a smaller `lora.r`) or share it "
    "(`cluster.strategy: zero1`, `cluster.offload: true`)",
    "narrow copies": "train less (`rows: new`, `lora` instead of `full`)",
    "gathered": "it is one block or matrix: take a larger device",
    "activations": "recompute them (`gradient_checkpointing: full`) or lower `micro_batch_tokens`",
    "logits": "lower `micro_batch_tokens`",
    "teacher": "learn from the data (`draft.loss: cross_entropy`)",
}


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
                [*_count_rows(stages), *_length_rows(stages), *_memory_rows(stages)],
            )
        )
    return Group(*parts, *(f"note: {note}" for note in planned.notes))


def explain_oom(stage: StagePlan) -> str:
    """Which part of a worker's memory is largest by the plan, and which key makes it smaller."""
    sizes = stage.memory_bytes
    total = sum(sizes.values())
    largest = max(sizes, key=lambda name: sizes[name])
    return (
        f"by the plan a worker of {stage.name} needs {total / _GIB:.3g} GiB, most of it "
        f"{largest} ({sizes[largest] / _GIB:.3g} GiB): {_REMEDIES[largest]}"
    )


def sparkline(shares: Sequence[float]) -> str:
    """Shares of a whole as one line of bars."""
    top = len(_BARS) - 1
    return "".join(_BARS[round(share * top)] for share in shares)


def _count_rows(stages: Sequence[StagePlan]) -> list[list[object]]:
    trained = [sum(stage.trainable.values()) for stage in stages]
    totals = [sum(stage.parameters.values()) for stage in stages]
    shares = [f"{part / whole:.4%}" for part, whole in zip(trained, totals, strict=True)]
    fewer = [stage.trainable_new_rows for stage in stages]
    return [
        ["trains", *(stage.trains for stage in stages)],
        ["parameters", *totals],
        *_component_rows([stage.parameters for stage in stages]),
        ["trained", *trained],
        *_component_rows([stage.trainable for stage in stages]),
        ["trained share", *shares],
        *(_component_rows([{"with `rows: new`": count or 0} for count in fewer])),
    ]


def _length_rows(stages: Sequence[StagePlan]) -> list[list[object]]:
    return [
        ["tokens per step", *(stage.tokens_per_step for stage in stages)],
        ["steps", *(stage.steps for stage in stages)],
        ["epochs", *(stage.epochs for stage in stages)],
        ["tokens", *(stage.tokens for stage in stages)],
        ["peak learning rate", *(f"{stage.peak_learning_rate:g}" for stage in stages)],
        ["  over the steps", *(sparkline(stage.learning_rate_shape) for stage in stages)],
    ]


def _memory_rows(stages: Sequence[StagePlan]) -> list[list[object]]:
    rows = _sized_rows("memory, MiB", [stage.memory_bytes for stage in stages])
    if any(stage.offloaded_bytes for stage in stages):
        rows += _sized_rows("offloaded, MiB", [stage.offloaded_bytes for stage in stages])
    return rows


def _sized_rows(title: str, found: Sequence[Mapping[str, int]]) -> list[list[object]]:
    mib = [{name: size / 2**20 for name, size in sizes.items()} for sizes in found]
    return [[title, *(sum(sizes.values()) for sizes in mib)], *_component_rows(mib)]


def _component_rows(found: Sequence[Mapping[str, float]]) -> list[list[object]]:
    """One row per component that any stage has; a dash where a stage has none of it."""
    return [
        [f"  {name}", *(counts[name] or None for counts in found)]
        for name in found[0]
        if any(counts[name] for counts in found)
    ]
