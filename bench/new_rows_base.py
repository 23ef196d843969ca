"""The bases that `new_rows.py` extends, the texts they share, and how anything there is trained.

`stories260K` are real weights: a Llama that learned from English stories alone, with tied rows.
`mixed` is LLaMA in small, made here in 90 s of a core: its vocabulary was learned from
English, and `CHINESE_SHARE` of the bytes it read were Chinese, which it spells in byte pieces.
So the two differ in whether the rows of those bytes have learned anything.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from altiplano.config.training import FullTrainSettings
from altiplano.data.tokens.pack import Sequences, pack_text
from altiplano.data.tokens.store import StoreWriter, TokenStore
from altiplano.data.tokens.windows import take_bytes
from altiplano.model.adapt import Trainee, make_trainee
from altiplano.model.attention import DOCUMENTS
from altiplano.model.load import save_model
from altiplano.train.local import train_here
from altiplano.train.machine import Machine
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary, tokenizer_fingerprint
from altiplano.vocabulary.train import train_sentencepiece

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
SEQUENCE_LENGTH = 256
CHINESE_SHARE = 0.15
"""Of the bytes that `mixed` reads. Of its tokens it is a third: a character is three."""
ENGLISH_HELD_OUT = 2
"""Documents of the English text, which is 30 long ones."""
_PIECES = 2048
_SHAPE = {
    "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": SEQUENCE_LENGTH,
}  # fmt: skip
_TRAINING = FullTrainSettings(
    rows="none", steps=250, learning_rate=4e-3, tokens_per_step=4096, micro_batch_tokens=4096
)


def read_lines(name: str) -> list[str]:
    """Lines of a shared text that are not empty."""
    lines = (DATA / "text" / name).read_text(encoding="utf-8-sig").splitlines()
    return [stripped for line in lines if (stripped := line.strip())]


def read_cmrc() -> list[str]:
    """Paragraphs of a Chinese encyclopedia."""
    file = DATA / "text" / "cmrc2018_dev_squad.json"
    articles = json.loads(file.read_text(encoding="utf-8"))["data"]
    return [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]


def read_english() -> tuple[list[str], list[str]]:
    """Documents to learn from, and documents held out from every base."""
    documents = read_lines("wiki_en_demo.txt")
    return documents[ENGLISH_HELD_OUT:], documents[:ENGLISH_HELD_OUT]


def write_stories(folder: Path) -> None:
    """stories260K as a Hugging Face directory."""
    models = DATA / "models"
    command = [
        sys.executable, "-m", "tests.helpers.llama2c", "--model", models / "stories260K.bin",
        "--tokenizer", models / "tok512.model", "--output", folder, "--head-dim", "8",
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, capture_output=True)


def write_mixed(folder: Path) -> None:
    """A small Llama that has read English and, as bytes, some Chinese."""
    from transformers import LlamaConfig, LlamaForCausalLM

    english, _ = read_english()
    size = sum(len(text.encode()) for text in english)
    chinese_bytes = int(size * CHINESE_SHARE / (1 - CHINESE_SHARE))
    chinese = take_bytes(read_lines("luxun_quanji.txt"), chinese_bytes)
    model_file = folder / "trained.model"
    train_sentencepiece(english, vocab_size=_PIECES, output=model_file, purpose="base")
    save_tokenizer(model_file.read_bytes(), folder)
    store = write_store(folder / "store", Vocabulary(folder), [*english, *chinese])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=_PIECES, **_SHAPE))
    fit(make_trainee(model, _TRAINING, _PIECES, seed=0), store)
    save_model(model, folder)


BASES = {"stories260K": write_stories, "mixed": write_mixed}


def write_store(folder: Path, vocabulary: Vocabulary, texts: Sequence[str]) -> TokenStore:
    """Texts as packed blocks, each with its BOS and EOS."""
    documents = [
        torch.tensor([vocabulary.bos_id, *ids, vocabulary.eos_id], dtype=torch.int32)
        for ids in vocabulary.encode_batch(texts)
    ]
    lengths = torch.tensor([len(document) for document in documents])
    stream = [Sequences(torch.cat(documents).numpy(), lengths.numpy())]
    with StoreWriter(
        folder, sequence_length=SEQUENCE_LENGTH, vocab_size=vocabulary.size, pad_id=0,
        tokenizer_fingerprint=tokenizer_fingerprint(vocabulary.source),
    ) as writer:  # fmt: skip
        for blocks in pack_text(stream, SEQUENCE_LENGTH):
            writer.add(blocks)
    return TokenStore.open(folder)


def fit(trainee: Trainee, store: TokenStore) -> None:
    """Train in this process, as the trainee's settings say."""
    machine = Machine(torch.device("cpu"), torch.float32, DOCUMENTS, "bench")
    train_here(trainee, store, seed=0, machine=machine)
