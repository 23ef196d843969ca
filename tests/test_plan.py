"""Plans from configs alone, and their memory against live tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from altiplano.config import Project, load_config
from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.errors import ConfigError, ModelError
from altiplano.model.adapt import Trainee, make_trainee
from altiplano.model.counts import LlamaShape, count_parameters, trainable_parameters
from altiplano.plan import StagePlan, explain_oom, make_plan, plan_table
from altiplano.plan import memory as plan_memory
from altiplano.plan.memory import Load, Sharing, worker_memory

LLAMA_7B = LlamaShape(4096, 11008, 32, 32, 32, 128)


def total(counts: dict[str, int]) -> int:
    """Sum over the components."""
    return sum(counts.values())


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
    full, half = (
        memory(gradient_checkpointing=mode)["activations"] for mode in ("full", "selective")
    )
    assert full < half < wide["activations"]
    assert narrow["activations"] < wide["activations"]


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
    assert "▁" in rows["over the steps"] and "█" in rows["over the steps"]


# ---------------------------------------------------------------- known before it exists


SHAPE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip


def test_a_published_shape_and_vocabulary_need_nothing_on_disk(tmp_path: Path) -> None:
    known = {"path": "models/llama-7b", "shape": SHAPE}
    planned = make_plan(
        load(tmp_path, base_model=known, tokenizer={"add": ["zh.model"], "pieces": 49953})
    )
    assert total(planned.stages[0].trainable) == 2 * 17953 * 4096
    assert not any("at most" in note or "zh.model" in note for note in planned.notes)
    with pytest.raises(ConfigError, match="`tokenizer.unchanged` leaves no new rows"):
        load(tmp_path, base_model=known, tokenizer={"unchanged": True})
    whole = {"stages": [{"name": "all", "rows": "all"}]}
    kept = make_plan(
        load(tmp_path, base_model=known, tokenizer={"unchanged": True}, pretrain=whole)
    )
    assert kept.vocab_new_at_most == kept.vocab_old == 32000
    with pytest.raises(ConfigError, match="31999, the base alone has 32000"):
        make_plan(load(tmp_path, base_model=known, tokenizer={"vocab_size": 50, "pieces": 31999}))


def test_a_base_on_disk_must_have_the_shape_it_is_said_to_have(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({**SHAPE, "hidden_size": 2048}))
    with pytest.raises(ModelError, match="hidden_size is 2048, not 4096"):
        make_plan(load(tmp_path, base_model={"path": "base", "shape": SHAPE}))


def test_the_learning_rate_is_shown_before_it_is_used(tmp_path: Path) -> None:
    stage = {"name": "a", "steps": 100, "warmup_ratio": 0.1, "min_lr_ratio": 0.1}
    planned = make_plan(load(tmp_path, pretrain={"stages": [stage, {**stage, "name": "b"}]}))
    found = planned.stages[1]
    assert found.learning_rates is not None
    assert found.learning_rates[0] == (0, pytest.approx(1e-4))
    assert dict(found.learning_rates)[10] == pytest.approx(1e-3)
    assert max(found.learning_rate_shape) <= 1
    unknown = make_plan(load(tmp_path, sft={"rows": "none", "lora": {}, "warmup_steps": 100}))
    assert unknown.stages[3].learning_rates is None
    assert unknown.stages[3].learning_rate_shape[0] < 0.1 < unknown.stages[3].learning_rate_shape[3]


# ---------------------------------------------------------------- memory against live tensors


SETTINGS = [
    {"full": True},
    {"rows": "new"},
    {"rows": "all", "lora": {"r": 4}},
    {"rows": "none", "lora": {"r": 4, "modules": ["q_proj", "v_proj"]}},
    {"rows": "new", "row_matrices": "embedding", "lora": {"r": 4, "dropout": 0.1}},
]


def planned_memory(trainee: Trainee, batch_tokens: int, precision: str) -> dict[str, int]:
    """What the plan says of a live trainee of 320 rows, alone on a CPU."""
    shape = LlamaShape.from_config(trainee.model.config.to_dict())
    settings = trainee.settings.model_copy(update={"precision": precision})
    trainable = trainable_parameters(shape, 300, 320, settings)
    load = Load(shape, count_parameters(shape, 320), trainable, 320, batch_tokens, 0)
    return worker_memory(settings, load, Sharing(1, "ddp", offload=False, on_gpu=False))[0]


def held(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_gradients_and_optimizer_are_what_lives(
    tiny_llama: Callable[..., Any], given: dict[str, Any], precision: str
) -> None:
    settings = TrainSettings.model_validate(given)
    model = tiny_llama(320).to(getattr(torch, precision))
    trainee = make_trainee(model, settings, 300, seed=0)
    parameters = list(trainee.trainable().values())
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    weights = [
        *model.parameters(),
        *(buffer for name, buffer in model.named_buffers() if "inv_freq" not in name),
    ]
    found = planned_memory(trainee, 64, precision)
    assert found["weights"] == held(weights)
    assert found["gradients"] == held([p.grad for p in parameters if p.grad is not None])
    assert found["optimizer"] == held(moments)


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_about_what_autograd_saves(
    tiny_llama: Callable[..., Any], given: dict[str, Any], precision: str
) -> None:
    tokens = 512
    model = tiny_llama(320).to(getattr(torch, precision))
    trainee = make_trainee(model.train(), TrainSettings.model_validate(given), 300, seed=0)
    saved = saved_bytes(trainee, tokens, narrow=precision == "bfloat16")
    found = planned_memory(trainee, tokens, precision)
    assert 0.7 < (found["activations"] + found["narrow copies"]) / saved < 1.4


def saved_bytes(trainee: Trainee, tokens: int, *, narrow: bool) -> int:
    """Bytes of the different storages that the body's backward pass keeps, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in trainee.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow),
    ):
        states = trainee.hidden(input_ids=torch.randint(0, 320, (1, tokens)))
    assert states.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_take_the_bytes_that_are_planned(
    tiny_llama: Callable[..., Any], bits: Any
) -> None:
    from altiplano.model.quantize import quantize_blocks

    model = tiny_llama(320).to(torch.bfloat16)
    shape = LlamaShape.from_config(model.config.to_dict())
    quantize_blocks(model, bits)
    stored = list(model.parameters())
    scales = [getattr(p, "quant_state", None) or getattr(p, "SCB", None) for p in stored]
    settings = TrainSettings(
        rows="none", lora=LoraSettings(r=4), quantize=bits, precision="bfloat16"
    )
    trainable = trainable_parameters(shape, 300, 320, settings)
    load_ = Load(shape, count_parameters(shape, 320), trainable, 320, 64, 0)
    sharing = Sharing(1, "ddp", offload=False, on_gpu=False)
    found = worker_memory(settings, load_, sharing)[0]["weights"] - 4 * trainable["lora"]
    assert any(scale is not None for scale in scales)
    assert held(stored) <= found <= 1.05 * held(stored)


def stage_of_7b(workers: int = 8, **cluster: Any) -> dict[str, dict[str, int]]:
    """Device and host memory of a full training of LLaMA-7B on GPUs."""
    settings = TrainSettings(full=True)
    counts = count_parameters(LLAMA_7B, 32000)
    load_ = Load(LLAMA_7B, counts, {**counts, "lora": 0}, 32000, 4096, 0)
    sharing = Sharing(workers, cluster.get("strategy", "ddp"), cluster.get("offload", False), True)
    device, host = worker_memory(settings, load_, sharing)
    return {"device": device, "host": host}


def test_each_strategy_shares_what_it_says() -> None:
    alone = stage_of_7b()["device"]
    shared = {f"zero{n}": stage_of_7b(strategy=f"zero{n}")["device"] for n in (1, 2, 3)}
    for name, divided in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        for stage in (1, 2, 3):
            found = shared[f"zero{stage}"][name]
            assert (found < alone[name] / 4) == (stage >= divided)
    assert shared["zero3"]["gathered"] > 0 == shared["zero2"]["gathered"]
    assert total(shared["zero3"]) < total(shared["zero2"]) < total(alone)


def test_what_is_offloaded_leaves_the_device() -> None:
    here = stage_of_7b(strategy="zero3")
    away = stage_of_7b(strategy="zero3", offload=True)
    assert here["host"] == {}
    assert set(away["host"]) == {"weights", "gradients", "optimizer"}
    assert total(away["device"]) + total(away["host"]) == total(here["device"])
    assert set(stage_of_7b(strategy="zero1", offload=True)["host"]) == {"optimizer"}


def test_running_out_of_memory_names_the_part_and_the_key(tmp_path: Path) -> None:
    stage = make_plan(load(tmp_path)).stages[0]

    def told(largest: str) -> str:
        sizes = {**stage.memory_bytes, largest: 2**40}
        return explain_oom(StagePlan(**{**vars(stage), "memory_bytes": sizes}))

    assert "activations (1.02e+03 GiB): recompute them (`gradient_checkpointing: full`)" in told(
        "activations"
    )
    assert "`cluster.strategy: zero1`" in told("optimizer")
    for part in stage.memory_bytes:
        assert part in told(part)


def test_the_loss_makes_as_many_logits_as_the_plan_counts() -> None:
    from altiplano.model import loss

    assert plan_memory.LOSS_CHUNK_TOKENS == loss.CHUNK_TOKENS


TINY_SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip


def test_a_calibration_times_every_stage(tmp_path: Path) -> None:
    from altiplano.plan.calibrate import calibrate, speed_lines

    short = {"precision": "float32", "micro_batch_tokens": 64}
    project = load(
        tmp_path,
        data={"text": CONFIG["data"]["text"], "sequence_length": 32},
        pretrain={"stages": [{**short, "name": "rows"}]},
        sft=None,
        draft={"layers": 1, "train": {**short, "steps": 20, "tokens_per_step": 1024}},
        base_model={"path": "base", "shape": TINY_SHAPE},
    )
    planned = make_plan(project)
    speeds = calibrate(project, planned)
    assert [speed.stage for speed in speeds] == [stage.name for stage in planned.stages]
    assert all(speed.tokens_per_s > 0 for speed in speeds)
    rows, draft = speeds
    assert draft.hours == pytest.approx(20 * 1024 / (2 * draft.tokens_per_s) / 3600)
    assert rows.hours is None
    assert "2 such workers" in speed_lines(speeds, 2)[-1]


def test_a_calibration_for_gpus_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from altiplano.plan.calibrate import calibrate

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    project = load(tmp_path, cluster={"gpus_per_worker": 1})
    with pytest.raises(ConfigError, match="no GPU to time"):
        calibrate(project, make_plan(project))
