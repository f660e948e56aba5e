"""Tools of a chat request: formats told by templates, grammars that hold a model to calls, and what a model is told."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
from scripted_client import ScriptedClient

from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError
from lightvllm.server import tool_grammar
from lightvllm.server.chat_protocol import ChatCompletionRequest
from lightvllm.server.conversation import prompt_text
from lightvllm.server.errors import ApiError
from lightvllm.server.params import structured_outputs
from lightvllm.server.settings import ServerSettings
from lightvllm.server.tool_calls import ToolFormat, write_calls
from lightvllm.server.tool_parsers import PARSERS
from lightvllm.server.tools import ToolUse, check_format, detect, tool_use

FORMATS: list[ToolFormat] = ["hermes", "llama3_json", "mistral", "pythonic"]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "ok": {"type": "boolean"},
        "kind": {"$ref": "#/$defs/Kind"},
        "many": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "none": {"type": "null"},
    },
    "required": ["city", "kind"],
    "additionalProperties": False,
    "$defs": {"Kind": {"enum": ["x", "y"]}},
}
ANSWER = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
NATIVE = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}<tool_call>"
    "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content is not none }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.arguments.a }}{% endfor %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "strict": True}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
DIALOGUE = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "8"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "9"}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("level"))


def engine(folder: Path, chat_template: str | None) -> Any:
    theirs = Tokenizer.from_dir(folder)
    theirs.chat_template = chat_template

    class Client(ScriptedClient):
        tokenizer = theirs  # type: ignore[assignment]

    return Client()


def request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "Add."}], **fields})


def use_of(client: Any, asked: ChatCompletionRequest, **settings: Any) -> ToolUse:
    return tool_use(asked, client, ServerSettings(**settings), structured_outputs(asked)[0])


def rendered(client: Any, **fields: Any) -> str:
    asked = request(**fields)
    return prompt_text(asked, client, ServerSettings(), use_of(client, asked))


def samples(grammar: str, count: int) -> list[str]:
    """Texts that the grammar allows, drawn by printable bytes."""
    from llguidance import LLMatcher, LLTokenizer

    compiled = LLMatcher.grammar_from_lark(grammar)
    assert LLMatcher.validate_grammar(compiled) == ""
    draw, texts = random.Random(0), []
    for _ in range(count):
        matcher, taken = LLMatcher(LLTokenizer("byte"), compiled), bytearray()
        while not matcher.is_stopped() and not (matcher.is_accepting() and draw.random() < 0.3):
            mask = matcher.compute_bitmask()
            allowed = [i for i in (10, *range(32, 127)) if mask[i // 8] >> (i % 8) & 1]
            if not allowed:
                break
            taken.append(draw.choice(allowed))
            assert matcher.consume_token(taken[-1])
        texts.append(taken.decode())
    return texts


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_what_a_grammar_allows_is_read_as_valid_calls(tool_format: ToolFormat, parallel: bool) -> None:
    functions: Any = [("get_weather", SCHEMA), ("noop", None)]
    numbers, names = set(), set()
    for text in samples(tool_grammar.grammar(tool_format, functions, parallel=parallel), 30):
        parser = PARSERS[tool_format](["get_weather", "noop"])
        parsed = parser.feed(text)
        assert parsed.content == parser.finish().content == ""
        numbers.add(parser.num_calls)
        calls = dict[int, list[str]]()
        for delta in parsed.calls:
            calls.setdefault(delta.index, [delta.name or "", ""])[1] += delta.arguments
        for name, written in calls.values():
            names.add(name)
            arguments = json.loads(written)
            if name == "noop":
                assert arguments == {}
            else:
                assert set(arguments) <= set(SCHEMA["properties"])  # type: ignore[arg-type]
                assert arguments["kind"] in ("x", "y")
                assert len(arguments["city"]) <= 5
                assert isinstance(arguments.get("ok", True), bool)
                assert arguments.get("none") is None
    assert names == {"get_weather", "noop"}
    assert min(numbers) == 1
    assert (max(numbers) > 1) is parallel


@pytest.mark.parametrize("tool_format", FORMATS)
def test_a_grammar_may_allow_an_answer_in_place_of_calls(tool_format: ToolFormat) -> None:
    texts = samples(tool_grammar.grammar(tool_format, [("noop", None)], parallel=False, answer=ANSWER), 60)
    assert {text for text in texts if "noop" not in text} == {'{"n": 1}', '{"n": 2}'}
    assert any("noop" in text for text in texts)


def test_a_mark_that_is_a_token_is_forced_as_one() -> None:
    assert 'calls: <[5]> "["' in tool_grammar.grammar("mistral", [("f", None)], parallel=True, mark_id=5)
    assert "call: <[5]> (call_0)" in tool_grammar.grammar("hermes", [("f", None)], parallel=True, mark_id=5)
    assert "TEXT (<[5]> (call_0) TEXT)*" in tool_grammar.text_with_calls(
        "hermes", [("f", None)], parallel=True, mark_id=5
    )


def accepted(grammar: str, text: str) -> bool:
    from llguidance import LLMatcher, LLTokenizer

    compiled = LLMatcher.grammar_from_lark(grammar)
    assert LLMatcher.validate_grammar(compiled) == ""
    matcher = LLMatcher(LLTokenizer("byte"), compiled, log_level=0)
    return matcher.consume_tokens(list(text.encode())) and bool(matcher.is_accepting())


@pytest.mark.parametrize("tool_format", ["hermes", "mistral"])
def test_calls_of_strict_tools_are_valid_wherever_they_stand(tool_format: ToolFormat) -> None:
    valid = write_calls(tool_format, [("weather", {"kind": "x"})])
    two = write_calls(tool_format, [("weather", {"kind": "x"}), ("other", {"anything": [1]})])
    schema = {"type": "object", "properties": {"kind": {"enum": ["x"]}}, "required": ["kind"]}
    functions: Any = [("weather", schema | {"additionalProperties": False}), ("other", {"type": "object"})]
    many = tool_grammar.text_with_calls(tool_format, functions, parallel=True)
    single = tool_grammar.text_with_calls(tool_format, functions, parallel=False)
    for text in ("", "Plain\ntext <tool [TOOL 東京", valid, f"I call.\n\n{valid}", f"{valid}\nDone."):
        assert accepted(many, text), text
        assert accepted(single, text), text
    assert accepted(many, f"Both:{two}")
    assert not accepted(single, f"Both:{two}")
    for wrong in (valid.replace('"x"', '"y"'), valid.replace("weather", "nothing"), valid[: len(valid) // 2]):
        assert not accepted(many, wrong)


def test_strict_tools_are_held_to_their_schemas_if_the_format_marks_calls(folder: Path) -> None:
    client = engine(folder, PLAIN)
    loose = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    held = use_of(client, request(tools=[TOOL, loose])).grammar
    assert held is not None
    assert str(held.grammar).startswith("start: (begin (call_0 | call_1))* TEXT")
    assert use_of(client, request(tools=[loose])).grammar is None
    assert use_of(client, request(tools=[TOOL]), tool_call_parser="llama3_json").grammar is None


def test_parameters_must_be_an_objects() -> None:
    with pytest.raises(ConfigError, match="expected a schema of an object"):
        tool_grammar.grammar("hermes", [("f", {"type": "array"})], parallel=True)


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        ('{{ "[TOOL_CALLS] [" }}', "mistral"),
        ("<tool_call>\n{{ call | tojson }}\n</tool_call>", "hermes"),
        ("<tool_call>\n<function={{ name }}>", None),
        ('Respond in the format {"name": function name, "parameters": dictionary}', "llama3_json"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("[func_name1(params_name1=value), func_name2()]", "pythonic"),
        ("{{ tools }}", None),
    ],
)
def test_a_template_tells_the_format(template: str, tool_format: str | None) -> None:
    assert detect(template) == tool_format


def test_a_template_with_tools_gets_them_and_arguments_as_a_mapping(folder: Path) -> None:
    client = engine(folder, NATIVE)
    assert use_of(client, request(tools=[TOOL])).native
    assert (
        rendered(client, tools=[TOOL], messages=DIALOGUE) == "add;<tool_call>[user]Add.[assistant]call_17[tool]8[tool]9"
    )
    assert rendered(client, tools=[TOOL], tool_choice="none") == "<tool_call>[user]Add."


def test_without_a_place_for_tools_the_system_message_tells_of_them(folder: Path) -> None:
    client = engine(folder, PLAIN)
    text = rendered(client, tools=[TOOL], messages=DIALOGUE)
    assert text.startswith("[system]You can call functions")
    assert '\n<tools>\n{"name": "add", "parameters": {"type": "object"}}\n</tools>\n' in text
    assert '<tool_call>\n{"name": "function_name", "arguments": {"parameter": "value"}}\n</tool_call>' in text
    assert text.endswith(
        '[user]Add.[assistant]<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>'
        "[user]<tool_response>\n8\n</tool_response>\n<tool_response>\n9\n</tool_response>"
    )
    system = [{"role": "developer", "content": "Be brief."}, *DIALOGUE]
    assert rendered(client, tools=[TOOL], messages=system).startswith("[system]Be brief.\n\nYou can call functions")
    assert rendered(client, messages=system).startswith("[system]Be brief.[user]Add.[assistant]<tool_call>")


def test_the_server_may_choose_the_format(folder: Path) -> None:
    client = engine(folder, "{{ tools }}")
    with pytest.raises(ApiError, match="started with tool_call_parser, one of hermes, llama3_json"):
        use_of(client, request(tools=[TOOL]))
    assert use_of(client, request(tools=[TOOL]), tool_call_parser="pythonic").format == "pythonic"
    with pytest.raises(ApiError, match="leave tools out"):
        use_of(client, request(tools=[TOOL]), tool_call_parser="none")
    assert not use_of(client, request(tools=[TOOL], tool_choice="none"), tool_call_parser="none").active


@pytest.mark.parametrize("name", [None, "auto", "none", *FORMATS])
def test_a_setting_is_checked_before_there_is_a_request(name: str | None) -> None:
    assert check_format(name) == (None if name == "auto" else name)
    with pytest.raises(ConfigError, match="use auto, hermes, llama3_json, mistral, pythonic or none"):
        check_format("xml")


def test_forms_and_tools_together(folder: Path) -> None:
    client = engine(folder, PLAIN)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": ANSWER}}
    grammar = use_of(client, request(tools=[TOOL], response_format=form)).grammar
    assert grammar is not None
    assert str(grammar.grammar).startswith("start: calls | answer\n")
    for fields, text in (
        ({"tool_choice": "required", "response_format": form}, "leaves no room"),
        ({"guided_regex": "a"}, "regex and tools exclude each other"),
    ):
        with pytest.raises(ApiError, match=text):
            use_of(client, request(tools=[TOOL], **fields))


@pytest.mark.parametrize("arguments", ["[1]", "{", "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(folder: Path, arguments: str) -> None:
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    with pytest.raises(ApiError, match=r"messages\[1\].tool_calls\[0\].function.arguments is"):
        rendered(engine(folder, PLAIN), messages=[DIALOGUE[0], {"role": "assistant", "tool_calls": [call]}])


def test_what_a_template_does_not_know_is_refused(folder: Path) -> None:
    client = engine(folder, PLAIN)
    with pytest.raises(ApiError, match="does not know documents"):
        rendered(client, documents=[{"text": "x"}])
    with pytest.raises(ApiError, match="no chat template"):
        rendered(engine(folder, None))
    told = engine(folder, PLAIN + "{{ reasoning_effort }}{{ thinking }}")
    fields = {"reasoning_effort": "low", "chat_template_kwargs": {"thinking": 1}}
    assert rendered(told, **fields) == "[user]Add.low1"
