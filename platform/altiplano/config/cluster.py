"""What a config may say of where a run works and is seen: Ray's cluster, trackers.

Nothing here changes what is learned, so no stage is made again for it. Knows neither Ray nor any
tracker.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from altiplano.config.training import Section


class ClusterSection(Section):
    """Which Ray cluster, what each training worker takes from it, and how they share the work.

    No key here changes what is learned: a run may be resumed with other ones.
    """

    address: str | None = None
    """Ray address to join; RAY_ADDRESS or --address come first; none starts a local cluster."""
    num_workers: int | tuple[int, int] = 1
    """Training workers, or [fewest, most]: as many as the cluster has, more when nodes come."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs per training worker."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs per training worker; 0 trains on the CPU."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray lays workers on nodes."""
    wait_s: float = Field(60, ge=0)
    """How long to wait for the workers' resources before giving up."""
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    """What workers share: `ddp` nothing but gradients; DeepSpeed's ZeRO (Rajbhandari et al. 2020)
    also the optimizer (1), the gradients (2) and all weights (3)."""
    offload: bool = False
    """Keep what ZeRO shares in CPU memory."""
    deepspeed: str | None = None
    """DeepSpeed JSON whose keys come before those made from this config; needs a zero strategy."""
    max_failures: int = Field(3, ge=0)
    """Worker deaths a training stage survives by resuming from its last checkpoint."""
    stall_timeout_s: float = Field(1800, gt=0)
    """A training that makes no step for this long is stopped, with what its workers were doing."""
    checkpoints: str | None = None
    """Directory or fsspec URL (s3://...) of unfinished trainings; `{output}/.training` by default.
    Every node must see it."""
    object_store_mib: int = Field(300, ge=80)
    """Object store of a local cluster."""
    dashboard: bool = True
    """Start Ray's dashboard with a local cluster (loopback; about 200 MB)."""

    @model_validator(mode="after")
    def _workers_agree(self) -> Self:
        fewest, most = self.worker_range
        problems = []
        if not 1 <= fewest <= most:
            problems.append(f"`num_workers` {self.num_workers}: give 1 <= fewest <= most")
        if self.strategy == "ddp" and (self.offload or self.deepspeed):
            problems.append("`offload` and `deepspeed` are DeepSpeed's: set `strategy: zero2`")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        return self.num_workers


class TrackSection(Section):
    """Where else a training is seen, beside the terminal, log.jsonl, TensorBoard and Ray's metrics.

    Keys to services come from their own environment variables, never from a config.
    """

    wandb_project: str | None = None
    """Weights & Biases project; needs the `track` extra and WANDB_API_KEY."""
    mlflow_uri: str | None = None
    """MLflow tracking address, such as http://host:5000; needs the `track` extra."""
    profile_steps: tuple[int, int] | None = None
    """Write a torch.profiler trace of these steps, first and last, into the run's logs."""
