"""How new rows should start: bits per byte of every `extend.init`, before and after training them.

Two bases (see `new_rows_base.py`) get Chinese pieces trained on shared texts that no base has read;
then nothing but the new rows is trained, with the library's own loop in one process. English is
measured because rows that start loud take probability from the old ones. The bases differ in
whether they have read Chinese as bytes, which is what `subpiece_mean` can inherit. Needs
../shared/data and some nine minutes of a core.

    python bench/new_rows.py --output new_rows.json [--base stories260K|mixed]
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from new_rows_base import (
    BASES,
    SEQUENCE_LENGTH,
    fit,
    read_cmrc,
    read_english,
    read_lines,
    write_store,
)
from record import make_parser, write_record

from altiplano.config.training import TrainSettings
from altiplano.data.tokens.store import TokenStore
from altiplano.evaluate.bits import bits_per_byte
from altiplano.model.adapt import make_trainee
from altiplano.model.extend import extend_checkpoint
from altiplano.model.load import load_model
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import merge_sentencepiece
from altiplano.vocabulary.subpieces import old_subpieces
from altiplano.vocabulary.train import train_sentencepiece

BOOKS = ("hongloumeng.txt", "sanguoyanyi.txt")
INITS = ("subpiece_mean", "mean", "gaussian", "random")
HELD_OUT_EVERY = 100
MAX_BYTES = 60_000

Bits = dict[str, float]
"""Bits per byte, by language."""


@dataclass(frozen=True)
class Trial:
    """What is the same for every way to start."""

    base: Path
    tokenizer: Path
    store: TokenStore
    held_out: dict[str, list[str]]
    settings: TrainSettings

    def measure_base(self) -> dict[str, Bits]:
        """The base before its extension."""
        return {"step 0": self._bits(load_model(self.base), Vocabulary(self.base))}

    def run(self, init: str, folder: Path) -> dict[str, Bits]:
        """Step 0 and the end of training new rows that start as `init` says."""
        old, new = Vocabulary(self.base), Vocabulary(self.tokenizer)
        folder.mkdir()
        extend_checkpoint(
            self.base, folder, old_subpieces(old, new), vocab_old=old.size, init=init,
            special_ids={}, seed=0,
        )  # fmt: skip
        model = load_model(folder)
        found = {"step 0": self._bits(model, new)}
        fit(make_trainee(model, self.settings, old.size, seed=0), self.store)
        return {**found, f"step {self.settings.steps}": self._bits(model.eval(), new)}

    def _bits(self, model: torch.nn.Module, vocabulary: Vocabulary) -> Bits:
        return {
            language: round(
                bits_per_byte(
                    model, vocabulary, texts, max_bytes=MAX_BYTES, sequence_length=SEQUENCE_LENGTH
                )["bits_per_byte"],
                4,
            )
            for language, texts in self.held_out.items()
        }


def try_base(name: str, folder: Path, pieces: int, settings: TrainSettings) -> dict[str, Any]:
    """Make base, vocabulary and data once, try every init and print what comes out."""
    chinese = [line for book in BOOKS for line in read_lines(book)] + read_cmrc()
    texts = [line for index, line in enumerate(chinese) if index % HELD_OUT_EVERY]
    held_out = {"zh": chinese[::HELD_OUT_EVERY], "en": read_english()[1]}
    base, tokenizer, addition = folder / "base", folder / "tokenizer", folder / "zh.model"
    base.mkdir(parents=True)
    BASES[name](base)
    train_sentencepiece(texts, vocab_size=pieces, output=addition)
    merged = merge_sentencepiece(base / "tokenizer.model", [addition])
    save_tokenizer(merged.proto, tokenizer)
    store = write_store(folder / "store", Vocabulary(tokenizer), texts)
    trial = Trial(base, tokenizer, store, held_out, settings)
    rows: dict[str, dict[str, Bits]] = {}
    for init in ("base", *INITS):
        rows[init] = trial.measure_base() if init == "base" else trial.run(init, folder / init)
        for when, bits in rows[init].items():
            numbers = f"{bits['zh']:7.3f}  {bits['en']:7.3f}"
            print(f"{name:>12}  {init:>14}  {when:>9}  {numbers}", flush=True)
    return {"rows_old": merged.old_size, "rows_new": merged.new_size, "bits_per_byte": rows}


def main() -> None:
    """Try the bases asked for, write the record."""
    parser = make_parser("bits per byte by initialisation of new rows")
    parser.add_argument("--base", choices=BASES, help="one of them only")
    parser.add_argument("--pieces", type=int, default=4000, help="Chinese pieces to train")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = TrainSettings(
        rows="new", steps=given.steps, learning_rate=given.learning_rate,
        tokens_per_step=4096, micro_batch_tokens=4096,
    )  # fmt: skip
    print(f"{'base':>12}  {'init':>14}  {'':>9}  {'zh':>7}  {'en':>7}  (bits per byte)")
    with tempfile.TemporaryDirectory() as folder:
        bases = {
            name: try_base(name, Path(folder) / name, given.pieces, settings)
            for name in ([given.base] if given.base else BASES)
        }
    numbers = {
        "bases": bases, "tokens_per_step": settings.tokens_per_step,
        "learning_rate": settings.learning_rate,
    }  # fmt: skip
    write_record(given.output, numbers, packages=("torch", "transformers", "sentencepiece"))


if __name__ == "__main__":
    main()
