"""The choice of precision and attention: what is said holds, and every refusal names the mend."""

from pathlib import Path

import pytest
import torch

from altiplano.config.training import TrainSettings
from altiplano.errors import TrainingError
from altiplano.model.attention import DOCUMENTS
from altiplano.train import machine
from altiplano.train.machine import choose_machine, matrix_speed

CPU = torch.device("cpu")


def settings(**given: object) -> TrainSettings:
    return TrainSettings.model_validate(given)


@pytest.mark.parametrize("asked", ["auto", "sdpa"])
def test_a_cpu_attends_document_by_document(asked: str) -> None:
    chosen = choose_machine(settings(attention=asked, precision="float32"), 32, use_gpu=False)
    assert chosen.attention == DOCUMENTS
    assert "document by document" in chosen.reason and "float32 (as configured)" in chosen.reason


@pytest.mark.parametrize(
    ("flash_installed", "precision", "expected"),
    [
        (True, "bfloat16", "flash_attention_2"),
        (True, "float32", DOCUMENTS),
        (False, "bfloat16", DOCUMENTS),
    ],
)
def test_a_gpu_uses_flash_attention_where_it_can(
    monkeypatch: pytest.MonkeyPatch, flash_installed: bool, precision: str, expected: str
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda _: object() if flash_installed else None)
    chosen = choose_machine(settings(precision=precision), 32, use_gpu=True)
    assert (chosen.device.type, chosen.attention) == ("cuda", expected)


def test_flash_attention_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(attention="flash_attention_2", precision="float32")
    with pytest.raises(TrainingError, match="needs a GPU and the flash-attn package"):
        choose_machine(asked, 32, use_gpu=False)
    monkeypatch.setattr(machine, "find_spec", lambda _: object())
    with pytest.raises(TrainingError, match="no float32.*precision: bfloat16"):
        choose_machine(asked, 32, use_gpu=True)


@pytest.mark.parametrize(("gain", "expected"), [(0.2, torch.float32), (2.0, torch.bfloat16)])
def test_bfloat16_is_taken_where_the_probe_says_it_pays(
    monkeypatch: pytest.MonkeyPatch, gain: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(machine, "_cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(machine, "_bfloat16_gain", lambda _: gain)
    chosen = choose_machine(settings(), 32, use_gpu=False)
    assert chosen.compute == expected and f"{gain:.1f}x float32 at width 32" in chosen.reason


def test_a_cpu_without_bfloat16_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "flags : avx2 avx512f\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: cpuinfo)
    monkeypatch.setattr(machine, "_bfloat16_gain", lambda _: pytest.fail("probed"))
    assert choose_machine(settings(), 32, use_gpu=False).compute == torch.float32


def test_the_speed_of_matrices_counts_all_their_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2 n m k over the shortest time; the model's width is the inner one."""
    shapes: list[tuple[int, ...]] = []

    def one_second(run, _device: torch.device) -> float:
        shapes.append(tuple(run().shape))
        return 1.0

    monkeypatch.setattr(machine, "_shortest", one_second)
    speed = matrix_speed(CPU, torch.float32, width=48)
    ((rows, columns),) = shapes
    assert speed == 2 * rows * columns * 48 and columns == 4 * 48


def test_the_speed_is_plausible() -> None:
    assert 1e7 < matrix_speed(CPU, torch.float32, width=64) < 1e15
