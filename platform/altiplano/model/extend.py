"""New rows for new pieces: resize embedding and head of a checkpoint, file by file.

Old rows are copied bit for bit; new rows start as `init` says. Knows pieces only as lists of old
ids. Holds one weight file and the two matrices in memory at a time.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.errors import ModelError
from altiplano.model.load import EMBEDDING, HEAD, iter_tensors, read_config, weight_files

if TYPE_CHECKING:
    import torch


def new_rows(
    old: "torch.Tensor", subpieces: Sequence[Sequence[int]], init: str, std: float, seed: int
) -> "torch.Tensor":
    """Rows for new pieces.

    Args:
        old: [V_old, H] matrix the rows are added to.
        subpieces: for every new piece, the ids the old tokenizer gives its text (may be empty).
        init: `subpiece_mean` (mean of those rows; the global mean where there are none), `mean`
            (of all rows), `gaussian` (drawn from the rows' mean and covariance; Hewitt 2021),
            or `random` (normal with `std`).
        std: standard deviation for `random`.
        seed: of the draws.

    Returns:
        [len(subpieces), H] in fp32.
    """
    import torch

    rows = old.float()
    count, width = len(subpieces), rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    mean = rows.mean(dim=0)
    if init == "random":
        return torch.randn(count, width, generator=generator) * std
    if init == "mean":
        return mean.repeat(count, 1)
    if init == "gaussian":
        centred = rows - mean
        covariance = centred.T @ centred / rows.shape[0]
        factor = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(width))
        return mean + torch.randn(count, width, generator=generator) @ factor.T
    assert init == "subpiece_mean", init
    return torch.stack([rows[list(ids)].mean(dim=0) if ids else mean for ids in subpieces])


def extend_checkpoint(
    source: Path,
    target: Path,
    subpieces: Sequence[Sequence[int]],
    *,
    vocab_old: int,
    init: str,
    special_ids: dict[str, int | None],
    seed: int,
) -> dict[str, int]:
    """Write `source` with one more row per new piece to `target`.

    Args:
        source: model directory whose first `vocab_old` rows belong to pieces; rows after them
            (padding of the matrix) are dropped.
        subpieces: old ids of every new piece, in order of the new ids.
        special_ids: bos/eos/pad ids written to the configs.

    Returns:
        counts of rows.
    """
    config = read_config(source)
    vocab_new = vocab_old + len(subpieces)
    if config["vocab_size"] < vocab_old:
        raise ModelError(
            f"{source} has {config['vocab_size']} embedding rows but its tokenizer {vocab_old} "
            f"pieces: the tokenizer belongs to another model"
        )
    std = float(config.get("initializer_range", 0.02))
    names = {name for name, _ in iter_tensors(source)}
    matrices = (EMBEDDING, HEAD) if HEAD in names else (EMBEDDING,)
    if EMBEDDING not in names:
        raise ModelError(f"{source} has no tensor {EMBEDDING}: it is not a Llama checkpoint")
    for file in weight_files(source):
        _extend_file(file, target / file.name, matrices, subpieces, vocab_old, init, std, seed)
    index = source / "model.safetensors.index.json"
    if index.is_file():
        shutil.copy2(index, target / index.name)
    config["vocab_size"] = vocab_new
    _write_configs(source, target, config, special_ids)
    return {"rows_old": vocab_old, "rows_new": vocab_new, "rows_added": len(subpieces)}


def _extend_file(
    source: Path,
    target: Path,
    matrices: tuple[str, ...],
    subpieces: Sequence[Sequence[int]],
    vocab_old: int,
    init: str,
    std: float,
    seed: int,
) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for position, name in enumerate(matrices):
        if name in tensors:
            old = tensors[name][:vocab_old]
            rows = new_rows(old, subpieces, init, std, seed + position)
            tensors[name] = torch.cat([old, rows.to(old.dtype)])
    save_file(tensors, target, metadata={"format": "pt"})


def _write_configs(
    source: Path, target: Path, config: dict, special_ids: dict[str, int | None]
) -> None:
    """config.json and generation_config.json with the tokenizer's ids, so EOS always stops."""
    known = {name: value for name, value in special_ids.items() if value is not None}
    config.update(known)
    generation: dict = {"_from_model_config": True}
    file = source / "generation_config.json"
    if file.is_file():
        generation = json.loads(file.read_text())
    generation.update(known)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
