"""Real engines on CPU: what a draft proposes changes the time of an answer and nothing else."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from vllm import LLM, SamplingParams, TokensPrompt

from altiplano.config.serving import DraftSettings, ModelSettings
from altiplano.serving.engine.arguments import engine_arguments
from altiplano.serving.speculation.proposer import Proposer
from tests.helpers.llama2c import write_base

MODELS = Path("shared/data/models")
PROMPTS = [[1], [1, 403], [1, 407, 261], [1, *range(300, 420)]]
"""The last is longer than one step takes (`max_num_batched_tokens`)."""


class Guesser(Proposer):
    """Our proposer, or somebody who proposes what `mode` says instead."""

    mode: ClassVar[str] = "draft"
    made: ClassVar["Guesser"]
    answers: ClassVar[list[list[int]]] = []
    """Prompts with their right answers, for `right` and `wrong`."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        Guesser.made = self
        self.draw = torch.Generator().manual_seed(0)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        if self.mode == "draft":
            return super().propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        rows = enumerate(sampled_token_ids)
        return [
            self.guess(token_ids_cpu[row, : num_tokens_no_spec[row]].tolist()) if new else []
            for row, new in rows
        ]

    def guess(self, so_far: list[int]) -> list[int]:
        """At most four ids after `so_far`."""
        count = int(torch.randint(5, (), generator=self.draw))
        if self.mode == "random":
            return torch.randint(512, (count,), generator=self.draw).tolist()
        known = [text for text in self.answers if text[: len(so_far)] == so_far]
        right = known[0][len(so_far) :][:4] if known else []
        return right if self.mode == "right" else [(token + 1) % 512 for token in right]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft that were really trained, on the same text with one tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    return (
        write_base(MODELS / "stories260K.bin", MODELS / "tok512.model", root / "target"),
        write_base(MODELS / "llama2xs_279K.bin", MODELS / "tok512.model", root / "draft"),
    )
