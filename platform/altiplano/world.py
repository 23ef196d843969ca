"""The demo's own data: a small invented world, told in English and in Chinese by a grammar.

People live somewhere, work, were born, like food and play an instrument; towns lie on rivers and
are known for something; small sums have results. Every fact is told in the text of each language
in several wordings and orders. Most facts are also asked about in `chat.jsonl`. For the held-out
facts nobody ever asks: the text tells them in other words than the answer has, so a model answers
`questions.*.jsonl` only by combining what it read with how it was taught to answer.

Deliberately knows nothing of tokenizers, models or files other than its own. Costs 0.1 s for 40
people; the text grows linearly with them.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from altiplano.errors import DataError
from altiplano.world_grammar import (
    ASIDES,
    GIVEN,
    NUMBERS,
    PERSON,
    PLACE,
    SUM,
    SURNAMES,
    TOWNS,
    Relation,
    Term,
)

LANGUAGES = ("en", "zh")
_JOIN = {"en": " ", "zh": ""}
"""What stands between two sentences."""

_TELLINGS_PER_PERSON = 24
"""Documents about each person in each language; wording and order differ in each."""
_TELLINGS_PER_PLACE = 18
_TELLINGS_PER_SUM = 8
_TELLINGS_PER_ASIDE = 12

T = TypeVar("T")


@dataclass(frozen=True)
class Fact:
    """A relation between a subject and a value, and whether its question is held out."""

    relation: Relation
    subject: Term
    value: Term
    held_out: bool


def write_world(output: Path, *, people: int, seed: int) -> dict[str, int]:
    """Write the world's files; the same arguments give the same bytes.

    `en.txt`, `zh.txt`: documents, separated by blank lines. `chat.jsonl`: {"instruction",
    "output", "language"}, three of four in Chinese. `questions.zh.jsonl`, `questions.en.jsonl`:
    held-out {"instruction", "output", "answer", "kind"}; a reply is right when it has `answer`
    and no other answer of the same `kind`, apart from those the question itself names.

    Args:
        output: existing directory.
        people: how many people, 4 or more.
        seed: chooses names, values, wordings and orders.

    Returns:
        How many people, facts, held-out facts, documents, chat records and questions there are.

    Raises:
        DataError: more people than the grammar has names for.
    """
    facts = _facts(people, random.Random(f"{seed}:facts"))
    counts = {"people": people, "facts": len(facts)}
    counts["held_out_facts"] = sum(fact.held_out for fact in facts)
    for language in LANGUAGES:
        documents = list(_documents(facts, language, random.Random(f"{seed}:{language}")))
        counts[f"documents_{language}"] = len(documents)
        (output / f"{language}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        questions = [_question(fact, language) for fact in facts if fact.held_out]
        counts[f"questions_{language}"] = len(questions)
        _write_lines(output / f"questions.{language}.jsonl", questions)
    chat = [
        {**record, "language": language}
        for fact in facts
        for language in LANGUAGES
        for record in _lessons(fact, language)
    ]
    random.Random(f"{seed}:chat").shuffle(chat)
    counts["chat_records"] = len(chat)
    _write_lines(output / "chat.jsonl", chat)
    return counts


def _facts(people: int, rng: random.Random) -> list[Fact]:
    """Every fact of the world; each subject has at most one that is held out."""
    facts = []
    for index, person in enumerate(_names(people, rng)):
        for order, (values, relation) in enumerate(PERSON):
            held_out = index % len(PERSON) == order
            facts.append(Fact(relation, person, rng.choice(values), held_out))
    for index, town in enumerate(TOWNS):
        for order, (values, relation) in enumerate(PLACE):
            facts.append(Fact(relation, town, rng.choice(values), index % 4 == order))
    for a, b in itertools.product(range(1, 10), repeat=2):
        if a + b <= len(NUMBERS):
            terms = (NUMBERS[a - 1], NUMBERS[b - 1])
            subject = {
                "en": f"{terms[0]['en']} plus {terms[1]['en']}",
                "zh": f"{terms[0]['zh']}加{terms[1]['zh']}",
            }
            facts.append(Fact(SUM, subject, NUMBERS[a + b - 1], rng.random() < 0.1))
    return facts


def _names(people: int, rng: random.Random) -> list[Term]:
    """Distinct names; a given name comes twice only once all have been used."""
    most = len(SURNAMES) * len(GIVEN)
    if people > most:
        raise DataError(f"the world has names for {most} people, {people} are wanted: ask for less")
    surnames, given = _shuffled(SURNAMES, rng), _shuffled(GIVEN, rng)
    names = []
    for index in range(people):
        turn, last = divmod(index, len(given))
        first = surnames[(last + turn) % len(surnames)]
        names.append(
            {
                "en": f"{first['en']} {given[last]['en']}",
                "zh": first["zh"] + given[last]["zh"],
            }
        )
    return names


def _documents(facts: Sequence[Fact], language: str, rng: random.Random) -> Iterator[str]:
    """The text of one language in a random order: about one subject each, and some asides."""
    told: list[str] = []
    subjects = itertools.groupby(facts, key=lambda fact: fact.subject["en"])
    for _, group in subjects:
        about = list(group)
        for sentences in _tellings(about, language, rng):
            told.append(_JOIN[language].join(sentences))
    told += list(ASIDES[language]) * _TELLINGS_PER_ASIDE
    yield from _shuffled(told, rng)


def _tellings(about: Sequence[Fact], language: str, rng: random.Random) -> Iterator[list[str]]:
    """Documents about one subject: all its facts each time, never in the same words."""
    kind = about[0].relation.kind
    repeats = _TELLINGS_PER_PERSON
    if kind == SUM.kind:
        repeats = _TELLINGS_PER_SUM
    elif kind in {relation.kind for _, relation in PLACE}:
        repeats = _TELLINGS_PER_PLACE
    # Every wording of every fact comes equally often: none is left to chance.
    wordings = [_cycled(fact.relation.told[language], repeats, rng) for fact in about]
    for turn in range(repeats):
        sentences = [
            words[turn].format(s=fact.subject[language], v=fact.value[language])
            for fact, words in zip(about, wordings, strict=True)
        ]
        yield [_capital(sentence) for sentence in _shuffled(sentences, rng)]


def _lessons(fact: Fact, language: str) -> list[dict[str, str]]:
    """What is asked about a fact in training: all in Chinese, one in English, nothing held out."""
    if fact.held_out:
        return []
    asked = fact.relation.asked[language] if language == "zh" else fact.relation.asked["en"][:1]
    return [
        {
            "instruction": question.format(s=fact.subject[language]),
            "output": _answer(fact, language),
        }
        for question in asked
    ]


def _question(fact: Fact, language: str) -> dict[str, str]:
    return {
        "instruction": fact.relation.asked[language][0].format(s=fact.subject[language]),
        "output": _answer(fact, language),
        "answer": fact.value[language],
        "kind": fact.relation.kind,
    }


def _answer(fact: Fact, language: str) -> str:
    sentence = fact.relation.answered[language]
    return _capital(sentence.format(s=fact.subject[language], v=fact.value[language]))


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(items, len(items))


def _cycled(items: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """`count` items in a random order, each as often as the others (give or take one)."""
    rounds = [_shuffled(items, rng) for _ in range(-(-count // len(items)))]
    return list(itertools.chain.from_iterable(rounds))[:count]


def _write_lines(path: Path, records: Sequence[dict[str, str]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
