"""How fast text becomes a token store, against the way of the published recipes, on the same cores.

    python bench/data.py --megabytes 7.3 128 --output FILE.json

MB are 10^6 bytes of UTF-8; 7.3 are the shared texts once, 128 show the steady state.

- `reference`: `datasets.load_dataset("text")`, a `map` with the fast tokenizer of transformers and
  a `map` that concatenates a batch of 1,000 lines into blocks and drops the rest, two processes.
- `ours`: `prepare_text` with its usual rules (NFC, invisible characters, exact duplicates, best-fit
  packing) on a local Ray cluster whose workers have run once; its start stands apart.
- `sentencepiece`: encoding alone, as lists and as arrays, on one thread and on two: the ceiling.
"""

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from data_corpus import make_tokenizer, write_corpus
from record import make_parser, write_record

from altiplano.config.data import CleanSection, DataSection, TextSource
from altiplano.data.flow.prepare import prepare_text
from altiplano.data.reading.files import CHUNK_BYTES
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.proto import MODEL_FILE

SEQUENCE_LENGTH = 512
PROCESSES = 2
PACKAGES = ("ray", "datasets", "transformers", "tokenizers", "sentencepiece", "numpy")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def main() -> None:
    """Run all three, print the numbers and write them."""
    parser = make_parser("Speed of text to token store, against datasets.map")
    parser.add_argument(
        "--megabytes", type=float, nargs="+", default=[7.3, 128], help="sizes of the corpus"
    )
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the real data")
    given = parser.parse_args()
    shared = given.shared
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_tokenizer(shared, root / "tokenizer")
        cluster = start_cluster(root, shared)
        rows = [measure(root, shared, megabytes) for megabytes in given.megabytes]
        ray.shutdown()
        report = {"rows": rows, **cluster, "sentencepiece_MB_per_s": sentencepiece_rates(root)}
    print(json.dumps(report, indent=2))
    write_record(given.output, report, packages=PACKAGES)


def start_cluster(root: Path, shared: Path) -> dict[str, float]:
    """Start it and let every worker run once; seconds of both."""
    # One more than there are, as `altiplano.cluster` starts it.
    start = timed(
        lambda: ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + 1,
            include_dashboard=False,
            object_store_memory=300 << 20,
            log_to_driver=False,
        )
    )
    write_corpus(shared, root / "first.txt", 2)
    first = timed(lambda: run_ours(root, "first.txt", chunk_bytes=1 << 18))
    return {"cluster_start_s": round(start, 1), "first_run_of_2_MB_s": round(first, 1)}


def measure(root: Path, shared: Path, megabytes: float) -> dict[str, float]:
    """Both ways on a corpus of one size."""
    size = write_corpus(shared, root / "corpus.txt", megabytes) / 1e6
    ours = timed(lambda: run_ours(root, "corpus.txt"))
    reference = timed(lambda: run_reference(root))
    return {
        "megabytes": round(size, 1),
        "ours_MB_per_s": round(size / ours, 1),
        "reference_MB_per_s": round(size / reference, 1),
        "ratio": round(reference / ours, 1),
    }


def run_ours(
    root: Path, corpus: str, chunk_bytes: int = CHUNK_BYTES, **clean: Any
) -> dict[str, Any]:
    """Prepare a corpus, with rules of `CleanSection` if any; return the metrics."""
    output, scratch = root / f"{corpus}-out", root / f"{corpus}-scratch"
    for directory in (output, scratch):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
    source = TextSource(path=str(root / corpus), language="zh", format="lines")
    rules = CleanSection(**clean)
    section = DataSection(sequence_length=SEQUENCE_LENGTH, held_out=0.0, clean=rules)
    return prepare_text(
        [source],
        None,
        str,
        root / "tokenizer",
        section=section,
        output=output,
        scratch=scratch,
        chunk_bytes=chunk_bytes,
    )


def run_reference(root: Path) -> None:
    """The published recipes' way."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"])  # ids and an attention mask of ones, as the recipes keep

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        """Join the documents of a batch and cut them into blocks."""
        blocks = {}
        for name, rows in batch.items():
            joined = list(itertools.chain.from_iterable(rows))
            end = len(joined) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
            starts = range(0, end, SEQUENCE_LENGTH)
            blocks[name] = [joined[at : at + SEQUENCE_LENGTH] for at in starts]
        return blocks | {"labels": blocks["input_ids"].copy()}

    lines = load_dataset(
        "text", data_files=str(root / "corpus.txt"), cache_dir=str(root / "cache"), split="train"
    )
    tokens = lines.map(tokenize, batched=True, num_proc=PROCESSES, remove_columns=["text"])
    tokens.map(group, batched=True, num_proc=PROCESSES)


def sentencepiece_rates(root: Path) -> dict[str, float]:
    """MB per second of the encoder alone, by result and number of threads."""
    processor = Vocabulary(root / "tokenizer" / MODEL_FILE)
    texts = (root / "corpus.txt").read_text(encoding="utf-8").splitlines()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ways: dict[str, Callable[..., Any]] = {
        "lists": processor.encode_batch,
        "arrays": processor.encode_flat,
    }
    return {
        f"{name}_{threads}_threads": round(
            megabytes / timed(lambda way=way, n=threads: way(texts, num_threads=n)), 1
        )
        for name, way in ways.items()
        for threads in (1, PROCESSES)
    }


def timed(work: Callable[[], Any]) -> float:
    """Seconds that something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
