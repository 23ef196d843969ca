"""What each command does once its arguments are parsed; shared by the command line and jobs/.

Knows every room by name and none in detail.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from altiplano.artifact import open_artifact
from altiplano.cluster import connect
from altiplano.config import Config, Project, ServeOnly, load_config, load_serve_only
from altiplano.console import console
from altiplano.errors import AltiplanoError, ConfigError
from altiplano.pipeline import (
    build_stages,
    exclusive,
    run_stages,
    select,
    survey,
    survey_table,
)
from altiplano.stages.stage import artifact_path


def run(
    project: Project,
    start: str | None,
    until: str | None,
    *,
    dry_run: bool,
    address: str | None,
) -> None:
    """Run the stages from `start` to `until`; with `dry_run` only say what would run."""
    stages = select(build_stages(project), start, until)
    if dry_run:
        console.print(survey_table(project, survey(project, stages)))
        plan(project, as_json=False)
        return
    forced = {stages[0].name} if start else set[str]()
    with exclusive(project):
        found = survey(project, stages)
        console.print(survey_table(project, found))
        if forced or not all(status.current for _, status in found):
            with connect(project.config.cluster, address):
                run_stages(project, stages, forced=forced)
    if stages[-1].verb == "evaluate":
        show_report(project)
        console.print(f"next: altiplano serve {shown(project.output)}")


def run_verb(project: Project, verb: str, *, force: bool, address: str | None) -> None:
    """Run the stages of one verb; what they read must be there."""
    stages = [stage for stage in build_stages(project) if stage.verb == verb]
    if not stages:
        raise ConfigError(f"{project.source} has no `{verb}` section: add one to run this stage")
    with exclusive(project), connect(project.config.cluster, address):
        run_stages(project, stages, forced={stage.name for stage in stages} if force else None)
    following = _next_stage(project, stages[-1].name)
    console.print(f"next: altiplano {following}")


def serve(target: Path, overrides: list[str], *, address: str | None) -> None:
    """Serve a run named by its YAML, its directory or a model directory, until interrupted."""
    from altiplano.serving.check import find_parts
    from altiplano.serving.environment import prepare
    from altiplano.serving.service import print_how_to_call, serve_until_interrupted, start

    config, place = _served(target, overrides)
    parts = find_parts(config.serve, place)
    prepare(config.serve)
    joined = bool(address or os.environ.get("RAY_ADDRESS") or config.cluster.address)
    with connect(config.cluster, address):
        service = start(config.serve, parts, may_grow=joined)
        print_how_to_call(service, config.serve)
        serve_until_interrupted(service)


def _served(target: Path, overrides: list[str]) -> tuple[Config | ServeOnly, Path]:
    """Settings and place of what is to be served."""
    if target.suffix in (".yaml", ".yml"):
        project = load_config(target, overrides)
        return project.config, project.output
    return load_serve_only(overrides), target


def verify(paths: list[Path]) -> None:
    """Check artifacts: file hashes, fingerprints of tokenizer and weights, shards of tokens."""
    from altiplano.data.tokens.store import TokenStore
    from altiplano.model.load import weights_fingerprint
    from altiplano.vocabulary.load import tokenizer_fingerprint

    problems = []
    for path in paths:
        try:
            manifest = open_artifact(path).manifest
            if manifest.kind == "model":
                _require_equal(
                    path, "weights", manifest.weights_fingerprint, weights_fingerprint(path)
                )
            if manifest.kind in ("model", "tokenizer"):
                found = tokenizer_fingerprint(path)
                _require_equal(path, "tokenizer", manifest.tokenizer_fingerprint, found)
            if manifest.kind == "tokens":
                TokenStore.open(path / "train").verify()
            console.print(
                f"[green]whole[/]   {path}  ({manifest.kind}, {len(manifest.files)} files)"
            )
        except AltiplanoError as error:
            problems.append(str(error))
    if problems:
        raise AltiplanoError("\n".join(problems))


def plan(project: Project, *, as_json: bool, timed: bool = False) -> None:
    """Print what will be trained and what it takes; with `timed`, how fast it would be here."""
    from altiplano.plan import make_plan, plan_table

    made = make_plan(project)
    speeds = []
    if timed:
        from altiplano.plan.calibrate import calibrate

        speeds = calibrate(project, made)
    if as_json:
        speed = {"speed": [asdict(found) for found in speeds]} if timed else {}
        print(json.dumps(made.to_json() | speed, indent=2))
        return
    console.print(plan_table(made))
    if timed:
        from altiplano.plan.calibrate import speed_lines

        for line in speed_lines(speeds, made.num_workers):
            console.print(line)


def show_report(project: Project) -> None:
    """Print the run's final table."""
    from altiplano.evaluate.report import read_report, report_table

    console.print(report_table(read_report(artifact_path(project, "evaluate"))))


def data_preview(project: Project, records: int) -> None:
    """Show what the model will see, the trained tokens coloured."""
    from altiplano.data.preview.preview import preview_chat, preview_text

    section = project.config.data
    vocabulary_dir = open_artifact(artifact_path(project, "tokenizer"), "tokenizer").path
    if section.all_text:
        preview_text(
            section.all_text,
            project.resolve,
            vocabulary_dir,
            records=records,
            clean=section.clean,
            held_out=section.held_out,
        )
    if section.instructions:
        preview_chat(
            section.instructions,
            project.resolve,
            vocabulary_dir,
            template=section.template,
            system_prompt=section.system_prompt,
            loss_on=section.loss_on,
            overlong=section.overlong,
            sequence_length=section.sequence_length,
            clean=section.clean,
            records=records,
        )


def _require_equal(path: Path, what: str, recorded: str | None, found: str) -> None:
    if recorded != found:
        raise AltiplanoError(
            f"{path}: the manifest says {what} {recorded}, the files give {found}; "
            f"delete the directory and run its stage again"
        )


def _next_stage(project: Project, name: str) -> str:
    names = [stage.name for stage in build_stages(project)]
    position = names.index(name) + 1
    if position == len(names):
        return f"serve {shown(project.output)}"
    return f"run {shown(project.source)} --from {names[position]}"


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
