"""Requests as OpenAI's API has them, with vLLM's well-known additions.

Keys nobody knows are ignored, because clients send new ones; keys that are known but not served are
refused, so that nobody takes an answer for something it is not. Knows values, not models: what
depends on a tokenizer or a context is checked later. Parsing costs about 20 µs.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from altiplano.serving.messages import Sampling

MAX_STOPS = 16
_MAX_STOP_LENGTH = 1024
_MAX_PROMPTS = 256
_MAX_LOGPROBS = 20

_NO_GUIDANCE = "vLLM cannot do classifier-free guidance"
_REFUSED: dict[str, str] = {
    "guidance_scale": _NO_GUIDANCE,
    "negative_prompt": _NO_GUIDANCE,
    "negative_prompt_ids": _NO_GUIDANCE,
    "audio": "the models here write text only",
    "functions": "it is replaced by `tools`",
    "function_call": "it is replaced by `tool_choice`",
    "web_search_options": "the models here search nothing",
    "suffix": "the models here go on from a prompt and fill in nothing",
    "chat_template": "a model answers with the template it was trained with",
}
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]


class Body(BaseModel):
    """What every request has."""

    model_config = ConfigDict(
        extra="ignore", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: str | None = Field(None, max_length=256)
    """Name of a served model or of a loaded adapter; the service's first model by default."""
    user: str | None = None
    """Taken and not used."""

    @model_validator(mode="before")
    @classmethod
    def _served(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, why in _REFUSED.items():
                if data.get(name) is not None:
                    raise ValueError(f"`{name}` is not served: {why}")
            if data.get("modalities") not in (None, ["text"]):
                raise ValueError('`modalities` may only be ["text"]: the models here write text')
        return data


class StreamOptions(BaseModel):
    """What a stream brings beside its tokens."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    include_usage: bool = False
    """One more event at the end that counts the tokens."""


class JsonSchema(BaseModel):
    """The schema of `response_format`."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: str = Field("answer", max_length=256)
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """The form an answer must have."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` belongs to the type json_schema, and only to it")
        return self


class Generation(Body):
    """What both kinds of text requests have."""

    n: int = Field(1, ge=1, le=1024)
    """Answers; with a seed, answer i has seed + i."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    """Sample among this many; 0 or -1 is all."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    """Fewest tokens before the model, or a stop string, may end an answer."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] = Field([], max_length=64)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[str, Bias] | None = Field(None, max_length=1024)
    """By token id."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(None, min_length=1, max_length=8192)
    guided_choice: list[str] | None = Field(None, min_length=1, max_length=1024)
    guided_grammar: str | None = Field(None, min_length=1, max_length=65536)
    use_beam_search: bool = False
    """Beam search with `n` beams; nothing is sampled."""
    length_penalty: float = Field(1.0, ge=-100, le=100)
    early_stopping: bool = False
    return_token_ids: bool = False
    """Add `prompt_token_ids` and `token_ids`."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for `stream: true`")
        for key in self.logit_bias or {}:
            if not (key.isascii() and key.isdecimal() and int(key) < 2**31):
                raise ValueError(f"`logit_bias` is by token id, got the key {key[:40]!r}")
        if self.use_beam_search and self.stream:
            raise ValueError("beam search knows its answer only at its end: not with `stream`")
        return self

    @property
    def stops(self) -> Sequence[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> Sampling:
        """How the engine is to choose tokens, without what `guided.py` adds.

        Args:
            max_tokens: longest answer, as `limits.check_request` allows it.
        """
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logit_bias={int(key): bias for key, bias in (self.logit_bias or {}).items()},
        )


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class ToolCallFunction(BaseModel):
    """What an earlier answer called."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(max_length=256)
    arguments: str = ""


class ToolCall(BaseModel):
    """A call an earlier answer made."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: ToolCallFunction


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    @property
    def text(self) -> str:
        """Its text; the parts joined by line breaks."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class FunctionTool(BaseModel):
    """What a tool is called and takes."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool the model may call."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"] = "function"
    function: FunctionTool


class ToolName(BaseModel):
    """Name of a tool."""

    model_config = ConfigDict(extra="ignore")

    name: str


class NamedTool(BaseModel):
    """The one tool that is to be called."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"] = "function"
    function: ToolName


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)
    add_generation_prompt: bool = True
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` is for `logprobs: true`")
        wanted = isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required"
        if wanted and not self.tools:
            raise ValueError("`tool_choice` asks for a call, but there are no `tools`")
        return self

    @property
    def longest(self) -> int | None:
        """Most tokens asked for; the newer name wins."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens reported per position; None reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=_MAX_PROMPTS),
        ]
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    """With 0 and `echo` nothing is made: the prompt and its logprobs come back."""
    logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=1024)
    add_special_tokens: bool = True
    """Put BOS before a prompt of text."""

    @model_validator(mode="after")
    def _completion(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(
                f"`best_of` ({self.best_of}) other than `n` ({self.n}) is not served: ask for more "
                f"answers with `logprobs` and choose, or use `use_beam_search`"
            )
        if self.max_tokens == 0 and not (self.echo and not self.stream):
            raise ValueError("`max_tokens` 0 is for `echo` without `stream`")
        return self

    @property
    def longest(self) -> int | None:
        """Most tokens asked for."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens reported per position; None reports nothing."""
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Every prompt on its own."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[int(id_) for id_ in self.prompt if isinstance(id_, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=2048),
        ]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)

    @property
    def inputs(self) -> Sequence[str | list[int]]:
        """Every input on its own."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[int(id_) for id_ in self.input if isinstance(id_, int)]]
        return [each for each in self.input if not isinstance(each, int)]
