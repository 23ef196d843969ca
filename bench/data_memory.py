"""Peak memory of preparing text, for a corpus and one ten times as large: it should not grow.

    python bench/data_memory.py --megabytes 200 --output FILE.json

Exact duplicates are known by a table of some 16 bytes per document (twice that while it grows);
`--duplicates keep` shows the rest.

For both corpora the peak resident memory, in MiB, of the driver and of the largest worker, sampled.
Mapped files count as resident while they are read, so `USS` (unique, not shared) stands beside it.
"""

import json
import os
import tempfile
import threading
from pathlib import Path

import psutil
import ray
from data import PACKAGES, SHARED, run_ours
from data_corpus import make_tokenizer, write_corpus
from record import make_parser, write_record

_SAMPLE_S = 0.1
_MIB = 1 << 20


class Sampler(threading.Thread):
    """Remembers the most memory that the driver and any worker had; a context manager."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self.peaks: dict[str, float] = {}

    def run(self) -> None:
        """Sample until the block ends."""
        while not self._done.wait(_SAMPLE_S):
            driver = psutil.Process()
            self._note("driver", driver)
            for process in driver.children(recursive=True):
                self._note("worker", process)

    def _note(self, role: str, process: psutil.Process) -> None:
        try:
            if role == "worker" and not process.name().startswith("ray::"):
                return
            memory = process.memory_full_info()
        except psutil.Error:
            return
        for kind, size in (("rss", memory.rss), ("uss", memory.uss)):
            key = f"{role}_{kind}_MiB"
            self.peaks[key] = max(self.peaks.get(key, 0), round(size / _MIB, 1))

    def __enter__(self) -> "Sampler":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join()


def main() -> None:
    """Measure both corpora, print the numbers and write them."""
    parser = make_parser("Peak memory of preparing text, at two sizes")
    parser.add_argument("--megabytes", type=float, default=200, help="size of the smaller corpus")
    parser.add_argument("--duplicates", default="exact", help="as in data.clean.duplicates")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the real data")
    given = parser.parse_args()
    shared = given.shared
    report = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_tokenizer(shared, root / "tokenizer")
        ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + 1,
            include_dashboard=False,
            object_store_memory=300 * _MIB,
            log_to_driver=False,
        )
        for size in (given.megabytes, 10 * given.megabytes):
            corpus = f"corpus-{size:g}.txt"
            write_corpus(shared, root / corpus, size)
            with Sampler() as sampler:
                run_ours(root, corpus, duplicates=given.duplicates)
            report[f"{size:g} MB"] = sampler.peaks
        ray.shutdown()
    print(json.dumps(report, indent=2))
    write_record(given.output, report, packages=PACKAGES)


if __name__ == "__main__":
    main()
