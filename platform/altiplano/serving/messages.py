"""What the HTTP side and a model's replica say to each other, as msgpack.

A `Job` goes out through a Ray Serve handle, which chooses the replica, counts the job for the
autoscaler and tells of the replica's death; its `Step`s come back through a socket (`link.py`), one
message per engine step for all jobs. Ids only: text is the HTTP side's business. Knows neither.
"""

import msgspec

TokenLogprob = tuple[int, float, int]
"""Token id, natural logarithm of its probability, rank (1 = likeliest)."""


class Sampling(msgspec.Struct, omit_defaults=True):
    """How tokens are chosen; the names and defaults of vLLM and OpenAI."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 is all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] = []
    """Beside the model's own end tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Likeliest tokens reported per position beside the chosen one; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt (`echo` with `logprobs`)."""
    logit_bias: dict[int, float] = {}
    guided: dict[str, object] | None = None
    """One of {"json": schema}, {"json_object": True}, {"regex": str}, {"choice": [str]},
    {"grammar": str}."""


class Job(msgspec.Struct, omit_defaults=True):
    """One answer to one prompt. `n` answers are n jobs."""

    id: str
    """128 random bits: who knows it may answer it."""
    prompt: list[int]
    sampling: Sampling
    reply_to: str = ""
    """Address of the socket that takes its steps (`link.Inbox.address`)."""
    adapter: str | None = None
    """Name of a loaded LoRA adapter."""
    adapter_path: str | None = None
    """Where every replica finds it."""


class Step(msgspec.Struct, array_like=True, omit_defaults=True):
    """What one engine step made for one job."""

    id: str
    tokens: list[int]
    finish: str | None = None
    """`stop`, `length` or `error`; None while it goes on."""
    logprobs: list[list[TokenLogprob]] | None = None
    """Per token of `tokens`: the chosen one first, then the likeliest."""
    prompt_logprobs: list[list[TokenLogprob] | None] | None = None
    """Only in the first step, per prompt token; None at the first."""
    cached_tokens: int = 0
    """Prompt tokens whose KV cache was there (first step)."""
    proposed: int = 0
    """Tokens a draft proposed for the whole answer (last step, where the engine knows)."""
    accepted: int = 0
    """How many of those it has."""
    stop_token: int | None = None
    """The id in `stop_token_ids` that ended it, where one did."""


class Outcome(msgspec.Struct, omit_defaults=True):
    """What the handle call of a job returns when the job is over."""

    status: str
    """`done`; `invalid`: the engine refuses the job (`message` says why); `lost`: it died."""
    message: str = ""
    tokens: int = 0
    """How many were made."""


class Embedding(msgspec.Struct):
    """What the handle call of an embedding job returns."""

    status: str
    """As in `Outcome`."""
    message: str = ""
    vector: list[float] = []


class About(msgspec.Struct):
    """What a replica says of its model (`Target.describe`)."""

    max_model_len: int
    vocab_size: int
    dtype: str
    engine: str
    """Name and version, e.g. `vllm 0.29.0`."""
    task: str
    weights_gib: float


def pack(message: msgspec.Struct | list[Step]) -> bytes:
    """Msgpack of a message, or of one engine step's messages."""
    return msgspec.msgpack.encode(message)


def unpack(data: bytes, kind: type) -> object:
    """The message in `data`.

    Raises:
        msgspec.ValidationError: `data` is no such message.
    """
    return msgspec.msgpack.decode(data, type=kind)
