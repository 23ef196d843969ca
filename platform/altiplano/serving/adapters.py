"""LoRA adapters for a running service: found, copied here where they are far, checked.

An address is a directory or an fsspec URL, and once it was loaded `ADDRESS#DIGEST` of its weights,
so that every replica serves the same ones or says that they were changed. Knows files, manifests
and PEFT's format, not engines. A replica's business: it imports torch. Costs one read of the file.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from altiplano.artifact import MANIFEST, read_manifest, require_same_tokenizer
from altiplano.errors import ArtifactError, DataError, ServeError
from altiplano.model.fold import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ROWS_WEIGHTS,
    LoraPart,
    read_lora,
)
from altiplano.model.load import weight_files
from altiplano.model.stored import read_header
from altiplano.storage import expand, identity_of, is_remote, open_binary, sha256_of

_DIGEST_LENGTH = 16
_PEFT_PREFIX = "base_model.model."
_MERGE = "merge it into the model and serve that (`altiplano merge CONFIG`)"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter on this machine."""

    directory: Path
    """In PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""
    address: str
    """Where it comes from, with the digest of its weights."""


def open_adapter(address: str, model_dir: Path, max_rank: int) -> Adapter:
    """Find an adapter and check that the engine can serve it, and for this model.

    Args:
        address: absolute directory or fsspec URL, with or without `#digest`.
        model_dir: the model it is for.
        max_rank: `serve.max_adapter_rank`.

    Raises:
        ServeError, ArtifactError, MismatchError, ModelError, DataError: what is wrong and what to
            do.
    """
    place, _, digest = address.partition("#")
    directory = _fetch(place) if is_remote(place) else _local(place)
    _check_files(directory, place)
    if (directory / MANIFEST).is_file():
        _check_manifest(directory, place, model_dir)
    _check_format(directory, place, max_rank)
    _check_shapes(directory, place, model_dir)
    found = sha256_of(directory / ADAPTER_WEIGHTS)[:_DIGEST_LENGTH]
    if digest and digest != found:
        raise ArtifactError(
            f"the adapter {place} has weights {found}, it was loaded with {digest}: they were "
            f"changed since; load it again under a new name"
        )
    return Adapter(directory, f"{place}#{found}")


def _local(place: str) -> Path:
    path = Path(place)
    if not path.is_absolute() or ".." in path.parts:
        raise ServeError(f"the adapter's path {place!r} must be absolute and without `..`")
    if not path.is_dir():
        raise ServeError(f"there is no adapter at {place}: give a directory every node can read")
    return path


def _check_files(directory: Path, place: str) -> None:
    """Refuse anything but safetensors, and rows, which the engine cannot exchange."""
    if not (directory / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(file.name for file in directory.glob("*.bin"))
        found = f"only pickle ({pickles[0]}), which may run code" if pickles else "no weights"
        raise ServeError(f"the adapter {place} holds {found}: {ADAPTER_WEIGHTS} is needed")
    if (directory / ROWS_WEIGHTS).is_file():
        raise ServeError(
            f"the adapter {place} holds rows of the embedding or head ({ROWS_WEIGHTS}), which "
            f"cannot be exchanged while serving: {_MERGE}"
        )


def _check_manifest(directory: Path, place: str, model_dir: Path) -> None:
    """Of an artifact of ours: whole, an adapter, of this model's tokenizer, not merged already."""
    manifest = read_manifest(directory)
    if manifest.kind != "adapter":
        raise ArtifactError(f"{place} is an artifact of kind {manifest.kind}, adapter is needed")
    if ROWS_WEIGHTS in manifest.files:
        raise ServeError(f"the adapter {place} was made with {ROWS_WEIGHTS}: {_MERGE}")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if sha256_of(directory / name) != manifest.files.get(name, {}).get("sha256"):
            raise ArtifactError(
                f"the adapter {place} is not what stage {manifest.stage} wrote: {name} was changed"
            )
    if not (model_dir / MANIFEST).is_file():
        return
    model = read_manifest(model_dir)
    require_same_tokenizer((f"adapter {place}", manifest), (f"model {model_dir}", model))
    if manifest.fingerprint in {part.fingerprint for part in model.inputs.values()}:
        raise ServeError(f"the adapter {place} is merged into the model {model_dir} already")


def _check_format(directory: Path, place: str, max_rank: int) -> None:
    """Refuse what vLLM would refuse, and what it would leave out without a word."""
    lora: LoraPart = read_lora(directory)
    config: dict[str, Any] = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    rank = config.get("r")
    problems = [
        f"`{key}`" for key in _NOT_SERVED if config.get(key) not in (None, False, "none", [], {})
    ]
    problems += [name for name in sorted(lora.names) if _is_foreign(name)][:2]
    if problems:
        raise ServeError(
            f"the adapter {place} has {', '.join(problems)}, which cannot be exchanged while "
            f"serving: {_MERGE}"
        )
    if not isinstance(rank, int) or not 0 < rank <= max_rank:
        raise ServeError(
            f"the adapter {place} has rank {rank}, serve.max_adapter_rank is {max_rank}: raise it"
        )


def _check_shapes(directory: Path, place: str, model_dir: Path) -> None:
    """Refuse matrices that do not fit: vLLM would find out half-way."""
    rank = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
    layers = {
        each.name: each.shape for file in weight_files(model_dir) for each in read_header(file)
    }
    for tensor in read_header(directory / ADAPTER_WEIGHTS):
        stem, _, side = tensor.name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        layer = layers.get(f"{stem}.weight")
        if layer is None:
            raise ServeError(f"the adapter {place} changes {stem}, which {model_dir} has not")
        fitting = (rank, layer[1]) if side == "A.weight" else (layer[0], rank)
        if tuple(tensor.shape) != fitting:
            raise ServeError(
                f"the adapter {place} gives {tensor.name} the shape {list(tensor.shape)}, "
                f"{list(fitting)} fits {model_dir}: it belongs to another model"
            )


def _is_foreign(name: str) -> bool:
    """Whether a tensor is none of a linear layer's A and B."""
    return "embed_tokens" in name or not name.endswith((".lora_A.weight", ".lora_B.weight"))


_NOT_SERVED = (
    "modules_to_save", "trainable_token_indices", "use_dora", "bias", "lora_bias", "alpha_pattern",
    "rank_pattern", "fan_in_fan_out",
)  # fmt: skip
"""Keys of PEFT's config that vLLM 0.29 refuses or does not read."""


def _fetch(place: str) -> Path:
    """Copy a remote adapter into this machine's cache, once per content; returns its directory.

    Raises:
        DataError: it cannot be read.
    """
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    files = {name: f"{place.rstrip('/')}/{name}" for name in names}
    files |= {
        name: path
        for name in (MANIFEST, ROWS_WEIGHTS)
        if _exists(path := f"{place.rstrip('/')}/{name}")
    }
    content = json.dumps({name: identity_of(path) for name, path in files.items()}, sort_keys=True)
    final = _cache() / sha256(content.encode()).hexdigest()[:32]
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=final.parent))
    try:
        for name, path in files.items():
            with open_binary(path) as source, open(partial / name, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        try:
            partial.rename(final)
        except OSError:
            # Another replica on this machine was faster.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _exists(path: str) -> bool:
    try:
        return bool(expand(path))
    except DataError:
        return False


def _cache() -> Path:
    """Where remote ones are kept: `$ALTIPLANO_CACHE/adapters`, else below `~/.cache/altiplano`."""
    root = os.environ.get("ALTIPLANO_CACHE") or Path.home() / ".cache" / "altiplano"
    return Path(root) / "adapters"
