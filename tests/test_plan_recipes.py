"""The reference systems' recipes plan to the numbers that they published."""

from pathlib import Path

import pytest

from altiplano.config import load_config
from altiplano.plan import StagePlan, make_plan

RECIPES = Path(__file__).parents[1] / "configs" / "reference"


def stages_of(name: str) -> dict[str, StagePlan]:
    """The planned stages of one recipe by name."""
    return {stage.name: stage for stage in make_plan(load_config(RECIPES / f"{name}.yaml")).stages}


PUBLISHED = [
    ("chinese-llama-7b", "pretrain-embedding", 204_607_488, 6_885_486_592, 2.97),
    ("chinese-llama-7b", "pretrain-attention", 417_603_584, 6_893_875_200, 6.06),
    ("chinese-llama-7b", "pretrain-all", 429_203_456, 6_905_475_072, 6.2154),
    ("chinese-alpaca-7b", "sft", 429_211_648, 6_905_483_264, 6.2155),
    ("chinese-llama-2-7b", "pretrain-lora", 612_892_672, None, 8.65),
    ("chinese-llama-2-7b", "sft", 612_892_672, None, 8.65),
    ("chinese-llama-2-13b", "pretrain-lora", 816_578_560, None, 6.05),
    ("chinese-llama-2-1.3b", "pretrain-full", 1_262_522_368, 1_262_522_368, 100),
    ("chinese-vicuna-7b-instruct", "sft", 4_194_304, 6_742_609_920, 0.0622),
    ("chinese-vicuna-7b-chat", "sft", 19_988_480, 6_758_404_096, 0.2958),
]


@pytest.mark.parametrize(("recipe", "stage", "trained", "everything", "percent"), PUBLISHED)
def test_published_numbers(
    recipe: str, stage: str, trained: int, everything: int | None, percent: float
) -> None:
    found = stages_of(recipe)[stage]
    parameters, trainable = sum(found.parameters.values()), sum(found.trainable.values())
    assert trainable == trained
    assert everything in (None, parameters)
    digits = len(str(percent).partition(".")[2])
    assert round(100 * trainable / parameters, digits) == percent


def test_every_recipe_is_held_against_its_numbers() -> None:
    files = {file.stem for file in RECIPES.glob("*.yaml")}
    assert files == {recipe for recipe, *_ in PUBLISHED}
    planned = {(recipe, stage) for recipe, stage, *_ in PUBLISHED}
    assert {(name, stage) for name in files for stage in stages_of(name)} - planned == {
        ("chinese-llama-2-13b", "sft")
    }


@pytest.mark.parametrize(
    ("recipe", "stage", "fewer"),
    [
        ("chinese-llama-7b", "pretrain-embedding", 17953 * 4096),
        ("chinese-llama-7b", "pretrain-all", 2 * 17953 * 4096 + 19_988_480),
        ("chinese-alpaca-7b", "sft", 2 * 4096 + 19_988_480),
        ("chinese-llama-2-7b", "pretrain-lora", 2 * 23296 * 4096 + 159_907_840),
        ("chinese-vicuna-7b-chat", "sft", None),
        ("chinese-llama-2-1.3b", "pretrain-full", None),
    ],
)
def test_what_new_rows_alone_would_train(recipe: str, stage: str, fewer: int | None) -> None:
    assert stages_of(recipe)[stage].trainable_new_rows == fewer


def test_recipes_say_where_they_come_from_and_how_to_run_them() -> None:
    for file in RECIPES.glob("*.yaml"):
        first, second, third, *_ = file.read_text(encoding="utf-8").splitlines()
        assert "ymcui/" in first or "Facico/" in first
        assert second.endswith(f"altiplano run configs/reference/{file.name}")
        assert third.endswith(f"altiplano plan configs/reference/{file.name}")
