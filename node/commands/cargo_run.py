"""``cargo run``: a Cargo on its publisher's own machine, in the sandbox that an Island would run it in, with no network."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from node.commands.common import add_data_dir, data_home
from node.settings import defaults, settle
from protocol import limits
from protocol.cargo_io import Line, decode_input, encode_line
from protocol.errors import ConfigError, Refused, RemoteProtocolError

if TYPE_CHECKING:
    from node.local_cargos import LocalCargo

_RUN = """\
Run a Cargo here, as an Island would: in the same runtime and the same sandbox, without a network. WHAT is a folder with a cargo.toml, a
.cargo file whose files lie beside it, or a Cargo that ships (cargo list --shipped). The input is one JSON object, the output JSON lines on
stdout. Exit status 0 when the Cargo said done, else 1.

  archipelag-node cargo run text-stats --input '{"text": "one two"}'
  archipelag-node cargo run ./my-cargo --input-file request.json
  echo '{"text": "one two"}' | archipelag-node cargo run text-stats
  archipelag-node cargo run text-stats --example"""
SEED = bytes(16)


def add_action(add: Callable[..., argparse.ArgumentParser]) -> None:
    run = add("run", _run, "run a Cargo here, in its sandbox", _RUN)
    run.add_argument("what", metavar="WHAT", help="a folder, a .cargo file, or the name of a Cargo that ships")
    run.add_argument("--input", metavar="JSON", help="the input (default: what comes on stdin)")
    run.add_argument("--input-file", metavar="F", help="a file with the input")
    run.add_argument("--example", action="store_true", default=None, help="the input of the example that ships with the Cargo")
    run.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: 1)")
    run.add_argument("--cache-dir", metavar="D", help="folder of downloaded models, shared by all nodes of a user")
    add_data_dir(run, "publisher")


def _run(arguments: argparse.Namespace) -> int:
    import trio

    from node.local_cargos import find_local

    settings = defaults(settle(arguments.parser, arguments), input=None, input_file=None, example=False, threads=1, cache_dir=None)
    if settings.threads < 1:
        raise ConfigError("--threads must be at least 1")
    cargo = find_local(settings.what, _publisher_id(arguments))
    if cargo is None:
        from node.shipped import shipped_names

        text = f"{settings.what!r} is no folder with a cargo.toml, no .cargo file and no Cargo that ships"
        raise ConfigError(f"{text} ({', '.join(shipped_names())})")
    data = _input(settings, cargo)
    return trio.run(partial(_perform, cargo, data, settings.threads, settings.cache_dir))


def _publisher_id(arguments: argparse.Namespace) -> str:
    """Whose Cargo a folder would become; a key that never signs where there is none yet."""
    from node.datadir import DataDir
    from node.shipped import PUBLISHER

    settings = defaults(settle(arguments.parser, arguments, strict=False), data_dir=str(data_home() / "publisher"))
    home = Path(settings.data_dir).expanduser()
    if not (home / "publisher.key").is_file():
        return PUBLISHER
    return DataDir.open(home).key("publisher").peer_id


def _input(settings: argparse.Namespace, cargo: LocalCargo) -> bytes:
    """Raises ConfigError for what is no JSON object."""
    given = [name for name in ("input", "input_file", "example") if getattr(settings, name)]
    if len(given) > 1:
        raise ConfigError("give one of --input, --input-file and --example")
    if settings.example:
        if cargo.example is None:
            raise ConfigError(f"{cargo.manifest.name} brings no example; give it an --input")
        data = json.dumps(cargo.example.input).encode()
    elif settings.input is not None:
        data = settings.input.encode()
    elif settings.input_file is not None:
        data = _read(Path(settings.input_file).expanduser())
    else:
        if sys.stdin.isatty():
            print("the input, one JSON object; Ctrl-D ends it:", file=sys.stderr)
        data = sys.stdin.buffer.read(limits.JOB_INPUT_BYTES_MAX + 1)
    try:
        decode_input(data)
    except RemoteProtocolError as error:
        raise ConfigError(f"{error}; an input looks like '{{\"text\": \"one two\"}}'") from None
    return data


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(limits.JOB_INPUT_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


async def _perform(cargo: LocalCargo, data: bytes, threads: int, cache_dir: str | None) -> int:
    from node.cargo_runtimes import Grants, find_runtimes, open_cargo
    from node.local_cargos import bring_files
    from protocol.cargos import Runtime
    from runtimes.base import LineCargo, LineRequest
    from runtimes.store import ModelStore

    store = ModelStore(Path(cache_dir).expanduser() if cache_dir else None)
    with ExitStack() as stack:
        files = await bring_files(cargo, store, stack)
        runtimes = await find_runtimes(f"cargo-run-{os.getpid()}", cargo.manifest.runtime is Runtime.CONTAINER)
        print(runtimes.sandbox, file=sys.stderr)
        async with open_cargo(cargo.manifest, cargo.address, files, runtimes, Grants(threads=threads)) as loaded:
            if not isinstance(loaded, LineCargo):
                raise ConfigError(f"{cargo.manifest.name} writes texts; serve it with `archipelag-node start --cargo` and ask it for one")
            try:
                async with loaded.run_lines(LineRequest("run", data, SEED)) as run:
                    async for line in run:
                        _print(line)
            except Refused as refusal:
                print(f"{refusal.code}: {refusal.message}", file=sys.stderr)
                return 1
    return 0


def _print(line: Line) -> None:
    sys.stdout.buffer.write(encode_line(line))
    sys.stdout.buffer.flush()
