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
    """Names of the linear layers that get an adapter; `lm_head` may be one."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA, Kalajdzievski 2023); for large ranks."""
    dora: bool = False
    """Train each output's magnitude apart from its direction (DoRA, Liu et al. 2024); slower."""
    init: Literal["zero", "pissa"] = "zero"
    """`zero`: B starts at 0. `pissa`: A and B start as the layer's principal singular vectors, and
    the frozen part loses them (Meng et al. 2024); saved as an ordinary adapter of rank 2 r."""
    b_learning_rate_ratio: float = Field(1.0, gt=0)
    """Learning rate of B relative to A's (LoRA+, Hayou et al. 2024, suggests 16)."""


class BeginSettings(Section):
    """What a stage begins with instead of fresh adapters. Resuming the same run needs no key."""

    mode: Literal["warm_start", "continue"]
    """`warm_start`: trained weights only, a fresh optimizer and a new learning-rate curve.
    `continue`: weights, optimizer moments and step; new data comes after the old and the
    learning-rate curve is carried on."""
    path: str
    """Artifact of the earlier stage (a directory of a run); for `continue` it was trained with
    `keep_optimizer: true`."""


class EarlyStop(Section):
    """End a stage when its held-out bits per byte no longer fall."""

    patience: int = Field(3, ge=1)
    """Evaluations without improvement before the stage ends."""
    min_delta: float = Field(0.0, ge=0)
    """Smaller improvements count as none, in bits per byte."""


class TrainSettings(Section):
    """One training stage."""

    name: str = Field("train", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the stage; its artifact carries it."""
    full: bool = False
    """Train every parameter; excludes `rows` and `lora`."""
    rows: Literal["none", "new", "all"] = "new"
    """Which rows of embedding and head are trained. `new`: old rows stay bit-identical."""
    row_matrices: Literal["both", "embedding", "head"] = "both"
    """Whose rows `rows` means; the other matrix stays frozen."""
    lora: LoraSettings | None = None
    """Adapters on the linear layers; none by default."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Store the blocks' frozen matrices in 8 bits, or 4 (NF4, doubly quantised; QLoRA, Dettmers et
    al. 2023), through bitsandbytes. Merging adds the adapter to the unquantised base."""
    begin: BeginSettings | None = None
    """Begin with an earlier stage's trained weights."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    rows_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of embedding and head rows; `learning_rate` by default."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; norms get none."""
    rows_weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of embedding and head rows."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after warm-up. `wsd`: constant, then linear over the last
    `decay_ratio` of the steps (warm-up, stable, decay)."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of steps; comes before `warmup_ratio`."""
    decay_ratio: float = Field(0.1, gt=0, le=1)
    """Share of the steps over which `wsd` falls."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where cosine, linear and wsd end, relative to the peak."""
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
    """Attention kernel. `sdpa`: PyTorch's, document by document; `auto` takes FlashAttention on
    GPUs that have it, else `sdpa`."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of every second block, or of every
    block (less memory, a third more time)."""
    compile: bool = False
    """Compile each block with torch.compile: faster steps after minutes of compiling."""
    evaluate_steps: int | None = Field(None, ge=1)
    """Steps between evaluations of the held-out bits per byte of every language."""
    early_stop: EarlyStop | None = None
    """End before `steps`; needs `evaluate_steps`."""
    keep_best: bool = False
    """Take the checkpoint with the fewest held-out bits per byte (the mean over languages) instead
    of the last; needs `evaluate_steps`."""
    checkpoint_steps: int = Field(50, ge=1)
    """Steps between checkpoints; a killed run goes on from the last one."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept while the stage runs, beside the best one."""
    keep_optimizer: bool = False
    """Keep the optimizer's moments in the artifact (three times its size), so that a later stage
    can `continue` from it."""
    max_loss_rise: float = Field(2.0, gt=0)
    """Stop as diverged when the smoothed loss is this many nats above its lowest."""
    log_steps: int = Field(5, ge=1)
    """Steps between log lines."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        problems = [
            problem
            for wrong, problem in (
                (
                    not self.full and self.rows == "none" and self.lora is None,
                    "nothing would be trained: set `rows`, `lora` or `full`",
                ),
                (
                    self.full and self.lora is not None,
                    "`full: true` trains every parameter: drop `lora`",
                ),
                (
                    self.full and self.quantize != "none",
                    "`full: true` trains every parameter, none can be quantised: drop `quantize`",
                ),
                (
                    self.early_stop is not None and self.evaluate_steps is None,
                    "`early_stop` looks at evaluations: set `evaluate_steps`",
                ),
                (
                    self.keep_best and self.evaluate_steps is None,
                    "`keep_best` looks at evaluations: set `evaluate_steps`",
                ),
                (
                    self.lora is not None and self.lora.init == "pissa" and self.lora.dora,
                    "`lora.init: pissa` and `lora.dora` exclude each other",
                ),
                (
                    self.lora is not None and self.lora.init == "pissa" and self.quantize != "none",
                    "`lora.init: pissa` changes the frozen base, `quantize` has stored it: use one",
                ),
                (
                    self.steps is not None
                    and self.warmup_steps is not None
                    and self.warmup_steps >= self.steps,
                    f"`warmup_steps` {self.warmup_steps} leaves none of the {self.steps} `steps`",
                ),
            )
            if wrong
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class FullTrainSettings(TrainSettings):
    """A training stage that trains every parameter: a base from scratch, a draft."""

    full: Literal[True] = True
    """Always every parameter."""
