"""What is served is found and refused before a weight is loaded; nothing here starts Ray."""

import json
import socket
from pathlib import Path

import pytest

from altiplano.artifact import Manifest, write_artifact
from altiplano.config.serving import DraftSettings, ServeSection
from altiplano.errors import ArtifactError, MismatchError, ModelError, ServeError
from altiplano.serving import failure, service
from altiplano.serving.check import check_parts, find_directories, find_parts
from serve.app import build
from tests.helpers.served_run import Shape, write_served_run, write_small_model

ON_CPU = ServeSection()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with a draft."""
    return write_served_run(tmp_path_factory.mktemp("runs") / "demo")


def _without_manifest(run: Path, into: Path) -> Path:
    """Copy the run's model as a plain Hugging Face directory."""
    into.mkdir()
    for file in (run / "merge").iterdir():
        if file.name != "manifest.json":
            (into / file.name).write_bytes(file.read_bytes())
    return into


def test_a_run_gives_its_model_and_its_draft(run: Path, tmp_path: Path) -> None:
    assert find_directories(run) == (run / "merge", run / "draft")
    assert find_directories(run / "draft") == (run / "draft", None)
    plain = _without_manifest(run, tmp_path / "plain")
    assert find_directories(plain) == (plain, None)
    check_parts(ON_CPU, run / "merge", run / "draft")
    check_parts(ON_CPU, plain)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_place_without_a_model_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ServeError, match=name):
        find_directories(tmp_path / name)


def test_a_draft_with_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    other = write_small_model(tmp_path / "other", Shape(seed=7))
    with pytest.raises(MismatchError) as refused:
        check_parts(ON_CPU, run / "merge", other)
    message = str(refused.value)
    for part in (run / "merge", other):
        manifest = json.loads((part / "manifest.json").read_text())
        assert str(part) in message
        assert manifest["tokenizer_fingerprint"][:16] in message
    assert "400 pieces" in message and "altiplano run" in message
    check_parts(ServeSection(draft=DraftSettings(placement="none")), run / "merge", other)


def test_a_draft_with_other_rows_is_refused(run: Path, tmp_path: Path) -> None:
    draft = write_small_model(tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    manifest = json.loads((draft / "manifest.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "vocab_size": 408}))
    del manifest["files"]["config.json"]
    (draft / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match=r"400 embedding rows.*has 408"):
        check_parts(ON_CPU, run / "merge", draft)


def test_speculation_needs_to_know_both_tokenizers(run: Path, tmp_path: Path) -> None:
    plain = _without_manifest(run, tmp_path / "plain")
    with pytest.raises(ServeError, match="names its tokenizer"):
        check_parts(ON_CPU, plain, run / "draft")
    with pytest.raises(ServeError, match="names its tokenizer"):
        check_parts(ON_CPU, run / "merge", plain)


@pytest.mark.parametrize(("kind", "advice"), [("adapter", "altiplano merge"), ("tokens", "merge/")])
def test_artifacts_of_other_kinds_are_refused(tmp_path: Path, kind: str, advice: str) -> None:
    path = tmp_path / "part"
    with write_artifact(path, Manifest(kind=kind, stage="sft", section={}, inputs={})) as partial:
        (partial / "content").write_text("something")
    with pytest.raises(ArtifactError, match=advice):
        check_parts(ON_CPU, *find_directories(path))


def test_an_edited_artifact_is_refused(run: Path, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"model\.safetensors was changed"):
        check_parts(ON_CPU, model)


def test_weights_must_be_whole_and_safetensors(run: Path, tmp_path: Path) -> None:
    plain = _without_manifest(run, tmp_path / "plain")
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    with pytest.raises(ServeError, match=r"only pickle \(pytorch_model\.bin\)"):
        check_parts(ON_CPU, plain)
    (plain / "pytorch_model.bin").unlink()
    with pytest.raises(ServeError, match="no weights"):
        check_parts(ON_CPU, plain)
    (plain / "model-00001-of-00002.safetensors").write_bytes(b"")
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        check_parts(ON_CPU, plain)


def test_a_model_without_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    plain = _without_manifest(run, tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer.model"):
        (plain / name).unlink()
    with pytest.raises(ServeError, match="has no tokenizer"):
        check_parts(ON_CPU, plain)


def test_head_sizes_the_engine_has_no_kernel_for_are_refused_on_cpus(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", Shape(head_dim=8))
    with pytest.raises(ServeError, match="size 8; on CPUs vLLM serves 32"):
        check_parts(ON_CPU, model)
    check_parts(ServeSection(gpus_per_replica=1), model)


def test_no_more_context_is_served_than_the_model_has(run: Path) -> None:
    check_parts(ServeSection(max_model_len=256), run / "merge")
    with pytest.raises(ServeError, match=r"max_model_len is 257, .* for 256 tokens"):
        check_parts(ServeSection(max_model_len=257), run / "merge")


def test_the_builder_refuses_wrong_arguments() -> None:
    with pytest.raises(ServeError, match="nothing to serve: name a run"):
        build({})
    with pytest.raises(ServeError, match=r"port: Input should be.*draft_token: Extra"):
        build({"artifact": "runs/demo", "draft_token": "4", "port": "none"})


def test_a_dot_in_an_argument_reaches_into_a_section(run: Path) -> None:
    with pytest.raises(ServeError, match=r"draft\.placement: Input should be"):
        build({"artifact": str(run), "draft.placement": "elsewhere"})


def test_every_model_has_the_services_settings_and_its_own(run: Path) -> None:
    section = ServeSection(
        dtype="float32",
        max_replicas=3,
        models=[{"name": "old", "path": str(run / "draft"), "max_replicas": 1}],
    )
    new, old = find_parts(section, run)
    assert (new.entry.name, new.draft_dir) == ("altiplano", run / "draft")
    assert (old.entry.name, old.draft_dir, old.model_dir) == ("old", None, run / "draft")
    assert (new.entry.max_replicas, old.entry.max_replicas) == (3, 1)
    assert new.entry.dtype == old.entry.dtype == "float32"
    assert find_parts(section, None) == [old]


def test_a_draft_may_lie_elsewhere_or_be_left_out(run: Path, tmp_path: Path) -> None:
    models = [{"name": "m", "path": str(run / "merge"), "draft_path": str(run / "draft")}]
    assert find_parts(ServeSection(models=models), None)[0].draft_dir == run / "draft"
    alone = ServeSection(draft=DraftSettings(placement="none"))
    assert find_parts(alone, run)[0].draft_dir is None
    other = write_small_model(tmp_path / "other", Shape(seed=7))
    models[0]["draft_path"] = str(other)
    with pytest.raises(MismatchError, match="400 pieces"):
        find_parts(ServeSection(models=models), None)


def test_adapters_and_a_draft_exclude_each_other(run: Path) -> None:
    with pytest.raises(ServeError, match=r"does not combine .*draft\.placement=none"):
        find_parts(ServeSection(max_adapters=2), run)
    alone = ServeSection(max_adapters=2, draft=DraftSettings(placement="none"))
    assert find_parts(alone, run)[0].entry.max_adapters == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"min_replicas": 3}, "max_replicas"),
        ({"quantization": "4bit"}, "needs a GPU"),
        ({"gpus_per_replica": 2, "draft": {"placement": "replica"}}, "tensor-parallel"),
        ({"tls_key": "key.pem"}, "go together"),
        ({"models": [{"name": "altiplano", "path": "x"}]}, "given twice"),
        ({"models": [{"name": "../up", "path": "x"}]}, "pattern"),
        ({"draft": {"min_replicas": 2}}, "max_replicas"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ServeSection.model_validate(settings)


def test_the_fewest_replicas_are_counted_with_their_drafts(run: Path) -> None:
    from altiplano.serving.app import needed_resources

    section = ServeSection(
        min_replicas=2,
        max_replicas=2,
        cpus_per_replica=1.5,
        draft=DraftSettings(placement="replica", num_cpus=0.5),
    )
    assert needed_resources(section, find_parts(section, run)) == {"CPU": 3.5, "GPU": 0.0}


def test_a_port_in_use_is_refused_by_number() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=rf"port {port} .* in use.*serve\.port="):
            service.require_free_port("127.0.0.1", port)
    service.require_free_port("127.0.0.1", port)
    with pytest.raises(ServeError, match="no address of this machine"):
        service.require_free_port("no.such.host.invalid", port)


def test_a_failure_is_told_by_its_last_error_and_the_engines_own(tmp_path: Path) -> None:
    traceback = (
        "The deployment failed to start 1 times in a row. Error:\n"
        '  File "replica.py", line 1, in initialize\n    raise RuntimeError(x)\n'
        "RuntimeError: Traceback (most recent call last):\n"
        '  File "engine.py", line 2, in start\n'
        "RuntimeError: no engine config: 1 error\n  Value error, invalid literal\n"
    )
    assert failure.last_error(traceback) == (
        "RuntimeError: no engine config: 1 error Value error, invalid literal"
    )
    assert failure.last_error("waiting for 2 CPUs") == "waiting for 2 CPUs"
    assert failure.last_error("") == "no reason given"
    log = tmp_path / "worker-1.err"
    log.write_text(
        "(EngineCore pid=7) x.ValueError: No memory\n(EngineCore pid=7)   in y\n"
        "RuntimeError: Engine core initialization failed\n"
    )
    assert failure.engine_error(0, tmp_path) == "ValueError: No memory"
    assert failure.engine_error(log.stat().st_mtime + 1, tmp_path) is None


def test_how_to_call_is_ready_to_paste() -> None:
    running = service.Service("http://127.0.0.1:8123", "demo", 1.0, frozenset())
    text = service.how_to_call(running, ServeSection())
    curl, python = text.split("\n\n")[:2]
    body = curl.split("-d '")[1].rstrip("'")
    assert json.loads(body)["model"] == "demo"
    assert "http://127.0.0.1:8123/v1/chat/completions" in curl
    compile(python, "snippet", "exec")
    assert 'base_url="http://127.0.0.1:8123/v1"' in python
