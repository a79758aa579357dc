"""Definitions that are good: what they say, what steps need, their canonical form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.workflows.definition import (
    CacheMode,
    Definition,
    FailMode,
    OnFailure,
    Retry,
    parse_definition,
)
from coordinator.workflows.values import Constant, written
from protocol import limits


def one(**fields: Any) -> Any:
    """The only step of a definition."""
    return parse_definition({"steps": [{"key": "a", "cargo": "echo", **fields}]}).steps[0]


def chain(*needs: str) -> Definition:
    """``chain("a", "b a", "c a b")``: each step, and what it depends on."""
    steps = [{"key": words[0], "cargo": "echo", "depends_on": words[1:]} for words in (line.split() for line in needs)]
    return parse_definition({"steps": steps})


def test_the_smallest_one() -> None:
    step = one()
    assert (step.cargo, step.needs, step.input, step.when, step.for_each) == ("echo", (), Constant({}), None, None)
    assert (step.retry, step.on_failure, step.cache, step.bid_micros) == (Retry(1), OnFailure.FAIL, CacheMode.USE, None)
    assert parse_definition({"steps": [{"key": "a", "cargo": "echo"}]}).fail_mode is FailMode.FAIL_FAST


def test_workload_means_cargo() -> None:
    assert parse_definition({"steps": [{"key": "a", "workload": "echo"}]}).steps[0].cargo == "echo"


def test_all_fields() -> None:
    step = one(
        input={"prompt": "hi", "n": 3},
        input_mapping={"/messages/0/content": "{{ input.text }}", "lang": "de", "x": {"pointer": "/input/x", "default": None}},
        when="{{ input.go }}",
        for_each="{{ input.texts }}",
        max_items=7,
        retry={"max_attempts": 4, "backoff_s": 2, "factor": 3, "jitter": 0, "max_backoff_s": 10},
        on_failure="skip",
        timeout_s=30,
        cache="off",
        bid_price="0.25",
    )
    assert [str(pointer) for pointer, _ in step.mapping] == ["/messages/0/content", "/lang", "/x"]
    assert step.retry == Retry(4, 2.0, 3.0, 0.0, 10.0)
    assert (step.max_items, step.timeout_s, step.cache, step.bid_micros) == (7, 30.0, CacheMode.OFF, 250_000)
    assert step.fans_out and step.has_plan and not step.asks_each


def test_needs_come_from_all_places_in_the_order_of_the_definition() -> None:
    definition = parse_definition(
        {
            "steps": [
                {"key": key, "cargo": "echo"} for key in "abcdefg"
            ]
            + [
                {
                    "key": "z",
                    "cargo": "echo",
                    "depends_on": ["g"],
                    "input": {"messages": [{"role": "user", "content": "say {{ f.output.text }}"}]},
                    "input_mapping": {"x": {"pointer": "/e/output/text"}, "y": ["{{ d.output.text | upper }}"]},
                    "when": "{{ c.state == 'succeeded' and input.go }}",
                    "for_each": {"pointer": "/b/outputs"},
                }
            ],
            "output": "{{ z.outputs }}",
        }
    )
    assert definition.by_key["z"].needs == ("b", "c", "d", "e", "f", "g")
    assert definition.dependants["b"] == ("z",) and definition.leaves == ("a", "z")


def test_a_name_that_a_template_makes_itself_is_no_need() -> None:
    assert one(input={"x": "{% set b = 1 %}{% for c in input.l %}{{ b + c + loop.index }}{% endfor %}"}).needs == ()


def test_raw_braces_and_other_texts_are_constants() -> None:
    step = one(input={"x": "{% raw %}{{ b }}{% endraw %}", "y": "{ b }", "z": "{# no template #}"})
    assert step.needs == () and written(step.input)["y"] == "{ b }"


def test_when_with_item_is_asked_for_each() -> None:
    assert one(for_each=[1, 2], when="{{ item > 1 }}").asks_each
    assert not one(for_each=[1, 2], when="{{ input.go }}").asks_each
    assert one(when=False).has_plan


@pytest.mark.parametrize(
    ("said", "action", "attempts"),
    [
        ({}, OnFailure.FAIL, 1),
        ({"on_failure": "retry"}, OnFailure.RETRY, limits.FLOW_ATTEMPTS_DEFAULT),
        ({"on_failure": "skip"}, OnFailure.SKIP, 1),
        ({"on_failure": "abort", "retry": {}}, OnFailure.ABORT, limits.FLOW_ATTEMPTS_DEFAULT),
        ({"retry": {"max_attempts": 2}}, OnFailure.FAIL, 2),
        ({"on_failure": "retry", "retry": {"max_attempts": 1}}, OnFailure.RETRY, 1),
        ({"on_failure": {"action": "skip", "max_attempts": 5}}, OnFailure.SKIP, 5),
        ({"on_failure": {"action": "skip"}, "retry": {"max_attempts": 5}}, OnFailure.SKIP, 5),
        ({"on_failure": {"max_attempts": 5}}, OnFailure.FAIL, 5),
    ],
)
def test_failing(said: dict[str, Any], action: OnFailure, attempts: int) -> None:
    step = one(**said)
    assert (step.on_failure, step.retry.max_attempts) == (action, attempts)
    assert one(**{k: v for k, v in step.to_json().items() if k not in ("key", "cargo")}) == step


def test_pauses_grow_and_chance_shortens_them() -> None:
    retry = Retry(5, 1.0, 2.0, 0.5, 5.0)
    assert [retry.pause_s(n, 0.0) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 5.0]
    assert retry.pause_s(2, 0.5) == 1.5
    assert Retry(jitter=1.0).pause_s(1, 0.75) == 0.25


def test_canonical_form_reads_as_the_same() -> None:
    body = {
        "steps": [
            {"workload": "echo", "key": "a", "input": {"b": [1, "{{ input.x }}"], "a": None}, "on_failure": "retry", "cache": "use"},
            {"key": "b", "cargo": "echo", "for_each": "/a/outputs", "input_mapping": {"/x": "{{ item }}"}, "bid_price": 1},
        ],
        "output": {"text": "{{ b.outputs | join }}", "p": {"pointer": "/a/output/n", "default": {"k": []}}},
    }
    definition = parse_definition(body)
    again = parse_definition(json.loads(json.dumps(definition.to_json())))
    assert again == definition and again.to_json() == definition.to_json() and again.address() == definition.address()
    assert definition.to_json()["steps"][0] == {
        "key": "a",
        "cargo": "echo",
        "input": {"b": [1, "{{ input.x }}"], "a": None},
        "on_failure": "retry",
    }


def test_the_address_is_of_what_is_meant_and_not_of_how_it_is_written() -> None:
    plain = parse_definition({"steps": [{"key": "a", "cargo": "echo"}]})
    wordy = {"fail_mode": "fail_fast", "steps": [{"cargo": "echo", "cache": "use", "key": "a", "input": {}, "depends_on": []}]}
    assert parse_definition(wordy).address() == plain.address()
    assert parse_definition(wordy | {"fail_mode": "best_effort"}).address() != plain.address()
    assert len(plain.address()) == 64


def test_what_a_rerun_does_again() -> None:
    definition = chain("a", "b a", "c a", "d b c", "e")
    assert definition.affected("b") == {"b", "d"}
    assert definition.affected("a") == {"a", "b", "c", "d"}
    assert definition.affected("e") == {"e"}


def test_two_hundred_steps_in_a_row() -> None:
    lines = ["s0", *(f"s{n} s{n - 1}" for n in range(1, limits.FLOW_STEPS_MAX))]
    assert len(chain(*lines).affected("s0")) == limits.FLOW_STEPS_MAX
