"""Find the model and the draft of a run, and refuse what cannot be served.

Everything here happens before a weight is loaded or Ray is touched. Knows artifacts and
config.json, not Ray. Costs one read of the files (their hashes are compared with the manifests).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altiplano.artifact import MANIFEST, Manifest, open_artifact, require_same_tokenizer
from altiplano.config.serving import EngineSettings, ModelSettings, ServeSection
from altiplano.errors import ArtifactError, MismatchError, ServeError
from altiplano.model.load import PIECES, read_config, weight_files
from altiplano.serving.engine.base import CPU_HEAD_SIZES

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Part:
    """One model of the service, found on disk."""

    entry: ModelSettings
    """Its settings."""
    model_dir: Path
    """Hugging Face model directory with its tokenizer, readable from every node."""
    draft_dir: Path | None
    """The draft that speculates for it; None serves it plainly."""


def find_parts(section: ServeSection, path: Path | None) -> list[Part]:
    """Every model of the service with its draft, checked.

    Args:
        section: the `serve` section.
        path: the run or model that `serve.model_name` names; None serves only `serve.models`.

    Raises:
        ServeError: there is no model at a path, or nothing to serve at all.
        ArtifactError, MismatchError: as `check_parts`.
    """
    entries = section.entries(None if path is None else str(path))
    if not entries:
        raise ServeError("nothing to serve: name a run or a model directory, or set `serve.models`")
    parts = []
    for entry in entries:
        model_dir, draft_dir = find_directories(Path(entry.path))
        if entry.draft_path is not None:
            draft_dir = find_directories(Path(entry.draft_path))[0]
        if entry.draft.placement == "none" or entry.task == "embed":
            draft_dir = None
        check_parts(entry, model_dir, draft_dir)
        parts.append(Part(entry, model_dir, draft_dir))
    return parts


def find_directories(path: Path) -> tuple[Path, Path | None]:
    """The model to serve and the draft that speculates for it.

    Args:
        path: a finished run (holds `merge/` and maybe `draft/`), a model artifact, or a Hugging
            Face model directory.

    Returns:
        Absolute model directory, and draft directory or None.

    Raises:
        ServeError: there is no model at that path.
    """
    path = path.resolve()
    if (path / "merge" / MANIFEST).is_file():
        draft = path / "draft"
        return path / "merge", draft if (draft / MANIFEST).is_file() else None
    if (path / MANIFEST).is_file() or (path / "config.json").is_file():
        return path, None
    if not path.is_dir():
        raise ServeError(
            f"{path} does not exist: give a finished run, a model artifact, or a Hugging Face "
            f"model directory"
        )
    raise ServeError(
        f"{path} holds no model to serve: a finished run has a merge/ folder, a model directory a "
        f"config.json; `altiplano run CONFIG --until merge` makes one"
    )


def check_parts(section: EngineSettings, model_dir: Path, draft_dir: Path | None = None) -> None:
    """Refuse a model, or a pair of model and draft, that the engine could not serve rightly.

    Raises:
        ArtifactError: an artifact is of the wrong kind, half-written, truncated or edited.
        MismatchError: the draft's vocabulary is not the model's.
        ServeError: no safetensors, no tokenizer, a head size or context the engine cannot serve.
    """
    manifest = _check_model("model", model_dir, section)
    config = read_config(model_dir)
    context = config.get("max_position_embeddings")
    if section.max_model_len and context and section.max_model_len > context:
        raise ServeError(
            f"serve.max_model_len is {section.max_model_len}, but the model {model_dir} was made "
            f"for {context} tokens: set serve.max_model_len to at most {context}"
        )
    if draft_dir is not None and section.draft.placement != "none":
        if section.max_adapters:
            raise ServeError(
                f"max_adapters is {section.max_adapters}, and the draft {draft_dir} would "
                f"speculate: vLLM does not combine adapters and speculation; set "
                f"draft.placement=none, or max_adapters=0"
            )
        draft_manifest = _check_model("draft", draft_dir, section)
        _check_pair((model_dir, manifest, config), (draft_dir, draft_manifest))


def _check_model(role: str, directory: Path, section: EngineSettings) -> Manifest | None:
    manifest = _open(role, directory)
    if not list(directory.glob("*.safetensors")):
        pickles = sorted(file.name for file in directory.glob("*.bin"))
        found = f"only pickle ({pickles[0]})" if pickles else "no weights"
        raise ServeError(
            f"the {role} {directory} holds {found}, and serving reads safetensors only: "
            f"`altiplano run CONFIG --until merge` writes them"
        )
    weight_files(directory)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ServeError(
            f"the {role} {directory} has no tokenizer ({' or '.join(_TOKENIZER_FILES)}): copy the "
            f"one it was trained with beside its weights"
        )
    config = read_config(directory)
    if PIECES in config:
        raise ServeError(
            f"the {role} {directory} has {config['vocab_size']} embedding rows for "
            f"{config[PIECES]} pieces, and the engine would answer with the rest: serve the merged "
            f"model, which has no padding rows (`altiplano run CONFIG --until merge`)"
        )
    if section.gpus_per_replica == 0:
        _check_head_size(role, directory, config)
    return manifest


def _open(role: str, directory: Path) -> Manifest | None:
    """The manifest of an artifact, its files checked; None for a plain model directory."""
    if not (directory / MANIFEST).is_file():
        if directory.with_name(directory.name + ".partial").exists():
            raise ArtifactError(f"{directory} is half-written: run the stage that makes it again")
        return None
    manifest = open_artifact(directory).manifest
    if manifest.kind == "adapter":
        raise ArtifactError(
            f"the {role} {directory} is an adapter, which changes a model but is none: "
            f"`altiplano merge CONFIG` folds it into its base; serve what that writes"
        )
    if manifest.kind != "model":
        raise ArtifactError(
            f"the {role} {directory} is an artifact of kind {manifest.kind}; only a model can be "
            f"served: give the merge/ folder of a finished run"
        )
    return manifest


def _check_head_size(role: str, directory: Path, config: dict[str, Any]) -> None:
    heads = config.get("num_attention_heads")
    size = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else None)
    if size not in CPU_HEAD_SIZES:
        supported = ", ".join(str(each) for each in CPU_HEAD_SIZES)
        raise ServeError(
            f"the {role} {directory} has attention heads of size {size}; on CPUs vLLM serves "
            f"{supported}: train one with such a head_dim, or serve on a GPU "
            f"(serve.gpus_per_replica=1)"
        )


def _check_pair(
    model: tuple[Path, Manifest | None, dict[str, Any]], draft: tuple[Path, Manifest | None]
) -> None:
    model_dir, model_manifest, model_config = model
    draft_dir, draft_manifest = draft
    if not (model_manifest and model_manifest.tokenizer_fingerprint and draft_manifest):
        bare = draft_dir if draft_manifest is None else model_dir
        raise ServeError(
            f"{bare} has no manifest that names its tokenizer, so nothing says whether {model_dir} "
            f"and {draft_dir} share one: serve artifacts of one run, or set "
            f"serve.draft.placement=none"
        )
    require_same_tokenizer(
        (f"model {model_dir}", model_manifest), (f"draft {draft_dir}", draft_manifest)
    )
    rows, draft_rows = model_config.get("vocab_size"), read_config(draft_dir).get("vocab_size")
    if rows != draft_rows:
        raise MismatchError(
            f"model {model_dir} has {rows} embedding rows and draft {draft_dir} has {draft_rows}: "
            f"make the draft from this model: `altiplano run CONFIG --from draft`"
        )
