"""Counts against real models and published numbers; plans from configs alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from altiplano.config import Project, load_config
from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.model.adapt import make_trainee
from altiplano.model.counts import LlamaShape, count_parameters, trainable_parameters
from altiplano.plan import make_plan, plan_table

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


def test_published_embedding_alone() -> None:
    settings = TrainSettings(rows="all")
    assert trainable_parameters(LLAMA_7B, 32000, 49953, settings)["embedding"] == 204_607_488


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


# ---------------------------------------------------------------- plans


CONFIG: dict[str, Any] = {
    "name": "trial",
    "base_model": {
        "scratch": {
            "text": [{"path": "en.txt", "language": "en"}],
            "tokenizer": {"vocab_size": 512},
            "shape": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                      "num_attention_heads": 2, "num_key_value_heads": 2},
            "train": {"steps": 20, "tokens_per_step": 1024},
        }
    },
    "tokenizer": {"vocab_size": 200, "pad_piece": "[PAD]"},
    "data": {
        "text": [{"path": "zh.txt", "language": "zh"}],
        "instructions": [{"path": "q.jsonl", "language": "zh"}],
    },
    "pretrain": {"stages": [{"name": "rows"}, {"name": "lora", "lora": {"r": 4}, "steps": 10}]},
    "sft": {"rows": "none", "lora": {"r": 4}},
    "draft": {"layers": 1, "train": {}},
    "cluster": {"num_workers": 2},
}  # fmt: skip


def load(folder: Path, **changes: Any) -> Project:
    """CONFIG with sections replaced, from a YAML file in a folder of its own."""
    file = folder / "trial.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return load_config(file)


def test_a_plan_from_scratch(tmp_path: Path) -> None:
    planned = make_plan(load(tmp_path))
    assert (planned.vocab_old, planned.vocab_new_at_most) == (512, 512 + 201)
    stages = {stage.name: stage for stage in planned.stages}
    assert list(stages) == ["base", "pretrain-rows", "pretrain-lora", "sft", "draft"]
    shape = LlamaShape(64, 96, 3, 2, 2, 32)
    base, rows, draft = stages["base"], stages["pretrain-rows"], stages["draft"]
    assert total(base.parameters) == total(base.trainable) == total(count_parameters(shape, 512))
    assert total(rows.trainable) == 2 * 201 * 64
    assert rows.parameters["embedding"] == 713 * 64
    one_layer = LlamaShape(64, 96, 1, 2, 2, 32)
    assert total(draft.trainable) == total(count_parameters(one_layer, 713))
    assert draft.memory_bytes["teacher"] == 4 * total(count_parameters(shape, 713))
    assert base.memory_bytes["teacher"] == 0
    assert base.memory_bytes["weights"] == 4 * total(base.parameters)
    assert base.memory_bytes["optimizer"] == 8 * total(base.trainable)
    assert (base.tokens, rows.tokens, rows.epochs) == (20 * 1024, None, 1.0)
    assert base.micro_batch_tokens == 512  # two workers share a step's 1024
    uneven = {"steps": 3, "tokens_per_step": 1300, "micro_batch_tokens": 100}
    odd = make_plan(load(tmp_path, sft={**uneven, "rows": "new"})).stages[3]
    assert (odd.tokens_per_step, odd.tokens, odd.micro_batch_tokens) == (1536, 3 * 1536, 512)
    assert any("at most 713" in note for note in planned.notes)
    json.dumps(planned.to_json())
    assert planned.to_json()["stages"][0]["trainable_total"] == total(base.trainable)


def test_a_plan_for_a_base_on_disk_reads_only_its_config(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    config = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    }  # fmt: skip
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    planned = make_plan(
        load(tmp_path, base_model={"path": "base"}, tokenizer={"vocab_size": 23296})
    )
    pretrain = planned.stages[1]
    assert total(pretrain.trainable) == 2 * 23296 * 4096 + 19_988_480 // 2
    assert total(pretrain.parameters) == 6_929_256_448 + 19_988_480 // 2


def test_padding_rows_are_counted_where_they_are(tmp_path: Path) -> None:
    plain, padded = (
        {stage.name: stage for stage in make_plan(load(tmp_path, extend=section)).stages}
        for section in ({}, {"pad_to_multiple": 64})
    )
    rows = 768 - 713
    stage, before = padded["pretrain-rows"], plain["pretrain-rows"]
    assert total(stage.parameters) - total(before.parameters) == 2 * rows * 64
    assert stage.trainable == before.trainable
    assert padded["base"] == plain["base"]
    assert padded["draft"] == plain["draft"]
    everything = TrainSettings(rows="all")
    found = trainable_parameters(LLAMA_7B, 32000, 49953, everything, rows_padding=31)
    assert found["embedding"] == 49984 * 4096


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    away = make_plan(load(tmp_path, base_model={"path": "somebody/llama-2-7b"}))
    assert away.stages == []
    assert "somebody/llama-2-7b is not on disk: counts are not available" in away.notes[0]
    lacking = make_plan(load(tmp_path, tokenizer={"add": ["zh.model"]}))
    assert lacking.vocab_new_at_most is None
    assert any("zh.model is not on disk" in note for note in lacking.notes)
    wordy = make_plan(load(tmp_path, tokenizer={"vocab_size": 200, "words": "terms.txt"}))
    assert any("terms.txt: domain words" in note for note in wordy.notes)
    terminal = Console(width=160)
    with terminal.capture() as captured:
        terminal.print(plan_table(away))
    assert "not on disk" in captured.get()


def test_pieces_of_ready_made_models_are_counted(tmp_path: Path) -> None:
    from tests.helpers.tiny_vocabulary import train_tiny_addition

    name = train_tiny_addition(tmp_path).name
    planned = make_plan(load(tmp_path, tokenizer={"add": [name, name]}))
    assert planned.vocab_new_at_most == 512 + 2 * 60


def test_less_memory_with_checkpointing_and_bfloat16(tmp_path: Path) -> None:
    def memory(**settings: Any) -> dict[str, int]:
        stages = [{"name": "lora", "lora": {"r": 4}, **settings}]
        planned = make_plan(load(tmp_path, pretrain={"stages": stages}))
        return planned.stages[1].memory_bytes

    wide, narrow = memory(precision="float32"), memory(precision="bfloat16")
    assert narrow["weights"] < wide["weights"]
    assert narrow["optimizer"] == wide["optimizer"]
    assert 2 * narrow["activations"] == wide["activations"]
    assert memory(gradient_checkpointing="full")["activations"] < wide["activations"]


def test_the_table_shows_stages_and_totals(tmp_path: Path) -> None:
    terminal = Console(width=160)
    with terminal.capture() as captured:
        terminal.print(plan_table(make_plan(load(tmp_path))))
    rows = {line.split("│")[1].strip(): line for line in captured.get().splitlines() if "│" in line}
    assert "new rows + LoRA r=4" in rows["trains"]
    trained = [cell.strip() for cell in rows["trained"].split("│")[2:5]]
    assert trained == ["170,432", "25,728", "37,632"]
    assert [cell.strip() for cell in rows["tokens"].split("│")[2:5]] == ["20,480", "-", "81,920"]
    assert "teacher" in rows
    assert "note: the new vocabulary holds at most 713" in captured.get()
