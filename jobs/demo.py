"""The demo: run configs/demo.yaml, serve the result, ask it questions over HTTP, stop.

KEEP=1 keeps the service up until Ctrl-C.
Usage: python jobs/demo.py [CONFIG] [section.key=value ...]
"""

import os
import sys
from pathlib import Path

import _start  # noqa: F401 - puts platform/ on the path

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"

if __name__ == "__main__":
    from altiplano.cli import user_errors
    from altiplano.demo import run_demo

    arguments = sys.argv[1:]
    config = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else CONFIG
    with user_errors():
        run_demo(config, arguments, keep=os.environ.get("KEEP") == "1")
