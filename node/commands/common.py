"""Options that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from node.settings import defaults, settle
from protocol.errors import ConfigError

T = TypeVar("T")

_COUNT_DIGITS_MAX = 9


def data_home() -> Path:
    """``$XDG_DATA_HOME/archipelag``, else ``~/.local/share/archipelag``."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "archipelag"


def add_data_dir(parser: argparse.ArgumentParser, role: str) -> None:
    parser.add_argument("--data-dir", metavar="D", help=f"folder for keys and state (default: {data_home() / role})")


def add_coordinator(parser: argparse.ArgumentParser) -> None:
    """For commands that ask a Coordinator over HTTP, as an account."""
    parser.add_argument("--coordinator", metavar="URL", help="the Coordinator's URL")
    parser.add_argument("--ca-file", metavar="F", help="certificates to trust for https, PEM")
    parser.add_argument("--api-key", metavar="KEY", help="your API key; better in ARCHIPELAG_API_KEY")


def need_coordinator(settings: argparse.Namespace) -> str:
    """Its URL. Raises ConfigError."""
    if not settings.coordinator:
        raise ConfigError("say which Coordinator: --coordinator URL, or ARCHIPELAG_COORDINATOR")
    return str(settings.coordinator)


def need_key(settings: argparse.Namespace) -> str:
    """The account's API key. Raises ConfigError."""
    if not settings.api_key:
        text = "an API key is needed: --api-key, or ARCHIPELAG_API_KEY"
        raise ConfigError(f"{text}; the Coordinator's operator makes one with archipelag-node keys create")
    return str(settings.api_key)


def add_logging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-json", action="store_true", default=None, help="log as JSON, one object a line, on stderr"
    )
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), help="how much to log (default: info)"
    )


def add_network(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--listen",
        action="append",
        metavar="MULTIADDR",
        help=f"where peers can reach this node, such as {example}; may be repeated; port 0 picks a free one",
    )
    parser.add_argument(
        "--bootstrap",
        action="append",
        metavar="MULTIADDR",
        help="a peer to connect to at start, with /p2p/PEER_ID at its end; may be repeated",
    )
    parser.add_argument(
        "--no-mdns", action="store_true", default=None, help="do not look for peers on the local network"
    )
    parser.add_argument(
        "--ready-file", metavar="F", help="write JSON with pid, peer_id and addresses to F once the node serves"
    )


def add_books(parser: argparse.ArgumentParser) -> None:
    """For commands that work on a Coordinator's books."""
    add_data_dir(parser, "coordinator")
    parser.add_argument(
        "--database-url", metavar="URL", help="the Coordinator's database, where it has another than its data folder's"
    )


def settled(arguments: argparse.Namespace, role: str, strict: bool = True) -> argparse.Namespace:
    """Arguments with environment, config file and common defaults filled in; ``strict`` as in ``settle``. Raises ConfigError."""
    if arguments.data_dir is None:
        arguments.data_dir = os.environ.get("ARCHIPELAG_DATA_DIR") or str(data_home() / role)
    return defaults(settle(arguments.parser, arguments, strict=strict), log_json=False, log_level="info")


def parse_count(text: str) -> int:
    """A whole number in at most nine ASCII digits. Raises ValueError."""
    if not (text.isascii() and text.isdigit() and len(text) <= _COUNT_DIGITS_MAX):
        raise ValueError(f"{text[:40]!r} is no whole number of at most {_COUNT_DIGITS_MAX} digits")
    return int(text)


def checked(convert: Callable[[str], T]) -> Callable[[str], T]:
    """A converter for argparse whose own words reach the user."""

    def read(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read
