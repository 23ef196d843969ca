"""What this machine is fast at: device, precision and attention kernel, each with its reason.

bfloat16 pays on a CPU only with avx512_bf16 or AMX; without them it is far slower than float32.
So it is decided by a probe of a few milliseconds, not by a flag alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError


@dataclass(frozen=True)
class Machine:
    """Where and how a stage computes.

    Attributes:
        reason: one line for the log.
    """

    device: torch.device
    compute: torch.dtype
    attention: str
    reason: str


def choose_machine(settings: TrainSettings, hidden_size: int, *, use_gpu: bool) -> Machine:
    """Decide device, compute type and attention kernel for a stage."""
    device = torch.device("cuda" if use_gpu else "cpu")
    compute, why_compute = _choose_precision(settings, hidden_size, device)
    attention, why_attention = _choose_attention(settings, compute, device)
    reason = f"{device}; {compute} ({why_compute}); {attention} ({why_attention})"
    return Machine(device, compute, attention, reason.replace("torch.", ""))


def _choose_precision(
    settings: TrainSettings, hidden_size: int, device: torch.device
) -> tuple[torch.dtype, str]:
    if settings.precision != "auto":
        return getattr(torch, settings.precision), "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU computes in bfloat16"
        return torch.float32, "this GPU has no bfloat16"
    if not _cpu_has_bfloat16():
        return torch.float32, "the CPU has neither avx512_bf16 nor AMX"
    gain = _bfloat16_gain(hidden_size)
    if gain > 1.3:
        return torch.bfloat16, f"{gain:.1f}x float32 at width {hidden_size}"
    return torch.float32, f"bfloat16 is only {gain:.1f}x float32 at width {hidden_size}"


def _cpu_has_bfloat16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _bfloat16_gain(width: int, tokens: int = 1024, repeats: int = 5) -> float:
    """Time of a float32 linear layer over that of an autocast one (casts of the input counted)."""
    states, weight = torch.randn(tokens, width), torch.randn(4 * width, width)
    narrow = weight.bfloat16()

    def best(run: Callable[[], object]) -> float:
        """Shortest time of several runs, in seconds."""
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return min(times)

    wide = best(lambda: states @ weight.T)
    return wide / best(lambda: (states.bfloat16() @ narrow.T).float())


def _choose_attention(
    settings: TrainSettings, compute: torch.dtype, device: torch.device
) -> tuple[str, str]:
    flash = device.type == "cuda" and find_spec("flash_attn") is not None
    if settings.attention == "flash_attention_2" and not flash:
        raise TrainingError(
            "`attention: flash_attention_2` needs a GPU and the flash-attn package: "
            "install the gpu extra, or set `attention: auto`"
        )
    if settings.attention != "auto":
        return settings.attention, "as configured"
    if flash and compute != torch.float32:
        return "flash_attention_2", "flash-attn is installed"
    return "sdpa", "no flash-attn here" if device.type == "cuda" else "CPU"
