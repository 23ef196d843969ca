"""Tools: what a request lets its answers call, and how the model is told.

A call that must come (`required`, or a named tool) is held to the tool's schema by the engine's
grammar, so it is always valid. One that may come (`auto`) is read from the text by `calls.py`. The
chat template tells of the tools where it can, else a system message does. Knows no tokens.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from altiplano.serving.front.calls import CLOSE, OPEN, Mode, Reader, parsed
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.guided import check_schema
from altiplano.serving.front.schemas import ChatRequest, NamedTool, Tool


@dataclass(frozen=True)
class ToolUse:
    """What a request lets its answers call."""

    mode: Mode
    names: Sequence[str]
    """Tools that may be called; the named one alone where one is."""
    parallel: bool
    """Whether one answer may call several."""
    guided: dict[str, object] | None
    """For `Sampling.guided`; None where the model may also answer in words."""

    def reader(self) -> Reader:
        """A reader for one answer."""
        return Reader(self.mode, self.names, self.parallel)


def read_tools(body: ChatRequest) -> ToolUse | None:
    """What may be called; None where nothing may.

    Raises:
        ApiError: 400, two tools of one name, a named tool that is not among them, a schema that
            cannot be used.
    """
    choice = body.tool_choice or "auto"
    if not body.tools or choice == "none":
        return None
    names = [tool.function.name for tool in body.tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ApiError(400, f"tools must differ by name, {twice} are given twice", param="tools")
    for index, tool in enumerate(body.tools):
        check_schema(_parameters(tool), f"tools.{index}.function.parameters")
    parallel = body.parallel_tool_calls
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise ApiError(
                400, f"`tool_choice` names {name!r}, `tools` are {names}", param="tool_choice"
            )
        schema = _parameters(body.tools[names.index(name)])
        return ToolUse("named", [name], False, {"json": schema})
    if choice == "required":
        return ToolUse("required", names, parallel, {"json": _any_call(body.tools, parallel)})
    return ToolUse("auto", names, parallel, None)


def conversation(
    body: ChatRequest, template: str, clean: Callable[[str], str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and further names for the chat template, tools and earlier calls among them.

    Args:
        template: Jinja source. One that does not read `tools` gets them as text, in Hermes' form.
        clean: takes control pieces out of what people wrote (`TextCodec.clean`).

    Returns:
        Arguments of `TextCodec.render`.
    """
    messages = [message.for_template() for message in body.messages]
    use = bool(body.tools) and body.tool_choice != "none"
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []] if use else []
    if re.search(r"\btools\b", template):
        for message in messages:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = _cleaned(_object(call), clean)
        return messages, {"tools": _cleaned(tools, clean)} if tools else {}
    messages = [_as_text(message) for message in messages]
    if tools:
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        text = "\n\n".join(filter(None, [system, _instructions(tools)]))
        messages.insert(0, {"role": "system", "content": text})
    return messages, {}


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _any_call(tools: Sequence[Tool], parallel: bool) -> dict[str, Any]:
    """Schema of a list of calls. Each tool's own schema moves under `$defs`, its references too."""
    calls, schemas = [], {}
    for index, tool in enumerate(tools):
        schemas[f"tool_{index}"] = _moved(_parameters(tool), f"#/$defs/tool_{index}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [tool.function.name]},
                    "parameters": {"$ref": f"#/$defs/tool_{index}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    one = {} if parallel else {"maxItems": 1}
    return {
        "type": "array",
        "minItems": 1,
        **one,
        "items": {"anyOf": calls},
        "$defs": schemas,
    }


def _moved(schema: Any, root: str) -> Any:
    """A schema that stands at `root` of another."""
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: root + value[1:] if name == "$ref" and isinstance(value, str) else _moved(value, root)
        for name, value in schema.items()
    }


def _cleaned(value: Any, clean: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(each, clean) for each in value]
    if isinstance(value, dict):
        return {clean(name): _cleaned(each, clean) for name, each in value.items()}
    return value


def _object(call: dict[str, Any]) -> Any:
    """Arguments of an earlier call as templates want them: not text, where they are an object."""
    arguments = call["function"]["arguments"]
    value = parsed(arguments)
    return value if isinstance(value, dict) else arguments


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message for a template that knows no tools."""
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = [
        f"{OPEN}\n{json.dumps(_spoken(call), ensure_ascii=False)}\n{CLOSE}"
        for call in message.get("tool_calls", [])
    ]
    content = "\n".join(filter(None, [message["content"], *calls]))
    return {name: message[name] for name in ("role", "name") if name in message} | {
        "content": content
    }


def _spoken(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": _object(call)}


def _instructions(tools: Sequence[dict[str, Any]]) -> str:
    described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You may call these functions:\n<tools>\n{described}\n</tools>\n"
        f"To call one, answer with its name and its arguments as JSON, like this:\n"
        f'{OPEN}\n{{"name": "the name", "arguments": {{}}}}\n{CLOSE}'
    )
