"""Merging: exact arithmetic, untouched tensors, refusals, the probe and the chain check."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from altiplano.artifact import Artifact, Input, Manifest
from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.errors import MismatchError, ModelError
from altiplano.merge.check import check_chain
from altiplano.merge.merge import merge_checkpoint
from altiplano.merge.probe import probe, probe_ids, relative_difference
from altiplano.model.adapt import make_trainee
from altiplano.model.fold import AdapterStack, fold_into
from altiplano.model.load import EMBEDDING, HEAD, load_model

OLD, NEW = 300, 320
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def save_base(tiny_llama: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a tiny model in several shards with a tokenizer file."""

    def save(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        directory = tmp_path / "base"
        model = tiny_llama(NEW, tied=tied).to(dtype)
        model.save_pretrained(directory, max_shard_size="150KB")
        assert len(list(directory.glob("*.safetensors"))) > 1
        (directory / "tokenizer.model").write_bytes(b"pieces")
        return directory

    return save


def train_adapter(base: Path, earlier: list[Path], target: Path, settings: TrainSettings) -> Path:
    """Write an adapter with random values in all its trained tensors."""
    model = load_model(base)
    fold_into(model, AdapterStack(earlier, OLD))
    trainee = make_trainee(model, settings, OLD, seed=1)
    generator = torch.Generator().manual_seed(len(earlier) + 7)
    with torch.no_grad():
        for parameter in trainee.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    trainee.save(target)
    return target


LORA = LoraSettings(r=4, alpha=8)
NEW_ROWS = TrainSettings(rows="new")
LORA_AND_ROWS = TrainSettings(rows="new", lora=LORA)
LORA_ALONE = TrainSettings(rows="none", lora=LORA)
ALL_ROWS = TrainSettings(rows="all", lora=LORA)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "chain", [[LORA_ALONE], [NEW_ROWS, LORA_AND_ROWS, LORA_ALONE], [LORA_AND_ROWS, ALL_ROWS]]
)
def test_merged_model_computes_what_base_and_adapters_compute(
    save_base: Callable[..., Path], tmp_path: Path, chain: list[TrainSettings], tied: bool
) -> None:
    base = save_base(tied=tied)
    adapters: list[Path] = []
    for index, settings in enumerate(chain):
        adapters.append(train_adapter(base, list(adapters), tmp_path / f"a{index}", settings))
    merged = tmp_path / "merged"
    merged.mkdir()

    metrics = merge_checkpoint(base, adapters, OLD, merged)

    found = probe(merged, base, adapters, OLD, tolerance=1e-4)
    assert found["probe_agreement"] == 1.0
    weights = load_model(merged).state_dict()
    assert metrics["tensors"] == len(list_names(merged)) == len(list_names(base))
    assert metrics["bytes"] == sum(weights[name].nbytes for name in list_names(merged))
    assert (merged / "tokenizer.model").read_bytes() == b"pieces"
    # The probe must be able to tell: the base alone says something else.
    with pytest.raises(ModelError, match="does not compute what"):
        probe(base, base, adapters, OLD, tolerance=1e-2)


def list_names(directory: Path) -> list[str]:
    """Names of the stored tensors."""
    return sorted(name for file in directory.glob("*.safetensors") for name in load_file(file))


def test_one_matrix_by_hand_and_old_rows_untouched(
    save_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = save_base(dtype=torch.bfloat16)
    adapter = train_adapter(base, [], tmp_path / "a", LORA_AND_ROWS)
    merged = tmp_path / "merged"
    merged.mkdir()
    merge_checkpoint(base, [adapter], OLD, merged)

    before, after = load_all(base), load_all(merged)
    lora = load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.{'model.' + Q0[:-7]}.lora_{part}.weight"] for part in "AB")
    expected = (before[Q0].float() + 8 / 4 * (b.float() @ a.float())).bfloat16()
    assert torch.equal(after[Q0], expected)
    assert torch.equal(after[EMBEDDING][:OLD], before[EMBEDDING][:OLD])
    rows = load_file(adapter / "rows.safetensors")["lm_head.new_rows"]
    assert torch.equal(after[HEAD][OLD:], rows.bfloat16())
    norm = "model.norm.weight"
    assert torch.equal(after[norm], before[norm])


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    """All stored tensors."""
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def test_files_and_index_are_the_bases_and_readable(
    save_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = save_base()
    adapter = train_adapter(base, [], tmp_path / "a", LORA_ALONE)
    merged = tmp_path / "merged"
    merged.mkdir()
    metrics = merge_checkpoint(base, [adapter], OLD, merged, dtype="bfloat16")

    index = "model.safetensors.index.json"
    weight_map = json.loads((merged / index).read_text())["weight_map"]
    assert weight_map == json.loads((base / index).read_text())["weight_map"]
    total = json.loads((merged / index).read_text())["metadata"]["total_size"]
    assert total == metrics["bytes"]
    for file in merged.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            assert stored.metadata() == {"format": "pt"}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_all(merged).values()} == {torch.bfloat16}
    found = probe(merged, base, [adapter], OLD, tolerance=2e-2)
    assert found["probe_difference"] > 1e-5  # bfloat16 was really written


def test_a_stored_copy_of_a_tied_head_is_not_carried_on(
    save_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = save_base(tied=True)
    shard = sorted(base.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    save_file({**tensors, HEAD: load_all(base)[EMBEDDING].clone()}, shard, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][HEAD] = shard.name
    index.write_text(json.dumps(content))
    adapter = train_adapter(base, [], tmp_path / "a", NEW_ROWS)
    merged = tmp_path / "merged"
    merged.mkdir()

    merge_checkpoint(base, [adapter], OLD, merged)

    assert HEAD not in list_names(merged)
    assert HEAD not in json.loads((merged / index.name).read_text())["weight_map"]
    probe(merged, base, [adapter], OLD, tolerance=1e-4)


def test_adapter_tensors_that_fit_nothing_are_named(
    save_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = save_base()
    adapter = train_adapter(base, [], tmp_path / "a", LORA_ALONE)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    stray = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, stray: torch.zeros(4, 64)}, file)
    merged = tmp_path / "merged"
    merged.mkdir()
    with pytest.raises(ModelError, match=r"layers\.9\.self_attn"):
        merge_checkpoint(base, [adapter], OLD, merged)
    assert not list(merged.iterdir())


def test_a_sum_outside_the_types_range_is_refused(
    save_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = save_base()
    adapter = train_adapter(base, [], tmp_path / "a", LORA_ALONE)
    file = adapter / "adapter_model.safetensors"
    save_file({name: t * 1e4 for name, t in load_file(file).items()}, file)
    merged = tmp_path / "merged"
    merged.mkdir()
    with pytest.raises(ModelError, match=r"not finite in torch\.float16"):
        merge_checkpoint(base, [adapter], OLD, merged, dtype="float16")


@pytest.mark.parametrize("place", [(slice(None), slice(None), 17), (2, 9)])
def test_one_wrong_row_or_position_is_not_averaged_away(place: tuple) -> None:
    logits = torch.randn(4, 32, 500, generator=torch.Generator().manual_seed(0))
    wrong = logits.clone()
    wrong[place] = logits[place] + 0.5
    assert relative_difference(wrong, logits) == pytest.approx(0.5, rel=0.02)
    assert relative_difference(logits, logits) == 0.0
    assert not relative_difference(logits * float("nan"), logits) <= 1e9


@pytest.mark.parametrize(("old", "new"), [(300, 320), (300, 300), (300, 301), (32000, 49953)])
def test_probe_ids_cover_old_and_new(old: int, new: int) -> None:
    ids = probe_ids(old, new)
    assert ids.shape == (4, 32)
    assert ids.min() == 0
    assert ids.max() == new - 1
    assert ((ids >= old).any() == (new > old)).item()
    assert torch.equal(ids, probe_ids(old, new))


def make_artifact(name: str, **fields: object) -> Artifact:
    """An artifact as a manifest alone; no file is ever opened."""
    plain = {"kind": "adapter", "stage": name, "section": {}, "inputs": {}, "vocab_new": 320}
    plain |= {"tokenizer_fingerprint": "t" * 64, "files": {name: {"sha256": name}}}
    return Artifact(Path("runs/x") / name, Manifest(**{**plain, **fields}))  # type: ignore[arg-type]


MODEL = make_artifact("extend", kind="model", weights_fingerprint="w" * 64)
TRAINED_ON = {"base_weights_fingerprint": "w" * 64}


def test_a_whole_chain_passes() -> None:
    first = make_artifact("pretrain-rows", metrics=TRAINED_ON, inputs={"model": MODEL.as_input})
    inputs = {"model": MODEL.as_input, "adapter-0": first.as_input}
    second = make_artifact("sft", metrics=TRAINED_ON, inputs=inputs)
    check_chain(MODEL, [first, second])
    check_chain(MODEL, [])


def test_an_adapter_with_another_tokenizer_is_refused() -> None:
    fields = {"tokenizer_fingerprint": "u" * 64, "vocab_new": 555, "metrics": TRAINED_ON}
    with pytest.raises(MismatchError) as caught:
        check_chain(MODEL, [make_artifact("sft", **fields)])
    for part in ("runs/x/sft", "runs/x/extend", "u" * 16, "t" * 16, "555", "320", "altiplano run"):
        assert part in str(caught.value)


def test_an_adapter_of_another_base_is_refused() -> None:
    metrics = {"base_weights_fingerprint": "v" * 64}
    with pytest.raises(MismatchError) as caught:
        check_chain(MODEL, [make_artifact("sft", metrics=metrics)])
    for part in ("runs/x/sft", "runs/x/extend", "v" * 16, "w" * 16, "altiplano run"):
        assert part in str(caught.value)


@pytest.mark.parametrize("before", [{}, {"adapter-0": Input("runs/y/pretrain", "f" * 64)}])
def test_an_adapter_after_other_adapters_is_refused(before: dict[str, Input]) -> None:
    first = make_artifact("pretrain-rows", metrics=TRAINED_ON)
    second = make_artifact("sft", metrics=TRAINED_ON, inputs=before)
    with pytest.raises(MismatchError) as caught:
        check_chain(MODEL, [first, second])
    message = str(caught.value)
    assert first.manifest.fingerprint[:16] in message
    assert "--from sft" in message
    assert all(asdict(item)["path"] in message for item in before.values())
