"""The model room: split rows, the chunked loss, adapters folded and kept live."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.errors import ModelError, TrainingError
from altiplano.model.adapt import Trainee, check_trained, load_chain_live, make_trainee
from altiplano.model.fold import AdapterStack, fold_into
from altiplano.model.load import (
    EMBEDDING,
    check_llama,
    import_model,
    load_model,
    weights_fingerprint,
)
from altiplano.model.loss import summed_cross_entropy, summed_distillation
from tests.helpers.tiny_run import VOCAB_NEW, VOCAB_OLD, write_model

LORA = LoraSettings(r=4, alpha=8)
IDS = torch.arange(48).view(2, 24) * 7 % VOCAB_NEW


def settings(**given) -> TrainSettings:
    return TrainSettings(name="stage", **given)


def trainee_of(directory: Path, **given) -> Trainee:
    return make_trainee(load_model(directory), settings(**given), VOCAB_OLD, seed=3)


def shake(trainee: Trainee, seed: int = 0) -> None:
    """Move every trained tensor, LoRA's zero B too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainee.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "what",
    [
        {"rows": "new"},
        {"rows": "all"},
        {"rows": "none", "lora": LORA},
        {"rows": "new", "lora": LORA},
        {"rows": "all", "lora": LORA},
        {"full": True},
    ],
    ids=str,
)
def test_chunked_loss_and_gradients_equal_the_plain_ones(
    tmp_path: Path, what: dict, tied: bool, chunk: int
) -> None:
    model = write_model(tmp_path / "m", tied=tied)
    labels = IDS.roll(-1, 1).clone()
    labels[0, 3:9] = -100
    plain, ours = trainee_of(model, **what), trainee_of(model, **what)
    for trainee in (plain, ours):
        shake(trainee)
    logits = plain.head(plain.hidden(input_ids=IDS))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    found = summed_cross_entropy(ours.hidden(input_ids=IDS), labels, ours.head, chunk)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-6)
    expected.backward()
    found.backward()
    wanted = plain.trainable()
    assert wanted
    for name, parameter in ours.trainable().items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-4)


def test_no_targets_give_a_zero_loss_that_has_a_gradient(tmp_path: Path) -> None:
    trainee = trainee_of(write_model(tmp_path / "m"))
    labels = torch.full_like(IDS, -100)
    loss = summed_cross_entropy(trainee.hidden(input_ids=IDS), labels, trainee.head)
    assert loss.item() == 0.0
    loss.backward()


def test_distillation_from_oneself_has_no_gradient_and_costs_the_entropy(tmp_path: Path) -> None:
    trainee = trainee_of(write_model(tmp_path / "m"), full=True)
    hidden = trainee.hidden(input_ids=IDS)
    loss = summed_distillation(
        hidden, IDS, trainee.head, hidden.detach(), trainee.head, chunk_tokens=7
    )
    p = trainee.head(hidden).softmax(-1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(), atol=1e-3, rtol=1e-5)
    loss.backward()
    largest = max(float(q.grad.abs().max()) for q in trainee.trainable().values())
    assert largest < 1e-4


def test_new_rows_leave_old_rows_untouched_and_small(tmp_path: Path) -> None:
    trainee = trainee_of(write_model(tmp_path / "m"), rows="new")
    assert {name: tuple(p.shape) for name, p in trainee.trainable().items()} == {
        "model.embed_tokens.rows.new": (VOCAB_NEW - VOCAB_OLD, 32),
        "lm_head.rows.new": (VOCAB_NEW - VOCAB_OLD, 32),
    }
    before = load_model(tmp_path / "m").lm_head.weight[:VOCAB_OLD].clone()
    shake(trainee)
    trainee.save(tmp_path / "a")
    merged = load_model(tmp_path / "m")
    fold_into(merged, AdapterStack([tmp_path / "a"], VOCAB_OLD))
    assert torch.equal(merged.lm_head.weight[:VOCAB_OLD], before)
    assert not torch.equal(
        merged.lm_head.weight[VOCAB_OLD:], load_model(tmp_path / "m").lm_head.weight[VOCAB_OLD:]
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_chain_says_the_same_trained_folded_and_live(tmp_path: Path, tied: bool) -> None:
    """Two stages of different rank and rows: training, folding and PEFT's own layers agree."""
    base = write_model(tmp_path / "m", tied=tied)
    chain: list[Path] = []
    stages = [
        {"rows": "new", "lora": LORA},
        {"rows": "none", "lora": LoraSettings(r=2, alpha=3, modules=["q_proj", "up_proj"])},
        {"rows": "all"},
    ]
    for number, what in enumerate(stages):
        model = load_model(base)
        fold_into(model, AdapterStack(chain, VOCAB_OLD))
        trainee = make_trainee(model, settings(**what), VOCAB_OLD, seed=number)
        shake(trainee, number)
        chain.append(tmp_path / str(number))
        trainee.save(chain[-1])
        check_trained(chain[-1])
        with torch.no_grad():
            trained = trainee.head(trainee.hidden(input_ids=IDS))
            live = load_chain_live(base, chain, VOCAB_OLD)(IDS).logits
            folded = load_model(base)
            fold_into(folded, AdapterStack(chain, VOCAB_OLD))
            torch.testing.assert_close(live, trained, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(folded(IDS).logits, trained, atol=1e-5, rtol=1e-4)


def test_saves_are_read_back_exactly(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    first, second = (trainee_of(model, rows="new", lora=LORA) for _ in range(2))
    shake(first)
    first.save(tmp_path / "a")
    second.load(tmp_path / "a")
    for name, parameter in first.trainable().items():
        assert torch.equal(parameter, second.trainable()[name])


def test_an_adapter_that_learned_nothing_is_refused(tmp_path: Path) -> None:
    trainee = trainee_of(write_model(tmp_path / "m"), rows="none", lora=LORA)
    trainee.save(tmp_path / "a")
    with pytest.raises(TrainingError, match="LoRA B matrices are still zero"):
        check_trained(tmp_path / "a")


def test_a_save_of_nan_is_refused(tmp_path: Path) -> None:
    trainee = trainee_of(write_model(tmp_path / "m"))
    with torch.no_grad():
        next(iter(trainee.trainable().values()))[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        trainee.save(tmp_path / "a")


def test_rows_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    trainee = trainee_of(write_model(tmp_path / "m"))
    trainee.save(tmp_path / "a")
    smaller = load_model(write_model(tmp_path / "s", vocab=70))
    with pytest.raises(ModelError, match="belongs to another model or vocabulary"):
        fold_into(smaller, AdapterStack([tmp_path / "a"], VOCAB_OLD))


def test_nothing_new_to_train_is_refused(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "m"))
    with pytest.raises(TrainingError, match="nothing to train"):
        make_trainee(model, settings(rows="new"), VOCAB_NEW, seed=0)
    with pytest.raises(TrainingError, match="q_prj"):
        lora = LoraSettings(modules=["q_prj"])
        make_trainee(model, settings(rows="none", lora=lora), VOCAB_OLD, seed=0)


def test_the_weights_fingerprint_is_of_content(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    expected = weights_fingerprint(model)
    tensors = load_file(model / "model.safetensors")
    half = dict(list(tensors.items())[:4])
    rest = {name: t for name, t in tensors.items() if name not in half}
    (tmp_path / "shards").mkdir()
    save_file(rest, tmp_path / "shards" / "a.safetensors")
    save_file(half, tmp_path / "shards" / "b.safetensors", metadata={"other": "container"})
    assert weights_fingerprint(tmp_path / "shards") == expected
    tensors[EMBEDDING][3, 3] += 1e-3
    save_file(tensors, model / "model.safetensors")
    assert weights_fingerprint(model) != expected


def test_directories_that_cannot_be_taught_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_llama(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="'gpt2'"):
        check_llama(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="holds no weights"):
        check_llama(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="as pickle"):
        check_llama(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"no tokenizer\.model"):
        check_llama(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    check_llama(tmp_path)
    index = '{"weight_map": {"a": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors"):
        check_llama(tmp_path)


def test_pickle_is_converted_when_it_is_asked_for(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    expected = weights_fingerprint(source)
    (source / "model.safetensors").unlink()
    (source / "tokenizer.model").touch()
    (tmp_path / "in").mkdir()
    with pytest.raises(ModelError, match="allow_pickle=true"):
        import_model(source, tmp_path / "in", allow_pickle=False)
    import_model(source, tmp_path / "in", allow_pickle=True)
    assert weights_fingerprint(tmp_path / "in") == expected
    assert not list((tmp_path / "in").glob("*.bin"))
