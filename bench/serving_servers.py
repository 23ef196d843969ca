"""The servers the benches compare, each started alone in processes of its own and ended whole.

- `vllm_alone`: vLLM's own API server, nothing before it.
- `ray_serve_llm`: Ray's own LLM service at its fastest: direct streaming, HAProxy, one ingress.
- `altiplano`: ours as `altiplano serve` starts it, with keys, limits and metrics on.

All get the same engine arguments. Knows command lines and processes, not what is measured.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from serving_models import ROOT

MAX_SEQUENCES = 64
KV_CACHE_BYTES = 512 << 20
ONE_PROCESS = (
    "--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor",
)  # fmt: skip
"""Makes vLLM's server run scheduler and model in one process, on one thread, as ours does."""
_START_S = 240.0
_STOP_S = 40.0
_NAME = "bench"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING",
    "RAY_metrics_report_interval_ms": "1000",
}  # fmt: skip
_FAST_RAY = {
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """What all servers are told of the engine."""

    dtype: str = "bfloat16"
    max_model_len: int = 1024


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    model: str
    startup_s: float
    process: "subprocess.Popen[bytes]" = field(repr=False)
    key: str | None = None

    def usage(self) -> dict[str, float]:
        """Memory of all its processes (shared pages counted once, MB) and CPU seconds so far."""
        pss, cpu = 0, 0.0
        for each in _family(self.process.pid):
            try:
                pss += each.memory_full_info().pss
                times = each.cpu_times()
                cpu += times.user + times.system
            except psutil.Error:
                continue
        return {"memory_MB": pss / 1e6, "cpu_s": cpu}

    def counters(self) -> dict[str, float]:
        """Its `/metrics`, summed over replicas and tags; empty where the server has no such route.

        Histograms give `NAME_sum` and `NAME_count`.
        """
        from prometheus_client.parser import text_string_to_metric_families

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        answer = httpx.get(f"{self.url}/metrics", headers=headers, timeout=20, trust_env=False)
        total: dict[str, float] = {}
        if answer.is_success:
            for family in text_string_to_metric_families(answer.text):
                for sample in family.samples:
                    if not sample.name.endswith("_bucket"):
                        total[sample.name] = total.get(sample.name, 0.0) + sample.value
        return total


@contextmanager
def vllm_alone(model: Path, engine: Engine, log: Path, *extra: str) -> Iterator[Server]:
    """vLLM's API server; `extra` are further arguments of its command line."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", _NAME, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", engine.dtype, "--max-model-len", str(engine.max_model_len), "--enforce-eager",
        "--max-num-seqs", str(MAX_SEQUENCES), "--kv-cache-memory-bytes", str(KV_CACHE_BYTES),
        "--disable-uvicorn-access-log", *extra,
    ]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1"} if ONE_PROCESS[0] in extra else {}
    with _running(command, variables, port, log) as server:
        yield server


@contextmanager
def vllm_with_draft(model: Path, draft: Path, engine: Engine, log: Path) -> Iterator[Server]:
    """The same with vLLM's own `draft_model` speculation of four tokens."""
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 4}
    with vllm_alone(model, engine, log, "--speculative-config", json.dumps(speculation)) as server:
        yield server


@contextmanager
def ray_serve_llm(model: Path, engine: Engine, log: Path) -> Iterator[Server]:
    """`ray.serve.llm`, see `serving_rayllm.py`."""
    port = free_port()
    script = str(Path(__file__).with_name("serving_rayllm.py"))
    command = [
        sys.executable, script, str(model), _NAME, str(port), engine.dtype,
        str(engine.max_model_len), str(MAX_SEQUENCES), str(KV_CACHE_BYTES),
    ]  # fmt: skip
    with _running(command, _FAST_RAY, port, log) as server:
        yield server


@contextmanager
def altiplano(model: Path, engine: Engine, log: Path, *overrides: str) -> Iterator[Server]:
    """Our service with an API key asked for; `overrides` are further `serve.` keys."""
    from altiplano.serving.front.keys import add_key

    port = free_port()
    keys = log.with_suffix(".keys")
    keys.unlink(missing_ok=True)
    key = add_key(keys, "bench", admin=True, requests_per_minute=10**6, tokens_per_minute=10**9)
    settings = {
        "port": port, "model_name": _NAME, "dtype": engine.dtype, "keys.file": keys.resolve(),
        "max_model_len": engine.max_model_len, "max_ongoing_requests": MAX_SEQUENCES,
        "kv_cache_gib": KV_CACHE_BYTES / 2**30, "enforce_eager": "true",
    }  # fmt: skip
    given = [f"serve.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "altiplano.cli", "serve", str(model), *given, *overrides]
    with _running(command, {}, port, log, key) as server:
        yield server


@contextmanager
def _running(
    command: list[str], variables: dict[str, str], port: int, log: Path, key: str | None = None
) -> Iterator[Server]:
    """Start a command, wait until its port answers, and end it with all its children."""
    environment = {**os.environ, **_ENVIRONMENT, **variables}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url, key, log)
        yield Server(url, _NAME, round(time.monotonic() - started, 1), process, key)
    finally:
        end(process)


def _wait_until_ready(
    process: "subprocess.Popen[bytes]", url: str, key: str | None, log: Path
) -> None:
    """Until one token was answered.

    Raises:
        RuntimeError: the server ended or does not answer; with the last words of its log.
    """
    body = {"model": _NAME, "prompt": "a", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    deadline = time.monotonic() + _START_S
    with httpx.Client(timeout=30, trust_env=False, headers=headers) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.post(f"{url}/v1/completions", json=body).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
    raise RuntimeError(f"no server at {url}: {log.read_text('utf-8', 'replace')[-1500:]}")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ctrl-C, then what is left of it is killed."""
    family = _family(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for each in alive:
        each.kill()


def _family(pid: int) -> list[psutil.Process]:
    """A process and all its children, or none if it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
