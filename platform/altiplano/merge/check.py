"""Do a model and its adapters belong together? Answered from manifests alone.

Runs before any weight is loaded. Knows fingerprints, not tensors; costs nothing.
"""

from collections.abc import Sequence

from altiplano.artifact import Artifact, require_same_tokenizer, require_same_weights
from altiplano.errors import MismatchError


def check_chain(model: Artifact, adapters: Sequence[Artifact]) -> None:
    """Refuse adapters of another vocabulary, of another base, or in another order.

    Args:
        model: the model the chain starts from.
        adapters: in the order in which they were trained.

    Raises:
        MismatchError: names both sides, their fingerprints and sizes, and the mending command.
    """
    base = (f"model {model.path}", model.manifest)
    for position, adapter in enumerate(adapters):
        this = (f"adapter {adapter.path}", adapter.manifest)
        require_same_tokenizer(this, base)
        require_same_weights(this, base)
        _require_predecessors(adapter, adapters[:position])


def _require_predecessors(adapter: Artifact, before: Sequence[Artifact]) -> None:
    """An adapter is a correction of what the adapters before it made, and of nothing else."""
    inputs = adapter.manifest.inputs
    roles = [f"adapter-{index}" for index in range(len(inputs)) if f"adapter-{index}" in inputs]
    trained_on = [(inputs[role].path, inputs[role].fingerprint) for role in roles]
    given = [(str(artifact.path), artifact.manifest.fingerprint) for artifact in before]
    if [fingerprint for _, fingerprint in trained_on] == [fingerprint for _, fingerprint in given]:
        return
    raise MismatchError(
        f"adapter {adapter.path} does not follow the adapters it is merged after:\n"
        f"  it was trained after: {_listed(trained_on)}\n"
        f"  it is merged after:   {_listed(given)}\n"
        f"give the adapters it was trained after, in that order, or train it again: "
        f"`altiplano run CONFIG --from {adapter.manifest.stage}`"
    )


def _listed(adapters: Sequence[tuple[str, str]]) -> str:
    named = [f"{path} ({fingerprint[:16]})" for path, fingerprint in adapters]
    return ", ".join(named) or "none"
