"""Models the serving benches serve: one of random weights, one trained pair, one useless draft.

Everything is written once into a folder and found there the next time. The pair is trained by the
platform's own pipeline (configs/speculation.yaml: a few minutes on two idle cores). Knows files,
not servers.
"""

import random
import subprocess
import sys
from pathlib import Path

from training_shape import SHAPES, SHARED

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 1024
"""Tokens the random model is made for."""
_FIRST_TEXT_ID = 259
_PIECES = 2000
"""Of the tokenizer made where the shared one is not there."""


def random_model(folder: Path, shape: str = "small", shared: Path = SHARED) -> Path:
    """A Llama of random weights in bfloat16; `small` has 134 M parameters with the shared pieces.

    Its tokenizer is Chinese LLaMA-2's of 55,296 pieces where `shared` has it.
    """
    place = folder / f"random-{shape}"
    if (place / "config.json").is_file():
        return place
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from altiplano.model.load import save_model
    from altiplano.vocabulary.convert import save_tokenizer

    place.mkdir(parents=True, exist_ok=True)
    file = shared / "tokenizers" / "chinese_llama2_55296.model"
    file = file if file.is_file() and shape != "tiny" else _train_tokenizer(folder)
    save_tokenizer(file.read_bytes(), place, chat_template=_TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_size(file), max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2,
        **SHAPES[shape],
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        # Control and byte pieces are never said: broken characters would cost every server time,
        # and vLLM a line of its log each.
        model.lm_head.weight[:_FIRST_TEXT_ID] = 0
    save_model(model, place)
    return place


def trained_pair(folder: Path) -> Path:
    """A run with `merge/` and `draft/`, trained by configs/speculation.yaml where it is not yet."""
    place = folder / "pair"
    command = [sys.executable, "-m", "altiplano.cli", "run", "configs/speculation.yaml"]
    subprocess.run(
        [*command, "--until", "draft", f"output={place.resolve()}"], cwd=ROOT, check=True
    )
    return place


def useless_pair(pair: Path) -> Path:
    """The same target with a draft of random weights: it is always wrong."""
    place = pair.with_name(pair.name + "-useless")
    if (place / "draft").is_dir():
        return place
    import torch
    from transformers import LlamaForCausalLM

    from altiplano.artifact import read_manifest, write_artifact
    from altiplano.model.load import copy_tokenizer, link_or_copy, load_config, save_model

    (place / "merge").mkdir(parents=True, exist_ok=True)
    for file in (pair / "merge").iterdir():
        link_or_copy(file, place / "merge" / file.name)
    torch.manual_seed(0)
    with write_artifact(place / "draft", read_manifest(pair / "draft")) as partial:
        save_model(LlamaForCausalLM(load_config(pair / "draft")), partial)
        copy_tokenizer(pair / "draft", partial)
    return place


def pair_prompts(pair: Path, count: int, seed: int = 0) -> list[str]:
    """Beginnings of stories from the pair's world."""
    draw = random.Random(seed)
    text = (pair / "world" / "en.txt").read_text("utf-8")
    picked = draw.choices([line for line in text.split("\n") if len(line) > 40], k=count)
    return [line[: max(8, len(line) // 3)].rstrip() for line in picked]


def write_tokenizer(place: Path) -> None:
    """The tokenizer made by code, in a model directory."""
    from altiplano.vocabulary.convert import save_tokenizer

    file = _train_tokenizer(place)
    save_tokenizer(file.read_bytes(), place, chat_template=_TEMPLATE)


def _train_tokenizer(folder: Path) -> Path:
    """Pieces of made-up words."""
    from altiplano.vocabulary.train import train_sentencepiece

    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnpqrstvwxz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(4000)]
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(4000)]
    file = folder / "tokenizer.model"
    train_sentencepiece(lines, vocab_size=_PIECES, output=file, purpose="base")
    return file


def _size(tokenizer: Path) -> int:
    from altiplano.vocabulary.load import Vocabulary

    return Vocabulary(tokenizer).size


_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
