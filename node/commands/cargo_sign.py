"""Cargos of one's own: a folder with a ``cargo.toml`` becomes a signed manifest that anybody can check."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node.commands.cache import policy_text
from node.commands.common import add_data_dir, data_home
from node.settings import defaults, settle
from protocol import limits
from protocol.errors import ConfigError, RemoteProtocolError

_ROLE = "publisher"
_LINES = 12  # of a schema or of options that ``show`` prints

_NEW = """\
Make a folder NAME with a cargo.toml that says what a Cargo is: its runtime, its files, what it needs and what it costs. Edit it, put the
files beside it, then: cargo build NAME, cargo sign NAME."""
_BUILD = """\
Read FOLDER/cargo.toml, hash the files that it names, and write NAME-RELEASE.manifest into the folder: the bytes that are signed. Files
that are not in the folder need sources, sha256, size_bytes and, over 1 MiB, root."""
_SIGN = """\
Sign FOLDER/NAME-RELEASE.manifest, which `cargo build` wrote, as NAME-RELEASE.cargo. The key is publisher.key in the data folder, made on
first use: whoever has it publishes in your name, so keep a copy in a safe place."""
_VERIFY = """\
Check a .cargo file: that its publisher has signed it, that its time is not over and, with --folder, that the files there are those that
it names. Exit status 0 where all is well, else 1."""
_SHOW = "Print what a .cargo or .manifest file says: who made it, what it runs, what it needs and what it costs."


def add_actions(add: Callable[..., argparse.ArgumentParser]) -> None:
    """``add(name, perform, brief, text)`` makes the parser of one action."""
    new = add("new", _new, "make a folder with a cargo.toml", _NEW)
    new.add_argument("name", metavar="NAME", help="the Cargo's name: lower-case words, joined by dashes or dots")
    new.add_argument(
        "--runtime", default="wasm", metavar="R", help="gguf, onnx, wasm, container or diffusers (default: wasm)"
    )
    build = add("build", _build, "hash a Cargo's files and write its manifest", _BUILD)
    sign = add("sign", _sign, "sign a manifest", _SIGN)
    for parser in (build, sign):
        parser.add_argument(
            "folder", nargs="?", default=".", metavar="FOLDER", help="the Cargo's folder (default: where you are)"
        )
        add_data_dir(parser, _ROLE)
    verify = add("verify", _verify, "check a .cargo file, and its files", _VERIFY)
    verify.add_argument("file", metavar="FILE", help="a .cargo file")
    verify.add_argument("--folder", metavar="D", help="check the files in this folder too")
    show = add("show", _show, "print what a .cargo file says", _SHOW)
    show.add_argument("file", metavar="FILE", help="a .cargo file, or a .manifest that is not signed yet")


def _new(arguments: argparse.Namespace) -> int:
    from node.cargo_folder import CARGO_FILE, template
    from protocol.cargos import Runtime, check_name

    try:
        check_name(arguments.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if arguments.runtime not in list(Runtime):
        raise ConfigError(f"--runtime is one of {', '.join(Runtime)}, not {arguments.runtime[:40]!r}")
    file = Path(arguments.name) / CARGO_FILE
    try:
        file.parent.mkdir(exist_ok=True)
        with open(file, "x") as new:
            new.write(template(arguments.name, Runtime(arguments.runtime)))
    except FileExistsError:
        raise ConfigError(f"{file} is there already; edit it, or choose another name") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    print(
        f"{file} is made.\nNext: edit it, put the Cargo's files beside it, then\n  archipelag-node cargo build {arguments.name}"
    )
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from node.cargo_folder import read_folder
    from node.datadir import write_atomically
    from protocol.cargos import address_of, canonical_manifest
    from runtimes.store.progress import ConsoleProgress

    folder, key = Path(arguments.folder), _publisher(arguments)
    with ConsoleProgress() as progress:
        manifest = read_folder(folder, key.peer_id, time.time_ns() // 1_000_000, progress)
    file = folder / f"{manifest.name}-{manifest.release}.manifest"
    try:
        write_atomically(file, canonical_manifest(manifest), mode=0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    print(f"{file}: {_count(len(manifest.files))}, {manifest.size_bytes:,} bytes, address {address_of(manifest)}")
    hidden = [each.path for each in manifest.files if not each.sources]
    if hidden:
        print(
            f"Only Islands that have them can give {', '.join(hidden[:5])} on; name sources in cargo.toml to let others download."
        )
    print(f"Next: archipelag-node cargo sign {folder}")
    return 0


def _sign(arguments: argparse.Namespace) -> int:
    from node.datadir import write_atomically
    from protocol.cargos import address_of, sign_cargo

    folder, key = Path(arguments.folder), _publisher(arguments)
    file = _newest_manifest(folder)
    manifest = _read_manifest(file)
    if manifest.publisher != key.peer_id:
        raise ConfigError(
            f"{file} was built for {manifest.publisher}, and this key is {key.peer_id}; build it again, or name its --data-dir"
        )
    signed = file.with_suffix(".cargo")
    try:
        write_atomically(signed, sign_cargo(manifest, key), mode=0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {signed}: {error.strerror}") from error
    print(f"{signed}: {manifest.name} {manifest.release} by {key.peer_id}\naddress {address_of(manifest)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from node.cargo_folder import check_folder
    from protocol.cargos import read_cargo, unexpired
    from runtimes.store.progress import ConsoleProgress

    try:
        cargo = read_cargo(_read(Path(arguments.file)))
        unexpired(cargo.manifest, time.time_ns() // 1_000_000)
    except RemoteProtocolError as error:
        print(f"{arguments.file}: {error}", file=sys.stderr)
        return 1
    complaints = []
    if arguments.folder is not None:
        with ConsoleProgress() as progress:
            complaints = check_folder(cargo.manifest, Path(arguments.folder), progress)
    for complaint in complaints:
        print(f"{arguments.file}: {complaint}", file=sys.stderr)
    if not complaints:
        manifest = cargo.manifest
        what = f"; {_count(len(manifest.files))} checked" if arguments.folder is not None else ""
        print(f"{manifest.name} {manifest.release} was signed by {manifest.publisher}{what}\naddress {cargo.address}")
    return 1 if complaints else 0


def _show(arguments: argparse.Namespace) -> int:
    from protocol.cargos import CargoManifest, read_cargo

    file = Path(arguments.file)
    try:
        manifest: CargoManifest = (
            _read_manifest(file) if file.suffix == ".manifest" else read_cargo(_read(file)).manifest
        )
    except RemoteProtocolError as error:
        raise ConfigError(f"{file}: {error}") from error
    print("\n".join(f"{name:<14}{text}" for name, text in _rows(manifest)))
    return 0


def _rows(manifest: Any) -> list[tuple[str, str]]:
    from protocol.prices import format_ask

    needs = manifest.needs
    rows = [
        ("name", f"{manifest.name} {manifest.release}"),
        ("publisher", manifest.publisher),
        ("runtime", f"{manifest.runtime}, begins with {manifest.entry}"),
        ("licence", manifest.licence),
        ("ask", f"{format_ask(manifest.ask)} credits (per job + per 1,000 output tokens + per second)"),
        ("trust level", str(manifest.trust_level)),
        ("needs", f"{needs.memory_bytes / 2**20:,.0f} MB, {needs.time_s} s, {needs.cpu_threads} CPU threads"),
        ("cache", policy_text(manifest.cache)),
        ("published", _date(manifest.published_at_ms)),
        ("expires", _date(manifest.expires_at_ms) if manifest.expires_at_ms else "never"),
    ]
    if manifest.description:
        rows.insert(1, ("", manifest.description))
    for file in manifest.files:
        rows.append(("file", f"{file.path}  {file.size_bytes:,} bytes  {file.sha256}"))
        rows += [("", f"  root {file.root}")] if file.root else []
        rows += [("", f"  {source}") for source in file.sources[:_LINES]]
    rows += [(name.replace("_", " "), getattr(manifest, name)) for name in ("options", "input_schema", "output_schema")]
    return rows


def _count(files: int) -> str:
    return f"{files} file{'' if files == 1 else 's'}"


def _date(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at_ms / 1000))


def _publisher(arguments: argparse.Namespace) -> Any:
    from node.datadir import DataDir

    settings = defaults(settle(arguments.parser, arguments, strict=False), data_dir=str(data_home() / _ROLE))
    return DataDir.open(settings.data_dir).key(_ROLE)


def _newest_manifest(folder: Path) -> Path:
    """What the folder's cargo.toml stands for. Raises ConfigError."""
    from node.cargo_folder import CARGO_FILE, name_of

    name, release = name_of(folder)
    file = folder / f"{name}-{release}.manifest"
    if not file.is_file():
        raise ConfigError(
            f"{file} is not there; {CARGO_FILE} says {name} {release}: run archipelag-node cargo build {folder} first"
        )
    return file


def _read_manifest(file: Path) -> Any:
    from protocol.cargos import read_manifest

    try:
        return read_manifest(_read(file))
    except RemoteProtocolError as error:
        raise ConfigError(f"{file}: {error}; build it again") from error


def _read(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(limits.ENVELOPE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
