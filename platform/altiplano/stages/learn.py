"""The stages that train: base from scratch, pre-training, instruction tuning, draft.

All are one engine with other settings. Each checks that model, adapters and tokens belong together
before a weight is loaded, and turns the last checkpoint into an artifact.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from altiplano.artifact import LOGS, Artifact, open_artifact, require_same_tokenizer
from altiplano.config.training import BeginSettings, TrainSettings
from altiplano.errors import MemoryShortageError, TrainingError
from altiplano.merge.check import check_chain
from altiplano.stages.stage import Work, artifact_path
from altiplano.train.run import TrainOutcome, run_training
from altiplano.train.worker import TrainJob

_CHECKPOINTS = ".training"
"""Folder of unfinished runs, below the run's output."""


def train_base(work: Work) -> None:
    """Train the tiny base model of a demo from nothing."""
    from altiplano.stages.prepare import init_scratch

    scratch = work.project.config.base_model.scratch
    assert scratch is not None
    start = _start_dir(work)
    init_scratch(work, start)
    outcome = _train(work, scratch.train, _Parts(start))
    _finish_full(work, outcome, start)


def train_stage(work: Work) -> None:
    """One stage of pre-training, or instruction tuning, on the chain so far."""
    settings = TrainSettings(**work.stage.section["train"])
    model, adapters = work.inputs["model"], work.roles("adapter-")
    check_chain(model, adapters)
    require_same_tokenizer(
        (f"model {model.path}", model.manifest),
        (f"tokens {work.path('tokens')}", work.inputs["tokens"].manifest),
    )
    parts = _Parts(model.path, tuple(a.path for a in adapters))
    outcome = _train(work, settings, parts)
    if settings.full:
        _finish_full(work, outcome, model.path)
    else:
        _finish_adapter(work, outcome, model)


def train_draft(work: Work) -> None:
    """The target's first blocks with its embedding and head, trained to say what it says."""
    from altiplano.draft import cut_draft

    section = work.project.config.draft
    assert section is not None
    target = work.inputs["target"]
    require_same_tokenizer(
        (f"target {target.path}", target.manifest),
        (f"tokens {work.path('tokens')}", work.inputs["tokens"].manifest),
    )
    start = _start_dir(work)
    cut_draft(target.path, start, section.layers)
    teacher = target.path if section.loss == "distill" else None
    outcome = _train(work, section.train, _Parts(start, teacher=teacher))
    _finish_full(work, outcome, start)


@dataclass(frozen=True)
class _Parts:
    """What a run starts from."""

    model_dir: Path
    adapter_dirs: tuple[Path, ...] = ()
    teacher: Path | None = None


def _train(work: Work, settings: TrainSettings, parts: _Parts) -> TrainOutcome:
    from altiplano.data.tokens.store import TokenStore
    from altiplano.train.schedule import stream_seed
    from altiplano.train.strategy import Sharing
    from altiplano.train.zero_config import deepspeed_config

    config = work.project.config
    tokens = work.inputs["tokens"].manifest
    store_dir = work.path("tokens") / "train"
    TokenStore.open(store_dir, tokenizer_fingerprint=tokens.tokenizer_fingerprint)
    named = settings.model_copy(
        update={"name": work.stage.name, "begin": _resolved(work, settings.begin)}
    )
    _check_beginning(work, named)
    cluster = config.cluster
    sharing = Sharing(cluster.strategy, cluster.offload, _deepspeed_json(work))
    if sharing.strategy != "ddp":
        # A contradiction is said before any worker starts.
        deepspeed_config(named, sharing, cluster.worker_range[0])
    job = TrainJob(
        settings=named,
        model_dir=parts.model_dir,
        adapter_dirs=parts.adapter_dirs,
        vocab_old=tokens.vocab_old or 0,
        store_dir=store_dir,
        seed=stream_seed(config.seed, work.stage.name),
        run_key=work.run_key,
        num_threads=max(1, int(cluster.cpus_per_worker)),
        use_gpu=cluster.gpus_per_worker > 0,
        teacher_dir=parts.teacher,
        held_out_dir=work.path("held_out" if "held_out" in work.inputs else "tokens"),
        held_out_bytes=config.evaluate.max_bytes_per_language,
        sharing=sharing,
        stall_timeout_s=cluster.stall_timeout_s,
        profile_steps=config.track.profile_steps,
    )
    try:
        outcome = run_training(job, cluster, work.project.output / _CHECKPOINTS, config.track)
    except MemoryShortageError as error:
        raise TrainingError(f"{error}\n{_explain_shortage(work)}") from None
    work.manifest.metrics = outcome.metrics
    return outcome


def _explain_shortage(work: Work) -> str:
    """What takes a worker's memory by the plan, and which key to change."""
    from altiplano.plan import explain_oom, make_plan

    stages = make_plan(work.project).stages
    return "\n".join(explain_oom(stage) for stage in stages if stage.name == work.stage.name)


def _check_beginning(work: Work, settings: TrainSettings) -> None:
    """Refuse a beginning that does not fit, before a weight is loaded."""
    from altiplano.train.begin import check_beginning

    if settings.begin is None:
        return
    begin = open_artifact(Path(settings.begin.path))
    own = artifact_path(work.project, work.stage.name)
    if begin.path.resolve() == own.resolve():
        raise TrainingError(
            f"stage {settings.name} begins with its own artifact {own}, which it would replace: "
            f"copy that elsewhere, or give another `output`"
        )
    # Without a model among its inputs a stage trains everything: only the tokenizer has to fit.
    model = work.inputs.get("model", work.inputs["tokens"])
    check_beginning(settings, begin, model, work.roles("adapter-"))


def _resolved(work: Work, begin: BeginSettings | None) -> BeginSettings | None:
    """`begin` with its path as this machine has it."""
    if begin is None:
        return None
    return begin.model_copy(update={"path": work.project.resolve(begin.path)})


def _deepspeed_json(work: Work) -> str | None:
    """The text of the user's own DeepSpeed JSON: workers may not see the file."""
    path = work.project.config.cluster.deepspeed
    if path is None:
        return None
    try:
        return Path(work.project.resolve(path)).read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"cluster.deepspeed {path} cannot be read: {error.strerror}") from None


def _start_dir(work: Work) -> Path:
    """Where the weights a full run starts from are written; the same for a resumed run."""
    start = work.project.output / _CHECKPOINTS / f"{work.stage.name}-{work.run_key[:12]}" / "start"
    shutil.rmtree(start, ignore_errors=True)
    start.mkdir(parents=True)
    return start


def _finish_adapter(work: Work, outcome: TrainOutcome, model: Artifact) -> None:
    """Turn the last checkpoint into an adapter artifact."""
    from altiplano.model.adapt import check_trained

    shutil.copytree(outcome.weights_dir, work.output, dirs_exist_ok=True)
    check_trained(work.output)
    source = model.manifest
    work.manifest.tokenizer_fingerprint = source.tokenizer_fingerprint
    work.manifest.vocab_old, work.manifest.vocab_new = source.vocab_old, source.vocab_new
    work.manifest.metrics["base_weights_fingerprint"] = source.weights_fingerprint
    _finish_logs(work, outcome)


def _finish_full(work: Work, outcome: TrainOutcome, start: Path) -> None:
    """Turn the last checkpoint into a model artifact in the type of the model it started from."""
    from altiplano.model.adapt import FULL_WEIGHTS
    from altiplano.model.load import cast_weights, copy_tokenizer, read_config, weights_fingerprint

    for name in ("config.json", "generation_config.json"):
        shutil.copy2(start / name, work.output / name)
    copy_tokenizer(start, work.output)
    dtype = read_config(start).get("dtype", "float32")
    cast_weights(outcome.weights_dir / FULL_WEIGHTS, work.output / FULL_WEIGHTS, dtype)
    tokens = work.inputs["tokens"].manifest
    work.manifest.tokenizer_fingerprint = tokens.tokenizer_fingerprint
    work.manifest.vocab_old, work.manifest.vocab_new = tokens.vocab_old, tokens.vocab_new
    work.manifest.weights_fingerprint = weights_fingerprint(work.output)
    _finish_logs(work, outcome)


def _finish_logs(work: Work, outcome: TrainOutcome) -> None:
    """Log, curve and TensorBoard events into the artifact; the run's checkpoints go after it."""
    from altiplano.evaluate.curves import plot_training
    from altiplano.train.begin import OPTIMIZER
    from altiplano.train.follow import EVENTS, LOG
    from altiplano.train.observe import PROFILE

    logs = work.output / LOGS
    shutil.copytree(outcome.work_dir / EVENTS, logs / EVENTS)
    shutil.copy2(outcome.work_dir / LOG, logs / LOG)
    if (outcome.work_dir / PROFILE).is_file():
        shutil.copy2(outcome.work_dir / PROFILE, logs / PROFILE)
    if (outcome.work_dir / OPTIMIZER).is_dir():
        shutil.copytree(outcome.work_dir / OPTIMIZER, work.output / OPTIMIZER)
    plot_training(logs / LOG, logs / "curve.png", work.stage.name)
    work.spent += [outcome.states, outcome.work_dir]
