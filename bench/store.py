"""Milliseconds to open a store of a billion tokens and take the batch of a step, as JSON.

Every row is a fresh process, so imports are loaded but nothing is mapped. The shards are sparse
files: no disk space is used, and pages read as zeros come from the page cache, so this measures
our work, not a disk's.

    python bench/store.py --output FILE.json
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import make_parser, write_record

from altiplano.data.tokens.order import blocks_at
from altiplano.data.tokens.store import SHARD_BYTES, TokenStore

_CHILD = "--measure"
NUM_TOKENS = 1_000_000_000
BLOCKS_PER_STEP = 64


def write_sparse_store(directory: Path, sequence_length: int) -> int:
    """A store of zeros; returns its number of blocks."""
    num_blocks = NUM_TOKENS // sequence_length
    per_shard = SHARD_BYTES // (3 * sequence_length)
    shards = []
    for number, start in enumerate(range(0, num_blocks, per_shard)):
        blocks = min(per_shard, num_blocks - start)
        name, size = f"shard-{number:05d}.bin", blocks * sequence_length * 3
        with (directory / name).open("wb") as file:
            file.truncate(size)
        shards.append({"name": name, "blocks": blocks, "bytes": size, "sha256": "0" * 64})
    index = {
        "format_version": 2, "sequence_length": sequence_length, "token_dtype": "uint16",
        "blocks_per_shard": per_shard, "cross_documents": False, "tokenizer_fingerprint": "bench",
        "vocab_size": 55_296, "pad_id": 0, "num_blocks": num_blocks,
        "num_tokens": num_blocks * sequence_length, "num_targets": 0, "shards": shards,
    }  # fmt: skip
    (directory / "index.json").write_text(json.dumps(index))
    return num_blocks


def measure(directory: str, step: int) -> dict[str, float]:
    """Open the store and take one step's batch."""
    started = time.perf_counter()
    store = TokenStore.open(directory)
    opened = time.perf_counter()
    batch = store.batch(blocks_at(store.num_blocks, BLOCKS_PER_STEP, 7, step))
    done = time.perf_counter()
    assert batch.input_ids.shape == (BLOCKS_PER_STEP, store.sequence_length)
    again = time.perf_counter()
    store.batch(blocks_at(store.num_blocks, BLOCKS_PER_STEP, 7, step + 1))
    return {
        "open_ms": round((opened - started) * 1e3, 2),
        "batch_ms": round((done - opened) * 1e3, 2),
        "next_batch_ms": round((time.perf_counter() - again) * 1e3, 2),
    }


def main() -> None:
    """Measure one row per block length and step; print and write them."""
    given = make_parser("Opening a store of a billion tokens").parse_args()
    rows = []
    for sequence_length in (512, 2048):
        with tempfile.TemporaryDirectory() as directory:
            num_blocks = write_sparse_store(Path(directory), sequence_length)
            steps_per_epoch = num_blocks // BLOCKS_PER_STEP
            for at in (0.0, 0.5, 0.999, 7.5):
                step = int(at * steps_per_epoch)
                command = [sys.executable, __file__, _CHILD, directory, str(step)]
                found = json.loads(subprocess.check_output(command))
                rows.append({"sequence_length": sequence_length, "epoch": at, "step": step} | found)
    report = {"tokens": NUM_TOKENS, "blocks_per_step": BLOCKS_PER_STEP, "rows": rows}
    print(json.dumps(report, indent=2))
    write_record(given.output, report, packages=("numpy",))


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
