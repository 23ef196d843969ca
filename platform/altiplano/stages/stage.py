"""What a stage is, whether it is up to date, and how one is executed.

A stage is up to date when its artifact is whole and was made from the same section and the same
inputs. Knows artifacts and sections, not what any stage does. Checking reads every file of the
artifact and every source file once.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altiplano.artifact import (
    Artifact,
    Input,
    Manifest,
    hash_json,
    open_artifact,
    write_artifact,
)
from altiplano.config import Project
from altiplano.console import console, simple_table
from altiplano.errors import ArtifactError, DataError
from altiplano.storage import delete_folder, expand, identity_of


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: its artifact's directory below the run's output.
        verb: the command it belongs to (`pretrain`, `data` ...).
        kind: the artifact's kind.
        section: resolved settings it depends on.
        needs: role -> name of the stage whose artifact it reads.
        files: source files it reads, as written in the config.
        run: does the work.
        version: raised when the code changes what a section means.
    """

    name: str
    verb: str
    kind: str
    section: dict[str, Any]
    run: Callable[["Work"], None]
    needs: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    version: int = 1


@dataclass
class Work:
    """What a running stage has at hand."""

    project: Project
    stage: Stage
    inputs: dict[str, Artifact]
    output: Path
    """Directory to fill; renamed to its final place when the stage ends well."""
    manifest: Manifest
    """Fingerprints, vocabulary sizes and metrics are the stage's to fill."""
    run_key: str
    """Hash of section and inputs."""
    spent: list[Path | str] = field(default_factory=list)
    """Folders, or fsspec URLs of some, to delete once the artifact is in place: until then they can
    make it again."""

    def path(self, role: str) -> Path:
        """Directory of an input artifact."""
        return self.inputs[role].path

    def roles(self, prefix: str) -> list[Artifact]:
        """Input artifacts whose role starts with a prefix, in order of their number."""
        names = [role for role in self.inputs if role.startswith(prefix)]
        return [self.inputs[r] for r in sorted(names, key=lambda r: int(r.rsplit("-", 1)[1]))]


@dataclass(frozen=True)
class Status:
    """Whether a stage must run, and why."""

    current: bool
    reason: str


def artifact_path(project: Project, name: str) -> Path:
    """Where a stage's artifact lies."""
    return project.output / name


def stage_status(project: Project, stage: Stage, changed: set[str]) -> Status:
    """Compare a stage with its artifact on disk.

    Args:
        changed: names of earlier stages that will run, so that this one must too.
    """
    if upstream := sorted(changed & set(stage.needs.values())):
        return Status(False, f"{upstream[0]} runs")
    path = artifact_path(project, stage.name)
    if not path.exists():
        return Status(False, "not made yet")
    try:
        found = open_artifact(path, stage.kind).manifest
        wanted = _gather_inputs(project, stage)
    except (ArtifactError, DataError) as error:
        return Status(False, str(error).splitlines()[0])
    if found.section != _section(stage):
        return Status(False, f"changed: {', '.join(_differences(found.section, _section(stage)))}")
    stale = [r for r in wanted if _fingerprint(found.inputs.get(r)) != wanted[r].fingerprint]
    if stale or set(found.inputs) != set(wanted):
        names = stale or sorted(set(found.inputs) ^ set(wanted))
        return Status(False, f"input changed: {names[0]}")
    return Status(True, "up to date")


def execute(project: Project, stage: Stage) -> Artifact:
    """Run one stage and write its artifact.

    Raises:
        AltiplanoError: an input is missing or broken, or the stage refused to go on.
    """
    final = artifact_path(project, stage.name)
    artifacts = {
        role: open_artifact(artifact_path(project, name)) for role, name in stage.needs.items()
    }
    inputs = {role: artifact.as_input for role, artifact in artifacts.items()}
    inputs.update(_file_inputs(project, stage))
    section = _section(stage)
    manifest = Manifest(stage.kind, stage.name, section, inputs)
    key = hash_json({"section": section, "inputs": {r: i.fingerprint for r, i in inputs.items()}})
    console.rule(f"[bold]{stage.name}", align="left")
    started = time.monotonic()
    with write_artifact(final, manifest) as output:
        work = Work(project, stage, artifacts, output, manifest, key)
        stage.run(work)
        manifest.seconds = round(time.monotonic() - started, 2)
    for folder in work.spent:
        delete_folder(str(folder))
    _summarise(manifest, final)
    return Artifact(final, manifest)


def _section(stage: Stage) -> dict[str, Any]:
    return {**stage.section, "stage_version": stage.version}


def _gather_inputs(project: Project, stage: Stage) -> dict[str, Input]:
    inputs = {
        role: open_artifact(artifact_path(project, name)).as_input
        for role, name in stage.needs.items()
    }
    return inputs | _file_inputs(project, stage)


def _file_inputs(project: Project, stage: Stage) -> dict[str, Input]:
    """Every source file with what tells whether it changed."""
    found = {}
    for written in stage.files:
        files = expand(project.resolve(written))
        shared = os.path.commonpath(files) if len(files) > 1 else ""
        for file in files:
            role = f"{written}#{os.path.relpath(file, shared)}" if shared else written
            found[f"file:{role}"] = Input(written, identity_of(file))
    return found


def _fingerprint(item: Input | None) -> str | None:
    return item.fingerprint if item else None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return sorted(key for key in {*old, *new} if old.get(key) != new.get(key))[:4]


def _summarise(manifest: Manifest, path: Path) -> None:
    """One table at the end of a stage."""
    rows = [(name, _shown(value)) for name, value in manifest.metrics.items()]
    rows = [(name, value) for name, value in rows if not _is_nested(value)]
    rows.append(("seconds", manifest.seconds))
    rows.append(("artifact", str(path)))
    console.print(simple_table(manifest.stage, ("", "value"), rows))


def _shown(value: object) -> object:
    """Counts by reason as one line; what holds more stays as it is."""
    if isinstance(value, dict) and all(isinstance(count, int) for count in value.values()):
        return ", ".join(f"{name} {count:,}" for name, count in value.items()) or "none"
    return value


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list) or (isinstance(value, str) and len(value) > 60)
