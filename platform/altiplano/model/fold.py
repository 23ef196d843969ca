"""Adapters folded into weights: rows replaced, then W + s B A, then DoRA's magnitude.

One place for the arithmetic that training (on top of earlier stages), merging and evaluation
share. For each adapter of a chain in turn, with s = alpha / r, or alpha / sqrt(r) for rsLoRA:

    W <- its rows           W <- W + s B A           DoRA: W <- m * W / |W|, row by row

Sums are fp32; the caller rounds once. Tensors are read when asked for: memory is that of one
matrix and its adapters. Knows nothing of how adapters are trained.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from altiplano.errors import ModelError
from altiplano.model.load import EMBEDDING, HEAD, num_pieces

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ROWS_WEIGHTS = "rows.safetensors"
_PEFT_PREFIX = "base_model.model."
_ROWS_OF = {EMBEDDING: "embed_tokens", HEAD: "lm_head"}
# Starts of PEFT's that change the base: such an adapter is no addition to the base as it was.
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Settings of PEFT's under which an update is not B A everywhere and for every token.
_OTHER_UPDATES = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
    "monteclora_config", "use_bdlora",
)  # fmt: skip


@dataclass(frozen=True)
class LoraPart:
    """The LoRA tensors of one adapter directory, as PEFT saves them."""

    directory: Path
    names: frozenset[str]
    alpha: float = 1.0
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    """Exceptions to alpha: (regex of a module's name, alpha)."""
    rank_stabilized: bool = False
    dora: bool = False

    def touches(self, name: str) -> bool:
        """Whether it changes the base tensor of this name."""
        return _lora_keys(name)[0] in self.names

    def fold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The base tensor with this part, in fp32.

        Args:
            name: a tensor that it touches.
            weight: [out, in], fp32.

        Raises:
            ModelError: shapes do not fit.
        """
        key_a, key_b, key_magnitude = _lora_keys(name)
        with safe_open(self.directory / ADAPTER_WEIGHTS, framework="pt") as stored:
            a, b = stored.get_tensor(key_a).float(), stored.get_tensor(key_b).float()
            magnitude = stored.get_tensor(key_magnitude).float() if self.dora else None
        update = b @ a
        _require_shape(name, self.directory, update, weight)
        folded = weight + self._scale(name, a.shape[0]) * update
        if magnitude is not None:
            _require_shape(name, self.directory, magnitude, folded[:, 0])
            folded = folded * (magnitude / folded.norm(dim=1))[:, None]
        return folded

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        exceptions = (
            alpha for key, alpha in self.alpha_pattern if re.match(rf"(.*\.)?({key})$", module)
        )
        return next(exceptions, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_lora(directory: Path) -> LoraPart:
    """The LoRA part of an adapter directory; without any, one that touches nothing.

    Unknown keys of adapter_config.json are ignored; ranks are those of the tensors.

    Raises:
        ModelError: tensors without a config, or one that asks for more than sums of B A.
    """
    names = frozenset(_names(directory / ADAPTER_WEIGHTS))
    if not names:
        return LoraPart(directory, names)
    file = directory / ADAPTER_CONFIG
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory} holds {ADAPTER_WEIGHTS}, but its {ADAPTER_CONFIG} cannot be read "
            f"({error}): the scale of the adapter is unknown; restore it"
        ) from None
    _require_plain(file, config)
    return LoraPart(
        directory,
        names,
        float(config["lora_alpha"]),
        tuple((config.get("alpha_pattern") or {}).items()),
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
    )


class AdapterStack:
    """Ordered adapters of one chain."""

    def __init__(self, adapter_dirs: Iterable[Path], vocab_old: int) -> None:
        self._dirs = list(adapter_dirs)
        self._vocab_old = vocab_old
        self._lora = [read_lora(directory) for directory in self._dirs]
        self._rows = [_names(directory / ROWS_WEIGHTS) for directory in self._dirs]

    def touches(self, name: str) -> bool:
        """Whether any adapter changes the base tensor of this name."""
        return any(
            lora.touches(name) or rows & _row_keys(name)
            for lora, rows in zip(self._lora, self._rows, strict=True)
        )

    def fold(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The base tensor with every adapter's part, in fp32.

        Args:
            name: tensor name in the base checkpoint.
            tensor: its value, any float type; of embedding and head the rows of pieces.

        Raises:
            ModelError: shapes do not fit; names both.
        """
        folded = tensor.float()
        for lora, rows in zip(self._lora, self._rows, strict=True):
            for key in rows & _row_keys(name):
                folded = self._replace_rows(name, folded, lora.directory, key)
            if lora.touches(name):
                folded = lora.fold(name, folded)
        return folded

    def _replace_rows(
        self, name: str, folded: torch.Tensor, directory: Path, key: str
    ) -> torch.Tensor:
        with safe_open(directory / ROWS_WEIGHTS, framework="pt") as stored:
            values: torch.Tensor = stored.get_tensor(key).float()
        if key.endswith("new_rows"):
            values = torch.cat([folded[: self._vocab_old], values])
        _require_shape(name, directory, values, folded)
        return values

    def unused(self, names: Iterable[str]) -> list[str]:
        """Adapter tensors that fit none of the base tensors named."""
        expected: set[str] = set()
        for name in names:
            expected.update(_lora_keys(name))
            expected |= _row_keys(name)
        found = set().union(*(lora.names for lora in self._lora), *self._rows)
        return sorted(found - expected)


def fold_into(model: "LlamaForCausalLM", stack: AdapterStack) -> None:
    """Fold a chain into a loaded model, rounding once to the model's type."""
    state = dict(model.named_parameters())
    if unused := stack.unused(state):
        raise ModelError(f"adapter tensors fit nothing in the model: {', '.join(unused[:3])}")
    pieces = num_pieces(model.config.to_dict())
    with torch.no_grad():
        for name, parameter in state.items():
            if stack.touches(name):
                part = parameter[:pieces] if name in _ROWS_OF else parameter
                part.copy_(stack.fold(name, part))


def _require_plain(file: Path, config: dict[str, Any]) -> None:
    kind, start = config.get("peft_type", "LORA"), str(config.get("init_lora_weights"))
    if kind != "LORA":
        raise ModelError(f"{file}: adapters of type {kind!r} cannot be folded, only LORA")
    if start.startswith(_CHANGED_BASE):
        raise ModelError(
            f"{file}: init_lora_weights {start!r} changed the base this adapter was trained on, "
            f"and it was saved relative to that: convert it to plain LoRA with PEFT first"
        )
    if others := [key for key in _OTHER_UPDATES if config.get(key)]:
        raise ModelError(f"{file}: {', '.join(others)} cannot be folded into one matrix")


def _names(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    with safe_open(file, framework="pt") as stored:
        return set(stored.keys())


def _lora_keys(name: str) -> tuple[str, str, str]:
    stem = _PEFT_PREFIX + name.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.lora_magnitude_vector"


def _row_keys(name: str) -> set[str]:
    part = _ROWS_OF.get(name)
    return {f"{part}.new_rows", f"{part}.weight"} if part else set()


def _require_shape(name: str, directory: Path, got: torch.Tensor, want: torch.Tensor) -> None:
    if got.shape != want.shape:
        raise ModelError(
            f"{directory} gives {name} the shape {list(got.shape)}, the model has "
            f"{list(want.shape)}: the adapter belongs to another model or vocabulary"
        )
