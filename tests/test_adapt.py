"""What is trained and saved: LoRA's variants, rows of one matrix, and what makes no sense."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.errors import ModelError, TrainingError
from altiplano.model.adapt import Trainee, load_chain_live, make_trainee
from altiplano.model.fold import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ROWS_WEIGHTS,
    AdapterStack,
    fold_into,
)
from altiplano.model.load import PIECES, load_model
from tests.helpers.tiny_run import VOCAB_NEW, VOCAB_OLD, write_model

IDS = torch.arange(48).view(2, 24) * 7 % VOCAB_NEW
ALL = LoraSettings().modules
VARIANTS = {
    "plain": {},
    "rslora": {"rank_stabilized": True},
    "dora": {"dora": True},
    "dora, rslora": {"dora": True, "rank_stabilized": True},
    "pissa": {"init": "pissa"},
    "pissa, rslora": {"init": "pissa", "rank_stabilized": True},
}


def lora(variant: str = "plain", **given) -> LoraSettings:
    return LoraSettings(**{"r": 4, "alpha": 6, **VARIANTS[variant], **given})


def trainee_of(source: Path, *, seed: int = 3, dtype: str = "float32", **given) -> Trainee:
    settings = TrainSettings(name="stage", **given)
    return make_trainee(load_model(source, dtype), settings, VOCAB_OLD, seed=seed)


def shake(trainee: Trainee, seed: int = 0) -> None:
    """Move every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainee.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def folded(source: Path, chain: list[Path]):
    model = load_model(source)
    fold_into(model, AdapterStack(chain, VOCAB_OLD))
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of a trainee or of a model."""
    if isinstance(model, Trainee):
        return model.head(model.hidden(input_ids=IDS))
    return model(input_ids=IDS, use_cache=False).logits


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models on disk: `untied`, `tied`, and `padded`, whose last 8 rows belong to no piece."""
    folder = tmp_path_factory.mktemp("bases")
    made = {name: write_model(folder / name, tied=name == "tied") for name in ("untied", "tied")}
    made["padded"] = write_model(folder / "padded", vocab=VOCAB_NEW + 8)
    file = made["padded"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {PIECES: VOCAB_NEW}))
    return made


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], [*ALL, "lm_head"]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_says_the_same_trained_folded_live_and_in_peft(
    bases: dict[str, Path], tmp_path: Path, variant: str, modules: list[str]
) -> None:
    from peft import PeftModel

    trainee = trainee_of(bases["untied"], rows="none", lora=lora(variant, modules=modules))
    shake(trainee)
    trainee.save(tmp_path)
    trained = logits(trainee)
    assert not torch.allclose(trained, logits(load_model(bases["untied"])), atol=1e-2)
    assert_alike(logits(folded(bases["untied"], [tmp_path])), trained)
    assert_alike(logits(load_chain_live(bases["untied"], [tmp_path], VOCAB_OLD)), trained)
    assert_alike(logits(PeftModel.from_pretrained(load_model(bases["untied"]), tmp_path)), trained)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_begins_at_the_base(bases: dict[str, Path], variant: str, dtype: str) -> None:
    trainee = trainee_of(bases["untied"], rows="none", lora=lora(variant), dtype=dtype)
    base = logits(load_model(bases["untied"], dtype)).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        begun = logits(trainee).float()
    difference = (begun - base).norm() / base.norm()
    assert difference < (1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_doras_magnitude_begins_as_the_exact_norm(bases: dict[str, Path], dtype: str) -> None:
    trainee = trainee_of(bases["untied"], rows="none", lora=lora("dora"), dtype=dtype)
    layer = trainee.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double().norm(dim=1)
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.double(), exact, atol=1e-6, rtol=1e-6)


def test_pissa_begins_alike_on_every_worker_and_with_the_largest_part(
    bases: dict[str, Path],
) -> None:
    first, second = (
        trainee_of(bases["untied"], rows="none", lora=lora("pissa"), seed=seed) for seed in (1, 2)
    )
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    layer = first.model.model.layers[0].mlp.up_proj
    whole = load_model(bases["untied"]).model.layers[0].mlp.up_proj.weight
    best = torch.linalg.svdvals(whole)[4:].norm()
    assert best <= layer.base_layer.weight.norm() * (1 + 1e-5) < best * 1.05


@examples(max_examples=25)
@given(
    base=st.sampled_from(["untied", "tied", "padded"]),
    rows=st.sampled_from(["none", "new", "all"]),
    matrices=st.sampled_from(["both", "embedding", "head"]),
    variant=st.none() | st.sampled_from(sorted(VARIANTS)),
    on_head=st.booleans(),
)
def test_what_is_trained_is_what_files_hold_and_what_is_read_back(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory,
    base: str, rows: str, matrices: str, variant: str | None, on_head: bool,
) -> None:  # fmt: skip
    if (rows == "none" and variant is None) or (base == "tied" and matrices != "both"):
        return
    on_head = on_head and base == "untied" and (rows == "none" or matrices == "embedding")
    modules = [*ALL, "lm_head"] if on_head else ALL
    given = {
        "rows": rows, "row_matrices": matrices,
        "lora": None if variant is None else lora(variant, modules=modules),
    }  # fmt: skip
    trainee = trainee_of(bases[base], **given)
    shake(trainee)
    folder = tmp_path_factory.mktemp("files")
    snapshot = {name: p.detach().clone() for name, p in trainee.trainable().items()}
    expected = logits(trainee)
    shake(trainee, 1)
    trainee.write(snapshot, folder)
    assert_alike(logits(folded(bases[base], [folder])), expected)
    again = trainee_of(bases[base], seed=9, **given)
    again.load(folder)
    assert_alike(logits(again), expected)
    for name, tensor in again.trainable().items():
        pieces = len(tensor) if ".lora_" in name else VOCAB_NEW
        assert torch.equal(tensor[:pieces], snapshot[name][:pieces]), name


@pytest.mark.parametrize("rows", ["new", "all"])
@pytest.mark.parametrize("matrix", ["embedding", "head"])
def test_one_matrix_alone_is_trained(
    bases: dict[str, Path], tmp_path: Path, rows: str, matrix: str
) -> None:
    trainee = trainee_of(bases["untied"], rows=rows, row_matrices=matrix)
    part = {"embedding": "embed_tokens", "head": "lm_head"}[matrix]
    assert [name for name in trainee.trainable() if part not in name] == []
    shake(trainee)
    trainee.save(tmp_path)
    kind = {"new": "new_rows", "all": "weight"}[rows]
    assert list(load_file(tmp_path / ROWS_WEIGHTS)) == [f"{part}.{kind}"]
    before, after = load_model(bases["untied"]), folded(bases["untied"], [tmp_path])
    assert torch.equal(before.lm_head.weight, after.lm_head.weight) == (matrix == "embedding")


def test_a_chain_of_every_kind_says_the_same_trained_folded_and_live(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Rows after an adapter on the head, and DoRA after others: no sum of independent parts."""
    chain: list[Path] = []
    stages = [
        {"rows": "none", "lora": lora(modules=["q_proj", "lm_head"])},
        {"rows": "new", "lora": lora("rslora")},
        {"rows": "none", "lora": lora("dora", modules=["q_proj", "lm_head"])},
        {"rows": "new", "row_matrices": "embedding", "lora": lora("pissa", modules=["q_proj"])},
    ]
    for number, what in enumerate(stages):
        model = folded(bases["untied"], chain)
        trainee = make_trainee(model, TrainSettings(name="stage", **what), VOCAB_OLD, seed=number)
        shake(trainee, number)
        chain.append(tmp_path / str(number))
        trainee.save(chain[-1])
        trained = logits(trainee)
        assert_alike(logits(folded(bases["untied"], chain)), trained)
        assert_alike(logits(load_chain_live(bases["untied"], chain, VOCAB_OLD)), trained)


def test_an_adapter_on_the_head_is_added_to_rows_that_came_with_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Such adapters are no longer made; earlier runs have some."""
    for what in ({"rows": "all"}, {"rows": "none", "lora": lora(modules=["lm_head"])}):
        trainee = trainee_of(bases["untied"], **what)
        shake(trainee)
        trainee.save(tmp_path)
    live = logits(load_chain_live(bases["untied"], [tmp_path], VOCAB_OLD))
    assert_alike(logits(folded(bases["untied"], [tmp_path])), live)


def test_what_a_model_cannot_do_is_listed_whole(bases: dict[str, Path]) -> None:
    with pytest.raises(TrainingError) as caught:
        trainee_of(
            bases["tied"], rows="all", row_matrices="head",
            lora=lora("pissa", modules=["q_prj", "lm_head", "k_proj"], r=20),
        )  # fmt: skip
    message = str(caught.value)
    for part in ("q_prj", "which is the embedding", "20 singular vectors", "one of two matrices",
                 "`rows: all` trains"):  # fmt: skip
        assert part in message
    with pytest.raises(TrainingError, match="padding rows an adapter would train"):
        trainee_of(bases["padded"], rows="none", lora=lora(modules=["lm_head"]))
    with pytest.raises(TrainingError, match="row_matrices: embedding"):
        trainee_of(bases["untied"], rows="new", lora=lora(modules=["lm_head"]))
    with pytest.raises(TrainingError, match="lora.dora` on 8-bit matrices"):
        trainee_of(bases["untied"], rows="none", quantize="8bit", lora=lora("dora"))
    with pytest.raises(TrainingError, match=r"names \['embed_tokens'\]"):
        trainee_of(bases["untied"], rows="none", lora=lora(modules=["embed_tokens"]))


def test_groups_have_their_own_rates_and_decay(bases: dict[str, Path]) -> None:
    trainee = trainee_of(
        bases["untied"], rows="all", row_matrices="embedding", learning_rate=1e-3,
        rows_learning_rate=2e-4, weight_decay=0.1, rows_weight_decay=0.3,
        lora=lora("dora", b_learning_rate_ratio=16, modules=["q_proj", "lm_head"]),
    )  # fmt: skip
    groups = {group["name"]: group for group in trainee.optimizer_groups()}
    names = {id(parameter): name for name, parameter in trainee.trainable().items()}
    found = {
        name: (group["peak_lr"], group["weight_decay"], {names[id(p)].split(".")[-3]
               if "lora" in names[id(p)] else "rows" for p in group["params"]})
        for name, group in groups.items()
    }  # fmt: skip
    assert found == {
        "matrices": (1e-3, 0.1, {"lora_A"}),
        "lora_b": (1e-3 * 16, 0.1, {"lora_B"}),
        "vectors": (1e-3, 0.0, {"lora_magnitude_vector"}),
        "rows": (2e-4, 0.3, {"rows"}),
    }
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    plain = trainee_of(bases["untied"], rows="none", lora=lora()).optimizer_groups()
    assert [group["name"] for group in plain] == ["matrices"]


@pytest.mark.parametrize("rows", ["new", "all"])
def test_fp32_masters_are_computed_with_in_bfloat16(bases: dict[str, Path], rows: str) -> None:
    trainee = trainee_of(bases["untied"], rows=rows, lora=lora(), dtype="bfloat16")
    layer = trainee.model.model.layers[1].mlp.down_proj
    seen: list[torch.dtype] = []
    for module in (layer, layer.lora_A["default"], layer.lora_B["default"]):
        module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = trainee.hidden(input_ids=IDS)
        loss = trainee.head(hidden).float().logsumexp(-1).sum()
    loss.backward()
    assert seen == [torch.bfloat16] * 3
    assert hidden.dtype == torch.bfloat16
    for name, parameter in trainee.trainable().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name


def test_an_adapter_of_other_settings_is_not_read(bases: dict[str, Path], tmp_path: Path) -> None:
    source = trainee_of(bases["untied"], rows="new", lora=lora())
    shake(source)
    source.save(tmp_path)
    for what, message in [
        ({"rows": "new", "lora": lora(r=8)}, r"\[4, 32\], this stage trains \[8, 32\].*`lora.r`"),
        ({"rows": "new", "lora": lora(modules=["q_proj"])}, r"holds .*down_proj.*`lora\.modules`"),
        ({"rows": "new", "lora": lora(modules=[*ALL, "lm_head"]), "row_matrices": "embedding"},
         "lacks .*lm_head"),
        ({"rows": "all", "lora": lora()}, "holds embed_tokens.new_rows"),
        ({"rows": "new", "row_matrices": "head", "lora": lora()}, "holds embed_tokens.new_rows"),
    ]:  # fmt: skip
        with pytest.raises(TrainingError, match=message):
            trainee_of(bases["untied"], **what).read(tmp_path)
    with pytest.raises(TrainingError, match=f"has no {ADAPTER_WEIGHTS}"):
        trainee_of(bases["untied"], rows="none", lora=lora()).read(tmp_path / "nothing")


def test_a_pissa_adapter_of_another_base_is_not_read(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    given = {"rows": "none", "lora": lora("pissa", modules=["q_proj"])}
    trainee_of(bases["untied"], **given).save(tmp_path)
    trainee_of(bases["untied"], **given).read(tmp_path)
    other = load_model(bases["untied"])
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
    trainee = make_trainee(other, TrainSettings(name="stage", **given), VOCAB_OLD, seed=0)
    with pytest.raises(TrainingError, match="layers.1.self_attn.q_proj began with other principal"):
        trainee.read(tmp_path)
    plain = trainee_of(bases["untied"], rows="none", lora=lora(modules=["q_proj"], r=8))
    shake(plain)
    plain.save(tmp_path)
    with pytest.raises(TrainingError, match="layers.0.self_attn.q_proj began with other principal"):
        trainee.read(tmp_path)


def test_adapters_made_elsewhere_are_folded_as_peft_computes_them(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Ranks and scales by module, a start of PEFT's own, and a key that is not known here."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3}, init_lora_weights="gaussian",
    )  # fmt: skip
    model = get_peft_model(load_model(bases["untied"]), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    file = tmp_path / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_tomorrow": 1}))
    assert_alike(logits(folded(bases["untied"], [tmp_path])), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"peft_type": "LOHA"}, "type 'LOHA'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens cannot be folded"),
        (None, "the scale of the adapter is unknown"),
    ],
    ids=str,
)
def test_adapters_that_are_no_sum_are_refused(
    bases: dict[str, Path], tmp_path: Path, change: dict | None, message: str
) -> None:
    trainee_of(bases["untied"], rows="none", lora=lora()).save(tmp_path)
    file = tmp_path / ADAPTER_CONFIG
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        AdapterStack([tmp_path], VOCAB_OLD)
