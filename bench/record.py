"""What every script here writes: its numbers, and on what they were measured.

Scripts are run as `python bench/NAME.py --output FILE.json` from the project's root. None of them
is a test: times depend on the machine, so nothing is asserted about them.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the option that all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return parser


def write_record(output: Path, numbers: dict[str, Any], *, packages: tuple[str, ...]) -> None:
    """Write numbers, command, versions and machine as JSON."""
    record = {
        "command": ["python", *sys.argv],
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        **numbers,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written: {output}")
