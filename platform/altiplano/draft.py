"""The draft: the target's first blocks with its own embedding, final norm and head.

It has the target's tokenizer by construction. Knows only how to cut; training it is the engine's
work. Costs one load of the target.
"""

from pathlib import Path

from altiplano.errors import ModelError
from altiplano.model.load import copy_tokenizer, load_model, read_config, save_model


def cut_draft(target: Path, output: Path, layers: int) -> None:
    """Write a model of the target's first `layers` blocks.

    Raises:
        ModelError: the target has no more blocks than that.
    """
    model = load_model(target, read_config(target).get("dtype", "float32"))
    have = model.config.num_hidden_layers
    if layers >= have:
        raise ModelError(
            f"draft.layers is {layers}, the target has {have} blocks: a draft must be smaller"
        )
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    save_model(model, output)
    copy_tokenizer(target, output)
