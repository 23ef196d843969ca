"""vLLM's AsyncLLM as an `Engine`: jobs of token ids in, steps of token ids out.

The model runs in processes of vLLM's own; this one translates and holds no weights. Knows neither
Ray nor text: nothing is detokenised. Import it only in a replica, after `quiet`: it imports vLLM
and torch (seconds). A step of a job costs about 0.1 ms here.
"""

import asyncio
import contextlib
import os
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from altiplano.config.serving import ModelSettings
from altiplano.errors import ServeError
from altiplano.serving.engine.arguments import QUIET, engine_arguments, require_cache
from altiplano.serving.engine.base import EngineLost, InvalidJob
from altiplano.serving.messages import About, Job, Sampling, Step, TokenLogprob

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
warnings.filterwarnings("ignore", category=DeprecationWarning)

import vllm  # noqa: E402 - reads the environment above
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.exceptions import VLLMClientError  # noqa: E402
from vllm.inputs import TokensPrompt, tokens_input  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.outputs import RequestOutput  # noqa: E402
from vllm.pooling_params import PoolingParams  # noqa: E402
from vllm.sampling_params import (  # noqa: E402
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # noqa: E402
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger  # noqa: E402
