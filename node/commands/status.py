"""Show what the node on a data folder is doing: identity, Cargos, jobs, connections."""

from __future__ import annotations

import argparse
import json
from typing import Any

from node.commands.common import add_data_dir, settled
from node.control import ask_node
from protocol.prices import format_credits

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
        lines += [f"islands    {status['islands']}"]
        for pipeline in status["pipelines"]:
            lines += _pipeline(pipeline)
        lines += [f"alike      {_pairs(status['cache_model'])}"] if status["cache_model"] else []
        return [*lines, f"host       {_pairs(status['host'])}"]
    if status["role"] == "bridge":
        lines += [f"joined     {status['coordinator'] or '-'}", f"jobs       {_pairs(status['jobs'])}"]
        return [*lines, f"reports    {status['reports']} under way", f"host       {_pairs(status['host'])}"]
    state = "draining" if status["draining"] else "ready" if status["ready"] else "waiting for a Coordinator"
    lines += [f"state      {state}", f"joined     {', '.join(status['coordinators']) or '-'}"]
    for cargo in status["cargos"]:
        room = f"{cargo['kv_tokens_free']}/{cargo['kv_tokens_total']} KV tokens, {cargo['slots_free']}/{cargo['slots_total']} slots free"
        lines.append(f"cargo      {cargo['name']} ({cargo['runtime']}): {room}, {cargo['tokens_per_s']:.0f} tokens/s")
    for shard in status["shards"]:
        lines += _shard(shard)
    lines += [f"loading    {one['name']}: {_share(one['done_bytes'], one['total_bytes'])}" for one in status["loading"]]
    if status["memory_free_bytes"]:
        lines.append(f"memory     {status['memory_free_bytes'] / 1e6:.0f} MB free for layers of large models")
    return [
        *lines,
        f"jobs       {_pairs(status['jobs'])}",
        f"tickets    {_pairs(status['tickets'])}",
        f"claims     {_pairs(status['claims'])}",
        f"files      {_pairs(status['files'])}",
        *(f"  refused  {peer}: {detail}" for peer, detail in status["files"]["bad_peers"].items()),
        f"host       {_pairs(status['host'])}",
    ]


def _share(done: int, total: int) -> str:
    return f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({100 * done // total} %)" if total else f"{done / 1e6:,.0f} MB"


def _pipeline(pipeline: dict[str, Any]) -> list[str]:
    """A Coordinator's: who computes which layers, and what that costs in credits (per job + per 1,000 tokens + per second)."""
    lines = [f"pipeline   {pipeline['name']}: {pipeline['state']}, {pipeline['cells']} KV tokens, mended {pipeline['mended']} times"]
    for number, stage in enumerate(pipeline["stages"]):
        ask = "+".join(format_credits(part) for part in stage["ask"])
        lines.append(f"  stage {number}  layers {stage['layers']} on {stage['island']}, ask {ask}, {stage['bytes_needed'] / 1e6:.0f} MB")
    lines += [f"  loading  {island}: {text}" for island, text in pipeline["loading"].items()]
    return lines + [f"  why      {reason}" for reason in pipeline["reasons"]]


def _shard(shard: dict[str, Any]) -> list[str]:
    """An Island's: what it holds for a pipeline, and how that does."""
    lines = [f"shard      {shard['name']} layers {shard['layers']}: {shard['state']}, {shard['bytes_needed'] / 1e6:.0f} MB planned"]
    if (stage := shard.get("stage")) is not None:
        lines.append(f"  compute  {stage['token_ms']} ms a token; {_pairs(stage['counts'])}")
        lines += [f"  route    {_route(stage['route'], stage['index'])}"] if stage["route"] else []
    if (driver := shard.get("driver")) is not None:
        lines.append(f"  drives   {driver['state']}: {_route(driver['route'], len(driver['route']) - 1)}, {driver['lap_ms']} ms a lap")
        lines += [f"  stage    {peer}: {ms} ms a token" for peer, ms in driver["compute_ms"].items()]
        lines += [f"  broke    {driver['last_break']}"] if driver["last_break"] else []
        lines.append(f"  steps    {_pairs(driver['counts'])}")
    return lines


def _route(route: list[str], own: int | None) -> str:
    return " → ".join(f"[{peer}]" if number == own else peer for number, peer in enumerate(route)) or "none"


def _pairs(values: dict[str, Any]) -> str:
    flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
    return ", ".join(f"{name} {value}" for name, value in flat.items())
