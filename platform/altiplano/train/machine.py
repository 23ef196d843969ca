"""What this machine is fast at: device, precision and attention kernel, each with its reason.

bfloat16 pays on a CPU only with avx512_bf16 or AMX; without them it is far slower than float32.
So it is decided by a probe, not by a flag alone. A probe takes less than half a second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError
from altiplano.model.attention import DOCUMENTS

_PROBE_S = 0.1


@dataclass(frozen=True)
class Machine:
    """Where and how a stage computes.

    Attributes:
        attention: `flash_attention_2`, or `model.attention.DOCUMENTS`, which is to be registered.
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


def matrix_speed(device: torch.device, dtype: torch.dtype, *, width: int) -> float:
    """FLOP/s of a matrix product as wide as the model, the best of several.

    What a step's share of the machine is measured against. On a CPU it is the speed of the threads
    that torch is set to use.

    Args:
        width: hidden size of the model.
    """
    rows, columns = (1 << 15, 1 << 13) if device.type == "cuda" else (1 << 7, 1 << 10)
    states = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(min(4 * width, columns), width, device=device, dtype=dtype)
    return 2 * rows * weight.numel() / _shortest(lambda: states @ weight.T, device)


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Shortest time of several runs, in seconds; the first one warms up and does not count."""

    def seconds() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds()
    deadline = time.perf_counter() + _PROBE_S
    best = seconds()
    while time.perf_counter() < deadline:
        best = min(best, seconds())
    return best


def _choose_precision(
    settings: TrainSettings, hidden_size: int, device: torch.device
) -> tuple[torch.dtype, str]:
    if settings.precision != "auto":
        return getattr(torch, settings.precision), "as configured"
    if device.type == "cuda":
        # Emulation in software does not count: it is slower than float32.
        if torch.cuda.is_bf16_supported(including_emulation=False):
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


def _bfloat16_gain(width: int, tokens: int = 256) -> float:
    """Time of a float32 linear layer over that of an autocast one (casts of the input counted)."""
    cpu = torch.device("cpu")
    states, weight = torch.randn(tokens, width), torch.randn(min(4 * width, 1 << 11), width)
    narrow = weight.bfloat16()
    wide = _shortest(lambda: states @ weight.T, cpu)
    return wide / _shortest(lambda: (states.bfloat16() @ narrow.T).float(), cpu)


def _choose_attention(
    settings: TrainSettings, compute: torch.dtype, device: torch.device
) -> tuple[str, str]:
    flash = device.type == "cuda" and find_spec("flash_attn") is not None
    if settings.attention == "flash_attention_2" and not flash:
        raise TrainingError(
            "`attention: flash_attention_2` needs a GPU and the flash-attn package: "
            "install the gpu extra, or set `attention: auto`"
        )
    if settings.attention == "flash_attention_2" and compute == torch.float32:
        raise TrainingError(
            "`attention: flash_attention_2` has no float32, in which this stage would compute: "
            "set `precision: bfloat16`, or `attention: auto`"
        )
    if settings.attention == "flash_attention_2":
        return "flash_attention_2", "as configured"
    if settings.attention == "sdpa":
        return DOCUMENTS, "as configured: SDPA, document by document"
    if flash and compute != torch.float32:
        return "flash_attention_2", "flash-attn is installed"
    if flash:
        return DOCUMENTS, "SDPA, document by document: flash-attn has no float32"
    why = "no flash-attn here" if device.type == "cuda" else "CPU"
    return DOCUMENTS, f"SDPA, document by document: {why}"
