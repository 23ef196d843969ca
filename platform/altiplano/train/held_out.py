"""Held-out bits per byte while a stage trains.

The same documents, windows and formula as `evaluate/bits.py`; but windows are packed into blocks of
the training's shape, several to a block and none seeing another, and workers share the blocks.
Every block's sum is made by one worker and all are added up in one order, so the numbers do not
depend on how many workers there are. Knows nothing of the steps before it.
Costs one forward pass over `max_bytes` of every language (long documents: nearly two), and 32 bytes
of memory per token.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from altiplano.data.tokens.fit import best_fit
from altiplano.data.tokens.store import Batch
from altiplano.data.tokens.windows import Window, split_windows, take_bytes
from altiplano.errors import TrainingError
from altiplano.model.adapt import Trainee
from altiplano.model.loss import IGNORED, summed_cross_entropy
from altiplano.train.batch import make_inputs
from altiplano.train.machine import Machine
from altiplano.train.strategy import Rank

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from altiplano.vocabulary.load import Vocabulary

Forward = Callable[[Callable[[], torch.Tensor]], torch.Tensor]
"""Runs one forward pass (`Strategy.loss`)."""

_FILES = "held_out.*.jsonl"


@dataclass(frozen=True)
class HeldOut:
    """Held-out texts, ready to be measured again and again.

    Attributes:
        sizes: language -> UTF-8 bytes that its blocks hold.
        blocks: language -> blocks [B, T]; every token is a label once.
    """

    sizes: dict[str, int]
    blocks: dict[str, Batch]

    @classmethod
    def open(
        cls,
        directory: Path,
        tokenizer_dir: Path,
        *,
        max_bytes: int,
        sequence_length: int,
        model_config: "LlamaConfig",
    ) -> "HeldOut":
        """Read and encode the first `max_bytes` of every language.

        Args:
            directory: a tokens artifact of text, with its `held_out.<language>.jsonl`.
            tokenizer_dir: the trained model's own, or the model itself.
            max_bytes: UTF-8 bytes per language; the last document is cut at a character.
            sequence_length: tokens of a window; the model's longest context if that is less.

        Raises:
            TrainingError: nothing is held out there.
        """
        from altiplano.vocabulary.load import Vocabulary

        vocabulary = Vocabulary(tokenizer_dir)
        length = min(sequence_length, model_config.max_position_embeddings)
        sizes, blocks = {}, {}
        for file in sorted(directory.glob(_FILES)):
            if documents := _read(file, max_bytes):
                language = file.name.removeprefix("held_out.").removesuffix(".jsonl")
                sizes[language] = sum(len(text.encode()) for text in documents)
                blocks[language] = _pack(_windows(vocabulary, documents, length), length)
        if not blocks:
            raise TrainingError(
                f"`evaluate_steps` needs held-out text, and {directory} has none: "
                f"raise `data.held_out`, or drop `evaluate_steps`"
            )
        return cls(sizes, blocks)

    def measure(
        self, trainee: Trainee, rank: Rank, machine: Machine, *, forward: Forward = lambda f: f()
    ) -> dict[str, float]:
        """Bits per byte of every language, the same on every worker; call it on all of them.

        Without dropout, in the training's precision. The model goes back to the mode it was in.
        Workers whose blocks run out compute one without targets, since under ZeRO-3 all must run
        as many forward passes.

        Args:
            forward: runs each forward pass; ZeRO-3 gathers weights in it.
        """
        length = next(iter(self.blocks.values())).labels.shape[1]
        batches = list(self._batches(max(1, trainee.settings.micro_batch_tokens // length)))
        nats = torch.zeros(len(batches), dtype=torch.float64, device=machine.device)
        was_training = trainee.model.training
        trainee.model.eval()
        try:
            for number in range(rank.index, _round_up(len(batches), rank.count), rank.count):
                mine = number < len(batches)
                batch = batches[number][1] if mine else _without_targets(batches[0][1])
                loss = _score(trainee, batch, machine, forward)
                if mine:
                    nats[number] = loss
        finally:
            trainee.model.train(was_training)
        rank.reduce_sum(nats)
        sums = dict.fromkeys(self.sizes, 0.0)
        for (language, _), value in zip(batches, nats.tolist(), strict=True):
            sums[language] += value
        return {name: sums[name] / math.log(2) / size for name, size in self.sizes.items()}

    def _batches(self, rows: int) -> Iterator[tuple[str, Batch]]:
        """Language and at most `rows` of its blocks."""
        for language, blocks in self.blocks.items():
            for start in range(0, len(blocks.labels), rows):
                yield language, _rows(blocks, slice(start, start + rows))


def has_held_out(directory: Path) -> bool:
    """Whether a tokens artifact holds texts out; one of conversations does not."""
    return any(file.stat().st_size for file in directory.glob(_FILES))


def _read(file: Path, max_bytes: int) -> list[str]:
    """The first documents of a file, without reading on."""
    documents, left = list[str](), max_bytes
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            documents.append(json.loads(line)["text"])
            left -= len(documents[-1].encode())
            if left <= 0:
                break
    return take_bytes(documents, max_bytes)


def _windows(vocabulary: "Vocabulary", documents: list[str], length: int) -> list[Window]:
    start = vocabulary.bos_id if vocabulary.bos_id >= 0 else vocabulary.eos_id
    encoded = vocabulary.encode_batch(documents)
    return [window for ids in encoded for window in split_windows([start, *ids], length)]


def _pack(windows: list[Window], length: int) -> Batch:
    """Whole windows in blocks of `length`, each a segment of its own."""
    bins = best_fit(np.array([len(w.token_ids) - 1 for w in windows]), length)
    shape = (int(bins.max()) + 1, length)
    ids, positions, segments = (np.zeros(shape, np.int64) for _ in range(3))
    labels = np.full(shape, IGNORED, np.int64)
    filled, placed = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
    for row, window in zip(bins, windows, strict=True):
        size = len(window.token_ids) - 1
        place = slice(filled[row], filled[row] + size)
        filled[row] += size
        placed[row] += 1
        ids[row, place] = window.token_ids[:-1]
        positions[row, place] = np.arange(size)
        segments[row, place] = placed[row]
        scored = slice(place.start + window.first_scored, place.stop)
        labels[row, scored] = window.token_ids[window.first_scored + 1 :]
    return Batch(ids, positions, segments, labels)


def _rows(batch: Batch, rows: slice) -> Batch:
    return Batch(
        batch.input_ids[rows], batch.position_ids[rows], batch.segment_ids[rows], batch.labels[rows]
    )


def _without_targets(batch: Batch) -> Batch:
    """One block of a batch, with nothing to score."""
    first = _rows(batch, slice(0, 1))
    return Batch(
        first.input_ids, first.position_ids, first.segment_ids, np.full_like(first.labels, IGNORED)
    )


def _score(trainee: Trainee, batch: Batch, machine: Machine, forward: Forward) -> float:
    """Sum of -ln p over the labels of a batch."""
    inputs = make_inputs(batch, machine.attention, machine.device)
    mixed = machine.compute != torch.float32

    def compute() -> torch.Tensor:
        with torch.autocast(machine.device.type, machine.compute, enabled=mixed):
            hidden = trainee.hidden(**inputs.model)
            return summed_cross_entropy(hidden, inputs.labels, trainee.head)

    with torch.no_grad():
        return float(forward(compute))


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
