"""The DeepSpeed config that a stage means, with the user's own JSON merged into it.

A pure function of both, so that a contradiction is found before a worker starts. Knows DeepSpeed's
keys, not DeepSpeed.
"""

import json
from typing import Any

from altiplano.config.training import TrainSettings
from altiplano.errors import ConfigError
from altiplano.train.strategy import Sharing

Json = dict[str, Any]

_OWNED_SECTIONS = ("optimizer", "scheduler")


def deepspeed_config(settings: TrainSettings, sharing: Sharing, workers: int) -> Json:
    """What DeepSpeed is given.

    The user's keys come before ours, except those that this config already says in its own words
    or that exactness rests on. Values "auto" are left to us.

    Raises:
        ConfigError: the JSON is unreadable, or says something else than the config; names all keys.
    """
    fixed = _fixed(settings, sharing, workers)
    users = _users(sharing.deepspeed)
    problems = [
        f"`{key}` is {value!r}, the config says {fixed[key]!r}"
        for key, value in _flat(users).items()
        if key in fixed and value != fixed[key]
    ]
    problems += [
        f"`{key}` is the stage's own: set learning rate, betas and schedule there"
        for key in _OWNED_SECTIONS
        if users.get(key)
    ]
    if problems:
        raise ConfigError(
            "`cluster.deepspeed` contradicts the config: "
            + "; ".join(problems)
            + '; drop these keys from the JSON, or set them to "auto"'
        )
    return _nested({**_preferred(sharing), **_flat(users), **fixed})


def _fixed(settings: TrainSettings, sharing: Sharing, workers: int) -> Json:
    """Dotted keys the user's JSON may not change.

    The loop accumulates and averages itself, over targets: to DeepSpeed every step is one batch of
    one sample per worker. Trained weights are fp32 and the loop casts, so DeepSpeed does not.
    """
    return {
        "train_batch_size": workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "managed_gradient_accumulation": True,
        "gradient_allreduce_op": "mean",
        "fp16.enabled": False,
        "bf16.enabled": False,
        "torch_autocast.enabled": False,
        "zero_optimization.stage": int(sharing.strategy.removeprefix("zero")),
    }


def _preferred(sharing: Sharing) -> Json:
    """Dotted keys the user's JSON may change."""
    preferred: Json = {
        "steps_per_print": None,
        # DeepSpeed's 5e8 elements are buffers of 2 GB, whatever the model.
        "zero_optimization.reduce_bucket_size": 50_000_000,
        "zero_optimization.allgather_bucket_size": 50_000_000,
        # The optimizer is PyTorch's fused AdamW on the CPU too: the same numbers as everywhere.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if sharing.offload:
        preferred["zero_optimization.offload_optimizer.device"] = "cpu"
        if sharing.strategy == "zero3":
            preferred["zero_optimization.offload_param.device"] = "cpu"
    return preferred


def _users(text: str | None) -> Json:
    """The user's JSON without its "auto" values."""
    if text is None:
        return {}
    try:
        users = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"`cluster.deepspeed` is no JSON: {error}") from None
    if not isinstance(users, dict):
        raise ConfigError(f"`cluster.deepspeed` holds {type(users).__name__}, not an object")
    return _without_auto(users)


def _without_auto(value: Json) -> Json:
    return {
        key: _without_auto(part) if isinstance(part, dict) else part
        for key, part in value.items()
        if part != "auto"
    }


def _flat(value: Json, prefix: str = "") -> Json:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: Json = {}
    for key, part in value.items():
        if isinstance(part, dict):
            flat |= _flat(part, f"{prefix}{key}.")
        else:
            flat[prefix + key] = part
    return flat


def _nested(flat: Json) -> Json:
    """The inverse of `_flat`."""
    nested: Json = {}
    for dotted, value in flat.items():
        *path, key = dotted.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    return nested
