"""The real pre-trained weights are read right: they speak, and wider heads change nothing."""

import random
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.helpers.llama2c import halves_from_pairs, read_model, widen_heads, write_base

BOS = 1
GREEDY = {
    "stories260K.bin": (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
        "Lily's mom said,"
    ),
    "llama2xs_279K.bin": (
        "Once upon a time, there was a little girl named Lily. She loved to play outside and came "
        "to play with her friends. One day, she went to the park to play with her toys. She was "
        "very happy."
    ),
}


@pytest.fixture(scope="module")
def pieces(shared: Path) -> SentencePieceProcessor:
    """Return the 512-piece vocabulary of both models."""
    return SentencePieceProcessor(model_file=str(shared / "models" / "tok512.model"))


def greedy_text(model: LlamaForCausalLM, pieces: SentencePieceProcessor, num_tokens: int) -> str:
    """Return what the model says first, token by most likely token."""
    ids = model.generate(torch.tensor([[BOS]]), max_new_tokens=num_tokens, do_sample=False)
    return pieces.decode(ids[0].tolist())


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_text_is_the_known_story(
    shared: Path, pieces: SentencePieceProcessor, name: str
) -> None:
    model = read_model(shared / "models" / name)
    assert greedy_text(model, pieces, 120).startswith(GREEDY[name])
    assert greedy_text(widen_heads(model), pieces, 120).startswith(GREEDY[name])


def test_loss_tells_a_story_from_its_shuffled_words(
    shared: Path, pieces: SentencePieceProcessor
) -> None:
    model = read_model(shared / "models" / "stories260K.bin")
    story = (
        "Once upon a time, there was a little girl named Lily. "
        "She loved to play outside in the park."
    )
    words = story.split()
    random.Random(0).shuffle(words)

    def loss(text: str) -> float:
        ids = torch.tensor([[BOS, *pieces.encode(text)]])
        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    assert loss(story) == pytest.approx(0.180, abs=0.001)
    assert loss(" ".join(words)) > 5


@pytest.mark.parametrize("name", GREEDY)
def test_wider_heads_compute_the_same_function(shared: Path, name: str) -> None:
    model = read_model(shared / "models" / name)
    wide = widen_heads(model).double()  # in fp32 only the order of additions would differ
    model.double()
    assert wide.config.head_dim == 32
    assert wide.model.layers[0].self_attn.q_proj.weight.shape == (8 * 32, 64)
    ids = torch.randint(3, 512, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_rotated_pairs_become_halves() -> None:
    rows = torch.arange(8.0).view(8, 1)
    assert halves_from_pairs(rows, num_heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_written_base_opens_as_any_hugging_face_model(
    shared: Path, pieces: SentencePieceProcessor, tmp_path: Path
) -> None:
    models = shared / "models"
    base = write_base(models / "stories260K.bin", models / "tok512.model", tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    assert model.config.head_dim == 32
    assert model.config.max_position_embeddings == 512
    text = "Once upon a time, there was a little girl named Lily."
    ids = AutoTokenizer.from_pretrained(base)(text).input_ids
    assert ids == [BOS, *pieces.encode(text)]
    assert greedy_text(model, pieces, 60).startswith(text)
    assert (base / "model.safetensors").is_file()
    assert not list(base.glob("*.bin"))
