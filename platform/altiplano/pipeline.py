"""Which stages a config has, in which order, and running the ones that are not up to date.

Knows the graph, not what any stage does. Building it costs nothing; asking what is cached reads
the artifacts once.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from altiplano.artifact import Artifact
from altiplano.config import Project
from altiplano.config.data import InstructionSource, TextSource
from altiplano.config.schema import Config
from altiplano.config.training import TrainSettings
from altiplano.console import console, simple_table
from altiplano.errors import AltiplanoError, ConfigError
from altiplano.stages import finish, learn, prepare
from altiplano.stages.stage import Stage, Status, execute, stage_status

_READING = {"clean", "held_out", "on_error"}
"""Keys of `data` that decide which texts are trained on."""


def build_stages(project: Project) -> list[Stage]:
    """All stages of a config, in the order they run."""
    config = project.config
    stages = [*_base_stages(project), *_vocabulary_stages(project)]
    if config.data.text:
        stages.append(_text_stage(project))
    if config.sft:
        stages.append(_chat_stage(project))
    model, adapters = "extend", list[str]()
    for settings in config.pretrain.stages if config.pretrain else []:
        name = f"pretrain-{settings.name}"
        stage = _train_stage(config, name, "pretrain", settings, model, adapters)
        stages.append(stage)
        model, adapters = _extend_chain(stage, settings, model, adapters)
    if config.sft:
        stage = _train_stage(config, "sft", "sft", config.sft, model, adapters)
        stages.append(stage)
        model, adapters = _extend_chain(stage, config.sft, model, adapters)
    stages.append(_merge_stage(config, model, adapters))
    if config.draft:
        stages.append(_draft_stage(config))
    stages.append(_evaluate_stage(config, stages))
    return stages


def run_stages(
    project: Project, stages: Sequence[Stage], *, forced: set[str] | None = None
) -> list[Artifact]:
    """Run the stages that are not up to date, in order, and all whose inputs thereby change.

    Args:
        forced: names to run even if they are up to date.

    Returns:
        artifacts of the stages that ran.
    """
    made = []
    for stage in stages:
        # What runs before is on disk by now: where it gave the same bytes, nothing follows.
        status = stage_status(project, stage, set())
        if status.current and stage.name not in (forced or set()):
            console.print(f"[green]cached[/]  {stage.name}")
            continue
        console.print(f"[yellow]running[/] {stage.name}: {status.reason}")
        made.append(execute(project, stage))
    return made


def survey(project: Project, stages: Sequence[Stage]) -> list[tuple[Stage, Status]]:
    """What a run would do, without doing it."""
    found, changed = [], set[str]()
    for stage in stages:
        status = stage_status(project, stage, changed)
        if not status.current:
            changed.add(stage.name)
        found.append((stage, status))
    return found


def survey_table(project: Project, found: Sequence[tuple[Stage, Status]]) -> Table:
    """The survey as people read it."""
    rows = [
        (stage.name, stage.kind, "cached" if status.current else "run", status.reason)
        for stage, status in found
    ]
    return simple_table(f"stages of {project.source.name}", ("stage", "makes", "", "why"), rows)


def select(
    stages: Sequence[Stage], start: str | None = None, until: str | None = None
) -> list[Stage]:
    """The stages from one name or verb to another, both included.

    Raises:
        ConfigError: there is no such stage.
    """
    first = min(_positions(stages, start)) if start else 0
    last = max(_positions(stages, until)) if until else len(stages) - 1
    if first > last:
        raise ConfigError(f"--from {start} comes after --until {until}: nothing would run")
    return list(stages[first : last + 1])


@contextmanager
def exclusive(project: Project) -> Iterator[None]:
    """Keep a second command from writing into the same run.

    Raises:
        AltiplanoError: another process is writing there.
    """
    project.output.mkdir(parents=True, exist_ok=True)
    with (project.output / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise AltiplanoError(
                f"process {lock.read().strip() or '?'} is writing into {project.output}: "
                f"wait for it, or give another `output=`"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _positions(stages: Sequence[Stage], name: str) -> list[int]:
    found = [i for i, stage in enumerate(stages) if name in (stage.name, stage.verb)]
    if not found:
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(f"this config has no stage `{name}`; it has: {names}")
    return found


def _base_stages(project: Project) -> list[Stage]:
    config, stages = project.config, list[Stage]()
    world = _world_need(config)
    if config.world:
        section = config.world.model_dump(mode="json")
        stages.append(Stage("world", "base", "world", section, prepare.make_world))
    scratch = config.base_model.scratch
    if scratch is None:
        return [*stages, _import_stage(project)]
    data = config.data
    sources = [source.model_dump(mode="json") for source in scratch.text]
    files = _files(project, scratch.text)
    reading = {"text": sources, **data.model_dump(mode="json", include=_READING)}
    return [
        *stages,
        Stage(
            "base-tokenizer", "base", "tokenizer",
            {**reading, **scratch.tokenizer.model_dump(mode="json")},
            prepare.train_base_tokenizer, world, files,
        ),
        Stage(
            "base-data", "base", "tokens", {**reading, "sequence_length": data.sequence_length},
            prepare.prepare_base_text, {**world, "tokenizer": "base-tokenizer"}, files,
        ),
        _measured(Stage(
            "base", "base", "model",
            {
                "shape": scratch.shape.model_dump(mode="json"),
                "train": scratch.train.model_dump(mode="json"),
                "seed": config.seed,
            },
            learn.train_base, {"tokenizer": "base-tokenizer", "tokens": "base-data"},
        ), config, scratch.train),
    ]  # fmt: skip


def _import_stage(project: Project) -> Stage:
    section = project.config.base_model
    path = section.path or ""
    local = Path(project.resolve(path)).is_dir()
    files = (f"{path}/*",) if local else ()
    settings = section.model_dump(mode="json")
    return Stage("base", "base", "model", settings, prepare.import_base, {}, files)


def _vocabulary_stages(project: Project) -> list[Stage]:
    config = project.config
    extend = {**config.extend.model_dump(mode="json"), "seed": config.seed}
    return [
        _tokenizer_stage(project),
        Stage(
            "extend", "extend", "model", extend, prepare.extend_model,
            {"base": "base", "tokenizer": "tokenizer"},
        ),
    ]  # fmt: skip


def _tokenizer_stage(project: Project) -> Stage:
    config, section = project.config, project.config.tokenizer
    settings = section.model_dump(mode="json")
    needs: dict[str, str] = {}
    files: tuple[str, ...] = ()
    if not section.unchanged:
        sources = config.data.all_text
        settings["seed"] = config.seed
        settings["text"] = [source.model_dump(mode="json") for source in sources]
        settings |= config.data.model_dump(mode="json", include=_READING)
        words = (section.words,) if section.words else ()
        needs = _world_need(config)
        files = (*_files(project, sources), *section.add, *words)
    return Stage(
        "tokenizer", "tokenizer", "tokenizer", settings, prepare.grow_tokenizer,
        {**needs, "base": "base"}, files,
    )  # fmt: skip


def _text_stage(project: Project) -> Stage:
    config, data = project.config, project.config.data
    kept = {*_READING, "text", "replay", "sequence_length", "cross_documents"}
    section = data.model_dump(mode="json", include=kept)
    needs = {**_world_need(config), "tokenizer": "tokenizer"}
    return Stage(
        "data-text", "data", "tokens", section, prepare.prepare_text, needs,
        _files(project, data.all_text),
    )  # fmt: skip


def _chat_stage(project: Project) -> Stage:
    config, data = project.config, project.config.data
    section = data.model_dump(
        mode="json", exclude={"text", "replay", "held_out", "cross_documents"}
    )
    needs = {**_world_need(config), "tokenizer": "tokenizer"}
    files = _files(project, data.instructions)
    return Stage("data-chat", "data", "tokens", section, prepare.prepare_chat, needs, files)


def _files(project: Project, sources: Sequence[TextSource | InstructionSource]) -> tuple[str, ...]:
    """Patterns of the files that sources read; a dataset of a hub has none that lie here."""
    found = []
    for source in sources:
        if source.format != "dataset":
            found.append(source.path)
        elif Path(project.resolve(source.path)).is_dir():
            found.append(f"{source.path}/**")
    return tuple(found)


def _world_need(config: Config) -> dict[str, str]:
    return {"world": "world"} if config.world else {}


def _chain_needs(model: str, adapters: Sequence[str]) -> dict[str, str]:
    return {"model": model, **{f"adapter-{i}": name for i, name in enumerate(adapters)}}


def _train_stage(
    config: Config,
    name: str,
    verb: str,
    settings: TrainSettings,
    model: str,
    adapters: Sequence[str],
) -> Stage:
    kind = "model" if settings.full else "adapter"
    tokens = "data-chat" if verb == "sft" else "data-text"
    needs = {**_chain_needs(model, adapters), "tokens": tokens}
    section = {"train": settings.model_dump(mode="json"), "seed": config.seed}
    return _measured(Stage(name, verb, kind, section, learn.train_stage, needs), config, settings)


def _extend_chain(
    stage: Stage, settings: TrainSettings, model: str, adapters: list[str]
) -> tuple[str, list[str]]:
    """A full stage begins a new chain; others add a link."""
    return (stage.name, []) if settings.full else (model, [*adapters, stage.name])


def _merge_stage(config: Config, model: str, adapters: Sequence[str]) -> Stage:
    needs = _chain_needs(model, adapters)
    if config.sft:
        needs["chat"] = "data-chat"
    section = config.merge.model_dump(mode="json")
    return Stage("merge", "merge", "model", section, finish.merge, needs)


def _draft_stage(config: Config) -> Stage:
    assert config.draft is not None
    tokens = "data-chat" if config.sft else "data-text"
    section = {**config.draft.model_dump(mode="json"), "seed": config.seed}
    needs = {"target": "merge", "tokens": tokens}
    stage = Stage("draft", "draft", "model", section, learn.train_draft, needs)
    return _measured(stage, config, config.draft.train)


def _measured(stage: Stage, config: Config, settings: TrainSettings) -> Stage:
    """A training stage with what it is measured on and what it begins with among its inputs."""
    needs, section, files = dict(stage.needs), dict(stage.section), stage.files
    if settings.evaluate_steps is not None:
        # A base from scratch holds texts of its own out.
        if stage.name != "base":
            needs["held_out"] = "data-text"
        section["held_out_bytes"] = config.evaluate.max_bytes_per_language
    if settings.begin is not None:
        # Its manifest tells every other file's hash.
        files = (*files, f"{settings.begin.path}/manifest.json")
    return replace(stage, needs=needs, section=section, files=files)


def _evaluate_stage(config: Config, stages: Sequence[Stage]) -> Stage:
    """Reads every artifact of the run: models and texts to measure, seconds to report."""
    needs = {stage.name: stage.name for stage in stages}
    section = config.evaluate.model_dump(mode="json")
    section["template"] = config.data.template
    section["system_prompt"] = config.data.system_prompt
    files = tuple(source.path for source in config.evaluate.questions)
    return Stage("evaluate", "evaluate", "report", section, finish.evaluate, needs, files)
