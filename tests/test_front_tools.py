"""Forms an answer must have, tools as the model is told of them, and calls read from its text."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.serving import LimitSettings
from altiplano.serving.front.calls import Delta, Reader
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.guided import guidance
from altiplano.serving.front.schemas import ChatRequest
from altiplano.serving.front.tools import conversation, read_tools

ASK = {"messages": [{"role": "user", "content": "Weather?"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look out of the window.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "$defs": {"city": {"type": "string", "enum": ["La Paz", "Oruro"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def request(**keys: Any) -> ChatRequest:
    return ChatRequest.model_validate({**ASK, **keys})


def guided(**keys: Any) -> dict[str, object] | None:
    return guidance(request(**keys), LimitSettings())


def test_every_form_reaches_the_engine_as_asked() -> None:
    schema = {"type": "object"}
    assert guided() is None
    assert guided(response_format={"type": "text"}) is None
    assert guided(response_format={"type": "json_object"}) == {"json_object": True}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert guided(response_format=form) == {"json": schema}
    assert guided(guided_json=schema) == guided(guided_json='{"type": "object"}')
    assert guided(guided_regex="a+") == {"regex": "a+"}
    assert guided(guided_choice=["a", "b"]) == {"choice": ["a", "b"]}
    assert guidance(request(), LimitSettings(), {"json": schema}) == {"json": schema}
    assert guided(guided_grammar="root ::= [a]") == {"grammar": "root ::= [a]"}


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "`guided_regex` and `guided_choice`"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "no JSON schema object"),
        ({"guided_json": '{"a":' * 40 + "1" + "}" * 40}, "deeper than 32"),
        ({"guided_json": {"$ref": "https://example.org/s"}}, "only what stands in the schema"),
        ({"guided_json": {"$ref": "other.json#/a"}}, "only what stands in the schema"),
        ({"guided_json": {"$ref": "#/a"}}, "which is not in it"),
        ({"guided_json": {"$ref": "#"}}, "only leads to itself"),
        ({"guided_json": {"a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}}, "only leads to itself"),
        ({"guided_json": {"enum": list(range(30_000))}}, "more than 20000 parts"),
        ({"guided_choice": ["a", ""]}, "empty choice"),
    ],
)
def test_a_form_no_engine_should_see_is_refused(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(ApiError, match=what) as refused:
        guided(**keys)
    assert refused.value.status == 400


def test_a_call_that_must_come_has_no_other_form() -> None:
    with pytest.raises(ApiError, match="`guided_regex` and `tool_choice`"):
        guidance(request(guided_regex="a"), LimitSettings(), {"json": {}})


def test_a_schema_may_refer_to_itself_where_that_ends() -> None:
    tree = {
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "$ref": {"type": "string"}},
    }
    assert guided(guided_json=tree) == {"json": tree}
    deep = {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}}
    assert guided(guided_json=deep) == {"json": deep}


def test_tools_may_must_or_must_not_be_called() -> None:
    assert read_tools(request()) is None
    assert read_tools(request(tools=[WEATHER], tool_choice="none")) is None
    free = read_tools(request(tools=[WEATHER]))
    assert free is not None and (free.mode, free.guided) == ("auto", None)
    named = {"type": "function", "function": {"name": "weather"}}
    one = read_tools(request(tools=[CLOCK, WEATHER], tool_choice=named))
    assert one is not None and one.guided == {"json": WEATHER["function"]["parameters"]}
    with pytest.raises(ApiError, match="names 'weather'"):
        read_tools(request(tools=[CLOCK], tool_choice=named))
    with pytest.raises(ApiError, match="given twice"):
        read_tools(request(tools=[CLOCK, CLOCK]))


@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_call_is_one_of_the_tools_with_its_own_schema(parallel: bool) -> None:
    use = read_tools(
        request(tools=[CLOCK, WEATHER], tool_choice="required", parallel_tool_calls=parallel)
    )
    assert use is not None and use.guided is not None
    valid = jsonschema.Draft202012Validator(use.guided["json"]).is_valid
    good = {"name": "weather", "parameters": {"city": "Oruro"}}
    assert valid([good])
    assert valid([{"name": "clock", "parameters": {}}])
    assert valid([good, good]) is parallel
    assert not valid([])
    assert not valid([{"name": "weather", "parameters": {"city": "Paris"}}])
    assert not valid([{"name": "clock", "parameters": {}, "more": 1}])
    assert not valid([{"name": "other", "parameters": {}}])


def test_a_template_that_reads_tools_gets_them_and_any_other_gets_words() -> None:
    said = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "function": {"name": "weather", "arguments": '{"city": "<END>"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "Sun"},
    ]
    body = request(messages=said, tools=[WEATHER, CLOCK])

    def clean(text: str) -> str:
        return text.replace("<END>", " ")

    messages, names = conversation(body, "{% for t in tools %}{{ t }}{% endfor %}", clean)
    assert [tool["function"]["name"] for tool in names["tools"]] == ["weather", "clock"]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": " "}
    assert messages[2] == {"role": "tool", "tool_call_id": "1", "content": "Sun"}

    messages, names = conversation(body, "{{ messages[0].content }}", clean)
    assert names == {}
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert "Look out of the window." in messages[0]["content"]
    read = Reader("auto", ["weather"], True)
    read.feed(messages[2]["content"])
    assert json.loads(read.calls[0]["function"]["arguments"]) == {"city": "<END>"}
    assert "Sun" in messages[3]["content"]
    silent, names = conversation(
        request(messages=said, tools=[WEATHER], tool_choice="none"), "{{ tools }}", clean
    )
    assert names == {} and len(silent) == 3


def joined(deltas: list[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls as a client puts a stream together."""
    content, calls = "", {}
    for delta in deltas:
        content += delta.get("content", "")
        for part in delta.get("tool_calls", []):
            call = calls.setdefault(part["index"], ["", ""])
            call[0] += part["function"].get("name", "")
            call[1] += part["function"]["arguments"]
    return content, [(name, arguments) for name, arguments in calls.values()]


def read(text: str, cuts: list[int] | None = None, **how: Any) -> tuple[Reader, list[Delta]]:
    reader = Reader(**{"mode": "auto", "names": ["weather", "clock"], "parallel": True, **how})
    deltas, last = [], 0
    for cut in [*sorted(cuts or []), len(text)]:
        deltas += reader.feed(text[last:cut])
        last = max(last, cut)
    return reader, deltas + reader.finish()


CALL = '{"name": "weather", "arguments": {"city": "Oruro"}}'
ORURO = ("weather", '{"city": "Oruro"}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just words.", "Just words.", []),
        (f"<tool_call>{CALL}</tool_call>", "", [ORURO]),
        (f"\n<tool_call>\n{CALL}\n</tool_call>\n", "\n", [ORURO]),
        (f"Let me see. <tool_call>{CALL}</tool_call>", "Let me see. ", [ORURO]),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", [ORURO, ORURO]),
        (f"<tool_call>{CALL}", "", [ORURO]),
        ("<tool_call>nothing</tool_call> so", "<tool_call>nothing</tool_call> so", []),
        ('<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
        ("a < b <tool", "a < b <tool", []),
        ('{"name": "clock", "parameters": {}}', "", [("clock", "{}")]),
        (f'{CALL}; {{"name": "clock"}}', "", [ORURO, ("clock", "{}")]),
        (f"[{CALL}]", "", [ORURO]),
        ('{"name": "Bob"}', '{"name": "Bob"}', []),
        ('{"age": 3}', '{"age": 3}', []),
        (f"Say {CALL}", f"Say {CALL}", []),
        (f"{CALL} and then", f"{CALL} and then", []),
    ],
)
@given(cuts=st.lists(st.integers(0, 130), max_size=12))
def test_calls_are_found_however_the_text_is_cut(
    text: str, content: str, calls: list[tuple[str, str]], cuts: list[int]
) -> None:
    reader, deltas = read(text, [cut for cut in cuts if cut <= len(text)])
    assert joined(deltas) == (content, calls)
    message = reader.message()
    told = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", [])
    ]
    assert told == calls
    assert message["content"] == (None if calls and not content.strip() else content)
    assert reader.finish_reason("stop") == ("tool_calls" if calls else "stop")
    assert reader.finish_reason("length") == "length"


@given(text=st.text(alphabet='<>/tol_ca{"name:}[] ', max_size=60), cut=st.integers(0, 60))
def test_no_text_is_lost(text: str, cut: int) -> None:
    _, deltas = read(text, [min(cut, len(text))])
    assert joined(deltas) == (text, [])


def test_text_that_cannot_be_a_call_is_not_held_back() -> None:
    reader = Reader("auto", ["weather"], True)
    assert reader.feed("Hello") == [{"content": "Hello"}]
    assert reader.feed(" <tool_") == [{"content": " "}]
    assert reader.feed("box>") == [{"content": "<tool_box>"}]


def test_one_call_is_enough_where_calls_are_not_parallel() -> None:
    reader, deltas = read(f"<tool_call>{CALL}</tool_call>" * 2, parallel=False)
    assert joined(deltas) == ("", [ORURO])
    assert len(reader.calls) == 1


def test_a_named_call_streams_its_arguments() -> None:
    reader, deltas = read('{"city": "Oruro"}', [3, 7], mode="named", names=["weather"])
    assert len(deltas) == 3
    assert joined(deltas) == ("", [ORURO])
    assert deltas[0]["tool_calls"][0]["id"].startswith("call_")
    assert reader.message()["content"] is None
    assert reader.finish_reason("stop") == "stop"


def test_required_calls_are_read_whole_and_a_cut_one_is_left_out() -> None:
    whole = f'[{CALL}, {{"name": "clock", "parameters": {{}}}}]'
    assert joined(read(whole, mode="required")[1]) == ("", [ORURO, ("clock", "{}")])
    assert joined(read(whole[:-12], mode="required")[1]) == ("", [ORURO])
    assert joined(read(whole[:20], mode="required")[1]) == (whole[:20], [])
