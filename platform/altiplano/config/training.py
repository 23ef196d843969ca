"""What one training stage may say: what is trained, how fast, for how long.

Shared by pre-training, instruction tuning, the draft and a base made from scratch, so that all of
them are the same engine with other settings. Knows nothing of models or data.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Common rules: unknown keys are errors, values do not change, docs sit under fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021), through PEFT."""

    r: int = Field(8, ge=1)
    """Rank."""
    alpha: float = Field(16, gt=0)
    """Scale: the update is alpha / r * B A."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
    )
    """Names of the linear layers that get an adapter."""


class TrainSettings(Section):
    """One training stage."""

    name: str = Field("train", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the stage; its artifact carries it."""
    full: bool = False
    """Train every parameter; excludes `rows` and `lora`."""
    rows: Literal["none", "new", "all"] = "new"
    """Which rows of embedding and head are trained. `new`: old rows stay bit-identical."""
    lora: LoraSettings | None = None
    """Adapters on the linear layers; none by default."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    rows_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of embedding and head rows; `learning_rate` by default."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; embedding rows and norms get none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where cosine and linear end, relative to the peak."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the data; ignored where `steps` is given."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    tokens_per_step: int = Field(8192, ge=1)
    """Tokens of one optimizer step over all workers; accumulation is derived from it."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Tokens of one forward pass of one worker."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the forward pass; `auto` probes whether bfloat16 pays. Trained weights are fp32."""
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel; `auto` takes FlashAttention on GPUs that have it, else PyTorch's SDPA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    checkpoint_steps: int = Field(50, ge=1)
    """Steps between checkpoints; a killed run goes on from the last one."""
    log_steps: int = Field(5, ge=1)
    """Steps between log lines."""

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not self.full and self.rows == "none" and self.lora is None:
            raise ValueError("nothing would be trained: set `rows`, `lora` or `full`")
        if self.full and self.lora is not None:
            raise ValueError("`full: true` trains every parameter: drop `lora`")
        return self


class FullTrainSettings(TrainSettings):
    """A training stage that trains every parameter: a base from scratch, a draft."""

    full: Literal[True] = True
    """Always every parameter."""
