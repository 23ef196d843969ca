"""New rows for new pieces: grow embedding and head of a checkpoint, file by file, in streams.

Old rows are copied bit for bit; new rows start as `init` says; rows that only pad the matrix are
zero. Files without either matrix are linked. Knows pieces only as lists of old ids. Memory: a few
buffers (`stored.CHUNK_BYTES`, `new_rows.GROUP_BYTES`), whatever the size of the model.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altiplano.errors import ModelError
from altiplano.model.load import EMBEDDING, HEAD, PIECES, link_or_copy, read_config, weight_files
from altiplano.model.stored import Chunk, Matrix, StoredTensor, Streamed, read_header, write_streams

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Growth:
    """What happens to each of the two matrices."""

    vocab_old: int
    subpieces: Sequence[Sequence[int]]
    init: str
    std: float
    seed: int
    rows_padding: int

    @property
    def rows(self) -> int:
        """Rows of the grown matrices, padding included."""
        return self.vocab_old + len(self.subpieces) + self.rows_padding

    def grow(self, stored: StoredTensor, seed: int) -> Streamed:
        """The matrix with its new rows."""
        width = stored.shape[1]
        shape = (self.rows, width)
        num_bytes = self.rows * width * stored.dtype.itemsize
        chunks = self._chunks(stored, seed)
        return Streamed(stored.name, stored.type_name, shape, num_bytes, chunks)

    def _chunks(self, stored: StoredTensor, seed: int) -> Iterator[Chunk]:
        import torch

        from altiplano.model.new_rows import new_rows

        old = Matrix(stored, self.vocab_old)
        row_bytes = stored.shape[1] * stored.dtype.itemsize
        yield from stored.chunks(self.vocab_old * row_bytes)
        for rows in new_rows(old, self.subpieces, self.init, self.std, seed):
            yield memoryview(rows.to(stored.dtype).flatten().view(torch.uint8).numpy())
        yield bytes(self.rows_padding * row_bytes)


def extend_checkpoint(
    source: Path,
    target: Path,
    subpieces: Sequence[Sequence[int]],
    *,
    vocab_old: int,
    init: str,
    special_ids: dict[str, int | None],
    seed: int,
    pad_to_multiple: int = 1,
) -> dict[str, int]:
    """Write `source` with one more row per new piece to `target`.

    Args:
        source: model directory whose first `vocab_old` rows belong to pieces; rows after them
            (padding of the matrix) are dropped.
        target: existing directory to fill with weights and configs.
        subpieces: old ids of every new piece, in order of the new ids.
        vocab_old: pieces of the source's vocabulary.
        init: see `new_rows`.
        special_ids: bos/eos/pad ids written to the configs.
        seed: of the draws.
        pad_to_multiple: zero rows are added until the number of rows is a multiple of this; the
            config then says how many rows are pieces (`load.PIECES`).

    Returns:
        counts of rows.

    Raises:
        ModelError: the source has fewer rows than pieces, lacks a matrix or stores it in a type
            that rows cannot be added to.
    """
    config = read_config(source)
    if config["vocab_size"] < vocab_old:
        raise ModelError(
            f"{source} has {config['vocab_size']} embedding rows but its tokenizer {vocab_old} "
            f"pieces: the tokenizer belongs to another model"
        )
    vocab_new = vocab_old + len(subpieces)
    std = float(config.get("initializer_range", 0.02))
    growth = _Growth(vocab_old, subpieces, init, std, seed, -vocab_new % pad_to_multiple)
    _write_weights(source, target, growth, tied=bool(config.get("tie_word_embeddings")))
    config["vocab_size"] = growth.rows
    config.pop(PIECES, None)
    if growth.rows_padding:
        config[PIECES] = vocab_new
    _write_configs(source, target, config, special_ids)
    return {
        "rows_old": vocab_old,
        "rows_new": vocab_new,
        "rows_added": len(subpieces),
        "rows_padding": growth.rows_padding,
    }


def _write_weights(source: Path, target: Path, growth: _Growth, *, tied: bool) -> None:
    headers = {file: read_header(file) for file in weight_files(source)}
    found = {tensor.name: tensor for header in headers.values() for tensor in header}
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        if name not in found:
            raise ModelError(f"{source} has no tensor {name}: it is not a whole Llama checkpoint")
        if found[name].shape[0] < growth.vocab_old:
            raise ModelError(
                f"{name} of {source} has {found[name].shape[0]} rows, its tokenizer "
                f"{growth.vocab_old} pieces: the tokenizer belongs to another model"
            )
    # A stored copy of a tied head gets the embedding's rows.
    seeds = {EMBEDDING: growth.seed, HEAD: growth.seed + (0 if tied else 1)}
    for file, header in headers.items():
        if not any(tensor.name in seeds for tensor in header):
            link_or_copy(file, target / file.name)
            continue
        streams = [
            growth.grow(tensor, seeds[tensor.name]) if tensor.name in seeds else _as_it_is(tensor)
            for tensor in header
        ]
        write_streams(target / file.name, streams)
    _write_index(source, target)


def _as_it_is(stored: StoredTensor) -> Streamed:
    return Streamed(stored.name, stored.type_name, stored.shape, stored.num_bytes, stored.chunks())


def _write_index(source: Path, target: Path) -> None:
    """The source's index, with the size of what is there now."""
    if not (source / _INDEX).is_file():
        return
    index: dict[str, Any] = json.loads((source / _INDEX).read_text(encoding="utf-8"))
    tensors = [
        tensor for file in weight_files(source) for tensor in read_header(target / file.name)
    ]
    index["metadata"] = {"total_size": sum(tensor.num_bytes for tensor in tensors)}
    (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configs(
    source: Path, target: Path, config: dict[str, Any], special_ids: dict[str, int | None]
) -> None:
    """config.json and generation_config.json with the tokenizer's ids, so EOS always stops."""
    known = {name: value for name, value in special_ids.items() if value is not None}
    config.update(known)
    generation: dict[str, Any] = {"_from_model_config": True}
    file = source / "generation_config.json"
    if file.is_file():
        generation = json.loads(file.read_text(encoding="utf-8"))
    generation.update(known)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (target / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )
