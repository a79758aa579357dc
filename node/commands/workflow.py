"""Run workflows at a Coordinator: several models chained into one, with what each step says going into the next.

  workflow run WHAT      start a run of a FILE (JSON or TOML), or of a saved workflow: NAME, NAME@2 or ACCOUNT/NAME@2
  workflow quote WHAT    what a run would cost at most
  workflow show ID       how far a run is, step by step
  workflow list          your runs, the newest first
  workflow cancel ID     end a run; what its finished steps said is kept
  workflow rerun ID      a new run from a step on, with what the steps before it have said
  workflow save FILE     keep a workflow at the Coordinator under a name; other contents are another version
  workflow publish FILE  save it, sign it with your publisher's key, and let anybody run it

examples:
  archipelag-node workflow run talk.toml --input '{"text": "one two three"}' --watch --coordinator URL
  archipelag-node workflow run ann/talk@2 --input @request.json --coordinator URL
  archipelag-node workflow rerun 4f1c2a9b8d7e6f5a4b3c2d1e --from summary --coordinator URL

--coordinator and --api-key may stand in ARCHIPELAG_COORDINATOR and ARCHIPELAG_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.commands.common import (
    add_coordinator,
    add_data_dir,
    checked,
    data_home,
    need_coordinator,
    need_key,
    parse_count,
)
from node.request_file import bytes_of, object_in
from node.settings import defaults, settle
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.workflows.definition import Definition
    from node.workflow_client import WorkflowClient

HELP = "run, save and publish workflows: several models chained into one"
_LISTED = 20
_AGAIN_S = 1.0  # after a stream has broken off
_LOST_MAX = 30  # times in a row
_ENDED = {"succeeded": "done", "failed": "failed", "cancelled": "cancelled", "skipped": "skipped"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, perform: Callable[[argparse.Namespace], int], brief: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=brief, description=f"{brief[0].upper()}{brief[1:]}.")
        add_coordinator(made)
        made.set_defaults(parser=made, perform=perform)
        return made

    for start in (add("run", _run, "start a run"), add("quote", _quote, "what a run would cost at most")):
        start.add_argument("what", metavar="WHAT", help="a .json or .toml file, or NAME, NAME@2 or ACCOUNT/NAME@2")
        start.add_argument("--input", metavar="JSON|@FILE", help="what the run is given")
        if start.prog.endswith("run"):
            start.add_argument("--fail-mode", metavar="MODE", help="fail_fast or best_effort, whatever the file says")
            start.add_argument("--max-price", metavar="P", help="credits that the whole run may cost; refused where its quote is higher")
            start.add_argument("--bid-price", metavar="P", help="credits that each job of it may cost")
            start.add_argument("--watch", action="store_true", default=None, help="show its steps as they end, then its output")
    show = add("show", _show, "how far a run is, step by step")
    show.add_argument("--json", action="store_true", default=None, help="all of it as JSON")
    show.add_argument("--timeline", action="store_true", default=None, help="what happened when, and on which Island")
    listing = add("list", _list, "your runs, the newest first")
    listing.add_argument("--limit", type=checked(parse_count), metavar="N", help=f"so many (default: {_LISTED})")
    cancel = add("cancel", _cancel, "end a run; what its finished steps said is kept")
    rerun = add("rerun", _rerun, "a new run from a step on")
    rerun.add_argument("--from", dest="step", metavar="STEP", help="the first step to run again, with all that need it")
    rerun.add_argument("--watch", action="store_true", default=None, help="show its steps as they end, then its output")
    for one in (show, cancel, rerun):
        one.add_argument("id", metavar="ID", help="the run's id")
    for keep in (add("save", _save, "keep a workflow under a name"), add("publish", _publish, "let anybody run a workflow, signed by you")):
        keep.add_argument("file", metavar="FILE", help="a .json or .toml file")
        keep.add_argument("--name", metavar="NAME", help="under which name (default: the file's own, or what its name key says)")
    add_data_dir(keep, "publisher")


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.perform(arguments))


def _settled(arguments: argparse.Namespace) -> argparse.Namespace:
    return settle(arguments.parser, arguments, strict=False)


def _client(settings: argparse.Namespace) -> WorkflowClient:
    from node.workflow_client import WorkflowClient

    return WorkflowClient(need_coordinator(settings), need_key(settings), settings.ca_file)


# -- files


def read_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Name and definition of a file: ``{name, steps, …}``, or a request's body, ``{name, definition: {steps, …}}``. Raises ConfigError."""
    value = object_in(path)
    body = dict(value["definition"]) if isinstance(value.get("definition"), dict) else value
    name = value.get("name") or path.stem
    if not isinstance(name, str):
        raise ConfigError(f"{path}: name must be a text")
    body.pop("name", None)
    if not isinstance(body.get("steps"), list):
        text = '{"steps": [{"key": "a", "cargo": "echo", "input": {"prompt": "one"}}]}'
        raise ConfigError(f"{path} has no list of steps; a workflow looks like {text}")
    return name, body


def _input(text: str | None) -> Any:
    """What stands behind --input. Raises ConfigError."""
    if text is None:
        return None
    data = bytes_of(Path(text[1:])) if text.startswith("@") else text.encode()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--input is no JSON ({error}); it looks like " + "'{\"text\": \"one two\"}', or @FILE") from None


def _body(settings: argparse.Namespace) -> dict[str, Any]:
    body: dict[str, Any] = {}
    path = Path(settings.what)
    if path.suffix in (".json", ".toml") or path.is_file():
        body["name"], body["definition"] = read_file(path)
    else:
        body["workflow"] = settings.what
    if settings.input is not None:
        body["input"] = _input(settings.input)
    for name in ("fail_mode", "max_price", "bid_price"):
        if getattr(settings, name, None) is not None:
            body[name] = getattr(settings, name)
    return body


# -- runs


def _run(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    client = _client(settings)
    return _follow(client, client.start(_body(settings), secrets.token_hex(16)), bool(settings.watch))


def _rerun(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    client = _client(settings)
    if not settings.step:
        raise ConfigError("say from which step on: --from STEP; archipelag-node workflow show ID lists them")
    return _follow(client, client.rerun(settings.id, settings.step, secrets.token_hex(16)), bool(settings.watch))


def _follow(client: WorkflowClient, started: Mapping[str, Any], is_watched: bool) -> int:
    print(f"run {started['id']} of {started['name'] or 'a workflow'}: {len(started['steps'])} steps", flush=True)
    if not is_watched:
        print(f"Next: archipelag-node workflow show {started['id']}")
        return 0
    return _watch(client, str(started["id"]))


def _watch(client: WorkflowClient, run_id: str) -> int:
    """Its steps as they end; exit status 0 where the run succeeded."""
    from node.workflow_client import StreamLost

    told: set[tuple[str, str]] = set()
    lost = 0
    while True:
        try:
            for event in client.events(run_id):
                lost = 0
                if event.get("type") == "step" and (event["key"], event["state"]) not in told:
                    told.add((event["key"], event["state"]))
                    print(_step_line(event), flush=True)
            return _say_end(client.show(run_id))
        except StreamLost:
            lost += 1
            if lost > _LOST_MAX:
                raise ConfigError(f"the Coordinator does not tell more; ask later: archipelag-node workflow show {run_id}") from None
            time.sleep(_AGAIN_S)


def _step_line(step: Mapping[str, Any]) -> str:
    parts = [f"  {step['key']:<24} {_ENDED.get(step['state'], step['state']):<10}"]
    if step.get("duration_ms") is not None and step["state"] in _ENDED:
        parts.append(f"{step['duration_ms'] / 1000:8.2f} s")
    if step.get("price") not in (None, "0"):
        parts.append(f"{step['price']} credits")
    if (step.get("attempts") or 0) > step.get("tasks", 1):
        parts.append(f"{step['attempts']} attempts")
    if step.get("error"):
        parts.append(f"{step['error']['code']}: {step['error']['message']}")
    return "  ".join(parts).rstrip()


def _say_end(shown: Mapping[str, Any]) -> int:
    took_s = shown["duration_ms"] / 1000 if shown.get("duration_ms") is not None else 0.0
    print(f"{_ENDED.get(shown['state'], shown['state'])} in {took_s:.2f} s for {shown['price']} credits", flush=True)
    if shown.get("output") is not None:
        print(json.dumps(shown["output"], ensure_ascii=False, indent=1))
    if shown["state"] == "succeeded":
        return 0
    error = shown.get("error") or {}
    if error:
        print(f"{error['code']}: {error['message']}", file=sys.stderr)
    broken = next((step["key"] for step in shown["steps"] if step["state"] == "failed"), None)
    if broken is not None:
        print(f"Next: archipelag-node workflow rerun {shown['id']} --from {broken}", file=sys.stderr)
    return 1


def _quote(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    quoted = _client(settings).quote(_body(settings))
    for line in quoted["steps"]:
        times = f"{line['jobs_max']} x {line['price_each_max']} = " if line["jobs_max"] != 1 else ""
        print(f"  {line['step']:<24} {line['cargo']:<24} {times}{line['price_max']} credits")
    print(f"at most {quoted['price_max']} credits for {quoted['jobs_max']} jobs")
    if quoted["unpriced"]:
        print(f"without {', '.join(quoted['unpriced'])}, which no Island offers now")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    client = _client(settings)
    if settings.timeline:
        for event in client.timeline(settings.id)["events"]:
            print(_event_line(event))
        return 0
    shown = client.show(settings.id)
    if settings.json:
        print(json.dumps(shown, ensure_ascii=False, indent=1))
        return 0
    print(f"run {shown['id']} of {shown['name'] or 'a workflow'}, begun {shown['created_at']}")
    for step in shown["steps"]:
        print(_step_line(step))
    if shown["state"] == "running":
        print(f"running; {shown['price']} credits so far")
        return 0
    _say_end(shown)
    return 0


def _event_line(event: Mapping[str, Any]) -> str:
    item = f"[{event['item']}]" if event.get("item") is not None else ""
    parts = [f"{event['at']}  {event['type']:<12}", f"{event['step'] or ''}{item}"]
    parts += [f"attempt {event['attempt']}"] if (event.get("attempt") or 1) > 1 else []
    parts += [f"{event['duration_ms'] / 1000:.2f} s"] if event.get("duration_ms") is not None else []
    parts += [f"on {event['island'][-8:]}"] if event.get("island") else []
    parts += [event["error"]["code"]] if event.get("error") else []
    return "  ".join(parts).rstrip()


def _list(arguments: argparse.Namespace) -> int:
    settings = defaults(_settled(arguments), limit=_LISTED)
    found = _client(settings).list(settings.limit)["data"]
    if not found:
        print("no runs yet; start one with archipelag-node workflow run FILE")
    for run in found:
        print(f"{run['id']}  {run['created_at']}  {_ENDED.get(run['state'], run['state']):<10}  {run['name']}")
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    told = _client(settings).cancel(settings.id)
    print(f"{told['id']}: {told['message']}")
    return 0


# -- what is saved


def _save(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    client = _client(settings)
    saved, _ = _keep(client, settings)
    print(f"{saved['id']}{'' if saved['is_new'] else ' (as before)'}\naddress {saved['address']}")
    print(f"Next: archipelag-node workflow run {saved['name']}@{saved['version']}")
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from coordinator.workflows.store import canonical
    from node.datadir import DataDir
    from protocol.envelope import Label, seal

    settings = defaults(_settled(arguments), data_dir=str(data_home() / "publisher"))
    client = _client(settings)
    saved, definition = _keep(client, settings)
    key = DataDir.open(settings.data_dir).key("publisher")
    told = client.publish(str(saved["name"]), int(saved["version"]), seal(Label.WORKFLOW, canonical(definition.to_json()), key))
    print(f"{told['id']} is published, signed by {told['signer'] or 'nobody'}\naddress {told['address']}")
    print(f"Next: anybody runs it with archipelag-node workflow run {told['id']}")
    return 0


def _keep(client: WorkflowClient, settings: argparse.Namespace) -> tuple[dict[str, Any], Definition]:
    """Saves what a file says. Raises ConfigError for what no Coordinator would take, and for one that has kept something else."""
    from coordinator.workflows.definition import parse_definition
    from coordinator.workflows.errors import FlowError

    name, value = read_file(Path(settings.file))
    try:
        definition = parse_definition(value)
    except FlowError as error:
        raise ConfigError(f"{settings.file}: {error}") from None
    saved = client.save(settings.name or name, value)
    if saved["address"] != definition.address():
        raise ConfigError(f"{settings.coordinator} has saved another workflow than was sent; do not trust it")
    return saved, definition
