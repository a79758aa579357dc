"""Templates that are good: what they give, here and in the worker, and what is sent to it."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import trio

from coordinator.workflows import template_worker
from coordinator.workflows.conditions import is_true
from coordinator.workflows.definition import parse_definition
from coordinator.workflows.errors import FlowError
from coordinator.workflows.inputs import Plan, input_of, output_of, plan_of
from coordinator.workflows.template_worker import Bounds
from coordinator.workflows.templates import Template, Templates, compile_check, parse_template
from protocol import limits

VARIABLES: dict[str, Any] = {
    "a": {
        "state": "succeeded",
        "output": {"text": "héllo", "n": 3, "items": [1, 2], "f": 1.5, "yes": True, "none": None, "o": {"k": "v"}},
        "outputs": [],
        "error": None,
    },
    "input": {"rows": [{"id": 1, "ok": True}, {"id": 2, "ok": False}, {"id": 3, "ok": True}], "csv": "a,b\nc", "quote": '"é"'},
    "item": "x",
    "index": 4,
}

HERE: list[tuple[str, Any]] = [
    ("{{ a.output.text }}", "héllo"),
    ("{{a.output['text']}}", "héllo"),
    ("{{ a.output.n }}", 3),
    ("{{ a.output }}", VARIABLES["a"]["output"]),
    ("{{ a.output.items }}", [1, 2]),
    ("{{ a.output.items[1] }}", 2),
    ("{{ a.output.none }}", None),
    ("{{ input.rows[0] }}", {"id": 1, "ok": True}),
    ("{{ index }}", 4),
    (" {{ a.output.n }}", " 3"),
    ("{{ a.output.n }}\n", "3\n"),
    ("n={{ a.output.n }} f={{ a.output.f }} {{ a.output.yes }} {{ a.output.none }}", "n=3 f=1.5 true null"),
    ("{{ a.output.o }}{{ input.rows }}", '{"k":"v"}[{"id":1,"ok":true},{"id":2,"ok":false},{"id":3,"ok":true}]'),
    ("{% raw %}{{ a }}{% endraw %}", "{{ a }}"),
    ("{{ '{{' }} {{ item }}", "{{ x"),
    ("{# a note #}{{ item }}", "x"),
    ("{{ 'text' }}", "text"),
]
IN_THE_WORKER: list[tuple[str, Any]] = [
    ("{{ a.output.text | upper }}", "HÉLLO"),
    ("{{ a.output.n + 1 }}", 4),
    ("{{ a.output.items + [3] }}", [1, 2, 3]),
    ("{{ a.output.items | first }}", 1),
    ("{{ a.output.text ~ a.output.yes ~ none ~ a.output.o }}", 'héllotruenull{"k":"v"}'),
    ("{{ input.rows | selectattr('ok') | map(attribute='id') | list }}", [1, 3]),
    ("{{ input.rows | map(attribute='id') }}", [1, 2, 3]),
    ("{{ input.rows | sum(attribute='id') }}", 6),
    ("{% for row in input.rows if row.ok %}{{ loop.index }}:{{ row.id }}{{ '' if loop.last else ',' }}{% endfor %}", "1:1,2:3"),
    ("{% for k, v in a.output.o.items() %}{{ k }}={{ v }}{% endfor %}", "k=v"),
    ("{% set x = a.output.n * 2 %}{{ x }}", "6"),
    ("{{ input.csv | lines }}", ["a,b", "c"]),
    ("{{ input.csv.split(',') }}", ["a", "b\nc"]),
    ("{{ a.output.o | tojson }}", '{"k":"v"}'),
    ("{{ '[1, {}]' | fromjson }}", [1, {}]),
    ("{{ input.quote | tojson }}", '"\\"é\\""'),
    ("{{ input.nothing | default('d') }}", "d"),
    ("{{ a.output.none.text | default('d') }}", "d"),
    ("{{ input.nothing is defined }}", False),
    ("{{ 'yes' if a.state == 'succeeded' else 'no' }}", "yes"),
    ("{{ range(3) }}", [0, 1, 2]),
    ("{{ input.rows | groupby('ok') | map(attribute='grouper') }}", [False, True]),
    ("{{ {'a': [1, (2, 3)]} }}", {"a": [1, [2, 3]]}),
    ("{{ true }}", True),
    ("{{ '<&>' | e }}", "&lt;&amp;&gt;"),
    ("{{ 'one two three' | wordwrap(5) }}", "one\ntwo\nthree"),
    ("{{ ['b', 'a'] | sort | join('-') }}", "a-b"),
    ("{{ a.output.items[-1] }}", 2),
    ("{{ a.output.text[:2] }}", "hé"),
    ("{% filter upper %}x{{ item }}{% endfilter %}", "XX"),
]


@pytest.mark.parametrize(("template", "value"), HERE)
async def test_what_only_names_things_is_looked_up_here(template: str, value: Any) -> None:
    assert parse_template(template).parts is not None
    templates = Templates()
    assert await templates.render(template, VARIABLES) == value
    assert templates.started == 0


async def test_all_else_is_computed_in_the_worker() -> None:
    async with Templates(at_once=1) as templates:
        for template, value in IN_THE_WORKER:
            assert parse_template(template).parts is None, template
            got = await templates.render(template, VARIABLES)
            assert got == value and type(got) is type(value), template
        assert templates.started == 1


async def test_both_ways_give_the_same() -> None:
    """What is looked up here gives in the worker, which is made to compute it, what it gives here."""
    async with Templates(at_once=1) as templates:
        for template, value in HERE:
            plain = parse_template(template)
            forced = Template(plain.source, plain.names, None, plain.is_value, {name: {} for name in plain.names})
            got = await templates.render(forced, VARIABLES)
            assert got == value and type(got) is type(value), template


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("no template", ""),
        ("{{ a.output.text }}", "a"),
        ("{{ a }}{{ b.c[d.e] }}", "a b d"),
        ("{% for x in rows %}{{ x.y }}{{ z }}{% endfor %}{{ x }}", "rows z x"),
        ("{% set q = a %}{{ q }}", "a"),
        ("{{ range(n) | join(s) }}", "n s"),
        ("{% with w = a %}{{ w }}{% endwith %}{{ w }}", "a w"),
        ("{% if a %}{{ b }}{% else %}{{ c }}{% endif %}", "a b c"),
    ],
)
def test_names(template: str, names: str) -> None:
    assert compile_check(template) == frozenset(names.split())


@pytest.mark.parametrize(
    ("template", "picked"),
    [
        ("{{ a.output.text | upper }}", {"a": {"output": {"text": "héllo"}}}),
        ("{{ a.output.text ~ a.output.n }}", {"a": {"output": {"text": "héllo", "n": 3}}}),
        ("{{ a.output.o.k | upper }}{{ a.output.o }}", {"a": {"output": {"o": {"k": "v"}}}}),
        ("{{ a.output.o }}{{ a.output.o.k | upper }}", {"a": {"output": {"o": {"k": "v"}}}}),
        ("{{ a.output }}{{ a.output.n + 1 }}", {"a": {"output": VARIABLES["a"]["output"]}}),
        ("{{ a.output.n + 1 }}{{ a.output }}", {"a": {"output": VARIABLES["a"]["output"]}}),
        ("{{ a.output.o.items() | list }}", {"a": {"output": {"o": {"k": "v"}}}}),
        ("{{ a.output.nope | default(1) }}", {"a": {"output": {}}}),
        ("{{ a.output.none.x | default(1) }}", {"a": {"output": {"none": None}}}),
        ("{{ input.rows[0].id + 1 }}", {"input": {"rows": VARIABLES["input"]["rows"]}}),
        ("{{ input['csv'] | upper }}", {"input": {"csv": "a,b\nc"}}),
        ("{% set b = a.output %}{{ b.n }}", {"a": {"output": VARIABLES["a"]["output"]}}),
        ("{{ a['out' ~ 'put'].n + 1 }}", {"a": VARIABLES["a"]}),
        ("{{ missing | default(1) }}", {}),
    ],
)
def test_a_worker_is_sent_only_what_a_template_looks_at(template: str, picked: dict[str, Any]) -> None:
    assert parse_template(template).picked(VARIABLES) == picked


def test_conditions() -> None:
    false: list[Any] = [None, False, 0, 0.0, "", "  ", "false", "False\n", "0", [], {}]
    true: list[Any] = [True, 1, -0.5, "no", "null", "00", "x", [0], {"a": None}]
    assert not any(map(is_true, false)) and all(map(is_true, true))


def step_of(**fields: Any) -> Any:
    return parse_definition({"steps": [{"key": "a", "cargo": "echo"}, {"key": "b", "cargo": "echo", **fields}]}).steps[1]


async def test_the_input_of_a_task() -> None:
    step = step_of(
        input={"messages": [{"role": "user", "content": "?"}], "n": "{{ a.output.n }}", "keep": 1},
        input_mapping={
            "/messages/0/content": "Say {{ a.output.text }}",
            "/messages/-": {"role": "user", "content": "{{ a.output.o.k }}"},
            "p": {"pointer": "/a/output/items/1"},
            "d": {"pointer": "/a/output/nope", "default": [1]},
            "/new/deep": "{{ a.output.o }}",
        },
    )
    given = await input_of(step, VARIABLES, Templates())
    assert given == {
        "messages": [{"role": "user", "content": "Say héllo"}, {"role": "user", "content": "v"}],
        "n": 3,
        "keep": 1,
        "p": 2,
        "d": [1],
        "new": {"deep": {"k": "v"}},
    }
    assert step.to_json()["input"]["messages"] == [{"role": "user", "content": "?"}]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"input": {"x": ["{{ a.output.nope }}"]}}, "input.x[0]"),
        ({"input_mapping": {"x": {"pointer": "/a/output/nope"}}}, "input_mapping.x.pointer"),
        ({"input_mapping": {"/x/y": 1}, "input": {"x": 1}}, "input_mapping./x/y"),
        ({"input_mapping": {"/x/3": 1}, "input": {"x": []}}, "input_mapping./x/3"),
        ({"input_mapping": {"x": "t{{ a.output.nope }}"}}, "input_mapping.x"),
    ],
)
async def test_a_task_that_cannot_have_its_input_says_where(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(FlowError) as caught:
        await input_of(step_of(**fields), VARIABLES, Templates())
    assert caught.value.where == where


async def test_plans() -> None:
    renders = Templates()
    here = {name: VARIABLES[name] for name in ("a", "input")}  # there is no item yet
    cases: list[tuple[dict[str, Any], Plan]] = [
        ({"when": "{{ a.output.none }}"}, Plan(False)),
        ({"when": "{{ a.output.n }}"}, Plan(True)),
        ({"when": False, "for_each": [1]}, Plan(False)),
        ({"for_each": "{{ a.output.items }}"}, Plan(True, [1, 2])),
        ({"for_each": "/input/rows"}, Plan(True, VARIABLES["input"]["rows"])),
        ({"for_each": ["{{ a.output.n }}", "y"]}, Plan(True, [3, "y"])),
        ({"for_each": [1], "when": "{{ item }}"}, Plan(True, [1])),
    ]
    for fields, plan in cases:
        assert await plan_of(step_of(**fields), here, renders) == plan
    for value in ("{{ a.output.text }}", "{{ a.output.o }}", {"pointer": "/a/output/none"}):
        with pytest.raises(FlowError, match="not a list"):
            await plan_of(step_of(for_each=value), VARIABLES, renders)


async def test_an_items_own_condition() -> None:
    step = step_of(for_each=[0, 1], when="{{ item }}", input={"x": "{{ item }}"})
    assert await input_of(step, VARIABLES | {"item": 0}, Templates()) is None
    assert await input_of(step, VARIABLES | {"item": 7}, Templates()) == {"x": 7}


async def test_the_output_of_a_run() -> None:
    output = {"t": "{{ a.output.text }}!", "p": {"pointer": "/a/output/n"}, "l": ["{{ run.id }}"]}
    definition = parse_definition({"steps": [{"key": "a", "cargo": "echo"}], "output": output})
    variables = VARIABLES | {"run": {"id": "r"}}
    assert await output_of(definition, variables, Templates()) == {"t": "héllo!", "p": 3, "l": ["r"]}


async def test_several_at_once_have_workers_of_their_own() -> None:
    async with Templates(at_once=2) as templates:
        got = []

        async def one(n: int) -> None:
            got.append(await templates.render("{{ n + 1 }}", {"n": n}))

        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(one, n)
        assert sorted(got) == list(range(1, 21)) and templates.started <= 2


async def test_more_than_may_wait_are_refused_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FLOW_RENDERS_WAITING_MAX", 2)
    refused = []
    async with Templates(at_once=1) as templates:

        async def one() -> None:
            try:
                await templates.render("{{ 1 + 1 }}", {})
            except FlowError as error:
                refused.append(error.is_transient)

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(one)
    assert refused == [True] * 3


async def test_a_rendering_that_nobody_wants_any_more_takes_its_worker_with_it() -> None:
    async with Templates(at_once=1, bounds=Bounds(1000, 10_000, 2**28, 30.0)) as templates:
        await templates.render("{{ 1 + 1 }}", {})
        worker = templates._idle[0]
        with trio.move_on_after(0.05):
            await templates.render("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", {})
        assert not worker.is_alive
        assert await templates.render("{{ 1 + 2 }}", {}) == 3


async def test_a_worker_that_somebody_ended_is_replaced() -> None:
    async with Templates(at_once=1) as templates:
        assert await templates.render("{{ 1 + 1 }}", {}) == 2
        os.kill(templates._idle[0]._process.pid, signal.SIGKILL)
        assert await templates.render("{{ 1 + 2 }}", {}) == 3
        assert templates.started == 2


async def test_workers_end_with_the_templates() -> None:
    async with Templates(at_once=1) as templates:
        await templates.render("{{ 1 + 1 }}", {})
        worker = templates._idle[0]
    assert not worker.is_alive


async def test_a_worker_that_cannot_start_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "__file__", "/nonexistent")
    async with Templates() as templates:
        with pytest.raises(FlowError, match="does not start") as caught:
            await templates.render("{{ 1 + 1 }}", {})
        assert caught.value.is_transient
