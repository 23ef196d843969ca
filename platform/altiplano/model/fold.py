"""Adapters folded into weights: W = W_base + sum_i (alpha_i / r_i) B_i A_i, rows replaced.

One place for the arithmetic that training (on top of earlier stages), merging and evaluation
share. Sums are fp32; the caller rounds once. Tensors are read when asked for: memory is that of
one matrix and its adapters.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

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


class AdapterStack:
    """Ordered adapters of one chain."""

    def __init__(self, adapter_dirs: Iterable[Path], vocab_old: int) -> None:
        self._dirs = list(adapter_dirs)
        self._vocab_old = vocab_old
        self._scales = [_scale(directory) for directory in self._dirs]
        self._lora = [_names(directory / ADAPTER_WEIGHTS) for directory in self._dirs]
        self._rows = [_names(directory / ROWS_WEIGHTS) for directory in self._dirs]

    def touches(self, name: str) -> bool:
        """Whether any adapter changes the base tensor of this name."""
        return any(
            _lora_keys(name)[0] in lora or rows & _row_keys(name)
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
        for directory, scale, lora, rows in zip(
            self._dirs, self._scales, self._lora, self._rows, strict=True
        ):
            key_a, key_b = _lora_keys(name)
            if key_a in lora:
                with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as stored:
                    update = stored.get_tensor(key_b).float() @ stored.get_tensor(key_a).float()
                _require_shape(name, directory, update, folded)
                folded = folded + scale * update
            for key in rows & _row_keys(name):
                with safe_open(directory / ROWS_WEIGHTS, framework="pt") as stored:
                    values = stored.get_tensor(key).float()
                if key.endswith("new_rows"):
                    values = torch.cat([folded[: self._vocab_old], values])
                _require_shape(name, directory, values, folded)
                folded = values
        return folded

    def unused(self, names: Iterable[str]) -> list[str]:
        """Adapter tensors that fit none of the base tensors named."""
        expected: set[str] = set()
        for name in names:
            expected.update(_lora_keys(name))
            expected |= _row_keys(name)
        found = set().union(*self._lora, *self._rows) if self._dirs else set()
        return sorted(found - expected)


def fold_into(model: "LlamaForCausalLM", stack: AdapterStack) -> None:
    """Fold a chain into a loaded model, rounding once to the model's type."""
    state = dict(model.named_parameters())
    names = {*state, HEAD} if model.config.tie_word_embeddings else set(state)
    if unused := stack.unused(names):
        raise ModelError(f"adapter tensors fit nothing in the model: {', '.join(unused[:3])}")
    pieces = num_pieces(model.config.to_dict())
    with torch.no_grad():
        for name, parameter in state.items():
            if stack.touches(name):
                part = parameter[:pieces] if name in _ROWS_OF else parameter
                part.copy_(stack.fold(name, part))


def _scale(directory: Path) -> float:
    file = directory / ADAPTER_CONFIG
    if not file.is_file():
        return 1.0
    config = json.loads(file.read_text())
    return float(config["lora_alpha"]) / float(config["r"])


def _names(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    with safe_open(file, framework="pt") as stored:
        return set(stored.keys())


def _lora_keys(name: str) -> tuple[str, str]:
    stem = _PEFT_PREFIX + name.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _row_keys(name: str) -> set[str]:
    part = _ROWS_OF.get(name)
    return {f"{part}.new_rows", f"{part}.weight"} if part else set()


def _require_shape(name: str, directory: Path, got: torch.Tensor, want: torch.Tensor) -> None:
    if got.shape != want.shape:
        raise ModelError(
            f"{directory} gives {name} the shape {list(got.shape)}, the model has "
            f"{list(want.shape)}: the adapter belongs to another model or vocabulary"
        )
