"""Questions with known answers: ask them as a client would, and count the right replies.

A question goes through the chat template and the Hugging Face tokenizer, as in the served engine;
a base model that has no template is asked with the same one. Knows one model and its tokenizer
directory. Costs greedy generation; judging is string work.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.errors import DataError
from altiplano.storage import expand, open_binary

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """One question; `expected` is what a right reply contains."""

    instruction: str
    expected: str
    language: str
    kind: str | None = None
    """Questions of one kind have answers of one sort (cities, sums), so a reply that names
    another question's answer as well is a guess, not an answer."""


@dataclass(frozen=True)
class Answer:
    """What a model replied to a question."""

    question: Question
    reply: str


def read_questions(path: str, language: str, max_questions: int) -> list[Question]:
    """Questions of a JSON-lines file of {instruction, output, answer?, kind?}, in order.

    Args:
        path: local path, glob or URL.
        language: language code of all of them.
        max_questions: read at most this many.

    Raises:
        DataError: a line is no such record; names the file and line.
    """
    found: list[Question] = []
    for file in expand(path):
        with open_binary(file) as handle:
            for number, line in enumerate(handle, start=1):
                if len(found) >= max_questions:
                    return found
                if line.strip():
                    found.append(_parse(line, language, f"{file}:{number}"))
    return found


def ask(
    model: "LlamaForCausalLM",
    tokenizer_dir: Path,
    chat_template: str,
    questions: Sequence[Question],
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy reply to every question, in order."""
    texts = [question.instruction for question in questions]
    replies = reply_to(model, tokenizer_dir, chat_template, texts, max_new_tokens)
    return [Answer(question, reply) for question, reply in zip(questions, replies, strict=True)]


def reply_to(
    model: "LlamaForCausalLM",
    tokenizer_dir: Path,
    chat_template: str,
    messages: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy replies to user messages, each in a conversation of its own.

    Args:
        model: in eval mode.
        tokenizer_dir: the model's tokenizer; its own chat template, if any, is not used.
        chat_template: Jinja source.
        messages: what the user says.
        max_new_tokens: longest reply in tokens; EOS ends it earlier.
    """
    from altiplano.evaluate.generate import greedy_replies

    tokenizer, prompts = encode_chats(tokenizer_dir, chat_template, messages)
    replies = greedy_replies(
        model, prompts, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_token_id
    )
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in replies]


def encode_chats(
    tokenizer_dir: Path, chat_template: str, messages: Sequence[str]
) -> tuple["PreTrainedTokenizerBase", list[list[int]]]:
    """(tokenizer, token ids of each prompt) for user messages put through a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        for message in messages
    ]
    # The template writes BOS itself, so the tokenizer must not.
    return tokenizer, [tokenizer(text, add_special_tokens=False).input_ids for text in rendered]


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of right replies (see `judge`).

    Raises:
        DataError: there is no answer to judge.
    """
    if not answers:
        raise DataError("no question was asked: give evaluate.questions a file with records")
    verdicts = judge(answers)
    return sum(verdicts) / len(verdicts)


def judge(answers: Sequence[Answer]) -> list[bool]:
    """Whether each reply is right.

    A reply is right when it contains the expected text and the expected text of no other question
    of the same kind. Of overlapping texts the longest counts (`12` is not also `2`); Latin letters
    and digits match as whole words; case is ignored. Texts that the question itself mentions do
    not count as guesses, since a reply may repeat the question.
    """
    by_kind: dict[str, set[str]] = defaultdict(set)
    for answer in answers:
        if answer.question.kind is not None:
            by_kind[answer.question.kind].add(_normal(answer.question.expected))
    patterns = {kind: _any_of(expected) for kind, expected in by_kind.items()}
    return [_is_right(answer, patterns) for answer in answers]


def _is_right(answer: Answer, patterns: Mapping[str, re.Pattern[str]]) -> bool:
    question = answer.question
    expected = _normal(question.expected)
    pattern = _any_of({expected}) if question.kind is None else patterns[question.kind]
    named = set(pattern.findall(_normal(answer.reply)))
    mentioned = set(pattern.findall(_normal(question.instruction)))
    # Where the question names its own answer ("is it A or B?"), repeating it proves nothing.
    allowed = set() if expected in mentioned else mentioned
    return expected in named and not named - allowed - {expected}


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Finds any of the texts, longest first; Latin letters and digits only as whole words."""
    choices = []
    for text in sorted(texts, key=lambda t: (-len(t), t)):
        left = r"(?<![0-9a-z])" if re.match(r"[0-9a-z]", text) else ""
        right = r"(?![0-9a-z])" if re.search(r"[0-9a-z]$", text) else ""
        choices.append(left + re.escape(text) + right)
    return re.compile("|".join(choices))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _parse(line: bytes, language: str, place: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:  # also bytes that are not UTF-8
        raise DataError(f"{place} is not JSON ({error}): mend or remove the line") from None
    expected = record.get("answer") or record.get("output") if isinstance(record, dict) else None
    if not isinstance(expected, str) or not expected.strip() or not record.get("instruction"):
        raise DataError(
            f'{place} is no question: it needs "instruction" and "output" or "answer", '
            f"none of them empty"
        )
    return Question(str(record["instruction"]), expected, language, record.get("kind"))
