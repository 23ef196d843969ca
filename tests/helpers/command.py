"""The `altiplano` command as users start it: in this process, or as a process of its own.

The process has a home directory of its own and Ray's default authentication, on its own local
cluster.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner, Result

from altiplano.cli import app


def altiplano(*arguments: object) -> Result:
    """Run one command in this process."""
    wide = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1"}
    return CliRunner(env=wide).invoke(app, [str(word) for word in arguments])


def refusal(*arguments: object) -> str:
    """What a command that must fail says: one message and no traceback."""
    result = altiplano(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "Traceback" not in result.output, result.output
    return result.stderr


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
