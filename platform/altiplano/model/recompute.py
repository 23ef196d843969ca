"""Memory against time, and compiling against time, block by block.

Recomputing keeps a block's input and computes the block again in the backward pass: the same
gradients to the bit, up to a third more time. Compiling fuses a block's elementwise operations;
attention stays outside (see `attention.attend`). Knows nothing of training.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

RecomputeMode = Literal["none", "selective", "full"]


def apply_recompute(model: "LlamaForCausalLM", mode: RecomputeMode) -> None:
    """Have the decoder blocks recompute their activations in the backward pass, in place.

    Args:
        mode: `none`; `selective`, every second block; `full`, every block.
    """
    if mode == "none":
        model.gradient_checkpointing_disable()
        return
    # Non-reentrant: gradients reach adapters though the embedding is frozen.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if mode == "selective":
        for block in model.model.layers[1::2]:
            block.gradient_checkpointing = False


def compile_blocks(model: "LlamaForCausalLM", *, backend: str = "inductor") -> None:
    """Compile every decoder block, in place; they share one compiled form.

    Shapes are static: a micro-batch of another shape is compiled anew. Compiling happens in the
    first call and takes a minute or so. Dropout is random in another way than uncompiled.

    Args:
        backend: of torch.compile. `aot_eager` makes the same graphs, which nothing fuses.
    """
    for block in model.model.layers:
        block.compile(dynamic=False, backend=backend)
