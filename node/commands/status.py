"""Show what the node on a data folder is doing: identity, Cargos, jobs, connections."""

from __future__ import annotations

import argparse
import json
from typing import Any

from node.commands.common import add_data_dir, settled
from node.control import ask_node

HELP = "show what a running node does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser, "island")
    parser.add_argument("--json", action="store_true", default=None, help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    settings = settled(arguments, "island")
    status = ask_node(settings.data_dir, "status")
    print(json.dumps(status, indent=1) if settings.json else "\n".join(_lines(status)))
    return 0


def _lines(status: dict[str, Any]) -> list[str]:
    lines = [f"{status['role']} {status['peer_id']}", f"network    {status['network']}"]
    lines += [f"address    {address}" for address in status["addresses"]]
    if status["role"] == "coordinator":
        return [*lines, f"islands    {status['islands']}", f"host       {_pairs(status['host'])}"]
    state = "draining" if status["draining"] else "ready" if status["ready"] else "waiting for a Coordinator"
    lines += [f"state      {state}", f"joined     {status['coordinator'] or '-'}"]
    for cargo in status["cargos"]:
        room = f"{cargo['kv_tokens_free']}/{cargo['kv_tokens_total']} KV tokens, {cargo['slots_free']}/{cargo['slots_total']} slots free"
        lines.append(f"cargo      {cargo['name']} ({cargo['runtime']}): {room}, {cargo['tokens_per_s']:.0f} tokens/s")
    return [
        *lines,
        f"jobs       {_pairs(status['jobs'])}",
        f"tickets    {_pairs(status['tickets'])}",
        f"host       {_pairs(status['host'])}",
    ]


def _pairs(values: dict[str, Any]) -> str:
    flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
    return ", ".join(f"{name} {value}" for name, value in flat.items())
