"""Run a bridge: the OpenAI API on this machine, with answers straight from Islands.

A bridge asks a Coordinator for a ticket to each job and then takes the tokens directly from the Island: the Coordinator learns who works
for you, how much and for what price, and never what you ask or what is answered. Point your client's base URL at it and keep your key:

  export ARCHIPELAG_API_KEY=ak_…
  archipelag-node bridge --coordinator http://192.0.2.7:8080
  curl -N http://127.0.0.1:8081/v1/chat/completions -H "Authorization: Bearer $ARCHIPELAG_API_KEY" -d '…'

It serves this machine only, and only clients that show the same key. Prices, limits and errors are the Coordinator's. SIGTERM or Ctrl-C
lets running answers finish (at most 30 s). Whoever owns an Island can read what it computes, unless the job is sealed.
"""

from __future__ import annotations

import argparse
import stat
from pathlib import Path

import trio

from node import logs
from node.commands.common import add_data_dir, add_logging, checked, settled
from node.ready import check_ready_file
from node.settings import defaults, parse_host_port
from privacy.keys import looks_like_api_key
from protocol import limits
from protocol.errors import ConfigError

HELP = "run a bridge: the OpenAI API on this machine, answers straight from Islands"
_KEY_BYTES_MAX = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser, "bridge")
    parser.add_argument(
        "--coordinator",
        action="append",
        metavar="ADDRESS",
        help="multiaddr or http(s) URL of a Coordinator; may be repeated; its identity is pinned at first use",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="your key at the Coordinator; better set ARCHIPELAG_API_KEY or --api-key-file: other users can see a command line",
    )
    parser.add_argument("--api-key-file", metavar="F", help="file that holds the key, and that only you can read")
    parser.add_argument(
        "--http",
        type=checked(parse_host_port),
        metavar="HOST:PORT",
        help="where to serve the API, on this machine (default: 127.0.0.1:8081); port 0 picks a free one",
    )
    parser.add_argument(
        "--job-timeout",
        type=float,
        metavar="SECONDS",
        help=f"longest time that a job may take (default: {limits.JOB_TIMEOUT_S:.0f})",
    )
    parser.add_argument("--ca-file", metavar="F", help="certificates to trust for the Coordinator's https URL")
    parser.add_argument(
        "--ready-file", metavar="F", help="write JSON with pid, peer_id and http to F once the bridge serves"
    )
    add_logging(parser)


def _key(settings: argparse.Namespace) -> str:
    """Raises ConfigError; no message shows the key."""
    if settings.api_key_file is not None:
        key = _read_key(Path(settings.api_key_file).expanduser())
    elif settings.api_key is not None:
        key = settings.api_key.strip()
    else:
        raise ConfigError("your API key is missing: set ARCHIPELAG_API_KEY, or give --api-key-file")
    if not looks_like_api_key(key):
        raise ConfigError("the API key is none of the form ak_…; take the whole key that 'archipelag-node keys create' printed")
    return key


def _read_key(file: Path) -> str:
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        with open(file, "rb") as opened:
            key = opened.read(_KEY_BYTES_MAX).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {getattr(error, 'strerror', 'it holds no key')}") from None
    if mode & 0o077:
        raise ConfigError(f"{file} can be read by others (mode {mode:o}); run: chmod 600 {file}")
    return key


def run(arguments: argparse.Namespace) -> int:
    settings = defaults(
        settled(arguments, "bridge"), coordinator=[], http=("127.0.0.1", 8081), job_timeout=limits.JOB_TIMEOUT_S
    )
    logs.setup(settings.log_json, settings.log_level)
    if not settings.coordinator:
        raise ConfigError("a Coordinator has to be named: --coordinator URL")
    if not 0 < settings.job_timeout <= limits.TICKET_LIFETIME_S:
        raise ConfigError(f"--job-timeout takes more than 0 and at most {limits.TICKET_LIFETIME_S:.0f} seconds")
    key = _key(settings)
    check_ready_file(settings.ready_file)
    from coordinator.config import is_loopback
    from node.bridge_role import BridgeRole, run_bridge
    from node.trust import check_address

    for address in settings.coordinator:
        check_address(address)
    host, port = settings.http
    if not is_loopback(host):
        raise ConfigError(f"--http {host} can be reached from other machines; a bridge serves its own only, such as 127.0.0.1:8081")
    role = BridgeRole(
        data_dir=settings.data_dir,
        coordinators=tuple(settings.coordinator),
        api_key=key,
        http_host=host,
        http_port=port,
        ca_file=settings.ca_file,
        ready_file=settings.ready_file,
        job_timeout_s=settings.job_timeout,
    )
    trio.run(run_bridge, role)
    return 0
