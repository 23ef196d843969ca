"""Resolve pyproject.toml into the pinned lists `requirements/cpu.txt` and `requirements/dev.txt`.

Each given interpreter's pip resolves the same requirements (a dry run: nothing is installed); the
second one must agree with the first, so that one list serves both Python versions. A package that
only one of them needs gets a `python_version` marker. The lists hold names and versions, never an
address. The rules (what goes in without its dependencies, what is left out) are declared in
pyproject.toml under `[tool.altiplano.lock]`.

It does not know which package index is in use: pip's own configuration decides. The lists are for
Linux on x86-64, where they are made. Costs minutes and, where pip offers torch's CUDA build,
gigabytes of download.

    python tools/lock.py python3.11 python3.12
"""

import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "# Made by `make lock` from pyproject.toml: do not edit. Linux x86-64, Python 3.11 and 3.12.\n"
    "# Install with --no-deps and torch first, as the Makefile does.\n"
)
Pins = dict[str, str]


def canonical(requirement: str) -> str:
    """Return the normalised project name a requirement line starts with (PEP 503)."""
    found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement.strip())
    assert found, f"not a requirement: {requirement!r}"
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def pip_report(python: str, arguments: list[str], constraints: list[str]) -> list[dict[str, Any]]:
    """Return what `python -m pip install` would install, one metadata record per project.

    Raises `subprocess.CalledProcessError` when pip finds no solution (pip says why on stderr).
    """
    with tempfile.TemporaryDirectory() as scratch:
        report, limits = Path(scratch, "report.json"), Path(scratch, "constraints.txt")
        limits.write_text("\n".join(constraints) + "\n")
        command = [python, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(limits), *arguments]
        subprocess.run(command, check=True)
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def resolve(python: str, wanted: list[str], rules: dict[str, Any], known: Pins) -> Pins:
    """Return `{project: version}` for `wanted`, keeping the versions in `known`."""
    excluded = [fnmatch.translate(pattern) for pattern in rules["exclude"]]
    bare = [line for line in wanted if canonical(line) in rules["without-dependencies"]]
    constraints = rules["constraints"] + [f"{name}=={version}" for name, version in known.items()]
    pins: Pins = {}
    requirements = [line for line in wanted if line not in bare]
    for metadata in pip_report(python, ["--no-deps", *bare], constraints) if bare else []:
        pins[canonical(metadata["name"])] = metadata["version"]
        # `torch==2.13.0+cpu` would forbid a CUDA build; pyproject.toml states the version itself.
        requirements += [
            line
            for line in metadata["requires_dist"]
            if "extra ==" not in line and canonical(line) != "torch"
        ]
    requirements = [
        line for line in requirements if not any(re.match(p, canonical(line)) for p in excluded)
    ]
    for metadata in pip_report(python, requirements, constraints):
        name = canonical(metadata["name"])
        if not any(re.match(pattern, name) for pattern in excluded):
            pins[name] = metadata["version"].partition("+")[0]
    return pins


def combine(per_python: dict[str, Pins]) -> dict[str, str]:
    """Return `{project: list line}` for the pins of each Python version, oldest first."""
    versions = list(per_python)
    lines: dict[str, str] = {}
    for name in sorted(set().union(*per_python.values())):
        having = [version for version in versions if name in per_python[version]]
        pins = {per_python[version][name] for version in having}
        assert len(pins) == 1, f"{name}: {pins} for Python {having}, although constrained"
        marker = ""
        if having != versions:
            wanted_by = " or ".join(f'python_version == "{version}"' for version in having)
            marker = f" ; {wanted_by}"
        lines[name] = f"{name}=={pins.pop()}{marker}"
    return lines


def python_version(python: str) -> str:
    """Return `major.minor` of an interpreter."""
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(pythons: list[str]) -> None:
    """Write both lists, resolved by each of `pythons` (commands or paths)."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, rules = pyproject["project"], pyproject["tool"]["altiplano"]["lock"]
    runtime = project["dependencies"] + project["optional-dependencies"]["cpu"]
    everything = runtime + project["optional-dependencies"]["dev"]
    cpu: dict[str, Pins] = {}
    dev: dict[str, Pins] = {}
    known: Pins = {}
    for version, python in sorted((python_version(python), python) for python in pythons):
        print(f"Python {version}: resolving", flush=True)
        cpu[version] = resolve(python, runtime, rules, known)
        known |= cpu[version]
        dev[version] = resolve(python, everything, rules, known)
        known |= dev[version]
    runtime_lines = combine(cpu)
    dev_lines = {n: line for n, line in combine(dev).items() if n not in runtime_lines}
    for name, lines in (("cpu", runtime_lines), ("dev", dev_lines)):
        path = ROOT / "requirements" / f"{name}.txt"
        path.write_text(HEADER + "\n".join(lines.values()) + "\n")
        print(f"{path.relative_to(ROOT)}: {len(lines)} packages")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: lock.py PYTHON...  (one interpreter for each supported Python version)")
    main(sys.argv[1:])
