"""Extension: old rows and other tensors bit by bit, how new rows start, padding rows, memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.data.tokens.store import TokenStore
from altiplano.errors import ModelError, ServeError, TrainingError
from altiplano.evaluate.acceptance import draft_acceptance
from altiplano.evaluate.generate import greedy_replies
from altiplano.merge.merge import merge_checkpoint
from altiplano.merge.probe import probe
from altiplano.model import new_rows as rows_module
from altiplano.model import stored as stored_module
from altiplano.model.adapt import load_chain_live, make_trainee
from altiplano.model.attention import DOCUMENTS
from altiplano.model.extend import extend_checkpoint
from altiplano.model.fold import AdapterStack, fold_into
from altiplano.model.load import EMBEDDING, HEAD, PIECES, load_model, read_config
from altiplano.model.loss import summed_distillation
from altiplano.model.new_rows import new_rows
from altiplano.model.stored import read_header
from altiplano.train.local import train_here
from altiplano.train.machine import Machine
from tests.helpers.tiny_run import LENGTH, VOCAB_NEW, VOCAB_OLD, write_model, write_store

ADDED = VOCAB_NEW - VOCAB_OLD
SUBPIECES = [[i % VOCAB_OLD, (7 * i + 1) % VOCAB_OLD, i % VOCAB_OLD] for i in range(ADDED)]
MATRICES = (EMBEDDING, HEAD)
INDEX = "model.safetensors.index.json"


def extend(base: Path, target: Path, subpieces: list[list[int]] = SUBPIECES, **given) -> dict:
    target.mkdir()
    values = {
        "vocab_old": VOCAB_OLD, "init": "subpiece_mean", "special_ids": {}, "seed": 0, **given,
    }  # fmt: skip
    return extend_checkpoint(base, target, subpieces, **values)


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def made(old: torch.Tensor, subpieces: list[list[int]], init: str, seed: int = 5) -> torch.Tensor:
    return torch.cat(list(new_rows(old, subpieces, init, std=0.02, seed=seed)))


# ---------------------------------------------------------------- how rows start


@given(
    pieces=st.lists(st.lists(st.integers(0, 40), max_size=9), min_size=1, max_size=30),
    group_bytes=st.sampled_from([1, 100, 10_000]),
)
def test_means_of_subpieces_are_exact_however_rows_are_grouped(
    pieces: list[list[int]], group_bytes: int
) -> None:
    old = torch.randn(41, 6, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "GROUP_BYTES", group_bytes)
        found = made(old, pieces, "subpiece_mean")
    wide = old.double()
    expected = torch.stack([wide[ids].mean(0) if ids else wide.mean(0) for ids in pieces])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_gaussian_rows_have_the_old_rows_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 6, generator=generator)
    old = torch.randn(500, 6, generator=generator) @ mix + 3.0
    rows = made(old, [[]] * 20000, "gaussian")
    torch.testing.assert_close(rows.mean(0), old.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(rows.T.cov(), old.T.cov(), atol=0.6, rtol=0.05)
    assert torch.equal(rows, made(old, [[]] * 20000, "gaussian"))
    assert not torch.equal(rows[:9], made(old, [[]] * 9, "gaussian", seed=6))


def test_gaussian_rows_of_a_matrix_of_few_rows_lie_in_its_span() -> None:
    old = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    rows = made(old, [[]] * 50, "gaussian")
    outside = rows - rows @ torch.linalg.pinv(old) @ old
    assert rows.isfinite().all()
    assert outside.abs().max() < 0.02


def test_mean_and_random_rows() -> None:
    old = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) + 3.0
    means = made(old, [[1], []], "mean")
    torch.testing.assert_close(means, old.mean(0).expand(2, 6))
    drawn = made(old, [[]] * 20000, "random")
    assert drawn.mean().abs() < 1e-3
    assert drawn.std().item() == pytest.approx(0.02, rel=0.02)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("tied", [False, True])
def test_extension_keeps_old_rows_and_means_subpieces(tmp_path: Path, tied: bool) -> None:
    base = write_model(tmp_path / "base", tied=tied, vocab=VOCAB_OLD)
    special = {"eos_token_id": 2, "pad_token_id": None}
    counts = extend(base, tmp_path / "new", [[1, 2], [7], []], special_ids=special)
    assert counts == {"rows_old": 60, "rows_new": 63, "rows_added": 3, "rows_padding": 0}
    old, new = all_tensors(base), all_tensors(tmp_path / "new")
    assert (HEAD in new) is not tied
    for name in [EMBEDDING] if tied else MATRICES:
        assert torch.equal(new[name][:VOCAB_OLD], old[name])
        torch.testing.assert_close(new[name][VOCAB_OLD], old[name][[1, 2]].mean(0))
        assert torch.equal(new[name][VOCAB_OLD + 1], old[name][7])
        torch.testing.assert_close(new[name][VOCAB_OLD + 2], old[name].mean(0))
    before, after = load_model(base), load_model(tmp_path / "new")
    ids = torch.arange(48).view(2, 24)
    assert torch.equal(before(ids).logits, after(ids).logits[..., :VOCAB_OLD])
    assert after.config.eos_token_id == 2
    assert PIECES not in read_config(tmp_path / "new")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [100, 1 << 20])
def test_a_sharded_checkpoint_is_copied_bit_by_bit_in_bounded_reads(
    tiny_llama: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype, chunk_bytes: int,
) -> None:  # fmt: skip
    base, group_bytes = tmp_path / "base", 1024
    tiny_llama(300).to(dtype).save_pretrained(base, max_shard_size="60KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    monkeypatch.setattr(stored_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(rows_module, "GROUP_BYTES", group_bytes)
    reads: list[int] = []
    fill = stored_module._fill

    def noted(got: int, wanted: bytearray, file: Path) -> None:
        reads.append(len(wanted))
        fill(got, wanted, file)

    monkeypatch.setattr(stored_module, "_fill", noted)
    subpieces = [[i, i + 100, i] for i in range(50)]
    extend(base, tmp_path / "new", subpieces, vocab_old=299)
    assert max(reads) <= max(chunk_bytes, group_bytes)
    old, new = all_tensors(base), all_tensors(tmp_path / "new")
    assert set(new) == set(old)
    for name, tensor in new.items():
        assert tensor.dtype == dtype
        kept = tensor[:299] if name in MATRICES else tensor
        assert torch.equal(kept, old[name][: len(kept)])
    expected = torch.stack([old[EMBEDDING][ids].float().mean(0) for ids in subpieces])
    torch.testing.assert_close(new[EMBEDDING][299:], expected.to(dtype))
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
    assert index["weight_map"] == json.loads((base / INDEX).read_text())["weight_map"]
    for file in (tmp_path / "new").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
    assert load_model(tmp_path / "new").config.vocab_size == 349


def test_sources_that_cannot_be_extended_are_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", vocab=VOCAB_OLD)
    with pytest.raises(ModelError, match="has 60 embedding rows but its tokenizer 61 pieces"):
        extend(base, tmp_path / "a", vocab_old=61)
    file = base / "model.safetensors"
    whole = file.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"has \d+ bytes, its header says \d+"):
        extend(base, tmp_path / "b")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="is not a safetensors file"):
        extend(base, tmp_path / "c")
    save_file({**tensors, EMBEDDING: tensors[EMBEDDING].to(torch.int8)}, file)
    with pytest.raises(ModelError, match="stored as I8"):
        extend(base, tmp_path / "d")
    save_file({name: t for name, t in tensors.items() if name != HEAD}, file)
    with pytest.raises(ModelError, match=r"no tensor lm_head\.weight"):
        extend(base, tmp_path / "e")
    save_file({**tensors, HEAD: tensors[HEAD][:50].clone()}, file)
    with pytest.raises(ModelError, match=r"lm_head\.weight of .* has 50 rows"):
        extend(base, tmp_path / "f")


def test_headers_tell_where_tensors_lie(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(4).half(), "c": torch.tensor(3.5)}
    save_file(tensors, tmp_path / "t.safetensors", metadata={"x": "y"})
    found = {stored.name: stored for stored in read_header(tmp_path / "t.safetensors")}
    assert set(found) == set(tensors)
    assert torch.equal(found["a"].rows(1, 4), tensors["a"][1:4])
    for name, tensor in tensors.items():
        data = b"".join(bytes(chunk) for chunk in found[name].chunks())
        assert data == tensor.numpy().tobytes()


# ---------------------------------------------------------------- padding rows


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The same extended model without and with padding rows."""
    base = write_model(tmp_path / "base", tied=request.param, vocab=VOCAB_OLD)
    extend(base, tmp_path / "plain")
    extend(base, tmp_path / "padded", pad_to_multiple=64)
    return tmp_path / "plain", tmp_path / "padded"


def test_padding_rows_are_zero_and_known_to_the_config(pair: tuple[Path, Path]) -> None:
    plain, padded = pair
    config = read_config(padded)
    assert (config["vocab_size"], config[PIECES]) == (128, VOCAB_NEW)
    for name, tensor in all_tensors(padded).items():
        if name in MATRICES:
            assert tensor.shape[0] == 128
            assert not tensor[VOCAB_NEW:].any()
            assert torch.equal(tensor[:VOCAB_NEW], all_tensors(plain)[name])
    ids = torch.arange(48).view(2, 24)
    assert torch.equal(load_model(padded)(ids).logits, load_model(plain)(ids).logits)


LORA = LoraSettings(r=4, alpha=8)
WHAT = [
    {"rows": "new"},
    {"rows": "new", "lora": LORA},
    {"rows": "all"},
    {"rows": "none", "lora": LORA},
    {"full": True, "rows": "none"},
]


def learn(folder: Path, store: Path, target: Path, what: dict, chain: tuple = ()) -> list[float]:
    """A few steps of the library's loop in one process; losses, and the trained files."""
    settings = TrainSettings(
        steps=4, tokens_per_step=4 * LENGTH, micro_batch_tokens=2 * LENGTH, learning_rate=1e-2,
        weight_decay=0.1, **what,
    )  # fmt: skip
    model = load_model(folder)
    fold_into(model, AdapterStack(chain, VOCAB_OLD))
    trainee = make_trainee(model, settings, VOCAB_OLD, seed=1)
    machine = Machine(torch.device("cpu"), torch.float32, DOCUMENTS, "test")
    records, _ = train_here(trainee, TokenStore.open(store), seed=5, machine=machine)
    trainee.save(target)
    return [record.loss for record in records]


@pytest.mark.parametrize("what", WHAT, ids=str)
def test_training_with_padding_rows_is_training_without(
    pair: tuple[Path, Path], tmp_path: Path, what: dict
) -> None:
    """Two stages and the merge: the same losses, the same adapters, the same merged weights."""
    store = write_store(tmp_path / "s")
    losses, adapters, merged = [], [], []
    for folder in pair:
        first, second = folder.with_name(f"{folder.name}-1"), folder.with_name(f"{folder.name}-2")
        losses.append(learn(folder, store, first, what))
        if what.get("full"):
            # A stage that trains everything begins a new chain.
            for name in ("config.json", "generation_config.json"):
                (first / name).write_bytes((folder / name).read_bytes())
            assert not load_file(first / "model.safetensors")[EMBEDDING][VOCAB_NEW:].any()
            base, chain = first, [second]
            losses[-1] += learn(first, store, second, {"rows": "new"})
        else:
            base, chain = folder, [first, second]
            losses[-1] += learn(folder, store, second, {"rows": "new", "lora": LORA}, (first,))
        adapters.append(load_file(second / "rows.safetensors"))
        output = folder.with_name(f"{folder.name}-merged")
        output.mkdir()
        merge_checkpoint(base, chain, VOCAB_OLD, output)
        assert probe(output, base, chain, VOCAB_OLD, 1e-4)["probe_agreement"] == 1.0
        assert load_chain_live(base, chain, VOCAB_OLD)(torch.tensor([[1]])).logits.shape[-1] == 80
        assert read_config(output)["vocab_size"] == VOCAB_NEW
        assert PIECES not in read_config(output)
        merged.append(all_tensors(output))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]
    for plain, padded in (adapters, merged):
        assert set(plain) == set(padded)
        for name in plain:
            torch.testing.assert_close(padded[name], plain[name], atol=2e-5, rtol=1e-4)


def test_padding_is_never_predicted_nor_accepted(pair: tuple[Path, Path]) -> None:
    plain, padded = (load_model(folder) for folder in pair)
    with torch.no_grad():
        # Rows that would win every comparison, whatever the sign of a logit.
        loud = 100 * padded.lm_head.weight[:24]
        padded.lm_head.weight[VOCAB_NEW:] = torch.cat([loud, -loud])
    prompts = [[1, 5, 9], [1, 70]]
    replies = [
        greedy_replies(model, prompts, max_new_tokens=6, eos_id=None) for model in (plain, padded)
    ]
    assert replies[0] == replies[1]
    for pair_of_models in ((plain, padded), (padded, plain)):
        found = draft_acceptance(*pair_of_models, prompts, k=2, max_new_tokens=6)
        assert found["agreement"] == 1.0


def test_a_padded_student_learns_from_a_plain_teacher(pair: tuple[Path, Path]) -> None:
    plain, padded = (load_model(folder) for folder in pair)
    ids = torch.arange(40).view(2, 20)
    hidden = padded.model(ids).last_hidden_state
    found = summed_distillation(
        hidden, ids, padded.lm_head, plain.model(ids).last_hidden_state, plain.lm_head
    )
    p = plain(ids).logits.softmax(-1)
    torch.testing.assert_close(found, -(p * p.log()).sum(), atol=1e-3, rtol=1e-5)


def test_what_padding_rows_would_spoil_is_refused(pair: tuple[Path, Path]) -> None:
    from altiplano.config.schema import ServeSection
    from altiplano.serving.check import check_parts

    _, padded = pair
    lora = TrainSettings(rows="none", lora=LoraSettings(modules=["lm_head"]))
    with pytest.raises(TrainingError, match="pad_to_multiple: 1"):
        make_trainee(load_model(padded), lora, VOCAB_OLD, seed=0)
    (padded / "tokenizer.model").touch()
    with pytest.raises(ServeError, match="has 128 embedding rows for 80 pieces"):
        check_parts(ServeSection(), padded)
