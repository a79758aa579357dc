"""A/B tests: a share of a Cargo's real traffic tries another version, and the better one is promoted when that is shown.

  ab create FILE         a test, from a file (JSON or TOML), from options, or from both; options win
  ab activate ID         start it, or go on after a pause
  ab watch ID            its results as they change, until it has ended
  ab results ID          its results now
  ab show ID             its plan, its state, and who did what when
  ab list                your tests, the newest first
  ab pause ID            everybody gets the base again; what was counted is kept
  ab promote ID          end it and have the base's name stand for the winner, or for --variant V
  ab rollback ID         end it; after a promotion the base's name stands again for what it was before
  ab rate JOB up|down    what you think of an answer, for tests by thumbs

What decides is fixed before the start: the metric, how many samples and hours at least, and the guardrails. Looking often does no harm: the
p-value and the interval hold for all looks together. The control, with which the others are compared, is the variant that the base's name
stands for now, else the first.

examples:
  archipelag-node ab create --name faster --base answers --variant old=answers@1.0.0:50 --variant new=answers@2.0.0:50 \\
    --metric latency --minimum-samples 1000 --minimum-hours 24 --guardrail success:1 --activate --watch
  archipelag-node ab create test.toml --ramp 5%:1h --ramp 25%:6h --no-auto-promote
  archipelag-node ab watch 4f1c2a9b8d7e6f5a
  archipelag-node ab promote 4f1c2a9b8d7e6f5a --variant new

a file, test.toml:
  name = "faster"
  base_cargo = "answers"
  primary_metric = "latency"
  minimum_samples = 1000
  minimum_hours = 24
  guardrails = [{ metric = "success", max_regression_percent = 1 }]
  [[variants]]
  name = "old"
  cargo = "answers@1.0.0"
  traffic_percent = 50
  [[variants]]
  name = "new"
  cargo = "answers@2.0.0"
  traffic_percent = 50

--coordinator and --api-key may stand in ARCHIPELAG_COORDINATOR and ARCHIPELAG_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from coordinator.abtests.plan import AbState, Metric, UnitKind
from node import ab_table
from node.commands.common import add_coordinator, checked, need_coordinator, need_key, parse_count
from node.http_client import Unreachable
from node.request_file import object_in
from node.settings import defaults, settle
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from node.ab_client import AbClient

HELP = "A/B tests: try a new version of a Cargo on real traffic, and promote the better one"
METRICS, UNITS = tuple(map(str, Metric)), tuple(map(str, UnitKind))
RATINGS: Mapping[str, str | None] = {"up": "up", "down": "down", "none": None}
_LISTED = 20
_INTERVAL_S, _INTERVAL_S_MAX = 2.0, 3600.0
_LOST_MAX = 60  # looks in a row at which nobody answers
_HOURS_OF = {"m": 1 / 60, "h": 1.0, "d": 24.0}
_ROW_MARGIN = 1  # the terminal's last row is the cursor's

Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, perform: Callable[[argparse.Namespace], int], brief: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=brief, description=f"{brief[0].upper()}{brief[1:]}.")
        add_coordinator(made)
        made.set_defaults(parser=made, perform=perform)
        return made

    _add_create(add)
    listing = add("list", _list, "your tests, the newest first")
    listing.add_argument("--limit", dest="ab_limit", type=checked(parse_count), metavar="N", help=f"so many (default: {_LISTED})")
    show = add("show", _show, "the plan of a test, its state, and who did what when")
    results = add("results", _results, "what a test has come to so far")
    for one in (show, results):
        one.add_argument("--json", dest="ab_json", action="store_true", default=None, help="all of it as JSON")
    watch = add("watch", _watch, "the results of a test as they change, until it has ended; exit status 0 where it promotes a variant")
    _add_interval(watch)
    promote = add("promote", _promote, "end a test and promote its winner, or the variant that you name")
    promote.add_argument("--variant", dest="ab_variant", metavar="V", help="promote this one, also where it has not won (yet)")
    promote.add_argument(
        "--force", dest="ab_force", action="store_true", default=None, help="without a winner too: the variant that is not the control"
    )
    begin = add("activate", _activate, "start a test, or go on after a pause")
    pause = add("pause", _pause, "pause a test: everybody gets the base again, and what was counted is kept")
    rollback = add("rollback", _rollback, "end a test, and take its promotion back if it had one")
    for one in (show, results, watch, promote, begin, pause, rollback):
        one.add_argument("id", metavar="ID", help="the test's id, as create and list print it")
    rate = add("rate", _rate, "say what you think of the answer of a job of yours")
    rate.add_argument("job", metavar="JOB", help="the job's id, as its answer says it")
    rate.add_argument("rating", choices=tuple(RATINGS), help="thumbs up or down; none takes it back")


def _add_interval(parser: argparse.ArgumentParser) -> None:
    text = f"look so often (default: {_INTERVAL_S:g})"
    parser.add_argument("--interval", dest="ab_interval", type=checked(parse_interval), metavar="SECONDS", help=text)


def _add_create(add: Add) -> None:
    """Names of their own, for ARCHIPELAG_NAME or ARCHIPELAG_UNIT say nothing about a test."""
    create = add("create", _create, "make a test, from a file, from options, or from both; it is a draft until it is activated")
    create.add_argument("file", nargs="?", metavar="FILE", help="a .json or .toml file; archipelag-node ab --help shows one")

    def option(flag: str, field: str, convert: Callable[[str], object], metavar: str, text: str, many: bool = False) -> None:
        action = "append" if many else "store"
        create.add_argument(flag, dest=f"ab_{field}", type=checked(convert), action=action, metavar=metavar, help=text)

    option("--name", "name", str, "N", "what you call it")
    option("--base", "base_cargo", str, "CARGO", "the Cargo whose traffic tries the variants; you have published it")
    option("--variant", "variants", parse_variant, "V=CARGO:PERCENT", "such as new=answers@2.0.0:50; given twice at least", many=True)
    option("--metric", "primary_metric", parse_metric, "M", f"what decides: {', '.join(METRICS)}")
    option("--minimum-samples", "minimum_samples", parse_count, "N", "units of each variant, before anything is decided")
    option("--minimum-hours", "minimum_hours", parse_number, "H", "of running time, before anything is decided")
    option("--guardrail", "guardrails", parse_guardrail, "M:PERCENT", "such as success:1, so much worse at most; repeatable", many=True)
    option("--alpha", "alpha", parse_number, "A", "the chance of calling something a difference by mistake, such as 0.05")
    option("--unit", "unit", parse_unit, "U", f"who always gets the same variant: {', '.join(UNITS)}")
    option("--ramp", "ramp", parse_ramp, "PERCENT:TIME", "such as 5%%:1h; so few units take part at first; may be repeated", many=True)
    create.add_argument("--no-auto-promote", dest="ab_no_auto_promote", action="store_true", default=None, help="only you promote")
    create.add_argument("--activate", dest="ab_activate", action="store_true", default=None, help="and start it")
    create.add_argument("--watch", dest="ab_watch", action="store_true", default=None, help="and watch it; with --activate")
    _add_interval(create)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.perform(arguments))


def _settled(arguments: argparse.Namespace) -> argparse.Namespace:
    return settle(arguments.parser, arguments, strict=False)


def _client(settings: argparse.Namespace) -> AbClient:
    from node.ab_client import AbClient

    return AbClient(need_coordinator(settings), need_key(settings), settings.ca_file)


# -- options


def parse_number(text: str) -> float:
    """Raises ValueError for what is no finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{text[:40]!r} is no number of at least 0")
    return value


def parse_interval(text: str) -> float:
    """Seconds. Raises ValueError."""
    value = parse_number(text)
    if not 0 < value <= _INTERVAL_S_MAX:
        raise ValueError(f"takes more than 0 and at most {_INTERVAL_S_MAX:,.0f} seconds, not {text[:40]!r}")
    return value


def parse_percent(text: str) -> float:
    """``5`` or ``5%``. Raises ValueError."""
    value = parse_number(text.removesuffix("%"))
    if value > 100:
        raise ValueError(f"{text[:40]!r} is over 100 percent")
    return value


def parse_variant(text: str) -> dict[str, Any]:
    """``new=answers@2.0.0:50``. Raises ValueError."""
    name, _, rest = text.partition("=")
    cargo, _, share = rest.rpartition(":")
    if not (name and cargo and share):
        raise ValueError(f"a variant is NAME=CARGO:PERCENT, such as new=answers@2.0.0:50, not {text[:80]!r}")
    return {"name": name, "cargo": cargo, "traffic_percent": parse_percent(share)}


def parse_metric(text: str) -> str:
    return _one_of(text, METRICS, "a metric is one of")


def parse_unit(text: str) -> str:
    return _one_of(text, UNITS, "a unit is one of")


def _one_of(text: str, known: Sequence[str], what: str) -> str:
    if text not in known:
        raise ValueError(f"{what} {', '.join(known)}, not {text[:40]!r}")
    return text


def parse_guardrail(text: str) -> dict[str, Any]:
    """``success:5``: at most 5 % worse than the control. Raises ValueError."""
    metric, _, percent = text.partition(":")
    if not percent:
        raise ValueError(f"a guardrail is METRIC:PERCENT, such as success:1, not {text[:40]!r}")
    return {"metric": parse_metric(metric), "max_regression_percent": parse_number(percent.removesuffix("%"))}


def parse_ramp(text: str) -> dict[str, Any]:
    """``5%:1h``, also ``30m`` and ``2d``. Raises ValueError."""
    percent, _, period = text.partition(":")
    if not period or period[-1] not in _HOURS_OF:
        raise ValueError(f"a step of the ramp is PERCENT:TIME, such as 5%:1h, 10%:30m or 25%:2d, not {text[:40]!r}")
    return {"percent": parse_percent(percent), "hours": parse_number(period[:-1]) * _HOURS_OF[period[-1]]}


# -- create


_FIELDS = "name base_cargo variants primary_metric minimum_samples minimum_hours guardrails alpha unit ramp".split()
_NEEDED = {"name": "--name", "base_cargo": "--base", "variants": "--variant"}


def body_of(settings: argparse.Namespace) -> dict[str, Any]:
    """The request: what the file says, and over it what the options say. Raises ConfigError."""
    body = object_in(Path(settings.file)) if settings.file is not None else {}
    given = {name: getattr(settings, f"ab_{name}") for name in _FIELDS}
    body |= {name: value for name, value in given.items() if value is not None}
    if settings.ab_no_auto_promote:
        body["auto_promote"] = False
    missing = [option for name, option in _NEEDED.items() if not body.get(name)]
    if missing:
        raise ConfigError(f"a test needs {', '.join(missing)}, or a file that says so; archipelag-node ab --help shows both")
    return body


def _create(arguments: argparse.Namespace) -> int:
    settings = defaults(_settled(arguments), ab_interval=_INTERVAL_S)
    client, body = _client(settings), body_of(settings)
    if settings.ab_watch and not settings.ab_activate:
        raise ConfigError("there is nothing to watch before the test is started: give --activate too")
    test = client.create(body)
    test_id = ab_table.plain(test.get("id"))
    if not settings.ab_activate:
        print("\n".join(ab_table.plan_lines(test)))
        print(f"Next: archipelag-node ab activate {test_id}")
        return 0
    print(f"created {test_id}", flush=True)
    try:
        test = client.activate(str(test.get("id")))
    except ConfigError:
        print(f"the test is kept as a draft; start it with\n  archipelag-node ab activate {test_id}", file=sys.stderr)
        raise
    if settings.ab_watch:
        return _watched(client, str(test.get("id")), settings.ab_interval)
    return _say_active(test)


# -- looking


def _list(arguments: argparse.Namespace) -> int:
    settings = defaults(_settled(arguments), ab_limit=_LISTED)
    found = _client(settings).tests(settings.ab_limit)
    if not found:
        print("no A/B tests yet; make one with archipelag-node ab create, and see archipelag-node ab --help")
        return 0
    print("\n".join(ab_table.tests_lines(found)))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    client = _client(settings)
    test, events = client.show(settings.id), client.events(settings.id)
    if settings.ab_json:
        print(json.dumps({"test": test, "events": events}, indent=1))
        return 0
    print("\n".join([*ab_table.plan_lines(test), "", *map(ab_table.event_line, events)]))
    return 0


def _results(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    results = _client(settings).results(settings.id)
    if settings.ab_json:
        print(json.dumps(results, indent=1))
        return 0
    print("\n".join(ab_table.results_lines(results, Screen(sys.stdout).columns)))
    return 0


# -- watching


class Looked(Protocol):
    """Of ``AbClient``, what watching needs."""

    def results(self, test_id: str) -> dict[str, Any]: ...


class Screen:
    """Draws blocks of lines: one over the other on a terminal, else below each other."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self.is_terminal = out.isatty()
        self._drawn = 0

    def __repr__(self) -> str:
        return f"<Screen {'terminal' if self.is_terminal else 'file'}, {self._drawn} lines>"

    @property
    def columns(self) -> int:
        return shutil.get_terminal_size().columns if self.is_terminal else ab_table.WIDTH

    def draw(self, lines: Sequence[str]) -> None:
        """Lines are not longer than ``columns``. What has scrolled off the top stays there."""
        up = min(self._drawn, shutil.get_terminal_size().lines - _ROW_MARGIN) if self.is_terminal else 0
        before = f"\x1b[{up}A\r\x1b[J" if up else "\n" if self._drawn else ""
        self._out.write(before + "".join(f"{line}\n" for line in lines))
        self._out.flush()
        self._drawn = len(lines)


def _watch(arguments: argparse.Namespace) -> int:
    settings = defaults(_settled(arguments), ab_interval=_INTERVAL_S)
    return _watched(_client(settings), settings.id, settings.ab_interval)


def _watched(client: AbClient, test_id: str, interval_s: float) -> int:
    try:
        return watch(client, test_id, Screen(sys.stdout), lambda: time.sleep(interval_s))
    except KeyboardInterrupt:
        shown = ab_table.plain(test_id)
        print(f"\nthe test goes on without you; come back with\n  archipelag-node ab watch {shown}", file=sys.stderr)
        raise


def watch(client: Looked, test_id: str, screen: Screen, pause: Callable[[], None]) -> int:
    """Shows the results at each look until the test has ended; exit status 0 where it promoted a variant. Raises ConfigError."""
    lost, key, lines = 0, "", list[str]()
    while True:
        try:
            results = client.results(test_id)
        except Unreachable as error:
            lost += 1
            if lost > _LOST_MAX or not lines:
                raise
            if screen.is_terminal:
                screen.draw([*lines, *ab_table.folded(f"{error}; trying again", screen.columns)])
        else:
            lost, state = 0, results["test"].get("state")
            lines = ab_table.results_lines(results, screen.columns, is_watched=True)
            if screen.is_terminal or ab_table.changed_key(results) != key:
                screen.draw(lines)
            key = ab_table.changed_key(results)
            if state in ab_table.ENDED:
                return 0 if state == AbState.PROMOTED else 1
        pause()


# -- changing


def _activate(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    return _say_active(_client(settings).activate(settings.id))


def _say_active(test: Mapping[str, Any]) -> int:
    name, base = ab_table.plain(test.get("name")), ab_table.plain(test.get("base_cargo"))
    print(f"{name} is active: requests for {base} go to its variants")
    print(f"Next: archipelag-node ab watch {ab_table.plain(test.get('id'))}")
    return 0


def _pause(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    test = _client(settings).pause(settings.id)
    name, base = ab_table.plain(test.get("name")), ab_table.plain(test.get("base_cargo"))
    print(f"{name} is paused: all requests for {base} get what the name stands for; what was counted is kept")
    print(f"Next: archipelag-node ab activate {ab_table.plain(test.get('id'))}")
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    client = _client(settings)
    test = client.promote(settings.id, settings.ab_variant, bool(settings.ab_force))
    unproven = _unproven(client, settings.id)
    print(ab_table.ended_words(test) + (f" ({unproven})" if unproven else ""))
    print(f"Islands and caches follow within seconds; back with archipelag-node ab rollback {ab_table.plain(test.get('id'))}")
    return 0


def _unproven(client: AbClient, test_id: str) -> str:
    try:
        return ab_table.unproven_words(client.events(test_id))
    except ConfigError:
        return ""  # it is promoted all the same


def _rollback(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    print(ab_table.ended_words(_client(settings).rollback(settings.id)))
    return 0


def _rate(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    _client(settings).rate(settings.job, RATINGS[settings.rating])
    given = "has no thumb from you any more" if settings.rating == "none" else f"has a thumb {settings.rating} from you"
    print(f"job {ab_table.plain(settings.job)} {given}")
    return 0
