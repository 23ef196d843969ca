"""`index.json` of a token store: what the store holds, and whether its shards are there.

Knows the format (docs/token-store.md), not what tokens or flags mean. Costs one small file and
one `stat` per shard, or one listing of a remote store.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from altiplano.data.tokens.shards import Shard, sizes_in
from altiplano.errors import ArtifactError, DataError
from altiplano.storage import open_binary

INDEX = "index.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    format_version: int
    sequence_length: int
    token_dtype: str
    """`uint16` or `uint32`; little-endian on every machine."""
    blocks_per_shard: int
    """Blocks of every shard but the last."""
    cross_documents: bool
    tokenizer_fingerprint: str
    vocab_size: int
    pad_id: int
    num_blocks: int
    num_tokens: int
    num_targets: int
    shards: list[Shard]

    @property
    def dtype(self) -> np.dtype:
        """Type of a token on disk."""
        return np.dtype(self.token_dtype).newbyteorder("<")


def read_index(directory: str) -> tuple[Index, str]:
    """The index of a store, and the sha256 of its bytes, which names the store's content.

    Raises:
        ArtifactError: there is none, it cannot be read, or another version wrote it.
    """
    file = f"{directory}/{INDEX}"
    try:
        with open_binary(file) as handle:
            data = handle.read()
    except DataError as error:
        raise ArtifactError(
            f"{directory} holds no token store ({error}): prepare the data again"
        ) from None
    try:
        raw: dict[str, Any] = json.loads(data)
        if raw["format_version"] != FORMAT_VERSION:
            raise ArtifactError(
                f"{file} has format version {raw['format_version']}, this Altiplano reads "
                f"{FORMAT_VERSION}: prepare the data again"
            )
        raw["shards"] = [Shard(**shard) for shard in raw["shards"]]
        return Index(**raw), hashlib.sha256(data).hexdigest()
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"{file} cannot be read ({error!r}): it was edited or truncated; prepare the data again"
        ) from None


def check_sizes(directory: str, index: Index) -> None:
    """Compare the size of every shard with the index; reads none of them.

    Raises:
        ArtifactError: a shard is missing or truncated.
    """
    sizes = sizes_in(directory)
    for shard in index.shards:
        found = sizes.get(shard.name)
        if found != shard.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise ArtifactError(
                f"{directory}/{shard.name} {state}, {shard.bytes} are expected: the token store "
                f"is truncated; restore the shard, or prepare the data again"
            )
