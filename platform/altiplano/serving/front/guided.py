"""Which form an answer must have: `response_format` and the `guided_*` keys -> `Sampling.guided`.

Refuses what no engine should see: several forms at once, schemas that point outside of themselves
or only at themselves. Whether a grammar can be compiled is the engine's to say. Costs microseconds.
"""

import json
from collections.abc import Iterator
from typing import Any

from altiplano.config.serving import LimitSettings
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.guard import check_json
from altiplano.serving.front.schemas import Generation

_MAX_NODES = 20_000


def guidance(
    body: Generation, limits: LimitSettings, call: dict[str, object] | None = None
) -> dict[str, object] | None:
    """What the engine is to hold the answer to; None where it is free.

    Args:
        limits: `serve.limits`.
        call: the form of a call that must come (`tools.ToolUse.guided`).

    Raises:
        ApiError: 400, two forms are asked for, or a schema cannot be used; names the key.
    """
    found: list[tuple[str, dict[str, object]]] = []
    if body.response_format is not None and body.response_format.type != "text":
        if body.response_format.json_schema is None:
            found.append(("response_format", {"json_object": True}))
        else:
            schema = body.response_format.json_schema.schema_
            check_schema(schema, "response_format.json_schema.schema")
            found.append(("response_format", {"json": schema}))
    if body.guided_json is not None:
        found.append(("guided_json", {"json": _schema(body.guided_json, limits)}))
    if body.guided_regex is not None:
        found.append(("guided_regex", {"regex": body.guided_regex}))
    if body.guided_choice is not None:
        if not all(body.guided_choice):
            raise ApiError(400, "`guided_choice` has an empty choice", param="guided_choice")
        found.append(("guided_choice", {"choice": body.guided_choice}))
    if body.guided_grammar is not None:
        found.append(("guided_grammar", {"grammar": body.guided_grammar}))
    if call is not None:
        found.append(("tool_choice", call))
    if len(found) > 1:
        names = " and ".join(f"`{name}`" for name, _ in found)
        raise ApiError(400, f"an answer has one form, not {names}: give one", param=found[1][0])
    return found[0][1] if found else None


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Refuse a JSON schema that is huge, or whose references leave it or never arrive.

    Raises:
        ApiError: 400, with the reference or the size.
    """
    for number, node in enumerate(_nodes(schema)):
        if number >= _MAX_NODES:
            raise ApiError(400, f"`{param}` has more than {_MAX_NODES} parts", param=param)
        # A property may be called `$ref` too; its value is then a schema.
        if isinstance(node, dict) and isinstance(node.get("$ref"), str):
            _follow(schema, node, param)


def _follow(schema: dict[str, Any], node: dict[str, Any], param: str) -> None:
    seen = []
    while isinstance(node, dict) and isinstance(reference := node.get("$ref"), str):
        if reference in seen:
            raise ApiError(
                400, f"`{param}`: the reference {reference!r} only leads to itself", param=param
            )
        seen.append(reference)
        node = _at(schema, reference, param)


def _at(schema: dict[str, Any], reference: str, param: str) -> Any:
    """What a reference into the schema names (RFC 6901)."""
    if reference != "#" and not reference.startswith("#/"):
        raise ApiError(
            400,
            f"`{param}` refers to {reference!r}: only what stands in the schema itself (#/...) may "
            f"be referred to",
            param=param,
        )
    place: Any = schema
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict) and name in place:
            place = place[name]
        else:
            raise ApiError(
                400, f"`{param}` refers to {reference!r}, which is not in it", param=param
            )
    return place


def _nodes(schema: Any) -> Iterator[Any]:
    """Every value in a schema, without recursion."""
    rest = [schema]
    while rest:
        node = rest.pop()
        yield node
        if isinstance(node, dict):
            rest += node.values()
        elif isinstance(node, list):
            rest += node


def _schema(given: dict[str, Any] | str, limits: LimitSettings) -> dict[str, Any]:
    """`guided_json`, which may come as text: then it passed the body's own checks as a string."""
    schema: Any = given
    if isinstance(given, str):
        try:
            check_json(given.encode(), limits.max_schema_depth)
            schema = json.loads(given)
        except (ValueError, ApiError) as error:
            raise ApiError(400, f"`guided_json`: {error}", param="guided_json") from None
    if not isinstance(schema, dict):
        raise ApiError(400, "`guided_json` is no JSON schema object", param="guided_json")
    check_schema(schema, "guided_json")
    return schema
