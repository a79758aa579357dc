"""Run a file of inputs at a Coordinator, many at once on many Islands: OpenAI's batches from the command line.

  batch run FILE         send a file, wait with a progress bar, and write the answers beside it
  batch wait ID          wait for a batch that runs, and write its answers
  batch list             your batches, the newest first
  batch show ID          how far a batch is, and what is wrong with its lines
  batch output ID        write the answers of a batch that has ended
  batch cancel ID        end a batch; what is done by then is kept

FILE has one input a line: plain prompts (.txt), JSON objects ({"prompt": …}, {"messages": […]}, or what the Cargo takes), or OpenAI's own
JSONL ({"custom_id": …, "method": "POST", "url": …, "body": …}). A line that is wrong is told by its number; the others run. Each answer
costs what it would cost alone. Ctrl-C leaves the batch running.

examples:
  archipelag-node batch run prompts.txt --cargo smollm2-135m --set max_tokens=64 --coordinator URL
  archipelag-node batch run requests.jsonl --output answers.jsonl --max-parallelism 8 --coordinator URL
  archipelag-node batch wait batch_4f1c2a9b8d7e6f5a4b3c2d1e --coordinator URL

--coordinator and --api-key may stand in ARCHIPELAG_COORDINATOR and ARCHIPELAG_API_KEY, or in config.toml in the data folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from node.batch_input import ENDPOINTS, Plan, check_size, parse_field, plan, requests
from node.commands.common import add_data_dir, checked, need_coordinator, need_key, parse_count, settled
from node.settings import defaults
from protocol import checks
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from node.batch_client import BatchClient

HELP = "run a file of inputs: many at once, on many Islands"
ENDED = ("completed", "failed", "expired", "cancelled")
_LISTED = 20
_LOOK_S, _LOOK_MAX_S = 0.2, 2.0  # between two looks at a batch
_LOST_S = 120.0  # so long a Coordinator may be away meanwhile
_SHOWN_ERRORS = 10
_IN_MEMORY_BYTES = 8 * 1024 * 1024
_TENTHS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, perform: Callable[[argparse.Namespace], int], brief: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=brief, description=f"{brief[0].upper()}{brief[1:]}.")
        made.add_argument("--coordinator", "--url", metavar="URL", help="the Coordinator's URL")
        made.add_argument("--ca-file", metavar="F", help="certificates to trust for https, PEM")
        made.add_argument("--api-key", "--key", metavar="KEY", help="your API key; better in ARCHIPELAG_API_KEY")
        add_data_dir(made, "consumer")
        made.set_defaults(parser=made, perform=perform)
        return made

    start = add("run", _run, "send a file, wait for it, and write the answers beside it")
    start.add_argument("file", metavar="FILE", help="prompts, JSON objects or OpenAI's requests, one a line")
    start.add_argument("--cargo", metavar="NAME", help="what is to run, where the lines do not say it")
    start.add_argument("--endpoint", choices=tuple(ENDPOINTS), help="what the lines are for, where that cannot be seen")
    start.add_argument(
        "--set", action="append", type=checked(parse_field), metavar="NAME=VALUE", help="a field of every request; may be repeated"
    )
    start.add_argument("--max-parallelism", type=checked(parse_count), metavar="N", help="so many lines at once at most")
    start.add_argument("--no-wait", action="store_true", default=None, help="print the batch's id and leave it running")
    wait = add("wait", _wait, "wait for a batch that runs, and write its answers")
    output = add("output", _output, "write the answers of a batch that has ended")
    for one in (start, wait, output):
        beside = "FILE.answers.jsonl" if one is start else "ID.answers.jsonl"
        one.add_argument("--output", metavar="OUT", help=f"where to write the answers (default: {beside}); - for stdout")
    listing = add("list", _list, "your batches, the newest first")
    listing.add_argument("--limit", type=checked(parse_count), metavar="N", help=f"so many (default: {_LISTED})")
    show = add("show", _show, "how far a batch is, and what is wrong with its lines")
    show.add_argument("--json", action="store_true", default=None, help="all of it as JSON")
    cancel = add("cancel", _cancel, "end a batch; what is done by then is kept")
    for one in (wait, output, show, cancel):
        one.add_argument("id", metavar="ID", help="the batch's id, as run and list print it")


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.perform(arguments))


@contextlib.contextmanager
def _client(settings: argparse.Namespace) -> Iterator[BatchClient]:
    from node.batch_client import BatchClient

    client = BatchClient(need_coordinator(settings), need_key(settings), settings.ca_file)
    try:
        yield client
    finally:
        client.close()


def _settled(arguments: argparse.Namespace) -> argparse.Namespace:
    return settled(arguments, "consumer", strict=False)


# -- run


def _run(arguments: argparse.Namespace) -> int:
    settings = defaults(_settled(arguments), cargo="", set=[], no_wait=False)
    file = Path(settings.file).expanduser()
    answers = _Answers.beside(file, settings.output)
    if not settings.no_wait:
        answers.check()
    endpoint = ENDPOINTS.get(settings.endpoint or "", "")
    with _client(settings) as client, tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as made:
        how = _write(file, settings.cargo, endpoint, dict(settings.set), made)
        sent = client.send(f"{file.stem}.jsonl", made)
        body: dict[str, Any] = {"input_file_id": sent["id"], "endpoint": how.endpoint, "completion_window": "24h"}
        if settings.max_parallelism is not None:
            body["max_parallelism"] = settings.max_parallelism
        batch = client.begin(body, secrets.token_hex(16))
        if settings.no_wait:
            print(batch["id"])
            return 0
        return _to_the_end(client, batch, answers, settings)


def _write(file: Path, cargo: str, endpoint: str, fields: dict[str, Any], to: IO[bytes]) -> Plan:
    """The requests of a file, one a line; where they begin is where ``to`` stands afterwards. Raises ConfigError."""
    count = size = 0
    try:
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            first = next((line for line in lines if line.strip()), None)
            if first is None:
                raise ConfigError(f"{file} has no lines")
            how = plan(file.name, first, cargo, endpoint, fields)
            lines.seek(0)
            for line in requests(lines, how):
                count, size = count + (line != b"\n"), size + len(line)
                to.write(line)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8; convert it with iconv -t UTF-8") from None
    check_size(count, size)
    to.seek(0)
    return how


def _wait(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    answers = _Answers.beside(Path(_name_of(settings.id)), settings.output)
    answers.check()
    with _client(settings) as client:
        return _to_the_end(client, client.show(settings.id), answers, settings)


def _to_the_end(client: BatchClient, batch: dict[str, Any], answers: _Answers, settings: argparse.Namespace) -> int:
    """Shows how far a batch is until it has ended, then writes its answers."""
    batch_id = checks.made_printable(str(batch["id"]))
    again = f"archipelag-node batch wait {batch_id}" + (f" --output {settings.output}" if settings.output else "")
    print(f"batch {batch_id}", file=sys.stderr)
    try:
        with _Progress() as progress:
            batch = _watched(client, batch, progress)
        answers.write(client, batch)
    except KeyboardInterrupt:
        end = f"archipelag-node batch cancel {batch_id}"
        print(f"\nthe batch goes on without you; come back with\n  {again}\nor end it with\n  {end}", file=sys.stderr)
        raise
    except ConfigError:
        print(f"nothing of the batch is lost; come back with\n  {again}", file=sys.stderr)
        raise
    return _report(batch, answers)


def _watched(client: BatchClient, batch: dict[str, Any], progress: _Progress) -> dict[str, Any]:
    """The batch as it ended. Raises ConfigError."""
    from node.batch_client import Unreachable

    pause_s, lost_at = _LOOK_S, None
    while batch["status"] not in ENDED:
        progress.show(batch)
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.2, _LOOK_MAX_S)
        try:
            batch, lost_at = client.show(batch["id"]), None
        except Unreachable:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _LOST_S:
                raise
    progress.show(batch)
    return batch


class _Progress:
    """On stderr: a bar where somebody watches a terminal, else a line about every tenth."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._said = ""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, batch: dict[str, Any]) -> None:
        counts = batch["request_counts"]
        done, total, failed = counts["completed"] + counts["failed"], counts["total"], counts["failed"]
        if not total:
            return
        if sys.stderr.isatty():
            self._show_bar(done, total, failed, batch["status"])
            return
        line = f"{done * _TENTHS // total * 10} % of {total:,} lines"
        if line != self._said:
            self._said = line
            print(line + (f", {failed:,} with an error" if failed else ""), file=sys.stderr, flush=True)

    def _show_bar(self, done: int, total: int, failed: int, status: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="line", file=sys.stderr)
        self._bar.set_description(status, refresh=False)
        if failed:
            self._bar.set_postfix(errors=failed, refresh=False)
        self._bar.update(done - self._bar.n)


# -- answers


class _Answers:
    """Where the answers of a batch are written, and its errors beside them."""

    def __init__(self, output: Path | None, errors: Path) -> None:
        """``output`` None: stdout."""
        self.output, self.errors = output, errors

    @classmethod
    def beside(cls, file: Path, output: str | None) -> _Answers:
        if output == "-":
            return cls(None, file.with_name(f"{file.stem}.errors.jsonl"))
        to = Path(output).expanduser() if output is not None else file.with_name(f"{file.stem}.answers.jsonl")
        return cls(to, to.with_name(f"{to.stem.removesuffix('.answers')}.errors.jsonl"))

    def check(self) -> None:
        """Raises ConfigError rather than to overwrite what somebody paid for."""
        for file in (self.output, self.errors):
            if file is not None and file.exists():
                raise ConfigError(f"{file} exists already; move it away, or name another file with --output")
        if self.output is not None and not self.output.parent.is_dir():
            raise ConfigError(f"there is no folder {self.output.parent} to write the answers to")

    def write(self, client: BatchClient, batch: dict[str, Any]) -> None:
        if batch["output_file_id"] is not None and self.output is None:
            client.fetch(batch["output_file_id"], sys.stdout.buffer.write)
            sys.stdout.flush()
        elif batch["output_file_id"] is not None and self.output is not None:
            client.save(batch["output_file_id"], self.output)
        if batch["error_file_id"] is not None:
            client.save(batch["error_file_id"], self.errors)


def _report(batch: dict[str, Any], answers: _Answers) -> int:
    """What came of it, on stderr; 0 where every line has its answer."""
    counts = batch["request_counts"]
    said = [f"{batch['status']}: {counts['completed']:,} of {counts['total']:,} lines, {batch['price']} credits"]
    if batch["output_file_id"] is not None and answers.output is not None:
        said.append(f"answers in {answers.output}")
    if batch["error_file_id"] is not None:
        said.append(f"errors in {answers.errors}")
    said += _errors(batch)
    print("\n".join(said), file=sys.stderr)
    return 0 if batch["status"] == "completed" and counts["completed"] == counts["total"] else 1


def _errors(batch: dict[str, Any]) -> list[str]:
    """What is wrong with lines, or with all of it."""
    found = (batch.get("errors") or {}).get("data") or []
    lines = [
        checks.made_printable(f"  line {each['line']}: {each['message']}" if each.get("line") else f"  {each['message']}")
        for each in found[:_SHOWN_ERRORS]
    ]
    return lines + ([f"  and {len(found) - _SHOWN_ERRORS} more"] if len(found) > _SHOWN_ERRORS else [])


def _output(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    answers = _Answers.beside(Path(_name_of(settings.id)), settings.output)
    answers.check()
    with _client(settings) as client:
        batch = client.show(settings.id)
        if batch["status"] not in ENDED:
            raise ConfigError(f"the batch is {batch['status']}; wait for it with archipelag-node batch wait {settings.id}")
        answers.write(client, batch)
    return _report(batch, answers)


def _name_of(batch_id: str) -> str:
    """For a file. Raises ConfigError for what is no id."""
    if not (batch_id.isascii() and batch_id.replace("_", "").isalnum()):
        raise ConfigError(f"{batch_id[:60]!r} is no id of a batch; see archipelag-node batch list")
    return batch_id


# -- looking, and ending


def _list(arguments: argparse.Namespace) -> int:
    settings = defaults(_settled(arguments), limit=_LISTED)
    with _client(settings) as client:
        found = client.list(settings.limit)
    if not found:
        print("no batches yet; begin one with archipelag-node batch run FILE")
    for batch in found:
        counts = batch["request_counts"]
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(batch["created_at"]))
        line = f"{batch['id']}  {made}  {batch['status']:<11}  {counts['completed']}/{counts['total']}  {batch['endpoint']}"
        print(checks.made_printable(line))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    settings = defaults(_settled(arguments), json=False)
    with _client(settings) as client:
        batch = client.show(settings.id)
    if settings.json:
        print(json.dumps(batch, indent=1))
        return 0
    counts = batch["request_counts"]
    print(f"{batch['status']}: {counts['completed']:,} of {counts['total']:,} lines, {counts['failed']:,} with an error")
    print(f"{batch['price']} credits so far; endpoint {checks.made_printable(batch['endpoint'])}")
    for line in _errors(batch):
        print(line)
    if batch["status"] in ENDED and (batch["output_file_id"] or batch["error_file_id"]):
        print(f"write its answers with archipelag-node batch output {settings.id}")
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    settings = _settled(arguments)
    with _client(settings) as client:
        batch = client.cancel(settings.id)
    counts = batch["request_counts"]
    print(f"{batch['status']}: {counts['completed']:,} of {counts['total']:,} lines are done; batch output {settings.id} writes them")
    return 0
