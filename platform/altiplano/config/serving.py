"""The `serve` section: models, their draft, autoscaling, limits, keys, the page.

Knows values and which of them exclude each other, not who uses them. A key of `EngineSettings` set
in `serve` holds for every model of the service; set in an entry of `serve.models`, for that one.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from altiplano.config.training import Section


class DraftSettings(Section):
    """Speculative decoding: a small model guesses, the large verifies (Leviathan et al. 2023)."""

    placement: Literal["engine", "replica", "none"] = "engine"
    """Where the draft runs: inside each engine; as a Ray Serve deployment of its own that several
    engines share; nowhere. A run without a draft is served plainly."""
    method: Literal["auto", "drafter", "draft_model"] = "auto"
    """What drafts inside the engine: our own loop (`drafter`, as the replica runs it, which can
    switch itself off) or vLLM's `draft_model`; `auto` is the first on CPUs, the second on GPUs."""
    tokens: int = Field(4, ge=1, le=16)
    """Most tokens proposed per step; fewer where fewer pay."""
    adaptive: bool = True
    """Choose the number of tokens by acceptance and load, and switch speculation off where it
    would be slower (and on again); false always proposes `tokens`."""
    overlap: bool = True
    """Replica: go on drafting the likely continuation while the target verifies."""
    deadline_ms: float = Field(50, gt=0, le=1000)
    """Replica: the longest an engine step waits for a draft; then it decodes plainly."""
    min_replicas: int = Field(1, ge=1)
    """Replica: fewest draft replicas."""
    max_replicas: int = Field(1, ge=1)
    """Replica: most draft replicas; scaled by how busy they are."""
    num_cpus: float = Field(1, ge=0)
    """Replica: CPUs a draft replica takes in the cluster."""
    num_gpus: float = Field(0, ge=0)
    """Replica: GPUs a draft replica takes; 0 drafts on the CPU."""
    cache_gib: float = Field(0.25, gt=0)
    """KV cache of a draft, in GiB."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"`max_replicas` {self.max_replicas} is below `min_replicas` {self.min_replicas}"
            )
        return self


class EngineSettings(Section):
    """One model's engine and its replicas."""

    task: Literal["generate", "embed"] = "generate"
    """Answer with text, or with embeddings (`/v1/embeddings`)."""
    min_replicas: int = Field(1, ge=0)
    """Fewest replicas the autoscaler keeps; with 0 the first request waits for a start."""
    max_replicas: int = Field(1, ge=1)
    """Most replicas it may start."""
    target_ongoing_requests: float = Field(16, gt=0)
    """Requests per replica (running and waiting) the autoscaler aims at."""
    max_ongoing_requests: int = Field(64, ge=1)
    """Requests a replica works on at once."""
    max_queued_requests: int = Field(128, ge=0)
    """Requests that wait beyond those; further ones are answered 503 with `Retry-After`."""
    upscale_delay_s: float = Field(5, ge=0)
    """How long the load must last before replicas are added."""
    downscale_delay_s: float = Field(60, ge=0)
    """How long the calm must last before replicas are taken away."""
    prefix_routing: bool = False
    """Send requests that begin alike to the replica that has their KV cache."""
    max_model_len: int | None = Field(None, ge=16)
    """Longest context served, in tokens; the model's own by default."""
    kv_cache_gib: float = Field(0.5, gt=0)
    """KV cache per replica on CPU, in GiB (on GPUs vLLM's gpu_memory_utilization rules)."""
    gpus_per_replica: int = Field(0, ge=0)
    """GPUs per replica (tensor parallel); 0 serves on the CPU."""
    cpus_per_replica: float = Field(1, ge=0)
    """CPUs per replica; on CPUs also the engine's threads."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the engine computes in."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Weights in 4 or 8 bits while loading (MXFP4, FP8; on GPUs, from 16-bit weights)."""
    enforce_eager: bool = True
    """Start quickly without compiling; set false for long-lived services."""
    max_adapters: int = Field(0, ge=0)
    """LoRA adapters that may be loaded while serving; 0 refuses them. Not together with a draft."""
    max_adapter_rank: int = Field(64, ge=1)
    """Largest rank of such an adapter."""
    draft: DraftSettings = DraftSettings()
    """Speculation."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.max_replicas < self.min_replicas:
            problems.append(
                f"`max_replicas` {self.max_replicas} is below `min_replicas` {self.min_replicas}"
            )
        if self.quantization != "none" and self.gpus_per_replica == 0:
            problems.append(
                f"`quantization: {self.quantization}` needs a GPU in vLLM: set `gpus_per_replica`, "
                f"or `quantization: none`"
            )
        if self.draft.placement == "replica" and self.gpus_per_replica > 1:
            problems.append(
                f"`draft.placement: replica` is not built for tensor-parallel targets "
                f"(`gpus_per_replica` is {self.gpus_per_replica}): use `engine` or `none`"
            )
        if self.draft.method == "drafter" and self.gpus_per_replica > 1:
            problems.append(
                f"`draft.method: drafter` is not built for tensor-parallel targets "
                f"(`gpus_per_replica` is {self.gpus_per_replica}): use `draft_model`"
            )
        if self.max_adapters and self.task == "embed":
            problems.append("`max_adapters` is for `task: generate`")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class ModelSettings(EngineSettings):
    """One of several models behind the same address."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    """Name clients give in `model`."""
    path: str
    """A finished run, a model artifact, or a Hugging Face Llama directory."""
    draft_path: str | None = None
    """A draft for it; by default the run's own."""


class KeySettings(Section):
    """Who may call."""

    file: str | None = None
    """File of API keys, hashed, made with `altiplano serve-key`; without it no key is asked for.
    Re-read when it changes."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Per key, where the key's own line sets none."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Prompt and answer tokens per key, where the key's own line sets none."""


class LimitSettings(Section):
    """What one request may ask for."""

    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt; by default what the model's context leaves."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer; by default what the model's context leaves."""
    default_max_tokens: int | None = Field(None, ge=1)
    """Answer length where a request names none; by default what the context leaves for chat, 16
    for completions, as OpenAI's."""
    max_n: int = Field(16, ge=1)
    """Most answers per request (`n`, `best_of`, beams)."""
    max_body_kib: int = Field(2048, ge=1)
    """Largest request body, in KiB."""
    max_schema_depth: int = Field(32, ge=1)
    """Deepest nesting of a request's JSON."""
    max_requests: int = Field(1024, ge=1)
    """Requests one HTTP replica holds at once; further ones are answered 503."""
    slow_client_s: float = Field(30, gt=0)
    """Give a client up that does not read its answer for this long."""


class ServeSection(EngineSettings):
    """The OpenAI-compatible service."""

    host: str = "127.0.0.1"
    """Address the HTTP port is bound to; loopback unless you say otherwise."""
    port: int = Field(8000, ge=1, le=65535)
    """HTTP port."""
    model_name: str = Field("altiplano", pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    """Name clients give in `model` for the run that is served."""
    models: list[ModelSettings] = []
    """Further models behind the same address."""
    http_replicas: int = Field(1, ge=1)
    """Replicas of the HTTP side; one carries thousands of tokens a second."""
    data_host: str = "127.0.0.1"
    """Address at which replicas on other nodes reach a replica's data socket; `node` is the
    node's own. Loopback is right where all replicas share one machine."""
    keys: KeySettings = KeySettings()
    """API keys and their rates."""
    limits: LimitSettings = LimitSettings()
    """Bounds of one request."""
    cors_origins: list[str] = []
    """Web origins that may call from a browser; none by default."""
    tls_certificate: str | None = None
    """PEM file; with `tls_key` the port speaks HTTPS."""
    tls_key: str | None = None
    """PEM file of the certificate's key."""
    page: bool = False
    """Serve the chat page at `/chat`."""
    startup_timeout_s: float = Field(300, gt=0)
    """Give up when the service is not healthy after this long."""
    drain_s: float = Field(60, gt=0)
    """How long a replica that is taken away may finish its answers."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        problems = []
        if (self.tls_certificate is None) != (self.tls_key is None):
            problems.append("`tls_certificate` and `tls_key` go together: set both or neither")
        names = [self.model_name, *(model.name for model in self.models)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            problems.append(f"names of models must differ, {twice} are given twice")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def entries(self, path: str | None, draft_path: str | None = None) -> list[ModelSettings]:
        """Every model of the service, its keys complete.

        Args:
            path: the run or model that `model_name` names; None where only `models` are served.
            draft_path: its draft, where it lies elsewhere than in the run.
        """
        shared = {
            name: getattr(self, name)
            for name in self.model_fields_set & EngineSettings.model_fields.keys()
        }
        own = (
            []
            if path is None
            else [ModelSettings(name=self.model_name, path=path, draft_path=draft_path, **shared)]
        )
        return own + [
            ModelSettings(
                **{**shared, **{name: getattr(model, name) for name in model.model_fields_set}}
            )
            for model in self.models
        ]
