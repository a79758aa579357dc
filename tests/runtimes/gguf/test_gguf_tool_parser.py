"""What models write when they call tools, read the same however it is cut into pieces; and what only looks like a call."""

from __future__ import annotations

import json
import random
import time

import pytest

from protocol.tool_calls import ARGUMENTS, CALL, END, read_answer
from runtimes.gguf.tool_parser import CallParser
from runtimes.gguf.tool_syntax import ToolSyntax

NAMES = ("weather", "now")
BERN = '{"city": "Bern"}'
H, HL, M, L, J = (ToolSyntax.HERMES, ToolSyntax.HERMES_LIST, ToolSyntax.MISTRAL, ToolSyntax.LLAMA, ToolSyntax.JSON)
ONE = '{"name": "weather", "arguments": {"city": "Bern"}}'
UNKNOWN = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
TRICKY = '{"city": "} \\" ] </tool_call> {", "deep": {"a": [1, {"b": "\\\\"}]}}'

# syntax, answer, words, calls
ANSWERS: dict[str, tuple[ToolSyntax, str, str, list[tuple[str, str]]]] = {
    "Hermes": (H, f"<tool_call>\n{ONE}\n</tool_call>", "", [("weather", BERN)]),
    "words before": (H, f"Let me see.\n\n<tool_call>\n{ONE}\n</tool_call>\n", "Let me see.", [("weather", BERN)]),
    "two": (
        H,
        f'<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
        "",
        [("weather", BERN), ("now", "{}")],
    ),
    "words behind": (H, f"<tool_call>{ONE}</tool_call> That is all.", " That is all.", [("weather", BERN)]),
    "never closed": (H, f"<tool_call>{ONE}", "", [("weather", BERN)]),
    "a brace forgotten": (H, f"<tool_call>{ONE[:-1]}</tool_call>", "", [("weather", BERN)]),
    "a list": (HL, f'<tool_call>[{ONE}, {{"name":"now","arguments":{{}}}}]</tool_call>', "", [("weather", BERN), ("now", "{}")]),
    "a list where none is usual": (H, f"<tool_call>[{ONE}]</tool_call>", "", [("weather", BERN)]),
    "tricky strings": (H, f'<tool_call>{{"name":"weather","arguments":{TRICKY}}}</tool_call>', "", [("weather", TRICKY)]),
    "arguments first": (H, f'<tool_call>{{"arguments": {BERN}, "name": "weather"}}</tool_call>', "", [("weather", BERN)]),
    "a function in a function": (H, f'<tool_call>{{"type": "function", "function": {ONE}}}</tool_call>', "", [("weather", BERN)]),
    "a type before the name": (H, f'<tool_call>{{"type": "function", "name": "weather", "parameters": {BERN}}}', "", [("weather", BERN)]),
    "no arguments": (H, '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    "null for arguments": (H, '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", "{}")]),
    "arguments in a string": (H, f'<tool_call>{{"name": "weather", "arguments": {json.dumps(BERN)}}}', "", [("weather", BERN)]),
    "more keys": (H, f'<tool_call>{{"name": "weather", "arguments": {BERN}, "id": "}}x"}}</tool_call>!', "!", [("weather", BERN)]),
    "half a pair": (H, '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "now"}', "", [("now", '{"a": "\\ud800"}')]),
    "marks within": (H, f'a{END}b<tool_call>{{"name":"now","arguments":{{"x":"{CALL}"}}}}', "a\ufffdb", [("now", '{"x":"\ufffd"}')]),
    "Mistral": (M, f'[TOOL_CALLS] [{ONE}, {{"name": "now", "arguments": {{}}}}]', "", [("weather", BERN), ("now", "{}")]),
    "Llama": (L, f'{{"name": "weather", "parameters": {BERN}}}', "", [("weather", BERN)]),
    "Llama's mark": (L, f'<|python_tag|>{{"name": "weather", "parameters": {BERN}}}', "", [("weather", BERN)]),
    "Llama, two": (L, '{"name":"now","parameters":{}}; {"name":"now","parameters":{}}', "", [("now", "{}"), ("now", "{}")]),
    "JSON": (J, f"\n{ONE}\n", "", [("weather", BERN)]),
    # no calls
    "nothing": (H, "", "", []),
    "words": (H, "  It is 3 < 4 <tool and more.  \n", "  It is 3 < 4 <tool and more.  \n", []),
    "an unknown tool": (H, UNKNOWN, UNKNOWN, []),
    "no JSON in the marks": (H, "<tool_call>weather(Bern)</tool_call>", "<tool_call>weather(Bern)</tool_call>", []),
    "nothing in the marks": (H, "<tool_call>", "<tool_call>", []),
    "cut off in the name": (H, '<tool_call>\n{"name": "wea', '<tool_call>\n{"name": "wea', []),
    "an object without a name": (H, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    "a JSON answer": (L, '{"temperature": 21}', '{"temperature": 21}', []),
    "a JSON answer with a name": (J, '{"name": "Ann", "age": 4}', '{"name": "Ann", "age": 4}', []),
    "a list as answer": (J, "[1, 2] are numbers", "[1, 2] are numbers", []),
    "an object later": (J, f"See: {ONE}", f"See: {ONE}", []),
    "a call behind a failed one": (H, f'<tool_call>x<tool_call>{ONE}</tool_call>', "<tool_call>x", [("weather", BERN)]),
}


def read(parser: CallParser, pieces: list[str]) -> str:
    return "".join(parser.feed(piece) for piece in pieces) + parser.finish()


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name: str) -> None:
    syntax, answer, words, calls = ANSWERS[name]
    whole = read(CallParser(syntax, NAMES), [answer])
    assert read_answer(whole) == (words, calls)
    assert read(CallParser(syntax, NAMES), list(answer)) == whole, "a character at a time"
    chance = random.Random(3)
    for _ in range(20):
        cuts = sorted(chance.randrange(len(answer) + 1) for _ in range(4))
        pieces = [answer[low:high] for low, high in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert read(CallParser(syntax, NAMES), pieces) == whole, pieces


def test_arguments_come_as_they_are_written() -> None:
    parser = CallParser(H, NAMES)
    assert parser.feed("Well <tool") == "Well" and parser.feed('_call>{"name": "weather", "argu') == ""
    assert parser.feed('ments": {') == f"{CALL}weather{ARGUMENTS}{{"
    assert parser.feed('"city": "Be') == '"city": "Be' and parser.feed('rn"}') == f'rn"}}{END}'
    assert parser.feed("}</tool_call>") == "" and parser.finish() == "" and parser.calls == 1


def test_words_come_as_they_are_written() -> None:
    parser = CallParser(J, NAMES)
    assert [parser.feed(word) for word in ("It", " is", " ", "\n", "so.")] == ["It", " is", "", "", " \nso."]


def test_a_json_answer_is_not_held_back() -> None:
    parser = CallParser(L, NAMES)
    assert parser.feed('{"temp') == "" and parser.feed('erature": ') == '{"temperature":'


def test_a_call_that_has_begun_in_the_prompt() -> None:
    for syntax, answer in ((H, ONE), (M, f"[{ONE}]"), (L, ONE), (J, ONE)):
        assert read_answer(read(CallParser(syntax, NAMES, begun=True), list(answer))) == ("", [("weather", BERN)])
    assert read(CallParser(H, NAMES, begun=True), ['{"na']) == '{"na'


def test_one_call_is_enough_where_it_is_to_be_the_only_one() -> None:
    answer = f"<tool_call>{ONE}</tool_call><tool_call>{ONE}</tool_call>"
    parser = CallParser(H, NAMES, parallel=False)
    over_at = next(at for at in range(len(answer)) if parser.feed(answer[at]) is not None and parser.is_over)
    assert answer[: over_at + 1] == f"<tool_call>{ONE}"
    assert parser.feed("more") == parser.finish() == "" and parser.calls == 1


def test_what_is_long_does_not_take_long() -> None:
    """16,384 pieces, as 4,096 tokens never give: in arguments, in words, and where a name never comes."""
    began = time.process_time()
    for start in ('<tool_call>{"name":"now","arguments":{"x":"', "", '<tool_call>{"arguments":"', "<tool_call>" + " " * 2000):
        parser = CallParser(H, NAMES)
        text = parser.feed(start) + "".join(parser.feed("word") for _ in range(16_384)) + parser.finish()
        assert text.count("word") == 16_384
    assert time.process_time() - began < 2.0


def test_nothing_is_lost_or_breaks_whatever_comes() -> None:
    chance = random.Random(11)
    parts = [*'{}[]:," \\', "<tool_call>", "</tool_call>", '"name"', '"now"', '"arguments"', "{}", "word", ONE]
    for _ in range(3000):
        syntax = chance.choice([H, HL, M, L, J])
        answer = "".join(chance.choice(parts) for _ in range(chance.randrange(14)))
        whole = read(CallParser(syntax, NAMES), [answer])
        assert read(CallParser(syntax, NAMES), list(answer)) == whole, answer
        words, calls = read_answer(whole)
        assert all(name in NAMES for name, _ in calls)
        assert calls or words == answer
