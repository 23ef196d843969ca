"""vLLM's AsyncLLM as an `Engine`: jobs of token ids in, steps of token ids out.

The model runs in processes of vLLM's own; this one translates and holds no weights. Knows neither
Serve nor text: nothing is detokenised. Import it only in a replica: it imports vLLM and torch
(seconds), which read their environment then.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from altiplano.config.serving import ModelSettings
from altiplano.errors import AltiplanoError, ServeError
from altiplano.serving.adapters import Adapter, open_adapter
from altiplano.serving.engine.arguments import QUIET, engine_arguments, environment, require_cache
from altiplano.serving.engine.base import EngineLost, InvalidJob
from altiplano.serving.engine.slots import AdapterSlots
from altiplano.serving.messages import About, Job, Step

os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.pooling_params import PoolingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.executor import Executor
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from altiplano.serving.engine.sampler import carry_refused
from altiplano.serving.engine.translate import sampling_params, step_of


class VllmEngine:
    """One model in vLLM. The interface is `base.Engine`'s."""

    def __init__(
        self,
        entry: ModelSettings,
        model_dir: Path,
        draft_dir: Path | None = None,
        channel: str | None = None,
    ) -> None:
        """Args: as `engine_arguments`; nothing is loaded yet.

        Raises:
            ServeError: settings that exclude each other.
        """
        self._entry = entry
        self._model_dir = model_dir
        self._arguments = engine_arguments(entry, model_dir, draft_dir, channel)
        self._exact = "speculative_config" in self._arguments and entry.gpus_per_replica == 0
        self._adapters = AdapterSlots(entry.max_adapters, self._put_in, self._take_out)
        self._vllm: AsyncLLM | None = None

    async def start(self) -> None:
        """Load the model, in a thread: Serve may want the replica to stop meanwhile.

        Raises:
            ServeError: no room for the KV cache, or vLLM refuses the model.
        """
        try:
            self._vllm = await asyncio.to_thread(self._load)
        except ServeError:
            raise
        except (ValueError, RuntimeError) as error:
            raise ServeError(f"vLLM cannot serve {self._model_dir}: {error}") from error

    def _load(self) -> AsyncLLM:
        os.environ.update(environment(self._entry))
        config = AsyncEngineArgs(**self._arguments).create_engine_config()
        require_cache(self._entry, config)
        engine = AsyncLLM(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=True,
            log_requests=False,
            stat_loggers=[RayPrometheusStatLogger],
        )
        # vLLM asks the environment anew for every token: a quarter of this process' work.
        enable_envs_cache()
        return engine

    async def generate(self, job: Job) -> AsyncGenerator[Step, None]:
        """Answer a job; see `base.Engine`."""
        engine = self._running()
        self._check_prompt(job.prompt)
        with _refusals():
            params = sampling_params(job.sampling)
            if self._exact:
                carry_refused(params, engine.model_config.get_vocab_size())
        # vLLM looks at a grammar before it takes the job, which may take long: in a thread then.
        prompt: Any = (
            TokensPrompt(prompt_token_ids=job.prompt)
            if job.sampling.guided
            else tokens_input(job.prompt)
        )
        made = 0
        async with self._adapter_of(job) as adapter:
            outputs = engine.generate(prompt, params, job.id, lora_request=adapter)
            with _refusals():
                async with contextlib.aclosing(outputs):
                    async for output in outputs:
                        step = step_of(job, output, first=made == 0)
                        made += len(step.tokens)
                        if step.finish == "error" and made == 0 and job.sampling.guided:
                            raise InvalidJob("the grammar cannot be compiled: make it simpler")
                        yield step

    async def embed(self, prompt: list[int]) -> list[float]:
        """Embed a prompt; see `base.Engine`."""
        engine = self._running()
        self._check_prompt(prompt)
        params = PoolingParams(task="embed")
        vector: list[float] = []
        outputs = engine.encode(tokens_input(prompt), params, os.urandom(8).hex())
        with _refusals():
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    vector = output.outputs.data.float().tolist()
        return vector

    async def check_health(self) -> None:
        """Raise `EngineLost` where the engine is dead."""
        if self._running().errored:
            raise EngineLost("vLLM's engine process is dead")

    def about(self) -> About:
        """What is served."""
        model = self._running().model_config
        weights = sum(file.stat().st_size for file in self._model_dir.glob("*.safetensors"))
        return About(
            max_model_len=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            dtype=str(model.dtype).removeprefix("torch."),
            engine=f"vllm {vllm.__version__}",
            task=self._entry.task,
            weights_gib=round(weights / 2**30, 3),
        )

    async def load_adapter(self, name: str, address: str) -> str:
        """Load a LoRA adapter; see `base.Engine`."""
        found = (await self._open_adapter(address)).address
        async with self._adapters.use(name, found):
            return found

    async def unload_adapter(self, name: str) -> None:
        """Drop an adapter's weights; see `base.Engine`."""
        await self._adapters.drop(name)

    def shutdown(self) -> None:
        """End vLLM's processes."""
        if self._vllm is not None:
            self._vllm.shutdown()
            self._vllm = None

    def _running(self) -> AsyncLLM:
        if self._vllm is None:
            raise EngineLost("the engine is shut down")
        return self._vllm

    def _check_prompt(self, prompt: list[int]) -> None:
        """vLLM lets ids through that the tokenizer has and the model has no row for."""
        rows = self._running().model_config.get_vocab_size()
        if prompt and not 0 <= min(prompt) <= max(prompt) < rows:
            wrong = next(token for token in prompt if not 0 <= token < rows)
            raise InvalidJob(f"the prompt has token {wrong}, the vocabulary has {rows}")

    @contextlib.asynccontextmanager
    async def _adapter_of(self, job: Job) -> AsyncIterator[LoRARequest | None]:
        """The adapter a job names, loaded for as long as the job runs."""
        if job.adapter is None or job.adapter_path is None:
            yield None
            return
        async with self._adapters.use(job.adapter, job.adapter_path) as slot:
            yield LoRARequest(slot.name, slot.number, str(slot.directory))

    async def _put_in(self, name: str, number: int, address: str) -> Path:
        engine, adapter = self._running(), await self._open_adapter(address)
        try:
            await engine.add_lora(LoRARequest(name, number, str(adapter.directory)))
        except EngineDeadError as error:
            raise EngineLost("vLLM's engine process died") from error
        # What the engine's process raised comes as a plain Exception with its text.
        except Exception as error:
            # It may lie there half loaded, in another's place.
            await self._take_out(number)
            raise InvalidJob(f"vLLM cannot load the adapter {adapter.address}: {error}") from error
        return adapter.directory

    async def _open_adapter(self, address: str) -> Adapter:
        """In a thread: it may be copied from afar."""
        if not self._entry.max_adapters:
            raise InvalidJob(f"model {self._entry.name} takes no adapters: set serve.max_adapters")
        rank = self._entry.max_adapter_rank
        try:
            return await asyncio.to_thread(open_adapter, address, self._model_dir, rank)
        except AltiplanoError as error:
            raise InvalidJob(str(error)) from error

    async def _take_out(self, number: int) -> None:
        with _refusals():
            await self._running().remove_lora(number)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn vLLM's errors into `InvalidJob` and `EngineLost`."""
    try:
        yield
    except EngineDeadError as error:
        raise EngineLost("vLLM's engine process died") from error
    except (VLLMClientError, GracefulHTTPError) as error:
        raise InvalidJob(str(error)) from error
    except EngineGenerateError as error:
        # vLLM words refusals of its input checks as ValueError too, and wraps them.
        if isinstance(error.__cause__, ValueError | TypeError | OverflowError):
            raise InvalidJob(str(error.__cause__)) from error
        raise
