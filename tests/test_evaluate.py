"""Measures held against brute force: bits per byte, greedy replies, judging, draft acceptance."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from altiplano.console import console
from altiplano.data.chat.encode import encode_spans, make_template
from altiplano.data.tokens.windows import split_windows, take_bytes
from altiplano.errors import ArtifactError, DataError, MismatchError
from altiplano.evaluate.acceptance import count_accepted, draft_acceptance
from altiplano.evaluate.bits import bits_per_byte
from altiplano.evaluate.curves import plot_training
from altiplano.evaluate.generate import greedy_replies
from altiplano.evaluate.questions import (
    Answer,
    Question,
    accuracy,
    ask,
    encode_chats,
    judge,
    read_questions,
)
from altiplano.evaluate.report import (
    Change,
    Results,
    Sample,
    read_report,
    report_table,
    write_report,
)
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from tests.helpers.tiny_vocabulary import english_lines, train_tiny_base

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a 320-piece tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tiny_base(directory).read_bytes(), directory)
    return directory


@pytest.fixture(scope="module")
def vocabulary(tokenizer_dir: Path) -> Vocabulary:
    """Return it opened."""
    return Vocabulary(tokenizer_dir)


@pytest.fixture
def sharp_llama(tiny_llama: Callable[..., "LlamaForCausalLM"]) -> "LlamaForCausalLM":
    """Return a random model whose predictions differ by context and are far from uniform."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def bits_of(model: "LlamaForCausalLM", context: list[int], token: int) -> float:
    """-log2 p(token | context), by the plainest path."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
    return -logits.log_softmax(-1)[token].item() / math.log(2)


# ---------------------------------------------------------------- bits per byte


def test_bits_per_byte_equals_token_by_token_sums(
    sharp_llama: "LlamaForCausalLM", vocabulary: Vocabulary
) -> None:
    texts = ["the river", "under 山 snow, runs", "a small boat runs to mountain"]
    found = bits_per_byte(
        sharp_llama, vocabulary, texts, max_bytes=10_000, sequence_length=64, batch_tokens=40
    )
    bits = 0.0
    for text in texts:
        ids = [vocabulary.bos_id, *vocabulary.encode(text)]
        bits += sum(bits_of(sharp_llama, ids[:t], ids[t]) for t in range(1, len(ids)))
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert found["bytes"] == size
    assert found["characters"] == sum(map(len, texts))
    assert found["tokens"] == sum(len(vocabulary.encode(text)) for text in texts)
    assert found["tokens_per_character"] == found["tokens"] / found["characters"]


def test_long_documents_keep_half_a_window_of_context(
    sharp_llama: "LlamaForCausalLM", vocabulary: Vocabulary
) -> None:
    text = " ".join(english_lines(8))
    ids = [vocabulary.bos_id, *vocabulary.encode(text)]
    length, stride = 16, 8
    assert len(ids) > 2 * length
    bits = 0.0
    for t in range(1, len(ids)):
        windows_before = 0 if t <= length else -(-(t - length) // stride)
        bits += bits_of(sharp_llama, ids[windows_before * stride : t], ids[t])
    found = bits_per_byte(sharp_llama, vocabulary, [text], max_bytes=10_000, sequence_length=length)
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)


@given(st.integers(1, 200), st.integers(1, 40))
def test_every_token_is_scored_once_with_enough_context(count: int, length: int) -> None:
    ids = list(range(count))
    scored = []
    for window in split_windows(ids, length):
        inputs = len(window.token_ids) - 1
        assert 0 < inputs <= length
        for position in range(window.first_scored, inputs):
            token = window.token_ids[position + 1]
            scored.append(token)
            assert position + 1 >= min(token, length // 2)
    assert scored == ids[1:]


@given(st.lists(st.text(max_size=20), max_size=6), st.integers(0, 60))
def test_text_is_cut_at_a_character_and_never_above_the_limit(texts: list[str], limit: int) -> None:
    taken = take_bytes(texts, limit)
    assert "".join(texts).startswith("".join(taken))
    size, whole = len("".join(taken).encode()), len("".join(texts).encode())
    assert min(limit, whole) - 3 <= size <= limit
    assert all(taken)


def test_bits_of_a_real_model_on_its_own_story(shared: Path) -> None:
    from tests.helpers.llama2c import read_model

    model = read_model(shared / "models" / "stories260K.bin")
    vocabulary = Vocabulary(shared / "models" / "tok512.model")
    story = greedy_replies(model, [[1]], max_new_tokens=31, eos_id=None)[0]
    text = vocabulary.decode(story)
    found = bits_per_byte(model, vocabulary, [text], max_bytes=999, sequence_length=512)
    nats_per_token = found["bits_per_byte"] * math.log(2) * found["bytes"] / found["tokens"]
    assert nats_per_token == pytest.approx(0.180, abs=1e-3)  # known of this checkpoint


def test_bits_refuse_a_foreign_vocabulary_and_no_text(
    tiny_llama: Callable[..., "LlamaForCausalLM"], vocabulary: Vocabulary
) -> None:
    with pytest.raises(MismatchError, match=r"320 pieces and the model 300"):
        bits_per_byte(tiny_llama(300), vocabulary, ["x"], max_bytes=9, sequence_length=8)
    with pytest.raises(DataError, match="held_out"):
        bits_per_byte(tiny_llama(), vocabulary, ["", ""], max_bytes=9, sequence_length=8)


# ---------------------------------------------------------------- greedy replies


def greedy_by_hand(model: "LlamaForCausalLM", prompt: list[int], count: int) -> list[int]:
    """Greedy continuation without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[1, 5, 9], [1], [1, 300, 20, 31, 42, 77], [1, 8], [1, 250, 13, 6]]


def test_batched_greedy_equals_one_by_one(sharp_llama: "LlamaForCausalLM") -> None:
    found = greedy_replies(sharp_llama, PROMPTS, max_new_tokens=9, eos_id=None, batch_size=2)
    expected = [greedy_by_hand(sharp_llama, prompt, 9) for prompt in PROMPTS]
    assert found == expected
    assert len({tuple(reply) for reply in found}) > 1
    stop = expected[0][4]
    stopped = greedy_replies(sharp_llama, PROMPTS, max_new_tokens=9, eos_id=stop, batch_size=5)
    assert stopped == [r[: r.index(stop)] if stop in r else r for r in expected]


@pytest.mark.parametrize("template", ["llama-2", "alpaca", "vicuna", "chatml"])
def test_questions_are_asked_with_the_ids_of_training(
    template: str, sharp_llama: "LlamaForCausalLM", tokenizer_dir: Path, vocabulary: Vocabulary
) -> None:
    questions = [Question("the river?", "boat", "en"), Question("snow", "market", "en")]
    texts = [question.instruction for question in questions]
    made = make_template(template, "runs to market", vocabulary)
    jinja = made.jinja
    tokenizer, prompts = encode_chats(tokenizer_dir, jinja, texts)
    for text, prompt in zip(texts, prompts, strict=True):
        spans = made.spans([{"role": "user", "content": text}])
        assert prompt == encode_spans(spans, made.control_ids, vocabulary).ids.tolist()
    answers = ask(sharp_llama, tokenizer_dir, jinja, questions, 6)
    assert [answer.question for answer in answers] == questions
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = greedy_by_hand(sharp_llama, prompt, 6)
        said = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        assert answer.reply == tokenizer.decode(said, skip_special_tokens=True).strip() != ""


# ---------------------------------------------------------------- judging


def answers_of(kind: str | None, *said: tuple[str, str, str]) -> list[Answer]:
    """Answers from (instruction, expected, reply)."""
    return [Answer(Question(asked, want, "en", kind), reply) for asked, want, reply in said]


def test_judging() -> None:
    places = answers_of(
        "place",
        ("where is A?", "Paris", "A lives in  paris."),
        ("where is B?", "Rome", "Rome or Paris"),  # names another answer
        ("where is C?", "New York", "in Parisian style"),
        ("is D in Paris?", "Oslo", "not in Paris, in Oslo"),  # repeats the question
        ("is E in Paris or in Rome?", "Rome", "in Paris or in Rome"),  # repeats both
        ("where is F?", "York", "New York"),  # the longer answer is another's
    )
    assert judge(places) == [True, False, False, True, False, False]
    sums = answers_of("sum", ("3 + 9", "12", "3 + 9 = 12"), ("1 + 1", "2", "12"), ("?", "3", "1"))
    assert judge(sums) == [True, False, False]
    chinese = answers_of("name", ("谁？", "王明", "是王明。"), ("谁？", "王明明", "王明明"))
    assert judge(chinese) == [True, True]
    free = answers_of(None, ("?", "boat", "a boat"), ("?", "snow", "snow and a boat"))
    assert judge(free) == [True, True]
    assert accuracy([*places, *sums]) == 3 / 9
    with pytest.raises(DataError):
        accuracy([])


def test_read_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [
        {"instruction": "a", "output": "in B", "answer": "B", "kind": "place"},
        {"instruction": "c", "output": "d"},
        {"instruction": "e", "output": "f"},
    ]
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert read_questions(str(file), "en", 2) == [
        Question("a", "B", "en", "place"),
        Question("c", "d", "en", None),
    ]


@pytest.mark.parametrize("line", ['{"instruction": "a"}', '{"output": "a"}', "[1]", "{", '"x"'])
def test_a_bad_question_is_named_by_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"q\.jsonl:2"):
        read_questions(str(file), "en", 9)


# ---------------------------------------------------------------- draft acceptance


def speculate(
    target: "LlamaForCausalLM", draft: "LlamaForCausalLM", prompt: list[int], k: int, count: int
) -> tuple[int, int, int]:
    """Run greedy speculative decoding for real: (accepted, proposed, steps)."""
    ids = prompt + greedy_by_hand(target, prompt, 1)
    end = len(prompt) + count
    accepted = proposed = steps = 0
    while len(ids) < end:
        block = greedy_by_hand(draft, ids, min(k, end - len(ids)))
        truth = greedy_by_hand(target, ids, len(block) + 1)
        run = 0
        while run < len(block) and block[run] == truth[run]:
            run += 1
        accepted, proposed, steps = accepted + run, proposed + len(block), steps + 1
        ids += truth[: run + 1]
    return accepted, proposed, steps


@pytest.mark.parametrize("k", [1, 3, 5])
def test_acceptance_equals_real_speculation(sharp_llama: "LlamaForCausalLM", k: int) -> None:
    draft = copy.deepcopy(sharp_llama)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std(correction=0) * 0.2)
    found = draft_acceptance(sharp_llama, draft, PROMPTS, k=k, max_new_tokens=12)
    runs = [speculate(sharp_llama, draft, prompt, k, 12) for prompt in PROMPTS]
    accepted, proposed, steps = (sum(column) for column in zip(*runs, strict=True))
    assert 0 < accepted < proposed
    assert found["acceptance_rate"] == accepted / proposed
    assert found["accepted_per_step"] == accepted / steps
    assert (found["steps"], found["tokens"]) == (steps, 12 * len(PROMPTS))


def test_a_perfect_draft_and_one_of_another_vocabulary(
    sharp_llama: "LlamaForCausalLM", tiny_llama: Callable[..., "LlamaForCausalLM"]
) -> None:
    same = draft_acceptance(sharp_llama, sharp_llama, PROMPTS, k=4, max_new_tokens=11)
    assert same["acceptance_rate"] == same["agreement"] == 1.0
    assert same["accepted_per_step"] == 4.0
    with pytest.raises(MismatchError, match="320 pieces and the draft 321"):
        draft_acceptance(sharp_llama, tiny_llama(321), PROMPTS, k=4, max_new_tokens=4)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 8))
def test_blocks_cover_the_reply(right: list[bool], k: int) -> None:
    accepted, proposed, steps = count_accepted(right, k)
    assert 0 <= accepted <= min(proposed, sum(right))
    assert proposed <= k * steps
    # Every token but the first is either accepted or the target's own; the last step may end
    # with an accepted one.
    assert max(0, len(right) - 1) <= accepted + steps <= max(0, len(right) - 1) + 1


def test_acceptance_of_two_real_models(shared: Path) -> None:
    from tests.helpers.llama2c import read_model

    target, draft = (
        read_model(shared / "models" / name) for name in ("stories260K.bin", "llama2xs_279K.bin")
    )
    prompts = [[1, first] for first in (403, 306, 311, 338)]
    found = draft_acceptance(target, draft, prompts, k=4, max_new_tokens=100)
    assert 0.68 < found["agreement"] < 0.84  # measured elsewhere on other prompts: 0.760
    assert 0.4 < found["acceptance_rate"] < found["agreement"]


# ---------------------------------------------------------------- curves and report


def test_a_curve_is_drawn_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    start = {"event": "start", "step": 0}
    point = {"event": "step", "learning_rate": 1e-3, "tokens_per_second": 900.0}
    records = [start, *({**point, "step": n, "loss": 5.0 / n} for n in (1, 5, 10))]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_training(log, tmp_path / "curve.png", "pretrain-rows")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    log.write_text(json.dumps(start) + "\n")
    with pytest.raises(DataError, match="no training step"):
        plot_training(log, tmp_path / "none.png", "x")


RESULTS = Results(
    run="demo",
    tokens_per_character={"en": Change(0.3, 0.3), "zh": Change(2.9, 0.7)},
    bits_per_byte={
        "base": {"en": 1.2, "zh": 9.5},
        "extend": {"en": 1.2, "zh": 8.25},
        "merge": {"en": 1.3, "zh": 1.125},
    },
    accuracy={"zh": Change(0.0, 0.875)},
    questions={"zh": 200},
    draft_acceptance={"acceptance_rate": 0.5, "accepted_per_step": 2.0},
    seconds={"tokenizer": 2.5, "merge": 1.5},
    samples=[Sample("谁|什么？", "", "王明\n。")],
)


def test_reports_hold_the_numbers(tmp_path: Path) -> None:
    write_report(RESULTS, tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored["bits_per_byte"]["extend"]["zh"] == 8.25
    assert read_report(tmp_path) == RESULTS
    assert stored["accuracy"]["zh"] == {"before": 0.0, "after": 0.875}
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "| tokens per character, zh | 2.9 | 0.7 |",
        "| bits per byte, zh | 9.5 | 1.125 |",
        "| accuracy, zh (200 questions) | 0.0% | 87.5% |",
        "| draft: proposals accepted | - | 50.0% |",
        "| extend | 1.2 | 8.25 |",
        "| all | 4 |",
        "| 谁\\|什么？ |  | 王明 。 |",
    ):
        assert line in markdown
    with console.capture() as captured:
        console.print(report_table(RESULTS))
    for text in ("87.5%", "1.125", "2.9", "seconds: merge"):
        assert text in captured.get()


def test_a_report_of_nothing_is_still_a_report(tmp_path: Path) -> None:
    write_report(Results("empty"), tmp_path)
    assert (tmp_path / "report.md").read_text().startswith("# Results of empty")
    assert read_report(tmp_path) == Results("empty")
    for broken in ("{", "[]", '{"run": "x"}'):
        (tmp_path / "report.json").write_text(broken)
        with pytest.raises(ArtifactError, match="altiplano evaluate"):
            read_report(tmp_path)
