"""The config tree: every problem at once, with file and line; every shipped YAML parses."""

from pathlib import Path

import pytest
import yaml

from altiplano.config import load_config, load_serve_only
from altiplano.config.schema import Config
from altiplano.config.training import Section
from altiplano.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))

GOOD = """\
name: small
base_model: {path: base}
tokenizer: {vocab_size: 100}
data:
  text:
    - {path: zh.txt, language: zh}
pretrain:
  stages:
    - {name: rows}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.name)
def test_every_shipped_config_parses(file: Path) -> None:
    assert load_config(file).config.name


def test_there_are_shipped_configs() -> None:
    assert {"demo.yaml", "real-zh.yaml", "llama2-zh.yaml", "llama3-zh.yaml"} <= {
        file.name for file in SHIPPED
    }


def test_a_llama2_recipe_takes_thirty_lines() -> None:
    lines = (ROOT / "configs" / "llama2-zh.yaml").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 30


def test_all_errors_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    text = GOOD.replace("vocab_size: 100", "vocab_sze: 100") + "servee: {}\n"
    text = text.replace("language: zh", "lang: zh")
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), ["serve.port=99999"])
    message = str(caught.value)
    assert "run.yaml:3: tokenizer.vocab_sze: unknown key; did you mean `vocab_size`?" in message
    assert "run.yaml:6: data.text.0.language: this key is required" in message
    assert "run.yaml:10: servee: unknown key; did you mean `serve`?" in message
    assert "override `serve.port=99999`" in message and "99999" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "name: again\n", "`name` is given twice (first on line 1)"),
        (GOOD.replace("{name: rows}", "{name: rows, rows: none}"), "nothing would be trained"),
        (GOOD.replace("{name: rows}", "{name: a, full: true, lora: {}}"), "drop `lora`"),
        (GOOD.replace("path: base", "{}").replace("{{}}", "{}"), "base_model"),
        (GOOD.replace("language: zh", "language: fr"), "have no text"),
        (GOOD.replace("- {name: rows}", "- {name: a}\n    - {name: a}"), "names must differ"),
        (
            GOOD.replace("pretrain:", "    - {path: zh.txt, language: en}\npretrain:"),
            "called zh.txt",
        ),
        (
            GOOD.replace(
                "language: zh}",
                "language: zh}\n  replay: {share: 0.1, text: [{path: zh.txt, language: en}]}",
            ),
            "give them different `name`s",
        ),
        (
            GOOD.replace("pretrain:", "    - {path: b, language: zh, weight: 2}\npretrain:"),
            "`weight` is given to 1 of 2 sources",
        ),
        (GOOD.replace("100}", "100, scores: reference, keep: cjk}"), "byte for byte: drop `keep`"),
        (GOOD.replace("{vocab_size: 100}", "{}"), "give `vocab_size`"),
        ("- a\n", "mapping of sections"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert expected in str(caught.value)


def test_overrides_reach_nested_keys_and_lists(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    project = load_config(file, ["pretrain.stages.0.steps=5", "draft.layers=2", "draft.train={}"])
    assert project.config.pretrain is not None and project.config.draft is not None
    assert project.config.pretrain.stages[0].steps == 5
    assert project.config.draft.layers == 2


@pytest.mark.parametrize("override", ["seed", "=3", "pretrain.stages.7.steps=1", "name.x=1"])
def test_bad_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(write(tmp_path, GOOD), [override])


def test_paths_start_at_the_project_root(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "configs").mkdir()
    project = load_config(write(tmp_path / "configs", GOOD))
    assert project.output == tmp_path / "runs" / "small"
    assert project.resolve("a/b.txt") == str(tmp_path / "a" / "b.txt")
    assert project.resolve("{output}/world/x") == str(project.output / "world" / "x")
    assert project.resolve("s3://bucket/x") == "s3://bucket/x"


def test_serving_without_a_yaml_takes_overrides_only() -> None:
    assert load_serve_only(["serve.port=8123"]).serve.port == 8123
    with pytest.raises(ConfigError, match="did you mean `serve`"):
        load_serve_only(["srve.port=8123"])


def sections(section: type[Section]) -> set[type[Section]]:
    """A section type and all it is made of."""
    found = {section}
    pending = [section]
    while pending:
        for field in pending.pop().model_fields.values():
            for kind in walk(field.annotation):
                if kind not in found:
                    found.add(kind)
                    pending.append(kind)
    return found


def walk(annotation: object) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [kind for argument in arguments for kind in walk(argument)]


def test_every_key_is_documented_where_it_is_declared() -> None:
    undocumented = [
        f"{section.__name__}.{name}"
        for section in sections(Config)
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert len(sections(Config)) > 10
    assert undocumented == []


def test_shipped_configs_say_how_to_run_them() -> None:
    for file in SHIPPED:
        head = file.read_text(encoding="utf-8").split("\nname:")[0]
        assert "altiplano run" in head or "make demo" in head, file.name
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["name"]
