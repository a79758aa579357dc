"""specs/batches.md and the code say the same: fields, events, states, the scheduler's own figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from coordinator import matching
from coordinator.batches import progress, shown, stragglers
from coordinator.batches.board import BatchView, Change
from coordinator.batches.progress import BatchProgress, Item, ItemState
from coordinator.batches.spec import BatchSpec, FailMode, Merge, unpack
from coordinator.books.runs import Run, RunKind, RunState

SPECS = Path(__file__).parents[2] / "specs"
PAGE, API = (SPECS / "batches.md").read_text(), (SPECS / "http-api.md").read_text()
_OWN = re.compile(r"^\| `(stragglers|matching)\.([A-Z_]+)` \| ([\d.,]+) \|", re.MULTILINE)


def view(state: RunState = RunState.RUNNING) -> BatchView:
    run = Run("batch_1", "ann", RunKind.BATCH, "echo", state, "c", 1, 1, total=1, error_code="timeout", error_message="late")
    return BatchView(run, BatchProgress("batch_1", 1), Merge.CONCAT, FailMode.BEST_EFFORT)


def test_the_schedulers_figures() -> None:
    found = _OWN.findall(PAGE)
    assert len(found) == 4
    for module, name, value in found:
        assert float(value) == getattr({"stragglers": stragglers, "matching": matching}[module], name)


def test_fields() -> None:
    child = re.search(r"^A child: `\{(.*?)\}`", PAGE, re.MULTILINE)
    assert child is not None and child[1].split(", ") == list(shown.child_json(0, Item()))
    status = re.search(r"batch-status` \| read \| \| `\{(.*?)\}`", API)
    assert status is not None and status[1].split(", ") == list(shown.status_json(view()))


def test_states_modes_and_codes() -> None:
    states = ", ".join(f"`{state}`" for state in ItemState)
    assert states.replace("`running`, `succeeded`", "`running`, then `succeeded`").replace(", `cancelled`", " or `cancelled`") in PAGE
    for mode in (*FailMode, *Merge, *(code for code in progress.AGAIN)):
        assert f"`{mode}`" in PAGE, mode


def test_events() -> None:
    named = {name: fields for name, fields in re.findall(r"^\| `(state|child|progress|complete|error)` \| (.*?) \|", PAGE, re.MULTILINE)}
    told = [
        shown.sse(Change(view(), [(0, Item())]), True),
        shown.sse(Change(view(), [(0, Item())]), False),
        shown.sse(Change(view(RunState.SUCCEEDED), []), False),
        shown.sse(Change(view(RunState.FAILED), []), False),
    ]
    names = [name for data in told for name in re.findall(r"event: (\w+)", data.decode())]
    assert names == ["state", "child", "child", "progress", "complete", "error"] and set(names) == set(named)
    for name, fields in named.items():
        data = next(line for line in b"".join(told).decode().split("\n\n") if line.startswith(f"event: {name}\n"))
        for field in re.findall(r"`(\w+)", fields):
            assert f'"{field}":' in data, (name, field)


def test_a_kept_specification_is_read_as_it_was() -> None:
    given = ({"prompt": "half a pair \ud800", "n": 1e300}, {"messages": [{"role": "user", "content": "\0"}]})
    whole = BatchSpec("echo", given, Merge.FLATTEN, FailMode.FAIL_FAST, 7, (5, 6), '"eu"', 9)
    assert unpack(whole.pack()) == whole and whole.policy is not None and whole.policy.name == "eu"
    plain = BatchSpec("echo", ({},))
    assert unpack(plain.pack()) == plain and plain.policy is None


def test_merging() -> None:
    texts: list[dict[str, Any]] = [{"text": "a"}, {"text": "b"}]
    lists: list[dict[str, Any]] = [{"text": "", "result": {"x": [1, 2]}}, {"text": "", "result": {"x": [[3]]}}]
    mixed: list[dict[str, Any]] = [
        {"text": "a"},
        {"text": "t", "result": {"x": 1, "y": 2}},
        {"text": "t", "result": {}},
        {"text": "", "result": {"x": 1}, "images": [{"data": "p"}]},
    ]
    assert shown.merged(texts, Merge.CONCAT) == "a\nb" and shown.merged(texts, Merge.FLATTEN) == ["a", "b"]
    assert shown.merged(lists, Merge.CONCAT) == [[1, 2], [[3]]] and shown.merged(lists, Merge.FLATTEN) == [1, 2, [3]]
    assert shown.merged(mixed, Merge.CONCAT) == ["a", {"x": 1, "y": 2}, "t", [{"data": "p"}]]
    assert shown.merged(mixed, Merge.FLATTEN) == ["a", {"x": 1, "y": 2}, "t", {"data": "p"}]
    assert shown.merged([], Merge.CONCAT) == "" and shown.merged([], Merge.FLATTEN) == []
