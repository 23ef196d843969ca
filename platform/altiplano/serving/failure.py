"""Why a deployment failed, in one sentence: the error a traceback ends with, and the engine's own.

Knows how Ray Serve and vLLM word their failures, not what was deployed. Reads the newest worker
logs of this machine, and only after a failure.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.serving.engine.arguments import explain_shortage

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

_SESSIONS = Path("/tmp/ray")
"""Where Ray keeps a folder per cluster, unless it was started with --temp-dir."""

_ERROR = re.compile(r"(?:[\w.]+\.)?(\w+(?:Error|Exception): .*)")
_MAX_CHARACTERS = 600


def log_folder() -> Path:
    """Folder of the connected cluster's logs on this machine."""
    import ray

    return _SESSIONS / ray.get_runtime_context().get_session_name() / "logs"


def describe_failure(application: "ApplicationStatusOverview", since: float, logs: Path) -> str:
    """What the deployments that are not healthy say, and what the engine said before it died.

    Args:
        application: from `serve.status()`.
        since: when the start began, in seconds since the epoch; older logs are another's.
        logs: folder of Ray's worker logs.
    """
    told = [
        f"{name} is {deployment.status.value}: {last_error(deployment.message)}"
        for name, deployment in application.deployments.items()
        if deployment.status != "HEALTHY" and (deployment.message or not application.message)
    ]
    if engine := engine_error(since, logs):
        told.append(f"the engine said: {engine}")
    return "\n".join(told) or last_error(application.message)


def last_error(message: str) -> str:
    """The last error of a traceback and the lines after it; of other text, its beginning."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    words = " ".join(lines[starts[-1] :] if starts else lines)
    return words[:_MAX_CHARACTERS] or "no reason given"


def engine_error(since: float, logs: Path) -> str | None:
    """The last error a vLLM engine process wrote on this machine.

    Serve is only told that the engine failed; the cause is in the log of the replica's worker.
    """
    for file in logs.glob("worker-*.err"):
        if file.stat().st_mtime < since:
            continue
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        engine = [line for line in lines if line.startswith("(EngineCore")]
        errors = [found[1] for line in engine if (found := _ERROR.search(line))]
        if errors:
            return explain_shortage("\n".join(engine)) or errors[-1][:_MAX_CHARACTERS]
    return None
