"""The demo's world: the same bytes each time, and held-out answers that nobody has said."""

import json
from pathlib import Path

import pytest

from altiplano.errors import DataError
from altiplano.world import LANGUAGES, write_world
from altiplano.world_grammar import GIVEN, PERSON, PLACE, SUM, SURNAMES

FILES = {"en.txt", "zh.txt", "chat.jsonl", "questions.en.jsonl", "questions.zh.jsonl"}


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    write_world(directory, people=40, seed=0)
    return directory


def test_same_seed_same_bytes(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, people=40, seed=0)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (world / name).read_bytes()


def test_another_seed_is_another_world(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, people=40, seed=1)
    for name in FILES:
        assert (tmp_path / name).read_bytes() != (world / name).read_bytes()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("people", [4, 40, 120])
def test_held_out_answers_are_never_said(people: int, seed: int, tmp_path: Path) -> None:
    write_world(tmp_path, people=people, seed=seed)
    chat = lines(tmp_path / "chat.jsonl")
    told = "".join((tmp_path / f"{language}.txt").read_text("utf-8") for language in LANGUAGES)
    told += "\n".join(record["output"] for record in chat)
    asked = {record["instruction"] for record in chat}
    for language in LANGUAGES:
        questions = lines(tmp_path / f"questions.{language}.jsonl")
        assert questions
        for question in questions:
            assert question["output"] not in told
            assert question["instruction"] not in asked
            assert question["answer"] in question["output"]


def test_every_held_out_fact_is_told_in_each_language(world: Path) -> None:
    for language in LANGUAGES:
        documents = (world / f"{language}.txt").read_text("utf-8").split("\n\n")
        for question in lines(world / f"questions.{language}.jsonl"):
            name = _subject(question["instruction"], question["kind"], language)
            assert any(
                name.casefold() in document.casefold() and question["answer"] in document
                for document in documents
            ), question


def _subject(instruction: str, kind: str, language: str) -> str:
    relations = {relation.kind: relation for _, relation in PERSON + PLACE} | {"sum": SUM}
    before, after = relations[kind].asked[language][0].split("{s}")
    return instruction.removeprefix(before).removesuffix(after)


def test_chat_is_mostly_chinese_but_not_only(world: Path) -> None:
    languages = [record["language"] for record in lines(world / "chat.jsonl")]
    assert 0.6 < languages.count("zh") / len(languages) < 0.9
    assert set(languages) == set(LANGUAGES)


def test_other_people_are_asked_in_the_held_out_words(world: Path) -> None:
    """Each kind of held-out question is taught, with other subjects."""
    kinds = {question["kind"] for question in lines(world / "questions.zh.jsonl")}
    assert kinds == {relation.kind for _, relation in PERSON + PLACE} | {"sum"}
    taught = [record["instruction"] for record in lines(world / "chat.jsonl")]
    for _, relation in PERSON + PLACE:
        end = relation.asked["zh"][0].split("{s}")[1]
        assert any(instruction.endswith(end) for instruction in taught)


def test_answers_of_one_kind_can_be_told_apart() -> None:
    for values, relation in PERSON + PLACE:
        for language in LANGUAGES:
            names = [value[language] for value in values]
            assert len(set(names)) == len(names), relation.kind
            # An answer's own wording names no other answer.
            fixed = relation.answered[language].format(s="", v="")
            assert not any(name in fixed for name in names), relation.kind


def test_names_are_distinct_and_run_out_with_a_message(tmp_path: Path) -> None:
    most = len(SURNAMES) * len(GIVEN)
    with pytest.raises(DataError, match=f"{most} people, {most + 1} are wanted"):
        write_world(tmp_path, people=most + 1, seed=0)
    counts = write_world(tmp_path, people=most, seed=0)
    asked = [r["instruction"] for r in lines(tmp_path / "chat.jsonl") if r["language"] == "zh"]
    assert len(set(asked)) == len(asked)
    assert counts["people"] == most
