"""A job submitted through Ray's Jobs API to a cluster of its own, as `ray job submit` does it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from altiplano.artifact import open_artifact
from tests.helpers.tiny_config import write_imported_run

RAY = Path(sys.executable).with_name("ray")
START_SECONDS, JOB_SECONDS = 90, 240


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on; another cluster may have Ray's usual ones."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Start `ray start --head` as a process group of its own; yield its dashboard's address.

    `ray stop` would end every cluster of the machine, so the group is ended instead. The library
    is not on the cluster's path: a job has to bring it.
    """
    gcs, page, client, agent = free_ports(4)
    if os.environ["RAY_AUTH_MODE"] == "token":
        subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets need a short path
    with (folder / "start.log").open("w") as log:
        head = subprocess.Popen(
            [
                RAY, "start", "--head", "--block", "--include-dashboard=true", "--num-cpus=3",
                f"--temp-dir={folder}", f"--port={gcs}", f"--dashboard-port={page}",
                f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
                "--object-store-memory=120000000",
            ],
            env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(page, head, folder / "start.log")
        yield f"http://127.0.0.1:{page}"
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"no dashboard after {START_SECONDS} s:\n{log.read_text()}")


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """Return what a job needs of a checkout, with a run's config and texts in it."""
    folder = tmp_path / "checkout"
    for name in ("jobs", "platform", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(root / name, folder / name, ignore=ignored)
    shutil.copy2(root / "pyproject.toml", folder)
    write_imported_run(folder, output=str(tmp_path / "run"), sft=None, draft=None)
    # Not the code that is installed here: seen in the manifest, it came with the job.
    machine = folder / "platform" / "altiplano" / "train" / "machine.py"
    code = machine.read_text(encoding="utf-8")
    assert "as configured" in code
    machine.write_text(code.replace("as configured", "as submitted"), encoding="utf-8")
    return folder


def test_a_submitted_job_runs_the_line_on_the_cluster(
    dashboard: str, checkout: Path, tmp_path: Path
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(dashboard)
    job = client.submit_job(
        entrypoint=f"{sys.executable} jobs/pipeline.py run.yaml --until merge",
        runtime_env={"working_dir": str(checkout)},
    )
    deadline = time.monotonic() + JOB_SECONDS
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.5)
    logs = client.get_job_logs(job)
    assert status == JobStatus.SUCCEEDED, logs
    assert "Ray: joined" in logs and "(3 CPUs)" in logs

    trained = open_artifact(tmp_path / "run" / "pretrain-lora", "adapter").manifest
    assert trained.metrics["steps"] == 2
    assert "as submitted" in trained.metrics["machine"]
    merged = open_artifact(tmp_path / "run" / "merge", "model").manifest
    assert merged.tokenizer_fingerprint == trained.tokenizer_fingerprint


def test_a_job_that_cannot_run_fails_with_its_message(dashboard: str, checkout: Path) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(dashboard)
    job = client.submit_job(
        entrypoint=f"{sys.executable} jobs/sft.py run.yaml",
        runtime_env={"working_dir": str(checkout)},
    )
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.2)
    logs = client.get_job_logs(job)
    assert status == JobStatus.FAILED
    assert "no `sft` section" in logs and "Traceback" not in logs


@pytest.mark.parametrize("name", ["pipeline", "base", "data", "draft", "evaluate", "extend",
                                  "merge", "pretrain", "sft", "tokenizer"])  # fmt: skip
def test_every_stage_has_a_file_that_finds_the_library(root: Path, name: str) -> None:
    """And reports a config that is not there as the command does."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, root / "jobs" / f"{name}.py", "nowhere.yaml"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot read the config nowhere.yaml" in done.stderr
    assert "Traceback" not in done.stderr
