"""Benches that nobody runs every day still run: the one for GPUs, tiny and on a CPU."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_gpu_bench_runs_on_a_cpu(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    script = [sys.executable, "bench/gpu_training.py", "--shape", "tiny", "--device", "cpu"]
    done = subprocess.run(
        [*script, "--output", str(output)], cwd=root, timeout=200, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads(output.read_text())
    assert "tokens_per_s" in json.dumps(numbers) and numbers["versions"]["torch"]
