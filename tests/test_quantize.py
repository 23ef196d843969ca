"""Quantised blocks: how many bytes they take, that adapters learn on them, and what is saved."""

import sys
from pathlib import Path

import pytest
import torch

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.errors import TrainingError
from altiplano.model.adapt import Trainee, make_trainee
from altiplano.model.fold import AdapterStack, fold_into
from altiplano.model.load import load_model
from altiplano.model.loss import summed_cross_entropy
from altiplano.model.quantize import quantize_blocks
from tests.helpers.tiny_run import VOCAB_NEW, VOCAB_OLD, write_model

pytest.importorskip("bitsandbytes")

IDS = torch.arange(48).view(2, 24) * 7 % VOCAB_NEW
BITS = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "m")


def trainee_of(base: Path, bits: str, dtype: str = "float32", **given) -> Trainee:
    model = load_model(base, dtype)
    quantize_blocks(model, bits)
    chosen = TrainSettings(name="stage", quantize=bits, **given)
    return make_trainee(model, chosen, VOCAB_OLD, seed=3)


def stored_bytes(layer) -> int:
    """What a quantised layer keeps: its codes and every tensor of its scales."""
    total = layer.weight.nbytes
    if (state := getattr(layer.weight, "quant_state", None)) is not None:
        tables = {state.code.data_ptr(), state.state2.code.data_ptr()}
        parts = [state.absmax, state.state2.absmax, state.offset]
        return total + sum(t.nbytes for t in parts if t.data_ptr() not in tables)
    return total + layer.weight.SCB.nbytes


@pytest.mark.parametrize(("bits", "per_weight"), [("4bit", 0.52), ("8bit", 1.02)])
def test_blocks_shrink_and_all_else_stays(tiny_llama, bits: str, per_weight: float) -> None:
    model = tiny_llama(vocab_size=100).to(torch.bfloat16)
    wider = torch.nn.Linear(512, 256, bias=False).to(torch.bfloat16)
    model.model.layers[0].mlp.gate_proj = wider
    before = {name: p for name, p in model.named_parameters() if "proj" not in name}
    quantize_blocks(model, bits)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(p.dtype in (torch.uint8, torch.int8) for n, p in after.items() if "proj" in n)
    assert stored_bytes(model.model.layers[0].mlp.gate_proj) <= per_weight * wider.weight.numel()


@pytest.mark.parametrize(
    ("bits", "variant"),
    [("4bit", {}), ("8bit", {}), ("4bit", {"dora": True}), ("8bit", {"rank_stabilized": True})],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_learn_on_quantised_blocks(
    base: Path, bits: str, variant: dict, dtype: str
) -> None:
    trainee = trainee_of(base, bits, dtype, rows="new", lora=LoraSettings(r=4, **variant))
    optimizer = torch.optim.AdamW(trainee.optimizer_groups(), lr=1e-2)
    codes = trainee.model.model.layers[0].mlp.up_proj.base_layer.weight.clone()
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = trainee.hidden(input_ids=IDS)
            loss = summed_cross_entropy(hidden, IDS.roll(-1, 1), trainee.head) / IDS.numel()
        loss.backward()
        for name, parameter in trainee.trainable().items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.any() for n, p in trainee.trainable().items() if ".lora_B." in n)
    assert torch.equal(trainee.model.model.layers[0].mlp.up_proj.base_layer.weight, codes)


@pytest.mark.parametrize(
    ("bits", "near", "dora"), [("4bit", 0.2, False), ("4bit", 0.2, True), ("8bit", 0.03, False)]
)
def test_the_adapter_merges_onto_the_unquantised_base(
    base: Path, tmp_path: Path, bits: str, near: float, dora: bool
) -> None:
    trainee = trainee_of(base, bits, rows="new", lora=LoraSettings(r=4, dora=dora))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainee.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        trainee.save(tmp_path)
        trained = trainee.head(trainee.hidden(input_ids=IDS))
        merged = load_model(base)
        unmerged = merged(IDS).logits
        fold_into(merged, AdapterStack([tmp_path], VOCAB_OLD))
        found = merged(IDS).logits
    assert (found - trained).norm() < near * found.norm()
    assert (unmerged - trained).norm() > 2 * (found - trained).norm()


@pytest.mark.parametrize("bits", BITS)
def test_moving_a_quantised_model_and_quantising_twice_change_nothing(
    base: Path, bits: str
) -> None:
    first, second = (trainee_of(base, bits, rows="new").model for _ in range(2))
    second.to(torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, second(IDS).logits)


def test_without_bitsandbytes_the_extra_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match="extra `gpu` or `cpu`"):
        quantize_blocks(load_model(base), "4bit")
