"""The worker of every CPU engine, which vLLM loads by name (`worker_cls`).

Mends three things of vLLM 0.29 on CPUs, each by its own objects: speculation samples exactly
(`sampler.py`), with min-p and logit bias too; a seeded request whose prompt is computed in several
parts draws nothing before its first token, where vLLM would rewind a CPU generator, which cannot
be, and lose the engine. Where nothing speculates and nobody seeds, it is vLLM's worker.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.worker.cpu_worker import CPUWorker

from altiplano.serving.engine.sampler import ExactSampler, restore_refused

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

QUALIFIED_NAME = "altiplano.serving.engine.worker.ExactCpuWorker"
"""For `worker_cls`."""


class ExactCpuWorker(CPUWorker):
    """vLLM's CPU worker with an exact verifier."""

    def init_device(self) -> None:
        """Build the model runner and give it our verifier, and the processors vLLM leaves out."""
        super().init_device()
        assert not self.use_v2_model_runner, "written against vLLM's first model runner"
        if self.vllm_config.speculative_config is None:
            return
        runner = self.model_runner
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
