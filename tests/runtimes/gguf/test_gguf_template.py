"""Chat templates: the usual ones give the usual prompts; one that a stranger wrote against us is stopped, and soon."""

from __future__ import annotations

import json
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import runtimes.gguf.template as template_module
from protocol import limits
from protocol.errors import Code, ConfigError, Refused
from protocol.generation import ChatMessage, Role
from runtimes.gguf.template import ChatTemplate

STEPS = 50_000
CPU_S_MAX = 10.0  # none of them takes one; those that get through take minutes
SYSTEM = ChatMessage(Role.SYSTEM, "Be brief.")
HELLO = ChatMessage(Role.USER, "Hello  ")
HI = ChatMessage(Role.ASSISTANT, "Hi!")
WHO = ChatMessage(Role.USER, "Who are you?", name="ann")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system message comes first, with the date. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("one call at a time") }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {{ '<start_of_image>' if item['type'] == 'image' else item['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0, seen=[]) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
        {%- set ns.seen = ns.seen + [message.role] %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " ~ message["content"] ~ "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"].strip() + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
{{- "|" + ns.seen | join(",") + "|" + user_messages | length | string }}
"""
QWEN = """\
{%- macro turn(role, content) -%}
    <|im_start|>{{ role }}
{{ content }}<|im_end|>
{% endmacro -%}
{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" and '</think>' in content and loop.index0 < ns.last_query %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.previtem is not defined or loop.previtem.role != "tool" %}
        {{- turn(message.role, content) }}
    {%- endif %}
    {%- if message.name is defined %}{% continue %}{% endif %}
    {%- if loop.last or (loop.nextitem.role != "tool") %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class _OneDay(datetime):
    @classmethod
    def now(cls, tz: object = None) -> _OneDay:
        return cls(2026, 11, 25)


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """A template that gets through must not take the machine along: with 1.5 GB more than now it gets a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[5]) * resource.getpagesize() if statm.exists() else 0
    resource.setrlimit(resource.RLIMIT_DATA, (used + 1536 * 2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def render(source: str, *messages: ChatMessage) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages or (HELLO,))


def stopped(source: str | ChatTemplate, *messages: ChatMessage) -> str:
    """Why the template was stopped."""
    template = source if isinstance(source, ChatTemplate) else ChatTemplate(source)
    with pytest.raises(Refused) as caught:
        template.render(messages or (HELLO,))
    assert caught.value.code is Code.BAD_INPUT and not caught.value.retryable
    assert len(caught.value.message) < 400
    return caught.value.message


# What templates are for


def test_chatml() -> None:
    assert render(CHATML, SYSTEM, HELLO, HI) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello  <|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, HELLO).startswith("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n")


def test_a_template_like_llama_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "datetime", _OneDay)
    tool = ChatMessage(Role.TOOL, 'say "é"')
    assert render(LLAMA3, SYSTEM, HELLO, HI, tool) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 25 Nov 2026\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
        '<|start_header_id|>ipython<|end_header_id|>\n\n"say \\"é\\""<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
    )


def test_a_template_like_gemma() -> None:
    assert render(GEMMA, SYSTEM, HELLO, HI, WHO) == (
        "<s><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi!<end_of_turn>\n"
        "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(Refused, match=r"refuses these messages: Conversation roles must alternate user/assistant") as caught:
        render(GEMMA, HELLO, WHO)
    assert caught.value.code is Code.BAD_INPUT


def test_a_template_like_mistral() -> None:
    assert render(MISTRAL, SYSTEM, HELLO, HI, WHO) == (
        "<s>[INST] Hello  [/INST] Hi!</s>[INST] Be brief.\n\nWho are you?[/INST]|user,assistant,user|2"
    )
    with pytest.raises(Refused, match="roles must alternate"):
        render(MISTRAL, HELLO, HELLO)


def test_a_template_like_qwen() -> None:
    thought = ChatMessage(Role.ASSISTANT, "<think>hm</think>\n\nHi!")
    assert render(QWEN, SYSTEM, HELLO, thought, WHO) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello  <|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, MISTRAL, QWEN])
def test_the_largest_chat_is_within_the_limits(source: str) -> None:
    """Each limit of the sandbox leaves room for all that a request may hold."""
    roles = [Role.USER, Role.ASSISTANT] * (limits.MESSAGES_MAX // 2)
    chat = [ChatMessage(role, "x" * limits.MESSAGE_CHARS_MAX) for role in roles]
    prompt = render(source, *chat)
    assert prompt.count("x" * limits.MESSAGE_CHARS_MAX) == limits.MESSAGES_MAX


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ', ' if not loop.last }}{% endfor %}", "1/3, 2/3, 3/3"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}", "Hello  Who are you?"),
        ("{% for m in messages %}{{ m.name or '-' }}{% endfor %}", "--ann"),
        ("{% for m in messages %}{{ m.get('name', '?') }}{{ 'name' in m }}{% endfor %}", "?False?FalseannTrue"),
        ("{{ messages[-1].content[:3] ~ messages[0].content[::-1]|trim }}", "WhoolleH"),
        ("{% for k, v in messages[2].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=Who are you?;name=ann;"),
        ("{{ messages[1]|tojson }}", '{"role": "assistant", "content": "Hi!"}'),
        ("{{ {'é': [1, none, true]}|tojson(indent=1) }}", '{\n "é": [\n  1,\n  null,\n  true\n ]\n}'),
        ("{{ {'b': '<é>', 'a': 1}|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}", '{"a":1,"b":"<\\u00e9>"}'),
        ("{% macro m(x, n=2) %}{{ x|upper }}{% if n %}{{ m(x, n - 1) }}{% endif %}{% endmacro %}{{ m('a') }}", "AAA"),
        ("{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}x{% endcall %}", "[x]"),
        ("{% set x %}a{{ 1 + 1 }}{% endset %}{{ x }}{{ x|length }}", "a22"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "10"),
        ("{{ messages|map(attribute='role')|unique|join('+') }}", "user+assistant"),
        ("{{ messages|selectattr('name', 'defined')|map(attribute='content')|first }}", "Who are you?"),
        ("{{ (messages|last).content.replace('Who', 'What').split(' ')|join('_') }}", "What_are_you?"),
        ("{{ 'a\nb'|indent(2) }}{{ 'x-y'|replace('-', '+') }}{{ 1234|replace(2, '') }}", "a\n  bx+y134"),
        ("{% for m in messages %}{{ m.role.replace('user', 'U').split(sep='s') }}{{ '-'.join('ab') }}{% endfor %}",
         "['U']a-b['a', '', 'i', 'tant']a-b['U']a-b"),
        ("{{ ', '.join(['a', 'b']) }}{{ '  x '.strip() }}{{ 'xxaxx'.strip('x') }}{{ 'xax'|trim('x') }}", "a, bxaa"),
        ("{{ 7 % 3 }}{{ 7 // 2 }}{{ 2 * 3 }}{{ 7 - 9 }}{{ '42'|int + 1 }}{{ 2.345|round(1) }}{{ [1, 2]|sum }}", "136-2432.33"),
        ("{{ 3 is odd }}{{ 4 is even }}{{ 9 is divisibleby(3) }}{{ 'x' is in ['x'] }}{{ 1 is eq(2) }}", "TrueTrueTrueTrueFalse"),
        ("{{ [3, 1, 2]|sort|join }}{{ [1, 3]|max }}{{ {'b': 1, 'a': 2}|dictsort|first|first }}{{ 'ab'|list }}", "1233a['a', 'b']"),
        ("{% for i in [1] %}{% set n = namespace(a=i) %}{{ 'x'.upper() }}{{ n.a }}{% endfor %}", "X1"),
        ("{{ missing }}{{ missing is defined }}{{ missing|default('d') }}{{ tools is none }}", "FalsedTrue"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% for i in ['a', 'a', 'b'] %}{{ loop.changed(i) }}{{ loop.cycle('x', 'y') }}{% endfor %}", "TruexFalseyTruex"),
        ("{% block a %}x{% endblock %}{{ self.a() }}", "xx"),
        ("{{ {'a': [1, {'b': 2}]} }}{{ (1, 2) in [(1, 2)] }}{{ {('a', 1): 2}[('a', 1)] }}", "{'a': [1, {'b': 2}]}True2"),
        ("{% if x %}\n  {% set y = 1 %}\n{% endif %}\n{{ 'kept' }}\n", "kept"),
    ],
)
def test_the_parts_of_the_language_that_templates_use(source: str, prompt: str) -> None:
    assert render(source, HELLO, HI, WHO) == prompt


def test_two_renderings_share_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_STEPS_MAX", 60)
    template = ChatTemplate("{% for i in range(15) %}{{ i }}{% endfor %}")
    assert len({template.render([HELLO]) for _ in range(5)}) == 1


# What they are not for


OUT_OF_THE_SANDBOX = {
    "class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ ''|attr('__class__') }}x{{ (''|attr('__class__')).mro() }}",
    "class by subscript": "{{ ''['__class__']['__base__'] }}",
    "globals of a function": "{{ range.__globals__['limits'] }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "the environment": "{% macro m() %}{% endmacro %}{{ m._environment.budget }}",
    "the function of the sandbox": "{{ raise_exception.__globals__.json }}",
    "by a format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "by a format string taken apart": "{% set f = '{0.__class__}'.format_map %}{{ f({'0': 1}) }}",
    "frame of a generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "a class method": "{{ dict.fromkeys(range(3)) }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "from import": "{% from 'os' import system %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "append": "{{ messages.append(1) }}",
    "pop": "{{ messages.pop() }}",
    "clear": "{{ messages[0].clear() }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "setdefault": "{{ messages[0].setdefault('x', 1) }}",
    "sort in place": "{{ messages.sort() }}",
    "bytes": "{{ 'x'.encode() }}",
    "an unknown function": "{{ open('/etc/passwd') }}",
    "an attribute of a message": "{% set messages[0].role = 'system' %}{{ messages[0].role }}",
}


@pytest.mark.parametrize("source", OUT_OF_THE_SANDBOX.values(), ids=OUT_OF_THE_SANDBOX)
def test_nothing_outside_is_reached_or_changed(source: str) -> None:
    message = HELLO
    with pytest.raises((Refused, ConfigError)):
        render(source, message)
    assert message == ChatMessage(Role.USER, "Hello  ")


DOUBLING = "{% set ns = namespace(x='0123456789abcdef') %}{% for i in range(60) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x|length }}"
LAUGHS = (
    "{% set ns = namespace(x=['ha'], y=['ha']) %}"
    "{% for i in range(30) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
)
FLAT_LAUGHS = (
    "{% set ns = namespace(x='ha', y='ha') %}{% for i in range(8) %}"
    "{% set ns.x = [" + "ns.x, " * 16 + "] %}{% set ns.y = (" + "ns.y, " * 16 + ") %}{% endfor %}"
)
BIG = "{% set ns = namespace(x='0123456789abcdef') %}{% for i in range(16) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{% set big = ns.x %}"
LONG = "{% set x = 1 %}" * 3000
TOO_MUCH = {
    # time
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "nested loops that print": "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}",
    "a loop with a long body": "{% for a in range(9999) %}" + LONG + "{% endfor %}",
    "a loop with a long condition": "{% for a in range(9999) if [" + "a, " * 9000 + "] == 1 %}{% endfor %}",
    "a macro with a long body": "{% macro m() %}" + LONG + "{% endmacro %}{% for a in range(9999) %}{{ m() }}{% endfor %}",
    "a block with a long body": "{% block b %}" + LONG + "{% endblock %}{% for a in range(9999) %}{{ self.b() }}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "a huge range": "{{ range(10001) }}",
    "a range beyond all bounds": "{{ range(10**30) }}",
    "the power operator": "{{ 9**99999999 }}",
    "powers by multiplication": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "rounding to many places": "{{ 1|round(999999999, 'ceil') }}",
    "rounding a text": "{{ 'a'|round(9, 'ceil') }}",
    "a number of many digits": BIG + "{{ big|int(base=16) }}",
    "bytes of a number": "{{ (1).to_bytes(999999999, 'big') }}",
    "many slices": "{{ []|slice(999999999999)|list }}",
    "laughs compared": LAUGHS + "{{ ns.x == ns.y }}",
    "laughs sought": LAUGHS + "{{ ns.x in [ns.y] }}",
    "laughs tested": LAUGHS + "{{ ns.x is eq(ns.y) }}",
    "laughs sorted": LAUGHS + "{{ [ns.x, ns.y]|sort }}",
    "laughs counted": LAUGHS + "{{ [ns.x].count(ns.y) }}",
    "laughs as a key": FLAT_LAUGHS + "{{ {ns.y: 1} }}",
    "laughs as a subscript": FLAT_LAUGHS + "{{ {}[ns.y] }}",
    "laughs looked up": FLAT_LAUGHS + "{{ {}.get(ns.y) }}",
    "laughs made unique": FLAT_LAUGHS + "{{ [ns.y, ns.y]|unique|list }}",
    "laughs in a loop that asks for changes": FLAT_LAUGHS + "{% for i in [1, 2] %}{{ loop.changed([ns.x]) }}{% endfor %}",
    "a search that goes back": BIG + "{{ ('a' + big).rfind('b' + big[:99999]) }}",
    "trimming by many characters": BIG + "{{ big|trim(big) }}",
    "stripping by many characters": BIG + "{{ big.strip(big) }}",
    "scanning again and again": BIG + "{% for i in range(9999) %}{% if 'x' in big %}{% endif %}{% endfor %}",
    "counting in a long list": BIG + "{% set all = big|list %}{% for i in range(9999) %}{% if all.count('x') %}{% endif %}{% endfor %}",
    "scanning by a test": BIG + "{% for i in range(9999) %}{% if big is lower %}{% endif %}{% endfor %}",
    "scanning by a method": BIG + "{% for i in range(9999) %}{% if big.isalnum() %}{% endif %}{% endfor %}",
    # memory
    "adding": DOUBLING.replace("EXPRESSION", "ns.x + ns.x"),
    "joining by ~": DOUBLING.replace("EXPRESSION", "ns.x ~ ns.x"),
    "joining": DOUBLING.replace("EXPRESSION", "[ns.x, ns.x]|join"),
    "joining by a long separator": DOUBLING.replace("EXPRESSION", "range(9)|join(ns.x)"),
    "joining by a method": DOUBLING.replace("EXPRESSION", "ns.x.join(['', '', ''])"),
    "replacing": DOUBLING.replace("EXPRESSION", "ns.x|replace('a', 'aa' ~ ns.x)"),
    "replacing nothing": DOUBLING.replace("EXPRESSION", "ns.x|replace('', '--')"),
    "replacing by a method": DOUBLING.replace("EXPRESSION", "ns.x.replace('a', 'aa' ~ ns.x)"),
    "escaping": DOUBLING.replace("EXPRESSION", "ns.x ~ ('&' ~ ns.x)|e ~ ''"),
    "a macro that repeats": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLING.replace("EXPRESSION", "d(ns.x)"),
    "a block that is set": DOUBLING.replace("{% set ns.x = EXPRESSION %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "indenting": "{{ 'a\nb'|indent(999999999, true) }}",
    "indenting many lines": DOUBLING.replace("EXPRESSION", "(ns.x ~ '\n')|indent(99999, true)"),
    "indenting JSON": "{{ [1]|tojson(indent=999999999) }}",
    "JSON in JSON": DOUBLING.replace("EXPRESSION", "ns.x|tojson"),
    "multiplying a text": "{{ 'x' * 999999999 }}",
    "multiplying a list": "{{ [1] * 999999999 }}",
    "formatting": "{{ '%999999999d' % 1 }}",
    "formatting by a method": "{{ '{:>999999999}'.format(1) }}",
    "formatting by a test": "{{ '%999999999d' is odd }}",
    "formatting by another test": "{{ '%999999999d' is divisibleby(3) }}",
    "padding": "{{ 'x'.ljust(999999999) }}",
    "centring": "{{ 'x'.center(999999999) }}",
    "filling with zeros": "{{ 'x'.zfill(999999999) }}",
    "lists that grow": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "lists by sum": "{{ [[1], [2]]|sum(start=[]) }}{% set ns = namespace(x=[1]) %}"
    "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|sum(start=[]) %}{% endfor %}",
    "lists of a long text": BIG + "{{ [" + "big|list, " * 200 + "] }}",
    "lists of ranges": "{{ [" + "range(9999)|list, " * 4000 + "]|length }}",
    "words of a long text": BIG + "{{ [" + "big.split('0'), " * 200 + "]|length }}",
    "slices of a long text": BIG + "{{ [" + "big[1:], " * 4000 + "]|length }}",
    "letters of a long text": BIG + "{{ [" + "big|upper, " * 4000 + "]|length }}",
    "a long text printed often": BIG + "{% for i in range(999) %}{{ big }}{% endfor %}",
    "arguments of a macro": "{% macro m() %}{% if varargs %}{{ m(*varargs) }}{% endif %}{% endmacro %}" + BIG + "{{ m(*big) }}",
    "laughs printed": LAUGHS + "{{ ns.x }}",
    "laughs joined": LAUGHS + "{{ 'x' ~ ns.x }}",
    "laughs in JSON": LAUGHS + "{{ ns.x|tojson }}",
    "laughs made a text": LAUGHS + "{{ (ns.x|string)|length }}",
    "laughs trimmed": LAUGHS + "{{ ns.x|trim|length }}",
    "laughs in capitals": LAUGHS + "{{ ns.x|upper|length }}",
    "laughs as the items of a mapping": LAUGHS + "{{ {'a': ns.x}.items() }}",
    "laughs as a reason": LAUGHS + "{{ raise_exception(ns.x) }}",
    "wide laughs printed": FLAT_LAUGHS + "{{ ns.x }}",
    "wide laughs in JSON": FLAT_LAUGHS + "{{ ns.x|tojson }}",
    "namespaces in each other": "{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns.x }}",
    "a deep value in JSON": LAUGHS.replace("range(30)", "range(900)").replace("ns.x, ns.x", "ns.x") + "{{ ns.x|tojson(indent=16) }}",
    # ways to win the budget back
    "a negative price": "{% for i in range(9999) %}{{ [-99999]|map('paid')|list }}{% for k in range(50) %}{% endfor %}{% endfor %}",
    "a negative price of a loop": "{% for i in range(9999) %}{{ [1]|counted(-99999) }}{% for k in range(50) %}{% endfor %}{% endfor %}",
}


class _Calls:
    """Counts what Python calls: a measure of time that does not depend on the machine."""

    def __init__(self) -> None:
        self.number = 0
        self.cpu_s = 0.0

    def __call__(self, frame: object, event: str, argument: object) -> None:
        self.number += 1

    def __enter__(self) -> _Calls:
        self.cpu_s = -time.process_time()
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self.cpu_s += time.process_time()


@pytest.mark.parametrize("source", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_wants_too_much_is_stopped_soon(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its budget, not by Python's own limits: those come late, or not at all. A smaller budget keeps this test short."""
    monkeypatch.setattr(limits, "TEMPLATE_STEPS_MAX", STEPS)
    template = ChatTemplate(source)
    with _Calls() as calls:
        reason = stopped(template)
    assert "was stopped: " in reason or "(OverflowError)" in reason
    assert calls.number < 40 * STEPS
    assert calls.cpu_s < CPU_S_MAX  # what Python does inside of one call is seen by this only


FOUR_MILLION = BIG.replace("range(16)", "range(18)").replace("0123456789abcdef", "aa bb cc dd ee f")
MANY = "[" + "big, " * 45 + "]"


@pytest.mark.parametrize(
    "source",
    [
        *(FOUR_MILLION + "{{ (" + MANY + what + ")|length }}" for what in ("|string", "|join", "|tojson", "|upper", "|string ~ ''")),
        *(FOUR_MILLION + "{{ (big" + what + ")|length }}" for what in (".split(' ')", ".split()", "|list", "|tojson", "[::2]|indent(99)")),
        TOO_MUCH["JSON in JSON"],
        TOO_MUCH["adding"],
    ],
    ids=lambda source: source[-40:],
)
def test_memory_stays_small(source: str) -> None:
    """What is made of some million characters is paid for before it is made, where it may be much."""
    template = ChatTemplate(source)
    tracemalloc.start()
    try:
        template.render([HELLO])
    except Refused as refused:
        assert "was stopped: " in refused.message
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 * limits.TEMPLATE_OUTPUT_CHARS_MAX


def test_the_largest_budget_is_spent_soon() -> None:
    template = ChatTemplate(TOO_MUCH["nested loops that print"])
    with _Calls() as calls:
        assert f"more than {limits.TEMPLATE_STEPS_MAX} steps" in stopped(template)
    assert calls.number < 20 * limits.TEMPLATE_STEPS_MAX


def test_endless_recursion_ends() -> None:
    assert "RecursionError" in stopped("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    assert "RecursionError" in stopped("{% block b %}{{ self.b() }}{% endblock %}")
    assert "RecursionError" in stopped("{% macro m() %}{{ caller() }}{% call m() %}{% endcall %}{% endmacro %}{% call m() %}{% endcall %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ 'x' + missing }}",
        "{{ missing.x }}",
        "{{ missing() }}",
        "{{ 1 // 0 }}",
        "{{ messages|dictsort }}",
        "{{ [1, 'x']|sort }}",
        "{{ {}|tojson(indent='x') }}",
        "{{ range(1, 2, 0) }}",
        "{{ range|tojson }}",
        "{{ strftime_now('%' ~ '0' * 1) }}",
        "{{ strftime_now('%d' ~ ('x' * 1)) }}",
        "{{ 'x'.index('y') }}",
        "{% set a, b = 'x' %}",
        "{{ 'x'|map|list }}",
        "{{ ['x']|map('nothing')|list }}",
        "{{ ['x']|select('nothing')|list }}",
        "{{ {[1]: 2} }}",
        "{% if messages %}{% else %}{{ x|nothing }}{% endif %}{{ (1).real() }}",
    ],
)
def test_a_template_that_fails_is_refused(source: str) -> None:
    """Whatever Python raises in it: the thread that renders serves all other jobs too."""
    stopped(source)


def test_a_refusal_tells_nothing_of_the_messages_but_what_the_template_says() -> None:
    secret = ChatMessage(Role.USER, "my secret")
    assert "secret" not in stopped("{{ {}[messages[0].content] + 1 }}", secret)
    assert "secret" not in stopped("{{ messages[0].content.index('x') }}", secret)
    assert stopped("{{ raise_exception('x' ~ messages) }}", *[HELLO] * 100).count("Hello") < 10


def test_output_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_OUTPUT_CHARS_MAX", 1000)
    assert len(render("{{ messages[0].content }}", ChatMessage(Role.USER, "x" * 1000))) == 1000
    assert "more than 1000 characters" in stopped("{{ messages[0].content }}", ChatMessage(Role.USER, "x" * 1001))
    assert "more than 1000 characters" in stopped("{% for i in range(500) %}abc{% endfor %}")


def test_dates_are_short() -> None:
    assert "a date format over 100 characters" in stopped("{{ strftime_now('" + "x" * 101 + "') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ messages",
        "{% nonsense %}",
        "{{ x|format('%') }}",
        "{{ '%s'|format(1) }}",
        "{{ 'a'|pprint }}",
        "{{ x is nothing }}",
        "{% for x in y recursive %}{{ loop(x) }}{% endfor %}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ " + "not " * 5000 + "x }}",
        "{{ x" + ".x" * 50_000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{{ '\\N{nothing}' }}",
        "{{ '\\x' }}",
        "{% set loop = 1 %}{% for i in [1] %}{% set loop = 1 %}{{ loop }}{% endfor %}",
        "{% trans %}x{% endtrans %}",
        "{% do messages %}",
        "{% unknown_" + "x" * 200_000 + " %}",
        "{% break %}",
        "{# " + "x" * (limits.TEMPLATE_BYTES_MAX - 5),
        "x" * (limits.TEMPLATE_BYTES_MAX + 1),
        "é" * (limits.TEMPLATE_BYTES_MAX // 2 + 1),
    ],
    ids=lambda source: source[:20],
)
def test_a_template_that_is_none_is_a_matter_of_the_file(source: str) -> None:
    with pytest.raises(ConfigError, match="use another model file") as caught:
        ChatTemplate(source)
    assert len(str(caught.value)) < 400


def test_the_longest_template_can_be_used() -> None:
    """Nothing grows faster than the template: 256 KiB can be compiled and rendered."""
    part = "{{ 1 }} {%- set x = 1 -%}{% if x %}{% endif %}\n{{ 'a'|replace('a', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa') }}"
    template = ChatTemplate(part * (limits.TEMPLATE_BYTES_MAX // len(part)))
    with _Calls() as calls:
        template.render([HELLO])
    assert calls.number < 20 * limits.TEMPLATE_STEPS_MAX


def test_constants_are_not_computed_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant that grows would be written into the compiled template before any budget of a rendering counts it."""
    calls: list[Any] = []
    count: Callable[..., None] = lambda self, size: calls.append(size)  # noqa: E731
    monkeypatch.setattr("runtimes.gguf.template._Budget.text", count)
    ChatTemplate("{{ 'a'|replace('a', 'aaaa')|upper|trim ~ 'x' }}{{ 'a'|indent(9) }}{% if 'a' is eq('b') %}{% endif %}{{ ['a']|join }}")
    assert calls == []


def test_repr_and_json_of_what_comes_back() -> None:
    assert repr(ChatTemplate("x")) == "<ChatTemplate>"
    assert json.loads(render("{{ messages|tojson }}", HELLO, WHO)) == [
        {"role": "user", "content": "Hello  "},
        {"role": "user", "content": "Who are you?", "name": "ann"},
    ]
