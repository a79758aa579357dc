"""List the peers of a running node: who is connected, at which round trip, and which Cargos its Island offers."""

from __future__ import annotations

import argparse
import json
from typing import Any

from node.commands.common import add_data_dir, settled
from node.control import ask_node

HELP = "list the peers of a running node"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser, "island")
    parser.add_argument("--json", action="store_true", default=None, help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    settings = settled(arguments, "island")
    peers = ask_node(settings.data_dir, "peers")["peers"]
    print(json.dumps(peers, indent=1) if settings.json else "\n".join(_table(peers)))
    return 0


def _table(peers: list[dict[str, Any]]) -> list[str]:
    if not peers:
        return ["no peers yet"]
    lines = [f"{'peer':<54} {'link':<10} {'round trip':>10}  cargos"]
    for peer in peers:
        island = peer["island"]
        cargos = ", ".join(f"{name} at {island['asks'][name]}" for name in island["cargos"]) if island else "-"
        round_trip = f"{peer['round_trip_ms']} ms" if peer["round_trip_ms"] is not None else "-"
        lines.append(
            f"{peer['peer_id']:<54} {'connected' if peer['connected'] else 'known':<10} {round_trip:>10}  {cargos}"
        )
    return lines
