"""Join the Ray cluster that was asked for, or start a local one.

`--address`, then RAY_ADDRESS, then `cluster.address` name a running cluster; otherwise a local one
is started and ended with the command. On a joined cluster the workers get this very package, so
driver and workers never run different code. Costs 3 to 6 seconds for a local cluster.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from altiplano.config.cluster import ClusterSection
from altiplano.console import console
from altiplano.errors import AltiplanoError

PACKAGE = Path(__file__).resolve().parent

_QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@contextmanager
def connect(section: ClusterSection, address: str | None = None) -> Iterator[None]:
    """Connect for the time of the block.

    Args:
        address: from the command line; comes before RAY_ADDRESS and the config.

    Raises:
        AltiplanoError: the cluster that was named cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not Path("/dev/nvidiactl").exists():
        # DeepSpeed, which accelerate imports where it is installed, else warns about every CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    target = address or os.environ.get("RAY_ADDRESS") or section.address
    try:
        info = ray.init(**_join(target) if target else _start(section))
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        where = f"the Ray cluster at {target}" if target else "a local Ray cluster"
        raise AltiplanoError(f"cannot connect to {where}: {error}; check --address") from None
    _say(info, target)
    try:
        yield
    finally:
        ray.shutdown()


def _join(target: str) -> dict[str, Any]:
    variables = {name: value for name, value in _QUIET.items() if not name.startswith("RAY_")}
    return {
        "address": target,
        "runtime_env": {"py_modules": [str(PACKAGE)], "env_vars": variables},
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }


def _start(section: ClusterSection) -> dict[str, Any]:
    # Workers inherit the environment; a checkout that is not installed is found this way.
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return {
        "address": "local",
        # One more than there are, so that data tasks and Serve find a place beside training.
        "num_cpus": (os.cpu_count() or 1) + 1,
        "object_store_memory": section.object_store_mib << 20,
        "include_dashboard": section.dashboard,
        "dashboard_host": "127.0.0.1",
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }


def _say(info: Any, target: str | None) -> None:
    resources = _resources()
    origin = f"joined {target}" if target else "started a local cluster"
    page = f"; dashboard http://{info.dashboard_url}" if info.dashboard_url else ""
    console.log(f"Ray: {origin} ({resources}){page}")


def _resources() -> str:
    import ray

    have = ray.cluster_resources()
    gpus = f", {have['GPU']:g} GPUs" if have.get("GPU") else ""
    return f"{have.get('CPU', 0):g} CPUs{gpus}"
