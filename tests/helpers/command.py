"""The `altiplano` command as a process of its own, as users start it: signals, exit codes, output.

It runs with a home directory of its own and Ray's default authentication, on its own local cluster.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Command:
    """A started command; `log` is what it has printed so far, both streams together."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self._file = folder / "command.log"
        home = folder / "home"
        home.mkdir(exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
        with self._file.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "altiplano.cli", *map(str, arguments)],
                env={**environment, "HOME": str(home), "COLUMNS": "200"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._file.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], bool], seconds: float = 150) -> None:
        """Wait for something to become true while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, f"the command ended early:\n{self.log}"
            assert time.monotonic() < deadline, f"nothing came of it:\n{self.log}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Send what Ctrl-C in a terminal sends: SIGINT to the whole process group."""
        os.killpg(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End the command without asking; its cluster sees that it is gone."""
        self._process.kill()
        self._process.wait()

    def exit_code(self, seconds: float = 150) -> int:
        """Wait for the end."""
        return self._process.wait(timeout=seconds)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=60)
