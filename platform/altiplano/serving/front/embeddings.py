"""`/v1/embeddings`: one vector per input, as numbers or as base64 of little-endian float32.

Knows nothing of how a model makes them. Inputs go out together; the engine batches them.
"""

import base64
import struct
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from altiplano.serving.front.asking import encode, open_request
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.generation import new_id
from altiplano.serving.front.limits import check_request
from altiplano.serving.front.models import ServedModel, TargetLost
from altiplano.serving.front.schemas import EmbeddingRequest
from altiplano.serving.front.sse import while_connected
from altiplano.serving.front.state import FrontState
from altiplano.serving.front.together import gathered
from altiplano.serving.messages import Job, Sampling


async def embed(state: FrontState, request: Request, body: EmbeddingRequest) -> Response:
    """Embed every input."""
    caller, model, _ = open_request(state, request, body.model, "embed")
    prompts = [
        await encode(model.codec, each, add_bos=True) if isinstance(each, str) else each
        for each in body.inputs
    ]
    for prompt in prompts:
        check_request(
            state.limits,
            # Nothing is made, so the prompt may fill the context.
            model.context + 1,
            prompt_tokens=len(prompt),
            max_tokens=None,
            answers=1,
            default_max_tokens=None,
        )
        if max(prompt) >= model.codec.size:
            raise ApiError(400, f"token ids go from 0 to {model.codec.size - 1}, got {max(prompt)}")
    vectors = await while_connected(
        request.receive, gathered([_vector(model, each) for each in prompts])
    )
    if body.dimensions not in (None, len(vectors[0])):
        raise ApiError(
            400,
            f"the model's embeddings have {len(vectors[0])} dimensions, not {body.dimensions}",
            param="dimensions",
        )
    tokens = sum(map(len, prompts))
    caller.charge(tokens)
    shown: list[Any] = list(map(_base64, vectors)) if body.encoding_format == "base64" else vectors
    content = {
        "object": "list",
        "model": model.name,
        "data": [
            {"object": "embedding", "index": index, "embedding": each}
            for index, each in enumerate(shown)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _vector(model: ServedModel, prompt: list[int]) -> list[float]:
    job = Job(new_id(), prompt, Sampling(max_tokens=1))
    try:
        embedding = await model.client.embed(job)
    except TargetLost:
        # As for answers: once more, on another replica.
        try:
            embedding = await model.client.embed(job)
        except TargetLost:
            raise ApiError(
                503, "two replicas of the model were lost: ask again", retry_after_s=1
            ) from None
    if embedding.status == "invalid":
        raise ApiError(400, embedding.message, code="invalid_request")
    return embedding.vector


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
