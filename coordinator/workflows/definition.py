"""Definitions of workflows: what a run does, checked before anything is paid for.

    {"steps": [{"key", "cargo", "input"?, "depends_on"?, "input_mapping"?, "when"?, "for_each"?, "max_items"?, "retry"?, "on_failure"?,
                "timeout_s"?, "cache"?, "bid_price"?}], "fail_mode"?, "output"?}

``workload`` means the same as ``cargo``. A step *needs* the steps in its ``depends_on`` and all that its templates and pointers name; needs
that go in a circle, and names that are neither a step nor a variable, are refused here.

Variables. Of each step that is needed, by its key: ``{state, output, outputs, error}``; ``output`` is what its job gave (``{text, result,
images, usage, …}``), null where there is none and where the step fans out; ``outputs`` is the list of all items' (of a step without
``for_each``: of one); ``error`` is null or ``{code, message}``. Then ``input``, the run's; ``run`` with ``id`` and ``name``; in steps with
``for_each`` also ``item`` and ``index``, but not in ``for_each`` itself.

When a step runs. Once all that it needs has ended, each *succeeded* or *skipped*. A step is skipped where its ``when`` is false
(conditions.py), and where it failed and ``on_failure`` is ``skip``; its output is null then, and those that need it run all the same. A
step that needs one that *failed* or is *blocked* is itself blocked and never runs.

What failure does. A failure that the runner calls retryable is tried again, up to ``max_attempts`` times in all, which is 1 where the step
says nothing of retrying, FLOW_ATTEMPTS_DEFAULT with ``on_failure: "retry"``, and otherwise what ``retry`` says. After the last attempt:

- ``skip``: the step counts as skipped; an item of a fan-out gives null and its step goes on;
- ``abort``: the run fails at once, whatever its fail mode;
- ``retry``, or no ``on_failure``: with ``fail_fast`` the run fails at once; with ``best_effort`` the step has failed (of a fan-out when all
  its items have ended), what needs it is blocked, and the others go on.

"At once" means that nothing more begins and what runs is cancelled; steps that had not ended are *cancelled*. A run succeeds where no step
failed (a step that is blocked needs one that did). A run that did not succeed is *partial* where at least one step succeeded.

``input_mapping`` puts values into a copy of ``input``: keys that begin with ``/`` are JSON pointers into it (``/messages/0/content``),
others the names of its fields. ``output`` is what the run gives, evaluated at its end with all steps as variables; without it the run
gives the output of each step that nobody needs, by its key (``outputs`` of those that fan out).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, TypeVar

from coordinator.workflows.errors import FlowError
from coordinator.workflows.pointers import Pointer, parse_pointer
from coordinator.workflows.templates import RESERVED, Template
from coordinator.workflows.values import Constant, Object, Reference, Value, names_in, parse_value, written
from protocol import checks, limits
from protocol.prices import format_credits, parse_price

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
_SHOWN_CHARS = 40
_CYCLE_SHOWN_MAX = 12
VARIABLES = frozenset({"input", "run", "item", "index"})
_ITEM_VARIABLES = frozenset({"item", "index"})
_RETRY_FIELDS = ("max_attempts", "backoff_s", "factor", "jitter", "max_backoff_s")
_STEP_FIELDS = (
    *("key", "cargo", "workload", "input", "depends_on", "input_mapping", "when", "for_each", "max_items", "retry"),
    *("on_failure", "timeout_s", "cache", "bid_price"),
)
_DEFINITION_FIELDS = ("steps", "fail_mode", "output")

Word = TypeVar("Word", bound=StrEnum)


class FailMode(StrEnum):
    """What the failure of a step means for the run."""

    FAIL_FAST = "fail_fast"
    BEST_EFFORT = "best_effort"


class OnFailure(StrEnum):
    """What comes after the last attempt of a step. FAIL, which is not written: as the run's fail mode says."""

    FAIL = "fail"
    RETRY = "retry"
    SKIP = "skip"
    ABORT = "abort"


class CacheMode(StrEnum):
    """Whether a step may be answered from the cache (USE), only writes to it (REFRESH), or leaves it alone (OFF)."""

    USE = "use"
    REFRESH = "refresh"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Retry:
    """``jitter``: the share of a pause that is left to chance. Attempt n + 1 begins ``backoff_s * factor ** (n - 1)`` seconds after
    attempt n has failed, at most ``max_backoff_s``, less up to ``jitter`` of it."""

    max_attempts: int = 1
    backoff_s: float = 1.0
    factor: float = 2.0
    jitter: float = 0.5
    max_backoff_s: float = 60.0

    def pause_s(self, failures: int, chance: float) -> float:
        """Seconds before the next attempt, after so many failures; ``chance`` is in [0, 1)."""
        longest = min(self.backoff_s * self.factor ** (failures - 1), self.max_backoff_s)
        return longest * (1.0 - self.jitter * chance)


@dataclass(frozen=True, slots=True)
class Step:
    """One step. ``needs``: keys of the steps it needs, in the order of the definition; ``mapping``: where in its input which value comes;
    ``timeout_s``: of one attempt, None: as jobs have it; ``bid_micros``: of one job, None: the run's or the market's."""

    key: str
    cargo: str
    input: Constant | Object
    mapping: tuple[tuple[Pointer, Value], ...] = ()
    depends_on: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    when: Value | None = None
    for_each: Value | None = None
    max_items: int = limits.FLOW_ITEMS_DEFAULT
    retry: Retry = field(default_factory=Retry)
    on_failure: OnFailure = OnFailure.FAIL
    timeout_s: float | None = None
    cache: CacheMode = CacheMode.USE
    bid_micros: int | None = None

    @property
    def fans_out(self) -> bool:
        return self.for_each is not None

    @property
    def asks_each(self) -> bool:
        """Whether ``when`` is asked for each item: it names item or index. Else it is asked once, before ``for_each`` is evaluated."""
        return self.when is not None and any(names & _ITEM_VARIABLES for _, names in names_in(self.when, ""))

    @property
    def has_plan(self) -> bool:
        """Whether something has to be evaluated before its jobs are known."""
        return self.fans_out or self.when is not None

    @property
    def tasks_max(self) -> int:
        return self.max_items if self.fans_out else 1

    def to_json(self) -> dict[str, Any]:
        """Its canonical form: what is as it would be anyway is left out."""
        plain = Step(self.key, self.cargo, self.input, retry=Retry(_attempts_usual(self.on_failure)))
        optional: dict[str, tuple[bool, Any]] = {
            "input": (written(self.input) != {}, written(self.input)),
            "depends_on": (bool(self.depends_on), list(self.depends_on)),
            "input_mapping": (bool(self.mapping), {str(pointer): written(value) for pointer, value in self.mapping}),
            "when": (self.when is not None, self.when and written(self.when)),
            "for_each": (self.fans_out, self.for_each and written(self.for_each)),
            "max_items": (self.max_items != plain.max_items, self.max_items),
            "retry": (self.retry != plain.retry, {name: getattr(self.retry, name) for name in _RETRY_FIELDS}),
            "on_failure": (self.on_failure is not OnFailure.FAIL, str(self.on_failure)),
            "timeout_s": (self.timeout_s is not None, self.timeout_s),
            "cache": (self.cache is not CacheMode.USE, str(self.cache)),
            "bid_price": (self.bid_micros is not None, format_credits(self.bid_micros or 0)),
        }
        return {"key": self.key, "cargo": self.cargo} | {name: value for name, (is_said, value) in optional.items() if is_said}


@dataclass(frozen=True, slots=True)
class Definition:
    """A workflow that can run. Made by ``parse_definition``."""

    steps: tuple[Step, ...]
    fail_mode: FailMode = FailMode.FAIL_FAST
    output: Value | None = None
    by_key: Mapping[str, Step] = field(init=False, repr=False, compare=False)
    dependants: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_key", {step.key: step for step in self.steps})
        dependants: dict[str, list[str]] = {step.key: [] for step in self.steps}
        for step in self.steps:
            for need in step.needs:
                dependants[need].append(step.key)
        object.__setattr__(self, "dependants", {key: tuple(those) for key, those in dependants.items()})

    @property
    def leaves(self) -> tuple[str, ...]:
        """Keys of the steps that no other needs."""
        return tuple(step.key for step in self.steps if not self.dependants[step.key])

    def affected(self, key: str) -> frozenset[str]:
        """The step and all that need it, directly or not: what a re-run from it does again. Raises KeyError."""
        found, waiting = {key}, deque([key])
        while waiting:
            for dependant in self.dependants[waiting.popleft()]:
                if dependant not in found:
                    found.add(dependant)
                    waiting.append(dependant)
        return frozenset(found)

    def to_json(self) -> dict[str, Any]:
        """Its canonical form, which ``parse_definition`` reads as the same definition."""
        output = {} if self.output is None else {"output": written(self.output)}
        return {"steps": [step.to_json() for step in self.steps], "fail_mode": str(self.fail_mode), **output}

    def address(self) -> str:
        """SHA-256 in hex of the canonical form as compact JSON with sorted names."""
        return hashlib.sha256(_compact(self.to_json())).hexdigest()


def parse_definition(value: object) -> Definition:
    """Of plain JSON. Large ones take some 100 ms: do that in a thread. Raises FlowError."""
    body = _object(value, "definition", _DEFINITION_FIELDS)
    _check_size(body)
    listed = body.get("steps")
    if not isinstance(listed, list) or not 1 <= len(listed) <= limits.FLOW_STEPS_MAX:
        raise FlowError("steps", f"must be a list of 1 to {limits.FLOW_STEPS_MAX} steps")
    keys = _keys(listed)
    steps = tuple(_parse_step(entry, f"steps[{index}]", keys) for index, entry in enumerate(listed))
    tasks = sum(step.tasks_max for step in steps)
    if tasks > limits.FLOW_TASKS_MAX:
        raise FlowError("steps", f"may run {tasks} jobs with their max_items; at most {limits.FLOW_TASKS_MAX} are allowed")
    _refuse_cycle({step.key: step.needs for step in steps})
    fail_mode = _choice(body, "", "fail_mode", FailMode, FailMode.FAIL_FAST)
    output = None if body.get("output") is None else parse_value(body["output"], "output", pointers=True)
    if output is not None:
        _check_names(output, "output", keys, has_items=False)
    return Definition(steps, fail_mode, output)


def _compact(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _check_size(body: Mapping[str, Any]) -> None:
    try:
        size = len(json.dumps(body, separators=(",", ":"), ensure_ascii=False))
    except (TypeError, ValueError):
        raise FlowError("definition", "is no JSON") from None
    except RecursionError:
        raise FlowError("definition", f"is nested deeper than {limits.FLOW_DEPTH_MAX}") from None
    if size > limits.FLOW_DEFINITION_BYTES_MAX:
        raise FlowError("definition", f"has {size} characters; at most {limits.FLOW_DEFINITION_BYTES_MAX} are allowed")


def _keys(listed: list[Any]) -> dict[str, int]:
    """Keys of all steps with their places. Raises FlowError for one that cannot be a name in templates, or is there twice."""
    places: dict[str, int] = {}
    for index, entry in enumerate(listed):
        where = f"steps[{index}]"
        key = _object(entry, where, _STEP_FIELDS).get("key")
        where += ".key"
        if not isinstance(key, str) or len(key) > limits.FLOW_KEY_CHARS_MAX or not _KEY.match(key):
            text = f"must be a name of at most {limits.FLOW_KEY_CHARS_MAX} letters, digits and _, with a letter first"
            raise FlowError(where, text)
        if key in VARIABLES or key in RESERVED:
            raise FlowError(where, f"{key!r} has a meaning of its own in templates; use another name")
        if key in places:
            raise FlowError(where, f"{key!r} is the key of steps[{places[key]}] already")
        places[key] = index
    return places


def _parse_step(entry: Mapping[str, Any], where: str, keys: Mapping[str, int]) -> Step:
    given = parse_value(_optional(entry.get("input"), {}), f"{where}.input", pointers=False)
    if not isinstance(given, Object) and not (isinstance(given, Constant) and isinstance(given.value, dict)):
        raise FlowError(f"{where}.input", "must be an object: messages or prompt, or what the Cargo takes")
    on_failure, retry = _parse_failing(entry, where)
    step = Step(
        key=entry["key"],
        cargo=_parse_cargo(entry, where),
        input=given,
        mapping=_parse_mapping(entry.get("input_mapping"), f"{where}.input_mapping"),
        depends_on=_parse_depends(entry, where, keys),
        when=_parse_when(entry.get("when"), f"{where}.when"),
        for_each=_parse_for_each(entry.get("for_each"), f"{where}.for_each"),
        max_items=_integer(entry, where, "max_items", 1, limits.FLOW_ITEMS_MAX, limits.FLOW_ITEMS_DEFAULT),
        retry=retry,
        on_failure=on_failure,
        timeout_s=_number(entry, where, "timeout_s", 0.001, limits.FLOW_TIMEOUT_S_MAX, None),
        cache=_choice(entry, where, "cache", CacheMode, CacheMode.USE),
        bid_micros=_parse_bid(entry.get("bid_price"), f"{where}.bid_price"),
    )
    if entry.get("max_items") is not None and not step.fans_out:
        raise FlowError(f"{where}.max_items", "is for steps with for_each")
    return _with_needs(step, where, keys)


def _with_needs(step: Step, where: str, keys: Mapping[str, int]) -> Step:
    needs = set(step.depends_on)
    for value, place, has_items in _values_of(step, where):
        needs |= _check_names(value, place, keys, has_items)
    if step.key in needs:
        raise FlowError(where, f"the step {step.key!r} depends on itself")
    ordered = tuple(sorted(needs, key=keys.__getitem__))
    made = {name: getattr(step, name) for name in Step.__dataclass_fields__}
    return Step(**made | {"needs": ordered})


def _values_of(step: Step, where: str) -> Iterator[tuple[Value, str, bool]]:
    """With where they stand, and whether item and index have a meaning there."""
    yield step.input, f"{where}.input", step.fans_out
    for pointer, value in step.mapping:
        yield value, f"{where}.input_mapping.{_mapping_key(pointer)}", step.fans_out
    if step.when is not None:
        yield step.when, f"{where}.when", step.fans_out
    if step.for_each is not None:
        yield step.for_each, f"{where}.for_each", False


def _check_names(value: Value, where: str, keys: Mapping[str, int], has_items: bool) -> set[str]:
    """The steps that a value names. Raises FlowError for any other name that is no variable."""
    found: set[str] = set()
    for place, names in names_in(value, where):
        for name in sorted(names):
            if name in keys:
                found.add(name)
            elif name in _ITEM_VARIABLES and not has_items:
                raise FlowError(place, f"names {name!r}, which is there only in steps with for_each, and not in for_each itself")
            elif name not in VARIABLES:
                text = f"names {_shown(name)}, which is no step and no variable (input, item, index, run)"
                raise FlowError(place, text + _nearest(name, [*keys, *VARIABLES]))
    return found


def _parse_cargo(entry: Mapping[str, Any], where: str) -> str:
    cargo = entry.get("cargo")
    cargo = entry.get("workload") if cargo is None else cargo
    if not isinstance(cargo, str) or not cargo:
        raise FlowError(f"{where}.cargo", "is missing: the name of what the step runs")
    try:
        checks.label("cargo", cargo, limits.NAME_CHARS_MAX)
    except ValueError:
        raise FlowError(f"{where}.cargo", "is no name of a Cargo") from None
    return cargo


def _parse_depends(entry: Mapping[str, Any], where: str, keys: Mapping[str, int]) -> tuple[str, ...]:
    listed = _optional(entry.get("depends_on"), [])
    if not isinstance(listed, list):
        raise FlowError(f"{where}.depends_on", "must be a list of keys of steps")
    for index, key in enumerate(listed):
        place = f"{where}.depends_on[{index}]"
        if not isinstance(key, str) or key not in keys:
            raise FlowError(place, f"{_shown(key)} is no step{_nearest(key, keys)}")
        if key == entry["key"]:
            raise FlowError(place, f"the step {key!r} depends on itself")
        if key in listed[:index]:
            raise FlowError(place, f"names {key!r} twice")
    return tuple(listed)


def _parse_mapping(value: Any, where: str) -> tuple[tuple[Pointer, Value], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise FlowError(where, "must be an object: a template or a pointer for each field of the input")
    found: dict[Pointer, Value] = {}
    for name, part in value.items():
        if not isinstance(name, str) or not name:
            raise FlowError(where, "must name fields of the input")
        try:
            pointer = parse_pointer(name) if name.startswith("/") else Pointer((name,))
        except FlowError as error:
            raise error.at(f"{where}.{name[:_SHOWN_CHARS]}") from None
        if pointer in found:
            raise FlowError(f"{where}.{name[:_SHOWN_CHARS]}", "is mapped twice")
        found[pointer] = parse_value(part, f"{where}.{name}", pointers=True)
    return tuple(found.items())


def _parse_when(value: Any, where: str) -> Value | None:
    if value is None:
        return None
    parsed = Constant(value) if isinstance(value, bool) else parse_value(value, where, pointers=True)
    if not isinstance(parsed, Template | Reference) and not isinstance(value, bool):
        raise FlowError(where, 'must be a template such as "{{ translate.output.text }}", a pointer, true or false')
    return parsed


def _parse_for_each(value: Any, where: str) -> Value | None:
    if value is None:
        return None
    if isinstance(value, str) and value.startswith("/") and "{{" not in value:
        value = {"pointer": value}
    parsed = parse_value(value, where, pointers=True)
    is_list = isinstance(value, list)
    if not is_list and not isinstance(parsed, Template | Reference):
        raise FlowError(where, 'must be a list, a template that gives one ("{{ input.texts }}") or a pointer to one')
    return parsed


def _parse_failing(entry: Mapping[str, Any], where: str) -> tuple[OnFailure, Retry]:
    """``on_failure`` is a word, or an object of the word (``action``) and the fields of ``retry``."""
    said, place = entry.get("on_failure"), f"{where}.on_failure"
    retry = entry.get("retry")
    retry_place = f"{where}.retry"
    if isinstance(said, Mapping):
        fields = _object(said, place, ("action", *_RETRY_FIELDS))
        if len(fields) > 1 and retry is not None:
            raise FlowError(place, "says how to retry, and so does retry; use one of them")
        retry, retry_place = ({k: v for k, v in fields.items() if k != "action"} or retry), place
        said, place = fields.get("action"), f"{place}.action"
    action = _choice({"on_failure": said}, "", "on_failure", OnFailure, OnFailure.FAIL, place, hidden=OnFailure.FAIL)
    usual = _attempts_usual(action) if retry is None else limits.FLOW_ATTEMPTS_DEFAULT
    return action, _parse_retry(_optional(retry, {}), retry_place, usual)


def _attempts_usual(action: OnFailure) -> int:
    """Where nothing is said of retrying but the action."""
    return limits.FLOW_ATTEMPTS_DEFAULT if action is OnFailure.RETRY else 1


def _parse_retry(value: Any, where: str, attempts: int) -> Retry:
    body = _object(value, where, _RETRY_FIELDS)
    usual = Retry()
    longest = _number(body, where, "max_backoff_s", 0.0, limits.FLOW_BACKOFF_S_MAX, usual.max_backoff_s)
    first = _number(body, where, "backoff_s", 0.0, limits.FLOW_BACKOFF_S_MAX, usual.backoff_s)
    factor = _number(body, where, "factor", 1.0, limits.FLOW_BACKOFF_FACTOR_MAX, usual.factor)
    jitter = _number(body, where, "jitter", 0.0, 1.0, usual.jitter)
    assert first is not None and factor is not None and jitter is not None and longest is not None
    count = _integer(body, where, "max_attempts", 1, limits.FLOW_ATTEMPTS_MAX, attempts)
    return Retry(count, first, factor, jitter, longest)


def _parse_bid(value: Any, where: str) -> int | None:
    if value is None:
        return None
    try:
        return parse_price(value)
    except ValueError as error:
        raise FlowError(where, str(error)) from None


def _refuse_cycle(needs: Mapping[str, Iterable[str]]) -> None:
    """Raises FlowError that names one."""
    left = {key: set(those) for key, those in needs.items()}
    free = deque(key for key, those in left.items() if not those)
    dependants: dict[str, list[str]] = {key: [] for key in left}
    for key, those in left.items():
        for need in those:
            dependants[need].append(key)
    while free:
        key = free.popleft()
        del left[key]
        for dependant in dependants[key]:
            left[dependant].discard(key)
            if not left[dependant]:
                free.append(dependant)
    if left:
        cycle = _walk(left)
        shown = cycle if len(cycle) <= _CYCLE_SHOWN_MAX else [*cycle[: _CYCLE_SHOWN_MAX - 1], "…", cycle[-1]]
        raise FlowError("steps", f"depend on each other in a circle: {' -> '.join(shown)}")


def _walk(needs: Mapping[str, set[str]]) -> list[str]:
    """A cycle, its first again at the end; each step of ``needs`` needs another of them."""
    path: list[str] = []
    key = next(iter(needs))
    while key not in path:
        path.append(key)
        key = min(needs[key])
    return [*path[path.index(key) :], key]


def _object(value: object, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    """Raises FlowError for another kind of value, and for a field that is not known."""
    if not isinstance(value, Mapping):
        raise FlowError(where, "must be an object")
    for name in value:
        if name not in known:
            raise FlowError(where, f"has no field {_shown(name)}{_nearest(name, known)}")
    return value


def _choice(
    body: Mapping[str, Any], where: str, name: str, words: type[Word], usual: Word, place: str = "", hidden: Word | None = None
) -> Word:
    value = body.get(name)
    if value is None:
        return usual
    choices = [str(word) for word in words if word is not hidden]
    if isinstance(value, str) and value in choices:
        return words(value)
    text = f"must be one of {', '.join(choices)}{_nearest(value, choices)}"
    raise FlowError(place or _joined(where, name), text)


def _number(body: Mapping[str, Any], where: str, name: str, low: float, high: float, usual: float | None) -> float | None:
    value = body.get(name)
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise FlowError(_joined(where, name), f"must be a number from {low:g} to {high:g}")
    return float(value)


def _integer(body: Mapping[str, Any], where: str, name: str, low: int, high: int, usual: int) -> int:
    value = body.get(name)
    if value is None:
        return usual
    if type(value) is not int or not low <= value <= high:
        raise FlowError(_joined(where, name), f"must be a whole number from {low} to {high}")
    return value


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _mapping_key(pointer: Pointer) -> str:
    return pointer.tokens[0] if len(pointer.tokens) == 1 else str(pointer)


def _optional(value: Any, usual: Any) -> Any:
    return usual if value is None else value


def _shown(name: object) -> str:
    return repr(name[:_SHOWN_CHARS]) if isinstance(name, str) else f"a {type(name).__name__}"


def _nearest(name: object, known: Iterable[str]) -> str:
    close = get_close_matches(name[:_SHOWN_CHARS], list(known), 1) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""
