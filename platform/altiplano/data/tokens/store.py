"""The token store: fixed-length blocks of token ids on disk, memory-mapped for training.

A directory with `shard-00000.bin`, ... and `index.json`; docs/token-store.md has the format on
one page. Deliberately knows nothing of text, tokenizers or torch. Costs 3 bytes per token on disk
(5 above 65,536 pieces), one `stat` per shard to open, and a few page faults per block read.
"""

import json
import mmap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from altiplano.data.tokens.index import FORMAT_VERSION, INDEX, Index, check_sizes, read_index
from altiplano.data.tokens.pack import FIRST, TARGET, TOKEN, Blocks
from altiplano.data.tokens.shards import Shard, ShardWriter, fetch, hash_file
from altiplano.errors import ArtifactError, MismatchError
from altiplano.storage import is_remote

IGNORE_INDEX = -100
"""Label of a position that is no target (PyTorch's cross-entropy ignores it)."""
SHARD_BYTES = 256 << 20
_OPEN_SHARDS = 256
"""Shards that are mapped at a time; each holds a file descriptor."""


@dataclass(frozen=True)
class Batch:
    """Blocks as a model takes them; every array is int64 [B, T]."""

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    """Restart at 0 in every segment."""
    segment_ids: npt.NDArray[np.int64]
    """1, 2, ... in every block; 0 is padding."""
    labels: npt.NDArray[np.int64]
    """Already shifted: labels[t] is token t + 1 where that is a target."""


class TokenStore:
    """A finished store, opened for reading; make one with `TokenStore.open`."""

    def __init__(self, directory: str, index: Index, locate: Callable[[Shard], Path]) -> None:
        self.index = index
        self.num_blocks = index.num_blocks
        self.sequence_length = index.sequence_length
        self.num_tokens = index.num_tokens
        """Tokens that are not padding."""
        self.num_targets = index.num_targets
        """Tokens the loss is taken on."""
        self._directory = directory
        self._locate = locate
        self._map = lru_cache(_OPEN_SHARDS)(self._map_shard)

    @classmethod
    def open(
        cls, directory: Path | str, *, tokenizer_fingerprint: str | None = None
    ) -> "TokenStore":
        """Read a store's index and look at its shards; their bytes are read when asked for.

        Args:
            directory: a local directory, or an fsspec URL. Shards of a URL are copied, once per
                machine, to `shards.cache_root()` when one of their blocks is first asked for.
            tokenizer_fingerprint: of the tokenizer the store is to be used with.

        Raises:
            ArtifactError: there is no store, a shard is missing or truncated, or another version
                wrote it.
            MismatchError: the store holds ids of another tokenizer.
        """
        place = str(directory).rstrip("/")
        index, index_hash = read_index(place)
        if tokenizer_fingerprint not in (None, index.tokenizer_fingerprint):
            raise MismatchError(
                f"the token store {place} was made with another tokenizer:\n"
                f"  the store's ids are of tokenizer {index.tokenizer_fingerprint[:16]}, "
                f"{index.vocab_size} pieces\n"
                f"  it is to be used with tokenizer {str(tokenizer_fingerprint)[:16]}\n"
                f"prepare the data again with this tokenizer: `altiplano run CONFIG --from data`"
            )
        check_sizes(place, index)
        if is_remote(place):
            return cls(place, index, lambda shard: fetch(place, shard, store_id=index_hash))
        return cls(place, index, lambda shard: Path(place) / shard.name)

    def batch(self, indices: npt.NDArray[np.integer]) -> Batch:
        """Read blocks.

        Args:
            indices: [B] block numbers, in any order.
        """
        shape = (len(indices), self.sequence_length)
        ids, flags = np.empty(shape, np.int64), np.empty(shape, np.uint8)
        numbers, rows = np.divmod(indices, self.index.blocks_per_shard)
        for number in np.unique(numbers):
            inside = numbers == number
            shard_ids, shard_flags = self._map(int(number))
            ids[inside] = shard_ids[rows[inside]]
            flags[inside] = shard_flags[rows[inside]]
        labels = np.full_like(ids, IGNORE_INDEX)
        labels[:, :-1] = np.where(flags[:, 1:] & TARGET, ids[:, 1:], IGNORE_INDEX)
        segments = np.cumsum(flags & FIRST != 0, axis=1) * (flags & TOKEN != 0)
        return Batch(ids, _positions(segments), segments, labels)

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the index (over 1 GB/s from a warm disk).

        Raises:
            ArtifactError: names the shards that were changed.
        """
        changed = [
            shard.name
            for shard in self.index.shards
            if hash_file(self._locate(shard)) != shard.sha256
        ]
        if changed:
            raise ArtifactError(
                f"{self._directory}: {', '.join(changed)} does not have the sha256 that {INDEX} "
                f"says: it was changed after it was written; restore it, or prepare the data again"
            )

    def _map_shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and flags of a shard, [n, T] each."""
        shard = self.index.shards[number]
        shape = (shard.blocks, self.sequence_length)
        with self._locate(shard).open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Blocks are read in random order: what lies around one is not wanted.
        mapping.madvise(mmap.MADV_RANDOM)
        data = np.frombuffer(mapping, np.uint8)
        split = shape[0] * shape[1] * self.index.dtype.itemsize
        return data[:split].view(self.index.dtype).reshape(shape), data[split:].reshape(shape)


class StoreWriter:
    """Writes a store block by block; a context manager.

    A shard gets its name when it is whole, and the index is written last and only without an
    error, so a directory with an index is whole.
    """

    def __init__(
        self,
        directory: Path,
        *,
        sequence_length: int,
        vocab_size: int,
        pad_id: int,
        tokenizer_fingerprint: str,
        cross_documents: bool = False,
        blocks_per_shard: int | None = None,
    ) -> None:
        """Describe the store; `with` creates it.

        Args:
            directory: made if missing; a store in it is replaced.
            sequence_length: T, tokens per block.
            vocab_size: pieces; decides between 2 and 4 bytes per token.
            pad_id: what stands where there is no token.
            tokenizer_fingerprint: of the tokenizer that made the ids.
            cross_documents: whether segments hold several documents; for the index.
            blocks_per_shard: as many as make `SHARD_BYTES`, unless given.
        """
        self._directory = directory
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        block_bytes = sequence_length * (self._dtype.itemsize + 1)
        self._blocks_per_shard = blocks_per_shard or max(1, SHARD_BYTES // block_bytes)
        self._sequence_length = sequence_length
        self._vocab_size, self._pad_id = vocab_size, pad_id
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._cross_documents = cross_documents
        self._shards: list[Shard] = []
        self._shard: ShardWriter | None = None
        self.num_blocks = self.num_tokens = self.num_targets = 0

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        # The index goes first: without it, what is left is no store.
        for old in (self._directory / INDEX, *self._directory.glob("shard-*.bin*")):
            old.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._shard:
                self._shard.discard()
            return
        self._finish_shard()
        partial = self._directory / f"{INDEX}.partial"
        partial.write_text(json.dumps(asdict(self._index()), indent=2) + "\n", encoding="utf-8")
        partial.replace(self._directory / INDEX)

    def add(self, blocks: Blocks) -> None:
        """Append blocks of T tokens."""
        flags = blocks.flags
        assert blocks.tokens.shape == flags.shape == (len(flags), self._sequence_length)
        has_token = flags & TOKEN != 0
        assert (flags[:, 0] & (FIRST | TOKEN) == FIRST | TOKEN).all(), "a block begins a segment"
        assert not (flags & FIRST & ((flags & TARGET) << 1)).any(), "a segment's first is no target"
        assert not (has_token[:, 1:] > has_token[:, :-1]).any(), "padding is at the end"
        tokens = np.where(has_token, blocks.tokens, self._pad_id).astype(self._dtype)
        start = 0
        while start < len(tokens):
            self._shard = self._shard or ShardWriter(self._directory, len(self._shards))
            stop = start + self._blocks_per_shard - self._shard.blocks
            self._shard.add(tokens[start:stop], flags[start:stop])
            if self._shard.blocks == self._blocks_per_shard:
                self._finish_shard()
            start = stop
        self.num_blocks += len(tokens)
        self.num_tokens += int(has_token.sum())
        self.num_targets += int((flags & TARGET).sum())

    @property
    def fill_rate(self) -> float:
        """Share of the positions that are not padding."""
        positions = self.num_blocks * self._sequence_length
        return self.num_tokens / positions if positions else 0.0

    def _finish_shard(self) -> None:
        if self._shard:
            self._shards.append(self._shard.finish())
            self._shard = None

    def _index(self) -> Index:
        return Index(
            format_version=FORMAT_VERSION,
            sequence_length=self._sequence_length,
            token_dtype=self._dtype.name,
            blocks_per_shard=self._blocks_per_shard,
            cross_documents=self._cross_documents,
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            vocab_size=self._vocab_size,
            pad_id=self._pad_id,
            num_blocks=self.num_blocks,
            num_tokens=self.num_tokens,
            num_targets=self.num_targets,
            shards=self._shards,
        )


def _positions(segments: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Position of each token within its segment, [B, T]."""
    steps = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.zeros_like(segments)
    changes = segments[:, 1:] != segments[:, :-1]
    starts[:, 1:] = np.where(changes, steps[:, 1:], 0)
    return steps - np.maximum.accumulate(starts, axis=1)
