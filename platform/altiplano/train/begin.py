"""What a stage begins with when its config names an earlier stage's artifact.

`check_beginning` runs in the driver, on manifests alone; `read_beginning` in every worker, once its
trainable parts are in place. The earlier stage's weights are the *start value* of this stage's, so
both must have been put into the same frozen model: an adapter that this stage also folds into its
base would count twice. Costs one read of the artifact (three times that with moments).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from altiplano.artifact import Artifact, require_same_tokenizer, require_same_weights
from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError
from altiplano.model.adapt import Trainee
from altiplano.train.checkpoint import read_state
from altiplano.train.schedule import Earlier
from altiplano.train.state import TrainState

OPTIMIZER = "optimizer"
"""Folder inside an artifact: the state after its last step, as in a checkpoint
(`keep_optimizer`)."""
STEPS = "steps"
"""Key of `TrainState.progress`: steps of the learning-rate curve."""

_SAME = ("full", "rows", "row_matrices")
_SAME_LORA = ("r", "alpha", "modules", "rank_stabilized", "dora", "init")


@dataclass(frozen=True)
class Beginning:
    """Where a stage begins.

    Attributes:
        earlier: how far the earlier stage came, where this one continues it.
        state: weights and moments to restore; None where the trainee has its weights already.
    """

    earlier: Earlier | None = None
    state: TrainState | None = None


def check_beginning(
    settings: TrainSettings, begin: Artifact, model: Artifact, adapters: Sequence[Artifact]
) -> None:
    """Refuse an artifact that this stage cannot begin with, before any weight is loaded.

    A stage that trains everything replaces every weight it starts from, so only the vocabulary has
    to be the same.

    Args:
        begin: the artifact that `settings.begin` names.
        model: what this stage trains on; where it trains everything, any artifact of its tokenizer.
        adapters: folded into it before, in order.

    Raises:
        MismatchError: another tokenizer or other base weights.
        TrainingError: other trained parts, another place in the chain, or no optimizer state.
    """
    assert settings.begin is not None
    if "train" not in begin.manifest.section:
        raise TrainingError(
            f"stage {settings.name} cannot begin with {begin.path}: that is an artifact of stage "
            f"{begin.manifest.stage}, which trains nothing; give one of a training stage"
        )
    this, base = (f"begin {begin.path}", begin.manifest), (f"model {model.path}", model.manifest)
    require_same_tokenizer(this, base)
    _require_same_parts(settings, begin)
    if not settings.full:
        require_same_weights(this, base)
        _require_same_place(settings, begin, adapters)
    if settings.begin.mode == "continue" and not (begin.path / OPTIMIZER).is_dir():
        raise TrainingError(
            f"stage {settings.name} cannot continue {begin.path}, which holds no optimizer state: "
            f"train it with `keep_optimizer: true`, or set `begin.mode: warm_start`"
        )


def read_beginning(settings: TrainSettings, trainee: Trainee) -> Beginning:
    """Take the earlier stage's weights; where this one continues it, moments and step as well.

    Args:
        settings: `begin.path` as a path that this worker can open.
        trainee: gets the weights; not yet shared by a strategy, which copies or divides them.

    Returns:
        what the strategy is to restore; a warm start leaves nothing.

    Raises:
        TrainingError: the artifact's tensors are not those that are trained.
    """
    assert settings.begin is not None
    directory = Path(settings.begin.path)
    # First of all the artifact itself: its files are checked against what is trained here.
    trainee.load(directory)
    if settings.begin.mode == "warm_start":
        return Beginning()
    state = read_state(directory / OPTIMIZER)
    assert state.weights.keys() == trainee.trainable().keys(), "a state of other tensors"
    begun = TrainState(state.step, state.weights, state.moments)
    return Beginning(Earlier(state.step, int(state.progress[STEPS])), begun)


def _require_same_parts(settings: TrainSettings, begin: Artifact) -> None:
    """Compare what is trained, by the settings of both stages."""
    ours, theirs = (
        _parts(stage) for stage in (settings, TrainSettings(**begin.manifest.section["train"]))
    )
    if different := [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]:
        told = "\n".join(
            f"  `{key}`: {theirs.get(key)} in {begin.path}, {ours.get(key)} here"
            for key in different
        )
        raise TrainingError(
            f"stage {settings.name} does not train what {begin.path} holds:\n{told}\n"
            f"make them the same, or drop `begin`"
        )


def _parts(settings: TrainSettings) -> dict[str, object]:
    """The settings that decide which tensors are trained, and what they mean."""
    parts: dict[str, object] = {key: getattr(settings, key) for key in _SAME}
    if settings.lora is None:
        return {**parts, "lora": None}
    parts |= {f"lora.{key}": getattr(settings.lora, key) for key in _SAME_LORA}
    return {**parts, "lora.modules": sorted(settings.lora.modules)}


def _require_same_place(
    settings: TrainSettings, begin: Artifact, adapters: Sequence[Artifact]
) -> None:
    """Both stages correct the same chain; else the earlier adapter's start would mean another."""
    inputs = begin.manifest.inputs
    roles = [f"adapter-{index}" for index in range(len(inputs)) if f"adapter-{index}" in inputs]
    theirs = [(inputs[role].path, inputs[role].fingerprint) for role in roles]
    ours = [(artifact.path.name, artifact.manifest.fingerprint) for artifact in adapters]
    if begin.manifest.fingerprint in [fingerprint for _, fingerprint in ours]:
        raise TrainingError(
            f"stage {settings.name} begins with {begin.path}, which is already in the base it "
            f"trains on, and would count twice: drop `begin` (a chain goes on by itself)"
        )
    if [fingerprint for _, fingerprint in theirs] != [fingerprint for _, fingerprint in ours]:
        raise TrainingError(
            f"stage {settings.name} cannot begin with {begin.path}, which corrects another base:\n"
            f"  {begin.path}: trained after {_listed(theirs)}\n"
            f"  stage {settings.name}: trains after {_listed(ours)}\n"
            f"begin with an adapter of the same place in the chain, or drop `begin`"
        )


def _listed(adapters: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{path} ({fingerprint[:16]})" for path, fingerprint in adapters) or "none"
