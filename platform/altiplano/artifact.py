"""Artifacts: directories with a manifest, the only thing that passes between stages.

A stage writes `NAME.partial` beside the final place and renames it once the manifest, with every
file's sha256 and size, is inside; so a directory that has a manifest is whole or was edited, and
`open_artifact` tells which. Two parts are combined only through `require_same_tokenizer`.
Knows fingerprints, not models or tokenizers. Opening costs one read of the files
(about 1.5 GB/s).
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from altiplano.errors import ArtifactError, MismatchError
from altiplano.storage import sha256_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOGS = "logs"
"""Folder inside an artifact for curves and logs: checked, but no part of its fingerprint."""

_REPORTED_PACKAGES = (
    "altiplano", "torch", "transformers", "peft", "ray", "sentencepiece", "tokenizers",
)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """What a stage read."""

    path: str
    fingerprint: str


@dataclass
class Manifest:
    """What an artifact is, what it was made from and what it holds."""

    kind: str
    """`tokenizer`, `model`, `adapter`, `tokens`, `report`, `world`."""
    stage: str
    """Name of the stage that wrote it."""
    section: dict[str, Any]
    """The resolved settings the stage read."""
    inputs: dict[str, Input]
    """What it read, by role."""
    tokenizer_fingerprint: str | None = None
    weights_fingerprint: str | None = None
    vocab_old: int | None = None
    """Pieces of the base vocabulary: rows below are the base's."""
    vocab_new: int | None = None
    """Pieces now."""
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative path -> {"sha256", "bytes"}."""
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Hash of the content: kind and files, without logs."""
        content = {k: v["sha256"] for k, v in self.files.items() if not k.startswith(LOGS + "/")}
        return hash_json({"kind": self.kind, "files": content})


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def as_input(self) -> Input:
        """How a later stage records that it read this; by name, so that a run can be moved."""
        return Input(self.path.name, self.manifest.fingerprint)


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def write_artifact(final: Path, manifest: Manifest) -> Iterator[Path]:
    """Write an artifact beside its final place; rename it when the block ends without error.

    The block fills the yielded directory and the manifest's fingerprints and metrics. On an error
    the half-written directory is removed and an earlier artifact stays as it was.
    """
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.monotonic()
    try:
        yield partial
        manifest.seconds = manifest.seconds or round(time.monotonic() - started, 2)
        manifest.files = _describe_files(partial)
        manifest.versions = _installed_versions()
        (partial / MANIFEST).write_text(
            json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        _replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_artifact(path: Path, kind: str | None = None) -> Artifact:
    """Open a finished artifact and check every file against the manifest.

    Args:
        path: its directory.
        kind: the kind it must be of, if the caller needs one.

    Raises:
        ArtifactError: missing, half-written, truncated, edited or of another kind.
    """
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} is an artifact of kind {manifest.kind}, {kind} is needed")
    problems = _compare_files(path, manifest)
    if problems:
        raise ArtifactError(
            f"{path} is not what stage {manifest.stage} wrote: {'; '.join(problems[:5])}; "
            f"restore it, or delete the directory and run the stage again"
        )
    return Artifact(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest without checking the files it lists.

    Raises:
        ArtifactError: there is none, or it cannot be read.
    """
    file = path / MANIFEST
    if not file.is_file():
        partial = path.with_name(path.name + ".partial")
        hint = f" ({partial.name} is half-written)" if partial.exists() else ""
        state = "has no manifest.json" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {state}{hint}: run the stage that makes it")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        found = raw.get("format_version")
        if found != FORMAT_VERSION:
            raise ArtifactError(
                f"{file} has format version {found}, this Altiplano reads {FORMAT_VERSION}: "
                f"run the stage again"
            )
        raw["inputs"] = {role: Input(**item) for role, item in raw["inputs"].items()}
        return Manifest(**raw)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"{file} cannot be read ({error}): it was edited or truncated; "
            f"delete {path} and run its stage again"
        ) from None


def require_same_tokenizer(left: tuple[str, Manifest], right: tuple[str, Manifest]) -> None:
    """Refuse two parts whose tokenizers differ, before any weight is loaded.

    Args:
        left, right: (what and where, its manifest), for instance ("adapter runs/a/sft", m).

    Raises:
        MismatchError: names both sides, fingerprints, sizes and the command that mends it.
    """
    (name_a, a), (name_b, b) = left, right
    if a.tokenizer_fingerprint is not None and a.tokenizer_fingerprint == b.tokenizer_fingerprint:
        return
    raise MismatchError(
        f"{name_a} and {name_b} do not belong together:\n"
        f"  {name_a}: tokenizer {_short(a.tokenizer_fingerprint)}, {a.vocab_new} pieces\n"
        f"  {name_b}: tokenizer {_short(b.tokenizer_fingerprint)}, {b.vocab_new} pieces\n"
        f"make both from one tokenizer: `altiplano run CONFIG --from extend`"
    )


def require_same_weights(adapter: tuple[str, Manifest], base: tuple[str, Manifest]) -> None:
    """Refuse an adapter on a model other than the one it was trained on.

    Raises:
        MismatchError: names both sides and their fingerprints.
    """
    (name_a, a), (name_b, b) = adapter, base
    trained_on = a.metrics.get("base_weights_fingerprint")
    if trained_on == b.weights_fingerprint:
        return
    raise MismatchError(
        f"{name_a} was not trained on {name_b}:\n"
        f"  {name_a}: trained on weights {_short(trained_on)}\n"
        f"  {name_b}: weights {_short(b.weights_fingerprint)}\n"
        f"give the model it was trained on, or train it again: "
        f"`altiplano run CONFIG --from {a.stage}`"
    )


def _short(fingerprint: str | None) -> str:
    return fingerprint[:16] if fingerprint else "(none)"


def _describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {
        str(p.relative_to(directory)): {"sha256": sha256_of(p), "bytes": p.stat().st_size}
        for p in files
    }


def _compare_files(path: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif (size := file.stat().st_size) != expected["bytes"]:
            problems.append(f"{name} has {size} bytes, expected {expected['bytes']}")
        elif sha256_of(file) != expected["sha256"]:
            problems.append(f"{name} was changed")
    return problems


def _replace(partial: Path, final: Path) -> None:
    """Put the new directory in place; the old one goes only once the new one is there."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _installed_versions() -> dict[str, str]:
    found = {}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
