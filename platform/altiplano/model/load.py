"""Model directories: check that one can be used, load it, hash it, write it.

A directory is Hugging Face's: config.json, safetensors, tokenizer files. Pickle is refused unless
asked for. Knows nothing of adapters or training. The hash reads every weight once.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PIECES = "altiplano_pieces"
"""Key of config.json: rows that belong to pieces, where the matrices have more (padding). Whoever
reads `vocab_size` alone would take zero rows for pieces, so only unmerged models have it."""


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        ModelError: it is missing or not JSON.
    """
    file = directory / "config.json"
    try:
        loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"{directory} has no config.json: give a Hugging Face directory") from None
    except ValueError as error:
        raise ModelError(f"{file} is not JSON ({error}): restore it") from None
    return loaded


def num_pieces(config: Mapping[str, Any]) -> int:
    """Rows of embedding and head that belong to pieces; the rest is padding."""
    pieces: int = config[PIECES] if PIECES in config else config["vocab_size"]
    return pieces


def check_llama(directory: Path, *, allow_pickle: bool = False) -> None:
    """Refuse a directory that this platform cannot teach.

    Raises:
        ModelError: not Llama-like, no weights, pickle only, a missing shard, or no tokenizer.
    """
    config = read_config(directory)
    kind = config.get("model_type")
    if kind != "llama":
        raise ModelError(
            f"{directory} holds a model of type {kind!r}; Altiplano teaches Llama-type models "
            f"(model_type 'llama'): give one of those"
        )
    if not list(directory.glob("*.safetensors")):
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        if not pickles:
            raise ModelError(f"{directory} holds no weights (*.safetensors)")
        if not allow_pickle:
            raise ModelError(
                f"{directory} holds its weights as pickle ({pickles[0]}), which can run code when "
                f"read: convert them to safetensors, or set base_model.allow_pickle=true if you "
                f"trust their origin"
            )
    else:
        weight_files(directory)
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise ModelError(
            f"{directory} has no tokenizer.model (SentencePiece) and no tokenizer.json (byte-level "
            f"BPE): its vocabulary is what new pieces are added to; copy it from the model's origin"
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, sorted; all shards that its index names.

    Raises:
        ModelError: none, or a shard is missing.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelError(f"{directory} lacks {missing[0]} (named by {index.name}): restore it")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no weights (*.safetensors)")
    return files


def weights_fingerprint(directory: Path) -> str:
    """sha256 over every tensor's name, dtype, shape and bytes, in order of names.

    The same tensors give the same hash whatever files or shards hold them.
    """
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    digest = hashlib.sha256()
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as tensors:
            digest.update(_tensor_digest(name, tensors.get_tensor(name)))
    return digest.hexdigest()


def _tensor_digest(name: str, tensor: "torch.Tensor") -> bytes:
    import torch

    digest = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.digest()


def load_config(directory: Path) -> "LlamaConfig":
    """The transformers config of a model directory."""
    from transformers import LlamaConfig

    config: LlamaConfig = LlamaConfig.from_pretrained(directory)
    return config


def load_model(directory: Path, dtype: str = "float32") -> "LlamaForCausalLM":
    """Load a model in eval mode, from safetensors only.

    Its head gives logits of pieces; where the matrices have padding rows, they stay unseen.

    Args:
        dtype: torch type name of the loaded weights.
    """
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    from altiplano.model.rows import PaddedHead

    logging.disable_progress_bar()
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    config = model.config.to_dict()
    if num_pieces(config) < config["vocab_size"]:
        model.lm_head = PaddedHead(model.lm_head.weight, num_pieces(config))
    return model.eval()


def save_model(model: "LlamaForCausalLM", directory: Path) -> None:
    """Write config.json, generation_config.json and safetensors (shards of at most 5 GB)."""
    model.save_pretrained(directory, max_shard_size="5GB")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that a directory has into another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)


def import_model(source: Path, target: Path, *, allow_pickle: bool) -> None:
    """Bring a base model into a run: hard links where possible, else copies.

    Pickle weights, where allowed, are converted to safetensors.
    """
    check_llama(source, allow_pickle=allow_pickle)
    if not list(source.glob("*.safetensors")):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
        save_model(model, target)
        copy_tokenizer(source, target)
        return
    small = [source / name for name in ("config.json", "generation_config.json", *TOKENIZER_FILES)]
    index = source / "model.safetensors.index.json"
    for file in [*small, index]:
        if file.is_file():
            shutil.copy2(file, target / file.name)
    for file in weight_files(source):
        link_or_copy(file, target / file.name)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none: weights are never changed in place."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copy2(source, target)


def iter_tensors(directory: Path) -> Iterator[tuple[str, Path]]:
    """(tensor name, file that holds it) of every tensor, file by file."""
    from safetensors import safe_open

    for file in weight_files(directory):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                yield name, file


def cast_weights(source: Path, target: Path, dtype: str) -> None:
    """Copy one safetensors file, its float tensors rounded to `dtype`."""
    import torch
    from safetensors.torch import load_file, save_file

    wanted = getattr(torch, dtype)
    tensors = {name: tensor.to(wanted) for name, tensor in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt"})
