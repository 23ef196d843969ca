"""An engine that embeds: its vectors are the model's own, and it refuses what it cannot embed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from altiplano.config.serving import ModelSettings
from altiplano.serving.engine.base import InvalidJob
from altiplano.serving.messages import Job, Sampling
from tests.helpers.served_run import write_small_model

PROMPTS = [[1, 300, 301, 302, 299], [1, 310]]


def test_an_embedding_is_the_models_last_state_at_length_one(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from altiplano.serving.engine.vllm import VllmEngine

    directory = write_small_model(tmp_path / "model")
    entry = ModelSettings(name="tiny", path="", task="embed", dtype="float32", kv_cache_gib=0.05)
    engine = VllmEngine(entry, directory)

    async def use() -> list[list[float]]:
        await engine.start()
        try:
            vectors = await asyncio.gather(*(engine.embed(prompt) for prompt in PROMPTS))
            for wrong in ([], [1, 4000], [1] * 300):
                with pytest.raises(InvalidJob):
                    await engine.embed(wrong)
            with pytest.raises(InvalidJob, match="generat"):
                await anext(engine.generate(Job("j", PROMPTS[0], Sampling(max_tokens=1))))
            assert engine.about().task == "embed"
            return vectors
        finally:
            engine.shutdown()
            await asyncio.sleep(0.1)

    vectors = asyncio.run(use())
    model: Any = LlamaForCausalLM.from_pretrained(directory).eval()
    for prompt, vector in zip(PROMPTS, vectors, strict=True):
        with torch.no_grad():
            state = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        assert vector == pytest.approx((state / state.norm()).tolist(), abs=1e-5)
