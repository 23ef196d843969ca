"""The worker of every CPU engine, which vLLM loads by name (`worker_cls`).

Puts right what vLLM 0.29 does badly on CPUs, with objects in the places vLLM has for them: tokens
are drawn cheaply (`draw.py`); speculation samples exactly, min-p and logit bias included
(`sampler.py`); a seeded request whose prompt is computed in several parts draws nothing before its
first token (vLLM wants to rewind its generator, which no CPU generator can, and the engine dies).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.worker.cpu_worker import CPUWorker

from altiplano.serving.engine.draw import InverseDraw
from altiplano.serving.engine.sampler import ExactSampler, restore_refused

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput


class ExactCpuWorker(CPUWorker):
    """vLLM's CPU worker with our draw and our verifier."""

    def init_device(self) -> None:
        """Build the model runner and give it our draw, our verifier and all processors."""
        super().init_device()
        assert not self.use_v2_model_runner, "written against vLLM's first model runner"
        runner = self.model_runner
        runner.sampler.topk_topp_sampler = InverseDraw()
        if self.vllm_config.speculative_config is None:
            return
        runner.rejection_sampler = ExactSampler(runner.sampler)
        runner.input_batch.logitsprocs = LogitsProcessors(
            make(self.vllm_config, self.device, False) for make in BUILTIN_LOGITS_PROCESSORS
        )

    def execute_model(
        self, scheduler_output: "SchedulerOutput"
    ) -> "ModelRunnerOutput | AsyncModelRunnerOutput | None":
        """Run the model; new requests get back what `carry_refused` hid."""
        for request in scheduler_output.scheduled_new_reqs:
            if request.sampling_params is not None:
                restore_refused(request.sampling_params)
        return super().execute_model(scheduler_output)

    def sample_tokens(
        self, grammar_output: "GrammarOutput | None"
    ) -> "ModelRunnerOutput | AsyncModelRunnerOutput":
        """Sample; requests whose prompt is not through leave their generators as they are."""
        with self._without_discarded_generators():
            return super().sample_tokens(grammar_output)

    @contextmanager
    def _without_discarded_generators(self) -> Iterator[None]:
        runner = self.model_runner
        generators = runner.input_batch.generators
        discarded = runner.discard_request_mask.np
        held = {row: generators.pop(row) for row in list(generators) if discarded[row]}
        try:
            yield
        finally:
            generators.update(held)
