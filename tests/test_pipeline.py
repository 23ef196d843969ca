"""The whole line on a tiny world: artifacts, caching, refusals, the report, an answer over HTTP."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from altiplano import commands
from altiplano.artifact import Artifact, open_artifact, write_artifact
from altiplano.config import Project, load_config
from altiplano.config.training import TrainSettings
from altiplano.errors import AltiplanoError, ArtifactError, MismatchError
from altiplano.pipeline import build_stages, run_stages, select, survey
from altiplano.stages.stage import artifact_path
from altiplano.train.checkpoint import read_state
from altiplano.train.follow import read_log, read_records
from altiplano.train.schedule import learning_rate_factor
from altiplano.vocabulary.load import Vocabulary
from tests.helpers.tiny_config import STEPS, tiny_project, tiny_tree, training, write_config

STAGES = [
    "world", "base-tokenizer", "base-data", "base", "tokenizer", "extend", "data-text",
    "data-chat", "pretrain-lora", "sft", "merge", "draft", "evaluate",
]  # fmt: skip
TRAINED = ["base", "pretrain-lora", "sft", "draft"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: dict[str, str]) -> Project:
    """Run the tiny config once; tests that change anything work on a copy."""
    project = tiny_project(tmp_path_factory.mktemp("pipeline"))
    made = run_stages(project, build_stages(project))
    assert [artifact.path.name for artifact in made] == STAGES
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """Return a copy of the finished run, free to be spoiled."""
    shutil.copytree(finished.root, tmp_path / "copy")
    return load_config(tmp_path / "copy" / "run.yaml")


def again(project: Project, *overrides: str) -> list[str]:
    """Names of the stages that another run executes."""
    project = load_config(project.source, list(overrides))
    return [made.path.name for made in run_stages(project, build_stages(project))]


def artifact(project: Project, name: str) -> Artifact:
    return open_artifact(artifact_path(project, name))


def test_every_artifact_is_whole_and_verified(finished: Project) -> None:
    commands.verify([finished.output / name for name in STAGES])
    left = {path.name for path in finished.output.iterdir()} - set(STAGES)
    assert left <= {".lock", ".training", ".preparing"}
    for folder in (".training", ".preparing"):
        assert not list((finished.output / folder).iterdir())


def test_one_tokenizer_from_the_first_new_row_to_the_draft(finished: Project) -> None:
    new = ["tokenizer", "extend", "data-text", "pretrain-lora", "data-chat", "sft", "merge"]
    manifests = [artifact(finished, name).manifest for name in [*new, "draft"]]
    base = artifact(finished, "base").manifest
    assert len({manifest.tokenizer_fingerprint for manifest in manifests}) == 1
    assert manifests[0].tokenizer_fingerprint != base.tokenizer_fingerprint
    assert {manifest.vocab_old for manifest in manifests} == {base.vocab_new}
    assert {manifest.vocab_new for manifest in manifests} == {
        Vocabulary(artifact_path(finished, "merge")).size
    }


def test_old_rows_are_those_of_the_base_to_the_bit(finished: Project) -> None:
    import torch

    from altiplano.model.load import load_model

    before, after = (
        load_model(artifact_path(finished, name)).state_dict() for name in ("base", "merge")
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = len(before[name])
        assert torch.equal(after[name][:old], before[name])
        assert len(after[name]) > old
        extended = load_model(artifact_path(finished, "extend")).state_dict()[name]
        assert not torch.equal(after[name][old:], extended[old:]), "new rows were not trained"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after[name], before[name]), "LoRA was not merged"


@pytest.mark.parametrize("name", TRAINED)
def test_training_leaves_its_curve_and_log(finished: Project, name: str) -> None:
    logs = artifact_path(finished, name) / "logs"
    records = [json.loads(line) for line in (logs / "log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["event"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert (logs / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((logs / "tensorboard").glob("events.out.tfevents.*"))
    assert artifact(finished, name).manifest.metrics["steps"] == STEPS


def test_a_stage_measures_and_keeps_what_it_is_asked_for(finished: Project) -> None:
    """Held-out bits per byte while training are those that the report has afterwards."""
    stage = artifact_path(finished, "pretrain-lora")
    measured = [r for r in read_records(stage / "logs" / "log.jsonl") if r["event"] == "evaluation"]
    assert [record["step"] for record in measured] == list(range(1, STEPS + 1))
    best = [record for record in measured if record["best"]][-1]["bits_per_byte"]
    report = json.loads((artifact_path(finished, "evaluate") / "report.json").read_text())
    assert report["bits_per_byte"]["pretrain-lora"] == pytest.approx(best, rel=1e-3)
    assert read_state(stage / "optimizer").progress["steps"] == STEPS
    assert json.loads((stage / "logs" / "profile.json").read_text())["traceEvents"]


def test_a_stage_goes_on_where_an_earlier_run_ended(project: Project) -> None:
    """New steps on the old curve, from the old moments; the earlier run stays as it is."""
    shutil.copytree(artifact_path(project, "pretrain-lora"), project.root / "earlier")
    tree = tiny_tree()
    tree["pretrain"]["stages"][0] |= {
        "steps": 2 * STEPS, "begin": {"mode": "continue", "path": "earlier"},
    }  # fmt: skip
    project = load_config(write_config(project.root, tree))
    (stage,) = (stage for stage in build_stages(project) if stage.name == "pretrain-lora")
    (made,) = run_stages(project, [stage])
    records = read_log(made.path / "logs" / "log.jsonl")
    assert [record["step"] for record in records] == [STEPS + 1, 2 * STEPS]
    settings = TrainSettings(**tree["pretrain"]["stages"][0])
    assert [record["learning_rate"] for record in records] == [
        settings.learning_rate * learning_rate_factor(step, 2 * STEPS, settings)
        for step in range(STEPS, 2 * STEPS)
    ]
    assert run_stages(project, [stage]) == []


def test_the_report_has_every_number(finished: Project) -> None:
    folder = artifact_path(finished, "evaluate")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    models = ["base", "extend", "pretrain-lora", "sft", "merge"]
    assert list(report["bits_per_byte"]) == models
    for found in report["bits_per_byte"].values():
        assert set(found) == {"en", "zh"} and all(0 < bits < 20 for bits in found.values())
    assert report["bits_per_byte"]["merge"] == pytest.approx(report["bits_per_byte"]["sft"])
    zh, en = (report["tokens_per_character"][language] for language in ("zh", "en"))
    assert zh["after"] < zh["before"] and en["after"] == en["before"]
    assert report["questions"] == {"zh": 3}
    assert 0 <= report["accuracy"]["zh"]["after"] <= 1
    assert 0 <= report["draft_acceptance"]["acceptance_rate"] <= 1
    assert list(report["seconds"]) == STAGES
    assert len(report["samples"]) == 3
    table = (folder / "report.md").read_text(encoding="utf-8")
    for words in ("tokens per character, zh", "bits per byte, en", "accuracy, zh", "draft"):
        assert words in table


def test_a_second_run_does_nothing(finished: Project) -> None:
    def state() -> dict[Path, int]:
        files = [path for path in finished.output.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = state()
    assert again(finished) == []
    assert state() == before
    assert all(status.current for _, status in survey(finished, build_stages(finished)))


def test_one_changed_key_runs_what_depends_on_it(project: Project) -> None:
    assert again(project, "sft.learning_rate=0.02") == ["sft", "merge", "draft", "evaluate"]


def test_an_edited_artifact_is_named_and_made_again(project: Project) -> None:
    """It comes out as it was, so nothing after it has to run."""
    tokenizer = artifact_path(project, "tokenizer")
    with (tokenizer / "tokenizer.json").open("a") as handle:
        handle.write(" ")
    stage = next(s for s in build_stages(project) if s.name == "extend")
    with pytest.raises(ArtifactError, match=r"tokenizer is not what .*tokenizer\.json has"):
        run_stages(project, [stage])
    assert again(project) == ["tokenizer"]


def test_a_changed_source_file_is_noticed(project: Project) -> None:
    tree = tiny_tree()
    source = project.root / "own.jsonl"
    source.write_text('{"instruction": "a", "output": "b"}\n' * 2, encoding="utf-8")
    tree["data"]["instructions"] = [{"path": "own.jsonl", "language": "en"}]
    project = load_config(write_config(project.root, tree))
    data = select(build_stages(project), "data-chat", "data-chat")
    run_stages(project, data)
    assert run_stages(project, data) == []
    source.write_text('{"instruction": "a", "output": "c"}\n' * 2, encoding="utf-8")
    assert len(run_stages(project, data)) == 1


# Parts that do not belong together.


@pytest.fixture
def other(project: Project) -> Project:
    """Return a run with the same base and another vocabulary, prepared but not trained."""
    other = load_config(project.source, ["output=other", "tokenizer.vocab_size=150"])
    for name in STAGES[:4]:
        shutil.copytree(project.output / name, other.output / name)
    wanted = ("tokenizer", "extend", "data-text", "data-chat")
    stages = [stage for stage in build_stages(other) if stage.name in wanted]
    assert [made.path.name for made in run_stages(other, stages)] == [
        "tokenizer", "extend", "data-text", "data-chat",
    ]  # fmt: skip
    return other


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Return a function that expects a verb to be refused before any weight is loaded."""

    def loaded(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded before the refusal")

    def expect(project: Project, verb: str) -> str:
        with monkeypatch.context() as patch, pytest.raises(MismatchError) as caught:
            patch.setattr("altiplano.stages.learn.run_training", loaded)
            patch.setattr("altiplano.merge.merge.merge_checkpoint", loaded)
            patch.setattr("altiplano.draft.cut_draft", loaded)
            patch.setattr("altiplano.model.load.load_model", loaded)
            commands.run_verb(project, verb, force=True, address=None)
        return str(caught.value)

    yield expect


def put(source: Path, target: Path, **changed: object) -> None:
    """Put an artifact in another's place, with some of its manifest changed."""
    manifest = replace(open_artifact(source).manifest, **changed)
    with write_artifact(target, manifest) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()


def names_both(message: str, left: Artifact, right: Artifact) -> None:
    for part in (left, right):
        assert str(part.path) in message
        assert str(part.manifest.tokenizer_fingerprint)[:16] in message
        assert f"{part.manifest.vocab_new} pieces" in message
    assert "altiplano run" in message


@pytest.mark.parametrize(
    ("verb", "tokens", "model"),
    [
        ("pretrain", "data-text", "extend"),
        ("sft", "data-chat", "extend"),
        ("draft", "data-chat", "merge"),
    ],
)
def test_tokens_of_another_tokenizer_are_refused(
    project: Project, other: Project, refused: Callable[..., str],
    verb: str, tokens: str, model: str,
) -> None:  # fmt: skip
    put(artifact_path(other, tokens), artifact_path(project, tokens))
    message = refused(project, verb)
    names_both(message, artifact(project, tokens), artifact(project, model))


@pytest.mark.parametrize("verb", ["sft", "merge"])
def test_an_adapter_of_another_tokenizer_is_refused(
    project: Project, other: Project, refused: Callable[..., str], verb: str
) -> None:
    tokenizer, adapter = artifact(other, "tokenizer").manifest, artifact_path(project, "sft")
    if verb == "sft":
        adapter = artifact_path(project, "pretrain-lora")
    put(
        adapter, adapter,
        tokenizer_fingerprint=tokenizer.tokenizer_fingerprint, vocab_new=tokenizer.vocab_new,
    )  # fmt: skip
    message = refused(project, verb)
    names_both(message, open_artifact(adapter), artifact(project, "extend"))


def test_an_adapter_of_another_base_is_refused(
    project: Project, refused: Callable[..., str]
) -> None:
    model = artifact_path(project, "extend")
    put(model, model, weights_fingerprint="0" * 64)
    message = refused(project, "merge")
    assert "was not trained on" in message and "0" * 16 in message and str(model) in message


def test_a_draft_of_another_vocabulary_is_not_served(project: Project, other: Project) -> None:
    from altiplano.serving.check import check_parts

    put(artifact_path(other, "extend"), artifact_path(project, "draft"))
    model, draft = (artifact(project, name) for name in ("merge", "draft"))
    with pytest.raises(MismatchError) as caught:
        check_parts(project.config.serve, model.path, draft.path)
    names_both(str(caught.value), model, draft)


def test_two_commands_do_not_write_into_one_run(project: Project) -> None:
    from altiplano.pipeline import exclusive

    with exclusive(project), pytest.raises(AltiplanoError, match=r"process \d+ is writing into"):
        commands.run_verb(project, "merge", force=False, address=None)


# The end of the line.


def answer_over_http(project: Project) -> dict:
    """Serve a run's model and draft, ask one question, stop."""
    import httpx

    from altiplano.serving import service
    from altiplano.serving.check import find_parts

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    section = project.config.serve.model_copy(update={"port": port})
    running = service.start(section, find_parts(section, project.output))
    try:
        answer = httpx.post(
            f"{running.url}/v1/chat/completions",
            json={
                "model": section.model_name,
                "messages": [{"role": "user", "content": "你好"}],
                "max_tokens": 8,
                "temperature": 0,
            },
            timeout=60,
            trust_env=False,
        ).raise_for_status()
    finally:
        running.stop()
    body: dict = answer.json()
    return body


def test_the_finished_run_answers_over_http(finished: Project) -> None:
    body = answer_over_http(finished)
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert 0 < body["usage"]["completion_tokens"] <= 8
    served, trained = (
        (artifact_path(finished, name) / "chat_template.jinja").read_text(encoding="utf-8")
        for name in ("merge", "data-chat")
    )
    assert served == trained


def test_real_weights_and_real_books(
    shared: Path, tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    """configs/real-zh.yaml in short: the vocabulary shrinks Chinese and leaves English alone."""
    from tests.helpers.llama2c import write_base

    models, text = shared / "models", shared / "text"
    write_base(models / "stories260K.bin", models / "tok512.model", tmp_path / "base")
    project = load_config(write_config(tmp_path, _real_tree(text, shared / "instruct")))
    made = run_stages(project, build_stages(project))
    assert [each.path.name for each in made][-1] == "evaluate"

    report = json.loads((artifact_path(project, "evaluate") / "report.json").read_text("utf-8"))
    zh, en = (report["tokens_per_character"][language] for language in ("zh", "en"))
    assert zh["after"] < 0.7 * zh["before"] and en["after"] == en["before"]
    bits = report["bits_per_byte"]
    assert list(bits) == ["base", "extend", "pretrain-lora", "sft", "merge"]
    assert bits["merge"]["zh"] < bits["base"]["zh"]
    assert bits["merge"]["zh"] == pytest.approx(bits["sft"]["zh"], rel=1e-4)
    english = (text / "wiki_en_demo.txt").read_text(encoding="utf-8")[:20_000]
    old, new = (Vocabulary(artifact_path(project, name)) for name in ("base", "merge"))
    assert new.encode(english) == old.encode(english)
    assert {sample["prompt"] for sample in report["samples"]} == {"你好"}
    assert 0 <= report["draft_acceptance"]["acceptance_rate"] <= 1


def _real_tree(text: Path, instruct: Path) -> dict:
    """The real run with few documents and steps."""
    lora = {"r": 2, "alpha": 4}
    short = {"learning_rate": 5e-3, "steps": 3}
    lines = {"format": "lines", "max_documents": 150}
    return {
        **tiny_tree(),
        "world": None,
        "base_model": {"path": "base"},
        "tokenizer": {"vocab_size": 300, "languages": ["zh"]},
        "data": {
            "text": [
                {"path": str(text / "hongloumeng.txt"), "language": "zh", **lines},
                {
                    "path": str(text / "cmrc2018_dev_squad.json"),
                    "language": "zh",
                    "text_key": "data.paragraphs.context",
                    "max_documents": 20,
                },
                {"path": str(text / "wiki_en_demo.txt"), "language": "en", **lines},
            ],
            "instructions": [
                {
                    "path": str(instruct / "alpaca_zh_demo.json"),
                    "language": "zh",
                    "max_records": 60,
                }
            ],
            "sequence_length": 256,
            "held_out": 0.1,
            "template": "alpaca",
            "overlong": "drop",
        },
        "pretrain": {"stages": [training(name="lora", lora=lora, **short)]},
        "sft": training(lora=lora, **short),
        "draft": {"layers": 2, "train": training(**short)},
        "evaluate": {
            "prompts": ["你好"],
            "max_tokens_per_answer": 6,
            "max_bytes_per_language": 3000,
        },
    }
