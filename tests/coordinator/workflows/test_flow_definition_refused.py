"""Definitions that are refused: where the fault is, and what is said of it."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from coordinator.workflows.definition import parse_definition
from coordinator.workflows.errors import FlowError
from protocol import limits

A: dict[str, Any] = {"key": "a", "cargo": "echo"}


def steps(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"steps": [A | entry for entry in entries]}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


CASES: list[tuple[Any, str, str]] = [
    ("x", "definition", "object"),
    ({}, "steps", "1 to 200"),
    ({"steps": []}, "steps", "1 to 200"),
    ({"steps": [A] * 201}, "steps", "1 to 200"),
    ({"steps": [A], "fail_mod": 1}, "definition", "did you mean 'fail_mode'"),
    ({"steps": [A], "fail_mode": "best_efort"}, "fail_mode", "did you mean 'best_effort'"),
    ({"steps": [A], "output": "{{ b.output }}"}, "output", "no step"),
    ({"steps": [A], "output": "{{ item }}"}, "output", "only in steps with for_each"),
    ({"steps": ["a"]}, "steps[0]", "object"),
    (steps({"depends": []}), "steps[0]", "did you mean 'depends_on'"),
    (steps({"key": "a b"}), "steps[0].key", "letters"),
    (steps({"key": "1a"}), "steps[0].key", "letters"),
    (steps({"key": "_a"}), "steps[0].key", "letters"),
    (steps({"key": "a" * 65}), "steps[0].key", "64"),
    (steps({"key": None}), "steps[0].key", "name"),
    (steps({"key": "input"}), "steps[0].key", "meaning of its own"),
    (steps({"key": "loop"}), "steps[0].key", "meaning of its own"),
    (steps({}, {}), "steps[1].key", "steps[0] already"),
    (steps({"cargo": None}), "steps[0].cargo", "missing"),
    (steps({"cargo": "no such name"}), "steps[0].cargo", "no name"),
    (steps({"cargo": 5}), "steps[0].cargo", "missing"),
    (steps({"input": "{{ input }}"}), "steps[0].input", "object"),
    (steps({"input": [1]}), "steps[0].input", "object"),
    (steps({"input": {"x": [{"y": "{{ b.output }}"}]}}), "steps[0].input.x[0].y", "'b', which is no step"),
    (steps({"input": {"x": "{{ inptu.t }}"}}), "steps[0].input.x", "did you mean 'input'"),
    (steps({"input": {"x": "{{ item }}"}}), "steps[0].input.x", "only in steps with for_each"),
    (steps({"input": {"x": "{{ a.output.text }}"}}), "steps[0]", "depends on itself"),
    (steps({"input": {"x": "{{ input. }}"}}), "steps[0].input.x", "cannot be read"),
    (steps({"input": {"x": "{{ input.__class__ }}"}}), "steps[0].input.x", "'__class__' is not allowed"),
    (steps({"input": {"x": deep(40)}}), "steps[0].input.x" + 32 * "[0]", "nested deeper"),
    (steps({"input": {"x": deep(5000)}}), "definition", "nested deeper"),
    (steps({"input": {"x": "\ud800"}}), "steps[0].input.x", "surrogate"),
    (steps({"input": {"\ud800": 1}}), "steps[0].input", "surrogate"),
    (steps({"input": {"x": float("nan")}}), "steps[0].input.x", "no JSON"),
    (steps({"input": {"x": {1}}}), "definition", "no JSON"),
    (steps({"input": {"x": "y" * limits.FLOW_DEFINITION_BYTES_MAX}}), "definition", "at most"),
    (steps({"input": {"x": "{{ input }}" + "y" * limits.FLOW_TEMPLATE_CHARS_MAX}}), "steps[0].input.x", "at most"),
    (steps({"depends_on": ["a"]}), "steps[0].depends_on[0]", "depends on itself"),
    (steps({"depends_on": "b"}), "steps[0].depends_on", "list"),
    (steps({"depends_on": [["b"]]}), "steps[0].depends_on[0]", "no step"),
    (steps({}, {"key": "b", "depends_on": ["a", "a"]}), "steps[1].depends_on[1]", "twice"),
    (steps({}, {"key": "translate"}, {"key": "c", "depends_on": ["a", "tranlate"]}), "steps[2].depends_on[1]", "did you mean 'translate'"),
    (steps({"input_mapping": []}), "steps[0].input_mapping", "object"),
    (steps({"input_mapping": {"x": "{{ b }}"}}), "steps[0].input_mapping.x", "no step"),
    (steps({"input_mapping": {"/x/~2": 1}}), "steps[0].input_mapping./x/~2", "~0"),
    (steps({"input_mapping": {"x": 1, "/x": 2}}), "steps[0].input_mapping./x", "twice"),
    (steps({"input_mapping": {"": 1}}), "steps[0].input_mapping", "name fields"),
    (steps({"input_mapping": {"x": {"pointer": "b"}}}), "steps[0].input_mapping.x.pointer", "begins with /"),
    (steps({"input_mapping": {"x": {"pointer": "/b/output"}}}), "steps[0].input_mapping.x.pointer", "no step"),
    (steps({"input_mapping": {"x": {"pointer": ""}}}), "steps[0].input_mapping.x.pointer", "name a step"),
    (steps({"input_mapping": {"x": {"pointer": 1}}}), "steps[0].input_mapping.x.pointer", "string"),
    (steps({"input_mapping": {"x": {"pointer": "/input", "default": "{{ 1 }}"}}}), "steps[0].input_mapping.x.default", "template"),
    (steps({"when": "input.x"}), "steps[0].when", "template"),
    (steps({"when": 1}), "steps[0].when", "template"),
    (steps({"when": "{{ item }}"}), "steps[0].when", "only in steps with for_each"),
    (steps({"for_each": "input.x"}), "steps[0].for_each", "list"),
    (steps({"for_each": "{{ item }}"}), "steps[0].for_each", "only in steps with for_each"),
    (steps({"for_each": {"x": 1}}), "steps[0].for_each", "list"),
    (steps({"max_items": 3}), "steps[0].max_items", "for_each"),
    (steps({"for_each": [1], "max_items": 10_001}), "steps[0].max_items", "1 to 10000"),
    (steps({"for_each": [1], "max_items": True}), "steps[0].max_items", "whole number"),
    (steps(*({"key": f"s{n}", "for_each": [1], "max_items": 9_000} for n in range(3))), "steps", "27000 jobs"),
    (steps({"retry": {"max_attempts": 11}}), "steps[0].retry.max_attempts", "1 to 10"),
    (steps({"retry": {"max_attempts": 0}}), "steps[0].retry.max_attempts", "1 to 10"),
    (steps({"retry": {"backoff": 1}}), "steps[0].retry", "did you mean 'backoff_s'"),
    (steps({"retry": {"jitter": 1.5}}), "steps[0].retry.jitter", "0 to 1"),
    (steps({"retry": {"factor": float("nan")}}), "steps[0].retry.factor", "number"),
    (steps({"retry": {"backoff_s": 10**400}}), "steps[0].retry.backoff_s", "number"),
    (steps({"retry": 3}), "steps[0].retry", "object"),
    (steps({"on_failure": "ignore"}), "steps[0].on_failure", "retry, skip, abort"),
    (steps({"on_failure": "fail"}), "steps[0].on_failure", "retry, skip, abort"),
    (steps({"on_failure": {"action": "skp"}}), "steps[0].on_failure.action", "did you mean 'skip'"),
    (steps({"on_failure": {"action": "skip", "max_attempts": 2}, "retry": {}}), "steps[0].on_failure", "one of them"),
    (steps({"on_failure": {"max_attempts": 99}}), "steps[0].on_failure.max_attempts", "1 to 10"),
    (steps({"timeout_s": 0}), "steps[0].timeout_s", "number"),
    (steps({"timeout_s": True}), "steps[0].timeout_s", "number"),
    (steps({"cache": "on"}), "steps[0].cache", "use, refresh, off"),
    (steps({"bid_price": -1}), "steps[0].bid_price", "below 0"),
    (steps({"bid_price": "1e3"}), "steps[0].bid_price", "exponent"),
]


@pytest.mark.parametrize(("body", "where", "said"), CASES, ids=range(len(CASES)))
def test_refused_where_and_why(body: Any, where: str, said: str) -> None:
    with pytest.raises(FlowError, match=re.escape(said)) as caught:
        parse_definition(body)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("needs", "cycle"),
    [
        ({"a": ["b"], "b": ["a"]}, "a -> b -> a"),
        ({"a": [], "b": ["a", "d"], "c": ["b"], "d": ["c"]}, "b -> d -> c -> b"),
        ({"a": ["b"], "b": ["c"], "c": ["b"]}, "b -> c -> b"),
    ],
)
def test_cycles_are_named(needs: dict[str, list[str]], cycle: str) -> None:
    with pytest.raises(FlowError, match="circle") as caught:
        parse_definition({"steps": [{"key": key, "cargo": "echo", "depends_on": those} for key, those in needs.items()]})
    assert caught.value.where == "steps" and caught.value.message.endswith(cycle)


def test_a_cycle_through_templates_is_one() -> None:
    entries = ({"input": {"x": "{{ b.output.text }}"}}, {"key": "b", "when": {"pointer": "/a/output"}})
    with pytest.raises(FlowError, match="a -> b -> a"):
        parse_definition(steps(*entries))


def test_a_long_cycle_is_cut_short() -> None:
    entries = [{"key": f"s{n}", "depends_on": [f"s{(n + 1) % 150}"]} for n in range(150)]
    with pytest.raises(FlowError, match="-> … -> s0") as caught:
        parse_definition(steps(*entries))
    assert len(str(caught.value)) < 200


def test_no_fault_quotes_a_prompt() -> None:
    secret = "my-secret-prompt"
    for entry in ({"input": secret}, {"when": secret}, {"for_each": secret}, {"input": {"x": secret + "{{ nope }}"}}):
        with pytest.raises(FlowError) as caught:
            parse_definition(steps(entry))
        assert secret not in str(caught.value)


def test_any_json_is_a_definition_or_refused() -> None:
    """Random changes of a good one raise nothing but FlowError."""
    chance = random.Random(6)
    junk: list[Any] = [None, True, 0, -1, 1e308, "", "a", "{{ a }}", "{% if", "/a", [], {}, [[]], "x" * 300]
    junk += [{"pointer": "/a"}, {"key": "a"}]
    names = "key cargo input depends_on input_mapping when for_each max_items retry on_failure timeout_s cache bid_price".split()
    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        entries = [dict(A), {"key": "b", "cargo": "echo", "input": {"x": "{{ a.output.text }}"}}]
        for _ in range(chance.randint(1, 3)):
            chance.choice(entries)[chance.choice(names)] = chance.choice(junk)
        try:
            parse_definition({"steps": entries})
            outcomes[True] += 1
        except FlowError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 50
