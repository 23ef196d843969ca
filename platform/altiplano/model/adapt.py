"""What a stage trains: new rows, all rows, LoRA or everything; and its files.

`Trainee` puts the trainable parts into a loaded model, gives the optimizer its groups, and saves
and loads exactly those tensors. Every save is opened again and checked, because a silently empty
adapter costs hours. Knows nothing of data, steps or Ray.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.errors import ModelError, TrainingError
from altiplano.model.fold import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ROWS_WEIGHTS
from altiplano.model.load import num_pieces
from altiplano.model.rows import PaddedHead, SplitEmbedding, SplitHead, SplitRows

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FULL_WEIGHTS = "model.safetensors"
_ADAPTER = "default"
_PREFIX = "base_model.model."


@dataclass
class Trainee:
    """A model with its trainable parts in place.

    Attributes:
        model: body and head; call `hidden` and `head`.
        settings: what the stage trains.
    """

    model: "LlamaForCausalLM"
    settings: TrainSettings

    def hidden(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """Last hidden states [B, T, H] of the body."""
        states: torch.Tensor = self.model.model(use_cache=False, **inputs).last_hidden_state
        return states

    @property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Maps hidden states [n, H] to logits [n, V]."""
        head: nn.Module = self.model.lm_head
        return head

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def optimizer_groups(self) -> list[dict]:
        """AdamW parameter groups: matrices, vectors (no decay), rows (own rate, no decay)."""
        settings = self.settings
        rows_rate = settings.rows_learning_rate or settings.learning_rate
        matrices, vectors, rows = [], [], []
        for name, parameter in self.trainable().items():
            if "embed_tokens" in name or "lm_head" in name:
                rows.append(parameter)
            elif parameter.ndim < 2:
                vectors.append(parameter)
            else:
                matrices.append(parameter)
        rate, decay = settings.learning_rate, settings.weight_decay
        groups = [
            {"name": "matrices", "params": matrices, "peak_lr": rate, "weight_decay": decay},
            {"name": "vectors", "params": vectors, "peak_lr": rate, "weight_decay": 0.0},
            {"name": "rows", "params": rows, "peak_lr": rows_rate, "weight_decay": 0.0},
        ]
        return [{**group, "lr": group["peak_lr"]} for group in groups if group["params"]]

    def save(self, directory: Path) -> None:
        """Write the trained tensors and check the files.

        Raises:
            TrainingError: what was written is not what is trained.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for file, tensors in self._files().items():
            copies = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
            save_file(copies, directory / file, metadata={"format": "pt"})
        if self.settings.lora is not None:
            _write_adapter_config(directory / ADAPTER_CONFIG, self.settings.lora)
        for file, tensors in self._files().items():
            _check_file(directory / file, tensors)

    def load(self, directory: Path) -> None:
        """Read back what `save` wrote, into the model."""
        for file, tensors in self._files().items():
            stored = load_file(directory / file)
            for name, tensor in tensors.items():
                tensor.data.copy_(stored[name])

    def _files(self) -> dict[str, dict[str, torch.Tensor]]:
        """File name -> tensor name -> live tensor, of everything trained."""
        parameters = self.trainable()
        if self.settings.full:
            return {FULL_WEIGHTS: dict(parameters)}
        pieces = num_pieces(self.model.config.to_dict())
        files: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in parameters.items():
            if ".lora_" in name:
                key = _PREFIX + name.replace(f".{_ADAPTER}.", ".")
                files.setdefault(ADAPTER_WEIGHTS, {})[key] = parameter
            else:
                part = "lm_head" if name.startswith("lm_head") else "embed_tokens"
                kind = "new_rows" if name.endswith("rows.new") else "weight"
                # Padding rows are of no use to anyone who reads the adapter.
                files.setdefault(ROWS_WEIGHTS, {})[f"{part}.{kind}"] = parameter[:pieces]
        return files


def make_trainee(
    model: "LlamaForCausalLM", settings: TrainSettings, vocab_old: int, seed: int
) -> Trainee:
    """Freeze a loaded model and put the stage's trainable parts in.

    Args:
        model: with earlier adapters already folded in.
        vocab_old: rows below it belong to the base vocabulary.
        seed: of LoRA's A matrices.

    Raises:
        TrainingError: `rows: new` without new rows, or LoRA names that match nothing.
    """
    if settings.full:
        model.requires_grad_(True)
        model.float()
        return Trainee(model, settings)
    model.requires_grad_(False)
    if settings.lora is not None:
        _inject_lora(model, settings.lora, seed)
    if settings.rows == "all":
        model.get_input_embeddings().float().requires_grad_(True)
        model.lm_head.float().requires_grad_(True)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.get_input_embeddings().weight
    elif settings.rows == "new":
        _split_rows(model, vocab_old)
    return Trainee(model, settings)


def _split_rows(model: "LlamaForCausalLM", vocab_old: int) -> None:
    pieces = num_pieces(model.config.to_dict())
    if vocab_old >= pieces:
        raise TrainingError(
            f"`rows: new` has nothing to train: the base vocabulary has {vocab_old} pieces and "
            f"the model rows for {pieces}; extend the vocabulary or set `rows: none`"
        )
    rows = SplitRows(model.get_input_embeddings().weight, vocab_old, pieces)
    tied = model.config.tie_word_embeddings
    head_rows = rows if tied else SplitRows(model.lm_head.weight, vocab_old, pieces)
    model.set_input_embeddings(SplitEmbedding(rows))
    model.lm_head = SplitHead(head_rows)


def _inject_lora(model: "LlamaForCausalLM", lora: LoraSettings, seed: int) -> None:
    from peft import inject_adapter_in_model

    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if unknown := [name for name in lora.modules if name not in present]:
        raise TrainingError(
            f"`lora.modules` names {unknown}, the model has "
            f"{sorted(n for n in present if n.endswith('_proj'))}"
        )
    if "lm_head" in lora.modules and isinstance(model.lm_head, PaddedHead):
        raise TrainingError(
            "`lora.modules` names lm_head, whose padding rows an adapter would train: set "
            "`extend.pad_to_multiple: 1`, or train its rows with `rows: new`"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(lora), model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _peft_config(lora: LoraSettings):  # type: ignore[no-untyped-def]  # peft is imported late
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.modules),
        task_type="CAUSAL_LM",
    )


def _write_adapter_config(file: Path, lora: LoraSettings) -> None:
    """PEFT's adapter_config.json, so that other tools read the adapter."""
    config = _peft_config(lora).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


def _check_file(file: Path, expected: dict[str, torch.Tensor]) -> None:
    """Open a save again: keys, shapes, bytes, finite values."""
    least = sum(t.numel() * t.element_size() for t in expected.values())
    if (size := file.stat().st_size) < least:
        raise TrainingError(f"{file} has {size} bytes, its tensors need {least}: disk full?")
    with safe_open(file, framework="pt") as stored:
        keys = set(stored.keys())
        if keys != set(expected):
            missing = sorted(set(expected) - keys)[:3]
            raise TrainingError(f"{file} lacks {missing}: this is a bug in the save")
        for name, tensor in expected.items():
            read = stored.get_tensor(name)
            if read.shape != tensor.shape:
                raise TrainingError(f"{file}: {name} is {read.shape}, expected {tensor.shape}")
            if not read.isfinite().all():
                raise TrainingError(f"{file}: {name} holds values that are not finite")


def check_trained(directory: Path) -> None:
    """Refuse a finished adapter whose LoRA B is all zero: training changed nothing.

    Raises:
        TrainingError: names the tensors.
    """
    file = directory / ADAPTER_WEIGHTS
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as stored:
        zero = [k for k in stored.keys() if ".lora_B." in k and not stored.get_tensor(k).any()]  # noqa: SIM118
    if zero:
        raise TrainingError(f"{file}: {len(zero)} LoRA B matrices are still zero, e.g. {zero[0]}")


def load_chain_live(
    model_dir: Path, adapter_dirs: list[Path], vocab_old: int, dtype: str = "float32"
) -> "LlamaForCausalLM":
    """A base model with its adapters' LoRA parts computed apart, as in training.

    Used to check a merge: the result must say the same as this. LoRA parts are PEFT modules, rows
    are put into the matrices.
    """
    import warnings

    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    from altiplano.model.load import load_model

    model = load_model(model_dir, dtype)
    for index, directory in enumerate(adapter_dirs):
        if (directory / ROWS_WEIGHTS).is_file():
            _place_rows(model, load_file(directory / ROWS_WEIGHTS), vocab_old)
        if (directory / ADAPTER_CONFIG).is_file():
            name = f"chain{index}"
            config = LoraConfig.from_pretrained(str(directory))
            config.inference_mode = True
            with warnings.catch_warnings():
                # PEFT warns that there are several adapters: that is what a chain is.
                warnings.simplefilter("ignore", UserWarning)
                inject_adapter_in_model(config, model, adapter_name=name)
            stored = load_file(directory / ADAPTER_WEIGHTS)
            set_peft_model_state_dict(model, stored, adapter_name=name)
    _activate_all(model)
    return model.eval()


def _activate_all(model: "LlamaForCausalLM") -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(list(module.lora_A.keys()))


def _place_rows(model: "LlamaForCausalLM", stored: dict[str, torch.Tensor], vocab_old: int) -> None:
    pieces = num_pieces(model.config.to_dict())
    matrices = {
        "embed_tokens": model.get_input_embeddings().weight, "lm_head": model.lm_head.weight
    }  # fmt: skip
    targets = {part: matrix[:pieces] for part, matrix in matrices.items()}
    with torch.no_grad():
        for key, values in stored.items():
            part, kind = key.split(".")
            start = vocab_old if kind == "new_rows" else 0
            if targets[part].shape[0] != start + values.shape[0]:
                raise ModelError(
                    f"adapter rows {key} end at {start + values.shape[0]}, the model has "
                    f"{targets[part].shape[0]}: they belong to another vocabulary"
                )
            targets[part][start:] = values.to(targets[part].dtype)
