"""Make an API key for a Coordinator. It works beside a running Coordinator, which accepts the key at once.

The key is printed once, alone on stdout, and stored only as a hash: whoever loses it makes another.
"""

from __future__ import annotations

import argparse

from node.commands.common import add_data_dir, settled
from node.datadir import DataDir
from node.settings import defaults
from protocol.errors import ConfigError

HELP = "make API keys"
_SCOPES = ("read", "write")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("create",), help="create: make a key and print it")
    add_data_dir(parser, "coordinator")
    parser.add_argument(
        "--database-url", metavar="URL", help="the Coordinator's database, where it has another than its data folder's"
    )
    parser.add_argument("--account", metavar="NAME", help="account that the key belongs to (default: local)")
    parser.add_argument("--scopes", metavar="LIST", help="what it may do: read, write, or both (default: read,write)")
    parser.add_argument("--rate-limit", type=int, metavar="N", help="requests a minute (default: no limit)")


def run(arguments: argparse.Namespace) -> int:
    settings = defaults(settled(arguments, "coordinator"), account="local", scopes="read,write")
    scopes = tuple(dict.fromkeys(part.strip() for part in settings.scopes.split(",") if part.strip()))
    if not scopes or not set(scopes) <= set(_SCOPES):
        raise ConfigError(f"--scopes takes {' and '.join(_SCOPES)}, separated by a comma, not {settings.scopes!r}")
    if settings.rate_limit is not None and settings.rate_limit < 1:
        raise ConfigError("--rate-limit must be at least 1 request a minute")
    from coordinator.keys import create_key
    from node.database import database_url

    DataDir.open(settings.data_dir)
    print(
        create_key(
            database_url(settings.data_dir, settings.database_url), settings.account, scopes, settings.rate_limit or 0
        )
    )
    return 0
