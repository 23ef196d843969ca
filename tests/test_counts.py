"""Parameters and operations against real models and published numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.errors import ModelError
from altiplano.model.adapt import make_trainee
from altiplano.model.counts import (
    LlamaShape,
    count_parameters,
    flops_per_token,
    recomputed_flops_per_token,
    require_shape,
    trainable_parameters,
)

LLAMA_7B = LlamaShape(4096, 11008, 32, 32, 32, 128)
LLAMA_13B = LlamaShape(5120, 13824, 40, 40, 40, 128)
LLAMA_1B3 = LlamaShape(4096, 11008, 4, 32, 32, 128)


def total(counts: dict[str, int]) -> int:
    """Sum over the components."""
    return sum(counts.values())


@pytest.mark.parametrize(
    ("shape", "vocab", "expected"),
    [
        (LLAMA_7B, 32000, 6_738_415_616),
        (LLAMA_7B, 49953, 6_885_486_592),
        (LLAMA_7B, 49954, 6_885_494_784),
        (LLAMA_7B, 55296, 6_929_256_448),
        (LLAMA_1B3, 55296, 1_262_522_368),
    ],
)
def test_published_sizes(shape: LlamaShape, vocab: int, expected: int) -> None:
    assert total(count_parameters(shape, vocab)) == expected


@pytest.mark.parametrize(
    ("shape", "vocab", "settings", "expected"),
    [
        (LLAMA_7B, 49953, {"rows": "all", "r": 8}, 429_203_456),
        (LLAMA_7B, 49954, {"rows": "all", "r": 8}, 429_211_648),
        (LLAMA_7B, 55296, {"rows": "all", "r": 64}, 612_892_672),
        (LLAMA_13B, 55296, {"rows": "all", "r": 64}, 816_578_560),
        (LLAMA_7B, 32000, {"rows": "none", "r": 8}, 19_988_480),
        (LLAMA_7B, 32000, {"rows": "none", "r": 8, "modules": ["q_proj", "v_proj"]}, 4_194_304),
        (LLAMA_7B, 49953, {"rows": "new"}, 2 * (49953 - 32000) * 4096),
    ],
)
def test_published_trainable_counts(
    shape: LlamaShape, vocab: int, settings: dict[str, Any], expected: int
) -> None:
    found = trainable_parameters(shape, 32000, vocab, make_settings(**settings))
    assert total(found) == expected


@pytest.mark.parametrize(
    ("modules", "share"),
    [(["q_proj", "k_proj", "v_proj", "o_proj"], "3.97%"), (list(LLAMA_13B.linear_sizes), "4.10%")],
)
def test_published_shares_of_13b(modules: list[str], share: str) -> None:
    settings = make_settings("all", 8, modules)
    trained = trainable_parameters(LLAMA_13B, 32000, 49953, settings)
    whole = total(count_parameters(LLAMA_13B, 49953)) + trained["lora"]
    assert f"{total(trained) / whole:.2%}" == share


def make_settings(rows: str, r: int | None = None, modules: list[str] | None = None) -> Any:
    """Settings with the few values that matter for counts."""
    lora: dict[str, Any] | None = None
    if r is not None:
        lora = {"r": r} if modules is None else {"r": r, "modules": modules}
    return TrainSettings.model_validate({"rows": rows, "lora": lora})


@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    head_dim=st.sampled_from([None, 8, 16]),
    tied=st.booleans(),
    biases=st.tuples(st.booleans(), st.booleans()),
    layers=st.integers(1, 3),
)
def test_counts_equal_those_of_a_real_model(
    heads: tuple[int, int],
    head_dim: int | None,
    tied: bool,
    biases: tuple[bool, bool],
    layers: int,
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=44, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
        tie_word_embeddings=tied, attention_bias=biases[0], mlp_bias=biases[1],
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shape = LlamaShape.from_config(config.to_dict())
    assert total(count_parameters(shape, 50)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(full=True),
        TrainSettings(rows="new"),
        TrainSettings(rows="all", lora=LoraSettings(r=3)),
        TrainSettings(rows="new", lora=LoraSettings(r=3, dora=True)),
        TrainSettings(rows="none", lora=LoraSettings(r=2, modules=["k_proj", "down_proj"])),
    ],
)
def test_trainable_counts_equal_what_is_trained(
    tiny_llama: Callable[..., Any], settings: TrainSettings, tied: bool
) -> None:
    model = tiny_llama(320, tied=tied)
    shape = LlamaShape.from_config(model.config.to_dict())
    found = trainable_parameters(shape, 300, 320, settings)
    trained = make_trainee(model, settings, 300, seed=0).trainable()
    assert total(found) == sum(parameter.numel() for parameter in trained.values())
    lora = sum(p.numel() for name, p in trained.items() if "lora_" in name)
    assert found["lora"] == lora


@pytest.mark.parametrize("rows", ["new", "all"])
@pytest.mark.parametrize("matrix", ["embedding", "head"])
def test_one_matrix_is_counted_where_one_is_trained(
    tiny_llama: Callable[..., Any], rows: Any, matrix: Any
) -> None:
    settings, model = TrainSettings(rows=rows, row_matrices=matrix), tiny_llama(320)
    shape = LlamaShape.from_config(model.config.to_dict())
    found = trainable_parameters(shape, 300, 320, settings)
    trained = make_trainee(model, settings, 300, seed=0).trainable()
    assert found[matrix] == total(found) == sum(p.numel() for p in trained.values())


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        (TrainSettings(full=True), True),
        (TrainSettings(rows="new"), True),
        (TrainSettings(rows="all", lora=LoraSettings(r=3)), True),
        (TrainSettings(rows="new", row_matrices="head"), True),
        (TrainSettings(rows="new", row_matrices="embedding"), True),
        # The first block's own inputs need no gradient: less than is counted.
        (TrainSettings(rows="none", lora=LoraSettings(r=2)), False),
    ],
)
def test_operations_equal_those_pytorch_counts(
    tiny_llama: Callable[..., Any], settings: TrainSettings, exact: bool
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = tiny_llama(320), 24
    model.config._attn_implementation = "eager"
    shape = LlamaShape.from_config(model.config.to_dict())
    trainee = make_trainee(model, settings, 300, seed=0)
    ids = torch.randint(0, 320, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        logits = trainee.head(trainee.hidden(input_ids=ids))
        torch.nn.functional.cross_entropy(logits[0], ids[0]).backward()
    # Eager attention multiplies the masked half too: as many keys as a length of 2 n - 1.
    expected = tokens * flops_per_token(shape, 320, settings, 2 * tokens - 1, vocab_old=300)
    if exact:
        assert counter.get_total_flops() == expected
    else:
        assert 0.8 * expected < counter.get_total_flops() < expected


def test_recomputing_costs_the_forward_pass_of_the_blocks_again() -> None:
    def again(mode: str) -> float:
        settings = TrainSettings.model_validate({"gradient_checkpointing": mode})
        return recomputed_flops_per_token(LLAMA_7B, settings, 1)

    blocks = total(count_parameters(LLAMA_7B, 0)) - 65 * 4096  # without norms
    assert again("full") == 2 * again("selective") == 2 * blocks + 4 * 32 * 4096
    assert again("none") == 0


def test_only_targets_cost_the_head() -> None:
    settings = TrainSettings(full=True)
    every, tenth = (
        flops_per_token(LLAMA_7B, 32000, settings, 512, target_share=share) for share in (1, 0.1)
    )
    assert every - tenth == pytest.approx(0.9 * 6 * 32000 * 4096)


def test_a_base_of_another_shape_is_refused() -> None:
    config = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    published = {**config, "num_key_value_heads": None, "head_dim": None}
    require_shape(published, {**config, "attention_bias": True}, "models/7b")
    require_shape(None, config, "models/7b")
    with pytest.raises(ModelError, match="models/7b .* num_hidden_layers is 40, not 32"):
        require_shape(published, {**config, "num_hidden_layers": 40}, "models/7b")
    with pytest.raises(ModelError, match="vocab_size is 32001, not 32000"):
        require_shape(published, {**config, "vocab_size": 32001}, "models/7b")
