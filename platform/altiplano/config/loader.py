"""From a YAML file and dotted overrides to one validated `Project`.

All errors are reported at once, each with file, line and, for unknown keys, the nearest known one.
Relative paths start at the project root: the nearest folder above the YAML that holds a
`pyproject.toml` or `.git`, else the YAML's own folder. Knows nothing of what a stage does.
Costs a few milliseconds.
"""

import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from altiplano.config.schema import Config, ServeOnly
from altiplano.errors import ConfigError

Place = tuple[str | int, ...]
SectionType = TypeVar("SectionType", bound=BaseModel)


@dataclass(frozen=True)
class Project:
    """A validated config and where it lives."""

    config: Config
    root: Path
    """Absolute folder that relative paths start from."""
    source: Path
    """The YAML file."""

    @property
    def output(self) -> Path:
        """Absolute directory of the run's artifacts."""
        return self.root / self.config.output

    def resolve(self, path: str) -> str:
        """Absolute local path or URL for a path as written in the config.

        `{output}` stands for the run's directory.
        """
        path = path.replace("{output}", str(self.output))
        if "://" in path:
            return path
        return str(self.root / Path(path).expanduser())


def load_config(path: str | Path, overrides: list[str] | None = None) -> Project:
    """Read and validate one YAML file.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; values are YAML, list items are indices
            (`pretrain.stages.0.steps=5`).

    Raises:
        ConfigError: every problem found, one per line.
    """
    source = Path(path)
    tree, lines = _read_yaml(source)
    origins = {place: f"{source}:{line}" for place, line in lines.items()}
    for override in overrides or []:
        _apply_override(tree, override, origins)
    config = _validate(Config, tree, origins, source)
    config = config.model_copy(update={"output": config.output.replace("{name}", config.name)})
    return Project(config, _project_root(source), source.resolve())


def load_serve_only(overrides: list[str]) -> ServeOnly:
    """The `serve` and `cluster` sections from overrides alone, for a run without its YAML.

    Raises:
        ConfigError: every problem found, one per line.
    """
    tree: dict[str, Any] = {}
    origins: dict[Place, str] = {}
    for override in overrides:
        _apply_override(tree, override, origins)
    return _validate(ServeOnly, tree, origins, Path("command line"))


def _validate(
    model: type[SectionType], tree: dict[str, Any], origins: dict[Place, str], source: Path
) -> SectionType:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(item, origins, source, model) for item in error.errors()]
        raise ConfigError("\n".join(["the config is not valid:", *problems])) from None


def _project_root(source: Path) -> Path:
    folder = source.resolve().parent
    for candidate in (folder, *folder.parents):
        if (candidate / "pyproject.toml").exists() or (candidate / ".git").exists():
            return candidate
    return folder


def _read_yaml(source: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The document as plain data, and the line of every key and list item."""
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the config {source}: {error.strerror}; give an existing YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold a mapping of sections, got {type(tree).__name__}")
    lines: dict[Place, int] = {}
    _collect_lines(node, (), lines, source)
    return tree, lines


def _collect_lines(node: Any, place: Place, lines: dict[Place, int], source: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, key.value)
            line = key.start_mark.line + 1
            if here in lines:
                raise ConfigError(
                    f"{source}:{line}: `{_dotted(here)}` is given twice "
                    f"(first on line {lines[here]}); keep one"
                )
            lines[here] = line
            _collect_lines(value, here, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*place, index)] = value.start_mark.line + 1
            _collect_lines(value, (*place, index), lines, source)


def _apply_override(tree: dict[str, Any], override: str, origins: dict[Place, str]) -> None:
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override `{override}` must look like section.key=value")
    keys: list[str | int] = [int(k) if k.isdigit() else k for k in dotted.split(".")]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override `{override}`: the value is not valid YAML") from None
    target: Any = tree
    for depth, key in enumerate(keys[:-1]):
        if isinstance(target, dict):
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
        elif isinstance(target, list) and isinstance(key, int) and key < len(target):
            target = target[key]
        else:
            at = _dotted(tuple(keys[: depth + 1]))
            raise ConfigError(f"override `{override}`: the config has no `{at}` to set a key in")
    last = keys[-1]
    in_list = isinstance(target, list) and isinstance(last, int) and last < len(target)
    if not (isinstance(target, dict) or in_list):
        raise ConfigError(f"override `{override}`: `{_dotted(tuple(keys[:-1]))}` holds no keys")
    target[last] = parsed
    origins[tuple(keys)] = f"override `{override}`"


def _describe(item: Any, origins: dict[Place, str], source: Path, model: type[BaseModel]) -> str:
    """One problem as `file:line: key: what is wrong`."""
    place: Place = tuple(item["loc"])
    origin = str(source)
    for length in range(len(place), 0, -1):
        if place[:length] in origins:
            origin = origins[place[:length]]
            break
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        known = _known_keys(place[:-1], model)
        near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        message = f"unknown key; {hint}"
    elif item["type"] == "missing":
        message = "this key is required"
    else:
        given = item.get("input")
        if isinstance(given, str | int | float | bool):
            message = f"{message}, got {given!r}"
    return f"  {origin}: {_dotted(place) or 'config'}: {message}"


def _known_keys(place: Place, model: type[BaseModel]) -> list[str]:
    """Keys of the section at a place of the tree."""
    annotation: Any = model
    for key in place:
        if isinstance(key, int):
            continue
        section = _section_in(annotation)
        if section is None or key not in section.model_fields:
            return []
        annotation = section.model_fields[key].annotation
    section = _section_in(annotation)
    return sorted(section.model_fields) if section else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section type inside `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            if (found := _section_in(argument)) is not None:
                return found
    return None


def _dotted(place: Place) -> str:
    return ".".join(str(key) for key in place)
