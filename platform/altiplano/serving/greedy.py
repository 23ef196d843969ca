"""A server that answers greedily, for speculation on CPUs.

vLLM 0.29's CPU engine was seen to give noise when it samples while it speculates, and the right
text when it does either alone or is greedy. Until that is mended upstream, a CPU service
that speculates reads every request at temperature 0. Knows only that one field of a request.
Importing it imports `ray.serve.llm` (several seconds).
"""

from typing import Any

from ray.serve.llm.deployment import LLMServer


class GreedyServer(LLMServer):
    """`ray.serve.llm`'s server with the temperature of every request set to 0."""

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        """Answer a chat request greedily."""
        return await super().chat(_greedy(request), raw_request_info)

    async def completions(self, request: Any, raw_request_info: Any = None) -> Any:
        """Answer a completion request greedily."""
        return await super().completions(_greedy(request), raw_request_info)


def _greedy(request: Any) -> Any:
    return request.model_copy(update={"temperature": 0.0})
