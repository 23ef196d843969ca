"""Checkpoints: trained weights, optimizer moments and the step, all as safetensors and JSON.

They are unsharded, so any number of workers resumes them. Size: three times the trained tensors.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from altiplano.errors import TrainingError
from altiplano.model.adapt import Trainee

WEIGHTS = "weights"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


def save_checkpoint(
    directory: Path,
    trainee: Trainee,
    optimizer: torch.optim.AdamW,
    *,
    step: int,
    run_key: str,
    precision: str,
) -> None:
    """Write a checkpoint after `step` finished steps computed in `precision`."""
    trainee.save(directory / WEIGHTS)
    tensors = {}
    for name, parameter in trainee.trainable().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value.detach().cpu().contiguous()
    save_file(tensors, directory / _OPTIMIZER)
    state = {"step": step, "run_key": run_key, "precision": precision}
    (directory / _STATE).write_text(json.dumps(state))


def saved_precision(directory: Path) -> str:
    """What the run was computed in so far, so that resuming it does not change that."""
    precision: str = json.loads((directory / _STATE).read_text())["precision"]
    return precision


def load_checkpoint(
    directory: Path, trainee: Trainee, optimizer: torch.optim.AdamW, *, run_key: str
) -> int:
    """Restore weights and moments; returns the number of finished steps.

    Raises:
        TrainingError: the checkpoint belongs to a run with other settings or data.
    """
    state = json.loads((directory / _STATE).read_text())
    if state["run_key"] != run_key:
        raise TrainingError(
            f"checkpoint {directory} is of run {state['run_key'][:12]}, this is run "
            f"{run_key[:12]}: delete it to start anew"
        )
    trainee.load(directory / WEIGHTS)
    stored = load_file(directory / _OPTIMIZER)
    for name, parameter in trainee.trainable().items():
        moments = {k.split(":", 1)[0]: v for k, v in stored.items() if k.split(":", 1)[1] == name}
        # AdamW keeps its step counter as a CPU or device scalar; fused wants it beside the weights.
        optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in moments.items()}
    return int(state["step"])
