"""What a stage trains: new rows, all rows, LoRA or everything; and its files.

`Trainee` puts the trainable parts into a loaded model, gives the optimizer its groups, and writes
and reads exactly those tensors. Everything written is opened again and checked, because a silently
empty adapter costs hours. Knows nothing of data, steps or Ray; `model/lora.py` knows PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from altiplano.config.training import TrainSettings
from altiplano.errors import ModelError, TrainingError
from altiplano.model.fold import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ROWS_WEIGHTS,
    AdapterStack,
    fold_into,
    read_lora,
)
from altiplano.model.load import HEAD, load_model, num_pieces
from altiplano.model.lora import (
    PrincipalPart,
    adapter_key,
    inject_lora,
    inject_stored,
    is_adapter,
    lora_problems,
    require_same_start,
    stored_form,
    trained_form,
    write_adapter_config,
)
from altiplano.model.rows import SplitEmbedding, SplitHead, SplitRows

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FULL_WEIGHTS = "model.safetensors"
Tensors = Mapping[str, torch.Tensor]


@dataclass
class Trainee:
    """A model with its trainable parts in place.

    Attributes:
        model: body and head; call `hidden` and `head`.
        settings: what the stage trains.
        principal: what PiSSA took out of frozen matrices, by layer; empty without it.
    """

    model: "LlamaForCausalLM"
    settings: TrainSettings
    principal: dict[str, PrincipalPart] = field(default_factory=dict)

    def hidden(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """Last hidden states [B, T, H] of the body."""
        states: torch.Tensor = self.model.model(use_cache=False, **inputs).last_hidden_state
        return states

    @property
    def head(self) -> nn.Module:
        """Maps hidden states [n, H] to logits [n, V]."""
        head: nn.Module = self.model.lm_head
        return head

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def optimizer_groups(self) -> list[dict]:
        """AdamW parameter groups: matrices, LoRA's B, vectors (no decay), rows.

        B has a group of its own where its rate differs (LoRA+, Hayou et al. 2024).
        """
        settings = self.settings
        rate, decay = settings.learning_rate, settings.weight_decay
        ratio = settings.lora.b_learning_rate_ratio if settings.lora is not None else 1.0
        groups: dict[str, dict] = {
            "matrices": {"peak_lr": rate, "weight_decay": decay},
            "lora_b": {"peak_lr": rate * ratio, "weight_decay": decay},
            "vectors": {"peak_lr": rate, "weight_decay": 0.0},
            "rows": {
                "peak_lr": settings.rows_learning_rate or rate,
                "weight_decay": settings.rows_weight_decay,
            },
        }
        for name, parameter in self.trainable().items():
            group = groups[_group_of(name, parameter.ndim, apart=ratio != 1.0)]
            group.setdefault("params", []).append(parameter)
        return [
            {"name": name, "lr": group["peak_lr"], **group}
            for name, group in groups.items()
            if "params" in group
        ]

    def files(self, weights: Tensors) -> dict[str, dict[str, torch.Tensor]]:
        """What the files of these trained tensors hold: file name -> key -> tensor.

        Args:
            weights: by parameter name, unsharded: live ones or those of a snapshot.
        """
        files: dict[str, dict[str, torch.Tensor]] = {}
        pieces = num_pieces(self.model.config.to_dict())
        for name, tensor in weights.items():
            file, key = self._place(name)
            if file == ADAPTER_WEIGHTS:
                tensor = stored_form(name, tensor, self.principal)
            elif file == ROWS_WEIGHTS:
                # Padding rows are of no use to anyone who reads the adapter.
                tensor = tensor[:pieces]
            files.setdefault(file, {})[key] = tensor
        return files

    def write(self, weights: Tensors, directory: Path) -> None:
        """Write the files of these trained tensors and check them.

        Raises:
            TrainingError: what was written is not what was given, or not finite.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for file, tensors in self.files(weights).items():
            copies = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
            save_file(copies, directory / file, metadata={"format": "pt"})
            _check_file(directory / file, copies)
        if self.settings.lora is not None:
            write_adapter_config(directory / ADAPTER_CONFIG, self.settings.lora)

    def read(self, directory: Path) -> dict[str, torch.Tensor]:
        """The trained tensors, by parameter name, that `write` put into a directory.

        Raises:
            TrainingError: the directory holds other tensors than this stage trains; names both.
        """
        places = {name: self._place(name) for name in self.trainable()}
        stored = {file: _open(directory, file) for file in {file for file, _ in places.values()}}
        found = {(file, key) for file, tensors in stored.items() for key in tensors}
        if differing := sorted(found ^ set(places.values())):
            file, key = differing[0]
            has = "holds" if differing[0] in found else "lacks"
            raise TrainingError(
                f"{directory / file} {has} {key} ({len(differing)} such), unlike what this stage "
                f"trains: give both the same `rows`, `row_matrices` and `lora.modules`"
            )
        weights = {
            name: self._fitted(name, stored[file][key], directory / file)
            for name, (file, key) in places.items()
        }
        if self.principal:
            require_same_start(stored[ADAPTER_WEIGHTS], self.principal, directory)
        return weights

    def save(self, directory: Path) -> None:
        """`write` of the live tensors."""
        self.write(self.trainable(), directory)

    def load(self, directory: Path) -> None:
        """`read` into the model."""
        live = self.trainable()
        for name, tensor in self.read(directory).items():
            live[name].data.copy_(tensor)

    def _place(self, name: str) -> tuple[str, str]:
        """File and key of a trained tensor."""
        if self.settings.full:
            return FULL_WEIGHTS, name
        if is_adapter(name):
            return ADAPTER_WEIGHTS, adapter_key(name)
        part = "lm_head" if name.startswith("lm_head") else "embed_tokens"
        return ROWS_WEIGHTS, f"{part}.{'new_rows' if name.endswith('rows.new') else 'weight'}"

    def _fitted(self, name: str, stored: torch.Tensor, file: Path) -> torch.Tensor:
        """A stored tensor in its live shape; padding rows, which no file holds, are zero."""
        tensor, shape = trained_form(name, stored, self.principal), self.trainable()[name].shape
        pieces = num_pieces(self.model.config.to_dict())
        if file.name == ROWS_WEIGHTS and tensor.shape[0] == pieces < shape[0]:
            tensor = F.pad(tensor, (0, 0, 0, shape[0] - pieces))
        if tensor.shape != shape:
            raise TrainingError(
                f"{file}: {name} is {list(stored.shape)}, this stage trains {list(shape)}: it was "
                f"written with another `lora.r` or `lora.init`, model or vocabulary"
            )
        return tensor


def make_trainee(
    model: "LlamaForCausalLM", settings: TrainSettings, vocab_old: int, seed: int
) -> Trainee:
    """Freeze a loaded model and put the stage's trainable parts in.

    Trained tensors are fp32; where the model is bfloat16 its forward pass needs autocast.

    Args:
        model: with earlier adapters already folded in, and quantised if it is to be.
        vocab_old: rows below it belong to the base vocabulary.
        seed: of LoRA's A matrices.

    Raises:
        TrainingError: the settings ask for what this model cannot do; lists all of it.
    """
    if settings.full:
        model.requires_grad_(True)
        model.float()
        return Trainee(model, settings)
    if problems := _problems(model, settings, vocab_old):
        raise TrainingError(f"stage {settings.name}: " + "; ".join(problems))
    model.requires_grad_(False)
    principal = {}
    if settings.lora is not None:
        principal = inject_lora(model, settings.lora, seed)
    if settings.rows == "all":
        _free_rows(model, settings)
    elif settings.rows == "new":
        _split_rows(model, settings, vocab_old)
    return Trainee(model, settings, principal)


def _problems(model: "LlamaForCausalLM", settings: TrainSettings, vocab_old: int) -> list[str]:
    """What in these settings this model cannot do."""
    problems = [] if settings.lora is None else lora_problems(model, settings.lora)
    pieces = num_pieces(model.config.to_dict())
    if settings.rows == "new" and vocab_old >= pieces:
        problems.append(
            f"`rows: new` has nothing to train: the base vocabulary has {vocab_old} pieces and "
            f"the model rows for {pieces}; extend the vocabulary or set `rows: none`"
        )
    if settings.quantize == "8bit" and settings.lora is not None and settings.lora.dora:
        problems.append(
            "`lora.dora` on 8-bit matrices fails in PEFT where there is no GPU: use "
            "`quantize: 4bit`, or drop `lora.dora`"
        )
    if settings.rows == "none":
        return problems
    if settings.row_matrices != "both" and model.config.tie_word_embeddings:
        problems.append(
            f"`row_matrices: {settings.row_matrices}` means one of two matrices, this model has "
            f"one for both (tie_word_embeddings): set `row_matrices: both`"
        )
    on_head = settings.lora is not None and "lm_head" in settings.lora.modules
    if on_head and settings.row_matrices != "embedding":
        problems.append(
            f"`lora.modules` names lm_head, whose rows `rows: {settings.rows}` trains or keeps as "
            f"they are: drop it, or set `row_matrices: embedding`"
        )
    return problems


def _group_of(name: str, ndim: int, *, apart: bool) -> str:
    """The optimizer group of a parameter; `apart`: LoRA's B has its own."""
    if is_adapter(name):
        if ndim < 2:
            return "vectors"
        return "lora_b" if apart and ".lora_B." in name else "matrices"
    if "embed_tokens" in name or "lm_head" in name:
        return "rows"
    return "vectors" if ndim < 2 else "matrices"


def _free_rows(model: "LlamaForCausalLM", settings: TrainSettings) -> None:
    """`rows: all`: fp32 masters; what leaves the embedding has the type of the blocks."""
    compute = model.dtype
    embedding = model.get_input_embeddings()
    if settings.row_matrices != "head":
        embedding.float().requires_grad_(True)
        # Without it the residual stream, and so every activation kept, would be fp32.
        embedding.register_forward_hook(lambda _module, _inputs, rows: rows.to(compute))
    if settings.row_matrices != "embedding":
        model.lm_head.float().requires_grad_(True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = embedding.weight


def _split_rows(model: "LlamaForCausalLM", settings: TrainSettings, vocab_old: int) -> None:
    """`rows: new`: new rows apart from the old ones, which stay as they are."""
    pieces = num_pieces(model.config.to_dict())
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    if settings.row_matrices != "head":
        model.set_input_embeddings(SplitEmbedding(SplitRows(embedding, vocab_old, pieces)))
    if settings.row_matrices != "embedding":
        tied = model.config.tie_word_embeddings
        rows = model.model.embed_tokens.rows if tied else SplitRows(head, vocab_old, pieces)
        model.lm_head = SplitHead(rows)


def _open(directory: Path, file: str) -> dict[str, torch.Tensor]:
    if not (directory / file).is_file():
        raise TrainingError(
            f"{directory} has no {file}: it is no artifact of a stage that trains the same tensors"
        )
    tensors: dict[str, torch.Tensor] = load_file(directory / file)
    return tensors


def _check_file(file: Path, expected: Tensors) -> None:
    """Open a save again: bytes, keys, values, and these finite."""
    least = sum(t.numel() * t.element_size() for t in expected.values())
    if (size := file.stat().st_size) < least:
        raise TrainingError(f"{file} has {size} bytes, its tensors need {least}: disk full?")
    with safe_open(file, framework="pt") as stored:
        keys = set(stored.keys())
        if keys != set(expected):
            missing = sorted(set(expected) - keys)[:3]
            raise TrainingError(f"{file} lacks {missing}: this is a bug in the save")
        for name, tensor in expected.items():
            if not tensor.isfinite().all():
                raise TrainingError(f"{file}: {name} holds values that are not finite")
            if not torch.equal(stored.get_tensor(name), tensor):
                raise TrainingError(f"{file}: {name} reads back otherwise: is the disk sound?")


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
    are put into the matrices. What comes before an adapter that is more than an addition to it
    is folded, as it was in training.
    """
    model = load_model(model_dir, dtype)
    first = _first_live(adapter_dirs)
    fold_into(model, AdapterStack(adapter_dirs[:first], vocab_old))
    for index, directory in enumerate(adapter_dirs[first:]):
        if (directory / ROWS_WEIGHTS).is_file():
            _place_rows(model, load_file(directory / ROWS_WEIGHTS), vocab_old)
        if (directory / ADAPTER_CONFIG).is_file():
            inject_stored(model, directory, f"chain{index}")
    _activate_all(model)
    return model.eval()


def _first_live(adapter_dirs: list[Path]) -> int:
    """Index of the first adapter that, like all after it, only adds to those before it.

    DoRA scales the whole matrix, and rows replace what an adapter on the head did before.
    """
    first, head_adapted = 0, False
    for index, directory in enumerate(adapter_dirs):
        lora = read_lora(directory)
        if lora.dora or (head_adapted and (directory / ROWS_WEIGHTS).is_file()):
            first, head_adapted = index, False
        head_adapted = head_adapted or lora.touches(HEAD)
    return first


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
