"""What an A/B test has come to, as lines of text. Pure; whatever a Coordinator says, only printable characters get through."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.abtests.plan import AbState, Metric, UnitKind
from protocol import checks

WIDTH = 160  # characters, where no terminal says how many it has
_TEXT_CHARS_MAX = 1000  # of one field
_ADDRESS_CHARS = 16
_ADDRESS = re.compile("[0-9a-f]{64}")
_P_MIN = 0.0001  # smaller ones are not told apart
_JOBS_PER_UNIT_MAX = 10  # more look like requests that name no user
_NONE = "-"
_OVER_REASONS, _UNFIT_REASON = ("base_changed", "harmful", "promotion_refused"), "variant_not_runnable"  # of pauses
ENDED = tuple(str(state) for state in AbState if state.ended)


@dataclass(frozen=True, slots=True)
class _Shown:
    """How a metric is written: its name, the field of its mean, its unit, decimals."""

    name: str
    field: str
    unit: str
    decimals: int


_METRICS: Mapping[str, _Shown] = {
    Metric.SUCCESS: _Shown("success", "success_rate", "%", 1),
    Metric.ABANDONED: _Shown("abandoned", "abandoned_percent", "%", 1),
    Metric.LATENCY: _Shown("latency", "avg_latency_ms", "ms", 1),
    Metric.TIME_TO_FIRST_TOKEN: _Shown("TTFT", "avg_time_to_first_token_ms", "ms", 1),
    Metric.TOKENS_PER_SECOND: _Shown("speed", "avg_tokens_per_second", "tokens/s", 2),
    Metric.COST: _Shown("cost", "avg_cost", "credits", 6),
    Metric.THUMBS: _Shown("thumbs", "thumbs_up_percent", "%", 1),
}


# -- words and numbers


def plain(value: object) -> str:
    """One printable line; ``-`` for nothing."""
    return _NONE if value is None or value == "" else checks.made_printable(str(value), _TEXT_CHARS_MAX)


def number(value: object, decimals: int = 0) -> str:
    """``1,234.50``; ``-`` for what is no number."""
    known = _known(value)
    return _NONE if known is None else f"{known:,.{decimals}f}"


def _known(value: object) -> float | None:
    """Also of a text: credits come as one."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except ValueError:
        return None
    return found if found is not None and math.isfinite(found) else None


def _percent(value: object, decimals: int = 1) -> str:
    known = _known(value)
    return _NONE if known is None else f"{known:.{decimals}f}".rstrip("0").rstrip(".") + " %"


def _time(hours: object) -> str:
    """``3.2 h``; less than an hour in minutes, less than a minute in seconds."""
    known = _known(hours)
    if known is None:
        return _NONE
    return f"{known:,.1f} h" if known >= 1 else f"{known * 60:.0f} min" if known * 60 >= 1 else f"{known * 3600:.0f} s"


def _p(value: object) -> str:
    known = _known(value)
    if known is None:
        return _NONE
    return f"below {_P_MIN}" if known < _P_MIN else f"{known:.4f}"


def _part(holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = holder.get(name)
    return value if isinstance(value, Mapping) else {}


def _parts(holder: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = holder.get(name)
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _codes(holder: Mapping[str, Any], name: str) -> list[str]:
    value = holder.get(name)
    return [str(one) for one in value] if isinstance(value, list) else []


def _version(variant: Mapping[str, Any]) -> str:
    return f"{plain(variant.get('cargo'))}@{plain(variant.get('release'))}"


def _variant(test: Mapping[str, Any], name: object) -> Mapping[str, Any]:
    return next((one for one in _parts(test, "variants") if one.get("name") == name), {})


# -- results


def results_lines(results: Mapping[str, Any], width: int = WIDTH, is_watched: bool = False) -> list[str]:
    """Everything that ``GET …/results`` says, in lines of at most ``width`` characters. ``is_watched``: until the test ends."""
    test = _part(results, "test")
    below = [*_comparison_lines(results), _progress_line(results), *_guardrail_lines(results), _ratio_line(results)]
    below += [*_nameless_lines(results), conclusion(results, is_watched)]
    lines = [_head(test, results), "", *_variants_table(results, width), "", *below]
    return [part for line in lines for part in folded(line, width)]


def folded(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, max(20, width), subsequent_indent="  ", break_on_hyphens=False)


def _head(test: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    parts = [f"{plain(test.get('name'))} ({plain(test.get('id'))})"]
    if test.get("state") == AbState.ACTIVE:
        parts.append(f"active for {_time(_running(results))}")
        parts.append(f"exposure {_percent(results.get('exposure_percent'))} of all units")
    elif test.get("state") == AbState.DRAFT:
        parts.append(state_word(test))
    else:
        parts += [state_word(test), f"ran for {_time(_running(results))}"]
    return ", ".join(parts)


def state_word(test: Mapping[str, Any]) -> str:
    return plain(test.get("state")).replace("_", " ")


def _running(results: Mapping[str, Any]) -> object:
    hours = results.get("running_hours")
    return hours if hours is not None else _part(results, "test").get("running_hours")


def _variants_table(results: Mapping[str, Any], width: int) -> list[str]:
    """A row for each variant; on a narrow terminal a column."""
    heads = ["variant", "version", "share", "units", "jobs", "cached"]
    rows = [heads + [f"{one.name} {one.unit}" if one.unit != "tokens/s" else one.unit for one in _METRICS.values()]]
    rows += [_variant_row(one) for one in _parts(results, "variants")]
    lines = grid(rows, 2)
    if max(map(len, lines)) <= width:
        return lines
    return grid(list(zip(*rows, strict=True)), 1)


def _variant_row(one: Mapping[str, Any]) -> list[str]:
    name = plain(one.get("name")) + (" (control)" if one.get("is_control") else "")
    row = [name, _version(one), _percent(one.get("traffic_percent"), 3)]
    row += [number(one.get(field)) for field in ("units", "job_count", "cached_count")]
    return row + [number(one.get(each.field), each.decimals) for each in _METRICS.values()]


def grid(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows in columns, the first ``left`` of them aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ([f"{cell:{'<' if at < left else '>'}{widths[at]}}" for at, cell in enumerate(row)] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]


def _comparison_lines(results: Mapping[str, Any]) -> Iterable[str]:
    for one in _parts(results, "comparisons"):
        yield f"{plain(one.get('variant'))} against {plain(one.get('control'))}: {_difference(one)}; {_is_conclusive(one)}"


def _difference(one: Mapping[str, Any]) -> str:
    shown = _METRICS.get(str(one.get("metric")))
    name, decimals = (shown.name, shown.decimals + 1) if shown else (plain(one.get("metric")), 3)
    unit = "points" if shown and shown.unit == "%" else plain(one.get("unit"))
    if _known(one.get("difference")) is None:
        return f"{name} not known yet"
    interval = _part(one, "interval")
    text = f"{name} {_signed(one.get('difference'), decimals)} {unit}"
    if _known(interval.get("low")) is not None:
        bounds = " to ".join(_signed(interval.get(end), decimals) for end in ("low", "high"))
        level = _known(interval.get("level"))
        text += f" [{bounds}{f' at {_percent(level * 100, 2)}' if level is not None else ''}]"
    return f"{text}, lift {_signed(one.get('lift_percent'), 1)} %, sequential p {_p(one.get('p_value'))}"


def _signed(value: object, decimals: int) -> str:
    known = _known(value)
    return _NONE if known is None else f"{known:+,.{decimals}f}"


def _is_conclusive(one: Mapping[str, Any]) -> str:
    """``conclusive: better``, or what is missing."""
    if one.get("conclusive"):
        return f"conclusive: {'better' if one.get('better') else 'worse'}"
    interval = _part(one, "interval")
    low, high = _known(interval.get("low")), _known(interval.get("high"))
    if low is None or high is None:
        return "not conclusive: too few values"
    return "not conclusive: no difference lies within" if low <= 0 <= high else "not conclusive: too few units yet"


def samples(results: Mapping[str, Any]) -> tuple[int, str]:
    """Of the variant that has the fewest, and its name."""
    found = [(int(_known(one.get("samples")) or 0), plain(one.get("name"))) for one in _parts(results, "variants")]
    return min(found, default=(0, _NONE))


def _progress_line(results: Mapping[str, Any]) -> str:
    test = _part(results, "test")
    fewest, _ = samples(results)
    hours = f", {_of_hours(results)}" if _known(test.get("minimum_hours")) else ""  # none where there is no minimum
    return f"progress: {fewest:,} of {number(test.get('minimum_samples'))} samples in each variant{hours}"


def _of_hours(results: Mapping[str, Any]) -> str:
    """``3.2 of 24 h``, ``12 s of 24 h``."""
    least = _short(_part(results, "test").get("minimum_hours"))
    return f"{_time(_running(results)).removesuffix(' h')} of {least} h"


def _short(value: object) -> str:
    known = _known(value)
    return _NONE if known is None else f"{known:,g}"


def _guardrail_lines(results: Mapping[str, Any]) -> Iterable[str]:
    words = {"holds": "holds", "not_yet": "not shown to hold yet", "violated": "VIOLATED"}
    limits = {str(one.get("metric")): one.get("max_regression_percent") for one in _parts(_part(results, "test"), "guardrails")}
    for one in _parts(results, "guardrails"):
        metric = str(one.get("metric"))
        state = words.get(str(one.get("state")), plain(one.get("state")))
        limit = one.get("max_regression_percent", limits.get(metric))
        regression = _known(one.get("regression_percent"))
        now = f", now {regression:+z.1f} %" if regression is not None else ""
        yield f"guardrail for {plain(one.get('variant'))}: {plain(metric)} at most {_percent(limit)} worse{now}: {state}"


def _ratio_line(results: Mapping[str, Any]) -> str:
    ratio = _part(results, "sample_ratio")
    if _known(ratio.get("p_value")) is None:
        return "sample ratio: too few units to say"
    return f"sample ratio: p {_p(ratio.get('p_value'))}, {'sound' if ratio.get('ok') else 'WRONG: the variants cannot be compared'}"


def _nameless_lines(results: Mapping[str, Any]) -> Iterable[str]:
    """Where a test by users that waits for samples gets many jobs of few units."""
    is_waiting = {"minimum_samples", "too_few_units"} & set(_codes(_part(results, "decision"), "waiting"))
    if not is_waiting or _part(results, "test").get("unit") != UnitKind.USER:
        return
    counted = [(_known(one.get("job_count")) or 0, _known(one.get("units")) or 0) for one in _parts(results, "variants")]
    if any(jobs > _JOBS_PER_UNIT_MAX * max(1, units) for jobs, units in counted):
        way = "send x-archipelag-unit or user, or make a test with --unit job"
        yield f"requests that name no user are one unit, their account: {way}"


# -- what it comes to, in words


def conclusion(results: Mapping[str, Any], is_watched: bool = False) -> str:
    """What the test waits for, why it is blocked, or how it has ended, and what can be done."""
    test = _part(results, "test")
    state = test.get("state")
    if state in ENDED:
        return ended_words(test)
    if state == AbState.DRAFT and is_watched:
        return f"waiting for the test to be activated: {_command('activate', test)}; Ctrl-C ends this"
    if state == AbState.DRAFT:
        return f"not begun. Next: {_command('activate', test)}"
    return _verdict_words(results, test)


def ended_words(test: Mapping[str, Any]) -> str:
    note = f": {plain(test.get('note'))}" if test.get("note") else ""
    base = plain(test.get("base_cargo"))
    if test.get("state") == AbState.PROMOTED:
        winner = test.get("winner")
        return f"promoted: {base} stands for {_version(_variant(test, winner))} now, the variant {plain(winner)}{note}"
    if test.get("winner"):  # else it has moved nothing
        return f"rolled back: {base} stands again for what it was before the test{note}"
    return f"rolled back: the test has ended; {base} goes on to stand for what it stands for{note}"


def unproven_words(events: Sequence[Mapping[str, Any]]) -> str:
    """What the promotion in an audit log, the oldest event first, was not shown by; empty: its variant was shown to be better."""
    detail = next((_part(event, "detail") for event in reversed(events) if event.get("kind") == "promoted"), {})
    if detail.get("is_conclusive") is not False:
        return ""
    missing = [plain(code) for code in _codes(detail, "waiting")]
    return "not shown to be better" + (f": {', '.join(missing).replace('_', ' ')}" if missing else "")


def _verdict_words(results: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    decision = _part(results, "decision")
    if blocked := [code for code in _codes(decision, "blocked") if code != "held"]:
        return f"blocked: {'; '.join(_why(code, results) for code in blocked)}. Next: {_command('rollback', test)}"
    if test.get("state") == AbState.PAUSED:
        why = plain(test.get("note")) if test.get("note") else "everybody gets the base, and nothing is counted"
        return f"paused: {why}. {_after_pause(test)}"
    if results.get("held_because"):
        return f"stands still: {plain(results.get('held_because'))}; it goes on by itself when that is over"
    if decision.get("verdict") == "promote":
        then = "; it is promoted within seconds" if test.get("auto_promote") else f". Next: {_command('promote', test)}"
        return f"{plain(decision.get('winner'))} has won{then}"
    if decision.get("verdict") == "keep_base":
        return f"{plain(test.get('control'))} is better than every other variant. Next: {_command('rollback', test)}"
    waiting = _codes(decision, "waiting")
    return f"waiting: {'; '.join(_why(code, results) for code in waiting)}" if waiting else plain(decision.get("verdict"))


def _after_pause(test: Mapping[str, Any]) -> str:
    """What can be done: a test is not activated again as long as what it was paused for is so."""
    activate, rollback = _command("activate", test), _command("rollback", test)
    if test.get("reason") in _OVER_REASONS:
        return f"Next: {rollback}"
    return f"Once it may run again: {activate}; or {rollback}" if test.get("reason") == _UNFIT_REASON else f"Next: {activate}"


def _why(code: str, results: Mapping[str, Any]) -> str:
    test = _part(results, "test")
    if code == "minimum_samples":
        fewest, name = samples(results)
        return f"{name} has {fewest:,} of {number(test.get('minimum_samples'))} samples"
    if code == "minimum_hours":
        return f"{_of_hours(results)} have passed"
    if code == "guardrail_violated":
        broken = [one for one in _parts(results, "guardrails") if one.get("state") == "violated"]
        named = ", ".join(f"{plain(one.get('metric'))} of {plain(one.get('variant'))}" for one in broken)
        return _reason(code, results) + (f" ({named})" if named else "")
    return _reason(code, results)


def _reason(code: str, results: Mapping[str, Any]) -> str:
    """In the Coordinator's words."""
    return plain(_part(_part(results, "decision"), "reasons").get(code, code))


def _command(action: str, test: Mapping[str, Any]) -> str:
    return f"archipelag-node ab {action} {plain(test.get('id'))}"


# -- one test, and many


def plan_lines(test: Mapping[str, Any]) -> list[str]:
    """The plan and the state, as ``GET …/{id}`` says them."""
    control = test.get("control")
    lines = [
        f"{plain(test.get('name'))} ({plain(test.get('id'))}), {state_word(test)}, ran for {_time(test.get('running_hours'))}",
        f"created {plain(test.get('created_at'))}, started {plain(test.get('started_at'))}, ended {plain(test.get('ended_at'))}",
        f"base       {plain(test.get('base_cargo'))}",
    ]
    for one in _parts(test, "variants"):
        mark = ", the control" if one.get("name") == control else ""
        address = plain(one.get("address"))[:_ADDRESS_CHARS]
        share = _percent(one.get("traffic_percent"), 3)
        lines.append(f"variant    {plain(one.get('name'))}: {_version(one)} ({address}), {share} of the {plain(test.get('unit'))}s{mark}")
    least = f"{number(test.get('minimum_samples'))} samples in each variant and {_short(test.get('minimum_hours'))} h"
    lines.append(f"decides    {plain(test.get('primary_metric'))}, alpha {_short(test.get('alpha'))}, after {least} at least")
    for one in _parts(test, "guardrails"):
        lines.append(f"guardrail  {plain(one.get('metric'))} at most {_percent(one.get('max_regression_percent'))} worse")
    for one in _parts(test, "ramp"):
        lines.append(f"ramp       {_percent(one.get('percent'))} of all units for {_short(one.get('hours'))} h")
    lines.append(f"promotion  {'by itself' if test.get('auto_promote') else 'by hand'}")
    if test.get("state") in ENDED:
        lines.append(ended_words(test))
    elif test.get("note"):
        lines.append(f"note       {plain(test.get('note'))}")
    return lines


def event_line(event: Mapping[str, Any]) -> str:
    """A line of the audit log: when, what, who, and what else is known about it."""
    who = event.get("account") or "the test itself"
    detail = _part(event, "detail")
    known = {key: value for key, value in detail.items() if value not in (None, "", [], {})}
    more = "; ".join(f"{plain(key).replace('_', ' ')}: {_detail(value)}" for key, value in known.items())
    return f"{plain(event.get('at'))}  {plain(event.get('kind')).replace('_', ' '):<12}  by {plain(who)}  {more}".rstrip()


def _detail(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and _ADDRESS.fullmatch(value):
        return value[:_ADDRESS_CHARS]
    return plain(", ".join(map(str, value)) if isinstance(value, list) else value)


def tests_lines(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [["id", "created", "state", "base", "variants", "name"]]
    for test in tests:
        variants = ", ".join(plain(one.get("name")) for one in _parts(test, "variants"))
        row = [plain(test.get(field)) for field in ("id", "created_at")]
        rows.append([*row, state_word(test), plain(test.get("base_cargo")), variants, plain(test.get("name"))])
    return grid(rows, len(rows[0]))


def changed_key(results: Mapping[str, Any]) -> str:
    """Equal for results that differ in nothing but the time that has passed."""
    test = _part(results, "test")
    counted = [results.get(name) for name in ("variants", "comparisons", "guardrails", "sample_ratio", "exposure_percent", "held_because")]
    return repr([test.get("state"), test.get("winner"), test.get("note"), _part(results, "decision"), counted])
