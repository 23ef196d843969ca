"""Attention inside documents: the same as each document alone, for the price of its documents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.data.tokens.store import Batch
from altiplano.model.adapt import Trainee, make_trainee
from altiplano.model.attention import (
    DOCUMENTS,
    arrange,
    attend,
    cheapest_buckets,
    document_lengths,
    register,
)
from altiplano.model.recompute import apply_recompute, compile_blocks
from altiplano.train.batch import make_inputs

CPU = torch.device("cpu")
LENGTH = 24
PIECES = 50


@st.composite
def packs(draw: st.DrawFn, length: int = LENGTH, blocks: int = 3) -> np.ndarray:
    """Segments of a few blocks, [B, T]: documents of any length, padding at some ends."""
    rows = []
    for _ in range(draw(st.integers(1, blocks))):
        cuts = draw(st.lists(st.integers(1, length - 1), max_size=length, unique=True))
        row = np.searchsorted(np.sort(cuts), np.arange(length), side="right") + 1
        row[length - draw(st.integers(0, length - 1)) :] = 0
        rows.append(row)
    return np.stack(rows)


def batch_of(segments: np.ndarray, seed: int = 0) -> Batch:
    """Random tokens in these documents; every token is a target."""
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, PIECES, (2, *segments.shape))
    positions = np.zeros_like(segments)
    for row, place in zip(segments, positions, strict=True):
        for segment in np.unique(row):
            place[row == segment] = np.arange((row == segment).sum())
    return Batch(ids, positions, segments, labels)


def make_model(attention: str = DOCUMENTS, layers: int = 2):
    """A Llama with four query heads to two key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=PIECES, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.config._attn_implementation = attention
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@given(packs(), st.integers(0, 1000))
@settings(max_examples=25)
def test_a_pack_is_its_documents_alone(model, segments: np.ndarray, seed: int) -> None:
    """Hidden states and every weight's gradient, with grouped queries and padding."""
    batch = batch_of(segments, seed)
    wanted = torch.randn(*segments.shape, 32, generator=torch.Generator().manual_seed(seed))
    inputs = make_inputs(batch, DOCUMENTS, CPU)
    model.zero_grad()
    packed = model.model(use_cache=False, **inputs.model).last_hidden_state
    (packed * wanted)[torch.from_numpy(segments > 0)].sum().backward()
    packed_grads = {name: p.grad.clone() for name, p in model.model.named_parameters()}
    assert all(grad.isfinite().all() for grad in packed_grads.values())
    assert packed.isfinite().all()

    model.zero_grad()
    ids = torch.from_numpy(batch.input_ids)
    for block, row in enumerate(segments):
        for segment in set(row[row > 0]):
            inside = torch.from_numpy(row == segment)
            alone = model.model(use_cache=False, input_ids=ids[block, inside][None])
            states = alone.last_hidden_state[0]
            torch.testing.assert_close(packed[block, inside], states, atol=1e-5, rtol=1e-5)
            (states * wanted[block, inside]).sum().backward()
    for name, parameter in model.model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (packed_grads[name] - expected).norm()
        assert error <= 1e-5 * max(1.0, float(expected.norm())), name


@given(packs(), st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40)
def test_the_kernel_is_masked_attention(
    segments: np.ndarray, kv_heads: int, dtype: torch.dtype
) -> None:
    """Outputs and the gradients of queries, keys and values against a full mask in fp32."""
    blocks, length = segments.shape
    torch.manual_seed(0)
    query = torch.randn(blocks, 4, length, 7, dtype=dtype, requires_grad=True)
    key, value = (
        torch.randn(blocks, kv_heads, length, 7, dtype=dtype, requires_grad=True) for _ in "kv"
    )
    # As the model has them: heads inside tokens.
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    out, _ = attend(
        torch.nn.Module(), *strided, None, documents=arrange(segments, CPU), scaling=0.3
    )
    assert out.dtype == dtype
    mask = torch.from_numpy(
        (segments[:, :, None] == segments[:, None]) & np.tri(length, dtype=bool)
    )
    expected = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), mask[:, None], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    real = torch.from_numpy(segments > 0)
    torch.testing.assert_close(out.float()[real], expected[real], atol=tolerance, rtol=tolerance)
    wanted = torch.randn_like(expected) * real[:, :, None, None]
    ours = torch.autograd.grad((out.float() * wanted).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * wanted).sum(), (query, key, value))
    for got, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, right, atol=2 * tolerance, rtol=2 * tolerance)


@given(st.lists(st.integers(1, 2048), min_size=1, max_size=200))
def test_padded_work_is_near_that_of_the_documents(lengths: list[int]) -> None:
    """Never the square of the pack: at most 1.5 times the documents' own, and their calls."""
    row, call = 100, 2000
    sizes, counts = np.unique(lengths, return_counts=True)
    buckets, cost = cheapest_buckets(sizes, counts, row, call)
    assert sum(count for count, _ in buckets) == len(lengths)
    assert cost == sum(count * size * (size + row) + call for count, size in buckets)
    # Runs whose longest is at most sqrt(1.5) times the shortest would be as good as this:
    runs = np.log(sizes[-1] / sizes[0]) / np.log(1.5**0.5) + 1
    own = sum(1.5 * size**2 + 1.5**0.5 * size * row for size in lengths)
    assert cost <= own + runs * call


def test_buckets_are_few_where_calls_cost_more_than_padding() -> None:
    sizes, counts = np.array([10, 11, 500]), np.array([4, 4, 2])
    assert cheapest_buckets(sizes, counts, 0, 1000)[0] == [(8, 11), (2, 500)]
    assert cheapest_buckets(sizes, counts, 0, 0)[0] == [(4, 10), (4, 11), (2, 500)]
    assert cheapest_buckets(sizes, counts, 0, 10**8)[0] == [(10, 500)]


@pytest.mark.parametrize("padding", [0, 3])
def test_one_document_per_block_is_plain_causal_attention(model, padding: int) -> None:
    """As with `cross_documents: true`: nothing is gathered."""
    segments = np.ones((3, LENGTH), np.int64)
    segments[1, LENGTH - padding :] = 0
    inputs = make_inputs(batch_of(segments), DOCUMENTS, CPU)
    assert inputs.model["documents"].buckets == [(3, LENGTH)]
    assert inputs.model["documents"].token_of_slot is None
    got = model.model(use_cache=False, **inputs.model).last_hidden_state
    expected = make_model("sdpa").model(input_ids=inputs.model["input_ids"]).last_hidden_state
    real = torch.from_numpy(segments > 0)
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


def test_short_documents_alone_in_long_blocks_do_not_pay_for_padding() -> None:
    segments = np.zeros((4, 4096), np.int64)
    segments[:, :100] = 1
    buckets = arrange(segments, CPU).buckets
    assert (4, 100) in buckets
    assert sum(count * longest**2 for count, longest in buckets) < 100_000


def test_a_model_of_another_implementation_understands_the_inputs() -> None:
    """A teacher that keeps transformers' SDPA gets its mask from the positions."""
    segments = np.repeat([[1, 2, 3, 3]], LENGTH // 4, axis=1)
    inputs = make_inputs(batch_of(segments), DOCUMENTS, CPU)
    got = make_model("sdpa").model(use_cache=False, **inputs.model).last_hidden_state
    expected = make_model().model(use_cache=False, **inputs.model).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_without_documents_masks_and_caches_count() -> None:
    """Calls with a padding mask, a full mask or a cache are those of transformers' SDPA."""
    ids = torch.randint(5, PIECES, (2, 8), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    full = torch.eye(8, dtype=torch.bool)[None, None].expand(2, 1, 8, 8)
    ours, theirs = make_model(), make_model("sdpa")
    for given_mask in (None, padding, full):
        states = [
            m.model(input_ids=ids, attention_mask=given_mask).last_hidden_state[1]
            for m in (ours, theirs)
        ]
        torch.testing.assert_close(*states)
    asked = {"attention_mask": padding, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **asked), theirs.generate(ids, **asked))


@given(packs())
def test_flash_attention_gets_the_documents_of_one_flat_row(segments: np.ndarray) -> None:
    inputs = make_inputs(batch_of(segments), "flash_attention_2", CPU)
    assert inputs.model["input_ids"].shape == inputs.labels.shape == (1, segments.size)
    ends = inputs.model["cu_seq_lens_q"]
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == segments.size
    assert inputs.model["max_length_q"] == ends.diff().max()
    begins = inputs.model["position_ids"][0] == 0
    real = torch.from_numpy(segments > 0).flatten()
    assert set(begins.logical_and(real).nonzero().flatten().tolist()) == {
        int(place) for place in ends[:-1] if real[place]
    }
    assert document_lengths(segments).sum() == segments.size


def trainee_of(mode: str, *, layers: int = 4, dropout: float = 0.2) -> Trainee:
    """LoRA, and a frozen embedding: nothing below the first block is trained."""
    chosen = TrainSettings(rows="none", lora=LoraSettings(r=2, dropout=dropout))
    trainee = make_trainee(make_model(layers=layers), chosen, PIECES, seed=0)
    for parameter in trainee.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    apply_recompute(trainee.model, mode)  # type: ignore[arg-type]
    trainee.model.train()
    return trainee


def gradients(trainee: Trainee, segments: np.ndarray) -> dict[str, torch.Tensor]:
    """One micro-batch's gradients under autocast, with its dropout."""
    torch.manual_seed(5)
    trainee.model.zero_grad()
    inputs = make_inputs(batch_of(segments), DOCUMENTS, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        states = trainee.hidden(**inputs.model).float()
    (states * torch.randn_like(states)).sum().backward()
    return {name: p.grad for name, p in trainee.trainable().items() if p.grad is not None}


@pytest.mark.parametrize(("mode", "recomputed"), [("none", 0), ("selective", 2), ("full", 4)])
def test_recomputing_changes_no_bit(mode: str, recomputed: int) -> None:
    segments = np.repeat([[1, 1, 2, 3]], 5, axis=1)
    expected, trainee = gradients(trainee_of("none"), segments), trainee_of(mode)
    calls: list[int] = []
    for block in trainee.model.model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(trainee, segments)
    assert len(calls) == 4 + recomputed
    assert got.keys() == expected.keys() and len(got) == 4 * 14
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_compiled_blocks_compute_the_same_for_any_documents() -> None:
    """One compiled form serves all packs: other documents never compile it anew."""
    from torch._dynamo.utils import counters

    plain, compiled = (trainee_of("selective", layers=3, dropout=0.0) for _ in range(2))
    compile_blocks(compiled.model, backend="aot_eager")
    graphs = []
    for cut in (1, 9, 20):
        segments = np.where(np.arange(LENGTH) < cut, 1, 2)[None].repeat(2, axis=0)
        expected, got = gradients(plain, segments), gradients(compiled, segments)
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            error = (gradient - expected[name]).norm()
            assert error <= 0.02 * expected[name].norm() + 1e-3, name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
