"""The draft's own loop: guesses as transformers does, computes nothing twice, forgets fairly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from altiplano.errors import ModelError, ServeError
from altiplano.serving.speculation import head
from altiplano.serving.speculation.cache import Blocks, Cache
from altiplano.serving.speculation.drafter import Drafter, Work
from altiplano.serving.speculation.llama import Llama
from altiplano.serving.speculation.protocol import Guess, Row, digest

VOCAB = 96
MAX_LEN = 128
CPU = torch.device("cpu")
UNHURRIED = 1e6
"""Milliseconds for prompts: every prompt is read at once."""


def make_model(**changes: Any) -> LlamaForCausalLM:
    """A random Llama whose guesses depend on what came before."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": MAX_LEN,
        "initializer_range": 0.6,
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        model = LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


class Reference:
    """Greedy continuations by transformers, from scratch, remembered."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self._next: dict[tuple[int, ...], int] = {}

    def __call__(self, ids: list[int], count: int) -> list[int]:
        """The next `count` tokens, to the end of the context at most."""
        known = list(ids)
        for _ in range(min(count, MAX_LEN - len(ids))):
            key = tuple(known)
            if key not in self._next:
                with torch.inference_mode():
                    logits = self._model(torch.tensor([known])).logits
                self._next[key] = int(logits[0, -1].argmax())
            known.append(self._next[key])
        return known[len(ids) :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """A model directory and what its model says."""
    directory = tmp_path_factory.mktemp("draft")
    model = make_model()
    model.save_pretrained(directory)
    return directory, Reference(model)


@pytest.fixture
def drafter(saved: tuple[Path, Reference]) -> Drafter:
    """A drafter with room for many sequences."""
    return Drafter(saved[0], cache_gib=0.01, dtype="float32", prefill_ms=UNHURRIED)


def whole(ids: list[int], k: int) -> Row:
    return Row(0, 0, ids, k)


def further(before: list[int], new: list[int], k: int) -> Row:
    return Row(digest(before), len(before), new, k)


def draft_ahead(drafter: Drafter, works: list[Work]) -> None:
    while drafter.lacks(works):
        drafter.draft_ahead(works)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["grouped", "tied", "llama3", "yarn"],
)
def test_logits_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**changes)
    model.save_pretrained(tmp_path)
    llama = Llama(tmp_path, device=CPU, dtype=torch.float32)
    cache = Cache(llama.shape, max_len=MAX_LEN, gib=0.01, device=CPU, dtype=torch.float32)
    ids = np.random.default_rng(1).integers(0, VOCAB, (3, 70), dtype=np.int32)
    sequences = [cache.new(row, "", MAX_LEN) for row in ids]
    for first, last in ((0, 60), (60, 61), (61, 70)):
        places = cache.places(sequences, [last] * 3, last - first)
        states = llama.advance(torch.from_numpy(ids[:, first:last]), places, cache.arena)
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids[:, :last]).long()).logits[:, -1]
        torch.testing.assert_close(llama.logits(states), expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    make_model(initializer_range=0.2).save_pretrained(tmp_path)
    scores = []
    ids = np.random.default_rng(1).integers(0, VOCAB, (4, 40), dtype=np.int32)
    for dtype in (torch.float32, torch.bfloat16):
        llama = Llama(tmp_path, device=CPU, dtype=dtype)
        cache = Cache(llama.shape, max_len=MAX_LEN, gib=0.01, device=CPU, dtype=dtype)
        sequences = [cache.new(row, "", 64) for row in ids]
        places = cache.places(sequences, [40] * 4, 40)
        states = llama.advance(torch.from_numpy(ids), places, cache.arena)
        scores.append(llama.logits(states).float())
    assert torch.corrcoef(torch.stack([each.flatten() for each in scores]))[0, 1] > 0.999


@pytest.mark.parametrize("pays", [True, False])
def test_the_head_names_the_likeliest(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 0.0] if pays else [0.0, 1.0])
    monkeypatch.setattr(head, "_seconds", lambda run: next(seconds))
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(5000, 64, generator=draw)
    weight[:, 7] *= 50  # A column far larger than the others.
    weight[123] *= 30
    states = torch.randn(300, 64, generator=draw) * torch.logspace(-3, 3, 300)[:, None]
    tested = head.Head(weight, device=CPU, dtype=torch.float32)
    agree = tested.best(states) == (states @ weight.t()).argmax(dim=1)
    assert agree.float().mean() >= (0.99 if pays else 1.0)
    assert tested.best(torch.zeros(1, 64)).shape == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "'mistral'"),
        ({"attention_bias": True}, "attention biases"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
    ],
)
def test_what_it_does_not_compute_is_refused(
    saved: tuple[Path, Reference], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((saved[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message):
        Drafter(tmp_path, cache_gib=0.01)


def test_a_cache_too_small_is_refused_and_a_small_one_shortens(
    saved: tuple[Path, Reference],
) -> None:
    with pytest.raises(ServeError, match="cache_gib"):
        Drafter(saved[0], cache_gib=1e-6)
    drafter = Drafter(saved[0], cache_gib=0.0002, dtype="float32", prefill_ms=UNHURRIED)
    assert 64 <= drafter.max_tokens < MAX_LEN
    text = [int(i * 7 % VOCAB) for i in range(drafter.max_tokens - 2)]
    assert drafter.propose([whole(text, 4)])[0].tokens == saved[1](text, 2)


Step = tuple[str, int, int, int]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cache_gib=st.sampled_from([0.0003, 0.01]),
    prefill_ms=st.sampled_from([0.0, UNHURRIED]),
    steps=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(
                    ["accept", "reject", "plain", "all", "join", "leave", "twin", "again"]
                ),
                st.integers(0, 3),
                st.integers(0, VOCAB - 1),
                st.integers(1, 5),
            ),
            min_size=1,
            max_size=3,
        ),
        min_size=3,
        max_size=12,
    ),
)
def test_any_history_is_answered_as_from_scratch(
    saved: tuple[Path, Reference], cache_gib: float, prefill_ms: float, steps: list[list[Step]]
) -> None:
    drafter = Drafter(saved[0], cache_gib=cache_gib, dtype="float32", prefill_ms=prefill_ms)
    texts: list[tuple[list[int], bool]] = []  # Each with: whether the drafter was told of it.
    for number, actions in enumerate(steps):
        rows, asked = [], []
        for action, index, token, _ in actions:
            if action == "join" or not texts:
                texts.append(([token] * (3 + 12 * index), False))
            if action == "leave" and len(texts) > 1:
                texts.pop(index % len(texts))
            if action == "twin":
                texts.append(texts[index % len(texts)])
        for place, (text, told) in enumerate(texts[:6]):
            action, index, token, k = actions[place % len(actions)]
            new = []
            if told:
                right = saved[1](text, 5)
                new = {"accept": right[:index], "all": right, "plain": [token] * 3}.get(action, [])
                new = new if action == "again" else [*new, (token + place) % VOCAB]
            if len(text) + len(new) > MAX_LEN:
                texts[place] = (text[:10], False)
                text, told, new = text[:10], False, []
            rows.append(further(text, new, k) if told else whole(text, k))
            asked.append(text + new)
        works = drafter.take_up([("", rows[:3]), ("other", rows[3:])])
        flat = [work for each in works for work in each]
        drafter.finish(flat)
        guesses = [work.guess() for work in flat]
        if number % 2:
            draft_ahead(drafter, flat)
            while drafter.read_on():
                pass
        for place, (row, text, guess) in enumerate(zip(rows, asked, guesses, strict=True)):
            expected = saved[1](text, row.k)
            assert guess.tokens in (expected, []), text
            if prefill_ms and cache_gib > 0.001:
                assert guess.missing or guess.tokens == expected
            ahead = flat[place].ahead()
            if ahead.tokens:
                chain = [*guess.tokens, ahead.guess, *ahead.tokens]
                assert chain == saved[1](text, 2 * row.k + 1)[: len(chain)]
            texts[place] = (text, not guess.missing)


def test_accepted_tokens_are_not_computed_again(
    drafter: Drafter, saved: tuple[Path, Reference]
) -> None:
    text = list(range(20))
    guess = drafter.propose([whole(text, 4)])[0]
    assert guess.tokens == saved[1](text, 4)
    before = (drafter.counts.passes, drafter.counts.prefill_tokens)
    drafter.propose([further(text, [*guess.tokens, 7], 4)])
    assert (drafter.counts.passes, drafter.counts.prefill_tokens) == (before[0] + 4, before[1])


def test_what_was_drafted_ahead_costs_nothing(
    drafter: Drafter, saved: tuple[Path, Reference]
) -> None:
    text = list(range(20))
    works = drafter.take_up([("", [whole(text, 3)])])[0]
    drafter.finish(works)
    draft_ahead(drafter, works)
    ahead = works[0].ahead()
    expected = saved[1](text, 7)
    assert [*works[0].guess().tokens, ahead.guess, *ahead.tokens] == expected
    passes = drafter.counts.passes
    assert drafter.propose([further(text, expected[:4], 3)])[0].tokens == expected[4:]
    assert (drafter.counts.passes, drafter.counts.hits) == (passes, 1)


def test_a_shared_beginning_is_read_once(drafter: Drafter) -> None:
    drafter.propose([whole(list(range(60)), 1)])
    read = drafter.counts.prefill_tokens
    drafter.propose([whole([*range(50), 90, 91, 92, 93], 1)])
    assert drafter.counts.prefill_tokens - read <= 4


def test_twins_that_part_keep_what_they_had(
    drafter: Drafter, saved: tuple[Path, Reference]
) -> None:
    text = list(range(40))
    drafter.propose([whole(text, 2), whole(text, 2)])
    read = drafter.counts.prefill_tokens
    assert read < len(text)
    guesses = drafter.propose([further(text, [3], 2), further(text, [4], 2)])
    assert [guess.tokens for guess in guesses] == [saved[1]([*text, x], 2) for x in (3, 4)]
    assert drafter.counts.prefill_tokens == read


def test_a_twin_may_stay_where_it_was(drafter: Drafter, saved: tuple[Path, Reference]) -> None:
    text = list(range(40))
    drafter.propose([whole(text, 2)])
    guesses = drafter.propose([further(text, [], 2), further(text, [4], 2)])
    assert [guess.tokens for guess in guesses] == [saved[1](text, 2), saved[1]([*text, 4], 2)]


def test_a_long_prompt_does_not_hold_the_others_up(saved: tuple[Path, Reference]) -> None:
    drafter = Drafter(saved[0], cache_gib=0.01, dtype="float32", prefill_ms=0.0)
    short, long = [1, 2], list(range(90))
    guesses = drafter.propose([whole(long, 2), whole(short, 2)])
    assert guesses == [Guess([]), Guess(saved[1](short, 2))]
    while drafter.read_on():
        pass
    assert drafter.propose([further(long, [5], 2)])[0].tokens == saved[1]([*long, 5], 2)


def test_guesses_end_where_the_context_ends(
    drafter: Drafter, saved: tuple[Path, Reference]
) -> None:
    for missing, count in ((0, 0), (1, 1), (3, 3), (9, 4)):
        text = [int(i * 7 % VOCAB) for i in range(MAX_LEN - missing)]
        assert drafter.propose([whole(text, 4)])[0] == Guess(saved[1](text, 4))
        assert len(saved[1](text, 4)) == count
    assert drafter.propose([whole([1] * (MAX_LEN + 1), 4)])[0] == Guess([])


def test_who_floods_the_cache_floods_its_own_part(saved: tuple[Path, Reference]) -> None:
    drafter = Drafter(saved[0], cache_gib=0.0003, dtype="float32", prefill_ms=UNHURRIED)
    quiet = [1, 2, 3]
    drafter.propose([whole(quiet, 1)], "quiet")
    for token in range(VOCAB):
        drafter.propose([whole([token, 9, token], 1)], "flood")
    assert drafter.counts.evictions > 50
    drafter.propose([whole([token, 8], 1) for token in range(40)], "flood")
    assert not drafter.propose([further(quiet, [4], 1)], "quiet")[0].missing
    assert drafter.propose([further([0, 9, 0], [4], 1)], "flood")[0].missing


def test_rows_beyond_the_cache_do_not_push_the_others_out(
    saved: tuple[Path, Reference],
) -> None:
    drafter = Drafter(saved[0], cache_gib=0.0003, dtype="float32", prefill_ms=UNHURRIED)
    texts = [[token, 5] for token in range(40)]
    first = drafter.propose([whole(text, 2) for text in texts])
    held = [bool(guess.tokens) for guess in first]
    assert 0 < sum(held) < len(texts)
    again = drafter.propose(
        [
            further(text, [1], 2) if each else whole([*text, 1], 2)
            for text, each in zip(reversed(texts), reversed(held), strict=True)
        ]
    )
    assert [bool(guess.tokens) for guess in again] == held[::-1]
    assert not any(guess.missing for guess in again)


@pytest.mark.parametrize(
    "row", [Row(0, 0, [], 2), Row(0, 0, [VOCAB], 2), Row(0, 0, [-1], 2), Row(0, 0, [1], -1)]
)
def test_impossible_rows_are_refused(drafter: Drafter, row: Row) -> None:
    with pytest.raises(ValueError):
        drafter.check([row])
    drafter.check([whole([1], 2), further([1], [], 2)])


@given(
    largest=st.integers(1, 5000),
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=60),
)
def test_blocks_never_overlap_and_all_come_back(
    largest: int, sizes: list[tuple[int, bool]]
) -> None:
    blocks = Blocks(largest, 4)
    taken: dict[int, int] = {}
    for tokens, give in sizes:
        size = blocks.fit(min(tokens, largest))
        start = blocks.take(size)
        if start is not None:
            assert all(start + size <= s or s + n <= start for s, n in taken.items())
            assert start + size <= 4 * blocks.largest
            taken[start] = size
        if give and taken:
            blocks.give(*taken.popitem())
    for block in taken.items():
        blocks.give(*block)
    assert [blocks.take(blocks.largest) is not None for _ in range(5)] == [True] * 4 + [False]
