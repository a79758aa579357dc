"""Peer streams beside raw TCP: echo round trips of 64 B, 16 KiB, 256 KiB and 4 MiB, and one-way throughput, between two processes.

Ours is what the node uses: FrameStream over Noise and Yamux, a message encoded, encrypted, decrypted and decoded on both ends. Raw is
a bare trio TCP stream that sends the same number of bytes. Both are measured in turn, in the same rounds, so that whatever else the
machine does meets both; figures are medians over all rounds.

    python -m bench.streams [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from bench.bars import at_least, at_most
from node.net.frames import FrameStream
from node.net.host import open_host
from protocol.errors import LinkLost
from protocol.registry import Registry, body

SIZES_BYTES = {"64 B": 64, "16 KiB": 16 * 1024, "256 KiB": 256 * 1024, "4 MiB": 4 * 1024 * 1024}
_ECHO, _SINK = "/bench/echo/1", "/bench/sink/1"
_FLOW_MESSAGES = 32  # of 4 MiB: 128 MiB a round
_READ_BYTES = 256 * 1024
BENCH = Registry("bench")


@BENCH.message(1)
@dataclass(frozen=True, slots=True)
class Blob:
    number: int
    data: bytes = body()


BENCH.seal()


# -- the other process


async def _echo(stream: FrameStream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except LinkLost:
        return


async def _sink(stream: FrameStream) -> None:
    """Takes _FLOW_MESSAGES at a time and answers with one empty Blob."""
    try:
        while True:
            for _ in range(_FLOW_MESSAGES):
                await stream.receive()
            await stream.send(Blob(0))
    except LinkLost:
        return


async def _raw_serve(stream: trio.SocketStream) -> None:
    """First byte: E echoes everything, S swallows a flow at a time and answers with one byte."""
    async with stream:
        try:
            mode = await stream.receive_some(1)
            while mode == b"E":
                data = await stream.receive_some(_READ_BYTES)
                if not data:
                    return
                await stream.send_all(data)
            while mode == b"S":
                if not await _raw_take(stream, _FLOW_MESSAGES * SIZES_BYTES["4 MiB"]):
                    return
                await stream.send_all(b"!")
        except trio.BrokenResourceError:
            return


async def _raw_take(stream: trio.SocketStream, count: int) -> bool:
    while count:
        data = await stream.receive_some(min(count, _READ_BYTES))
        if not data:
            return False
        count -= len(data)
    return True


async def _serve() -> None:
    async with open_host(bytes([2]) * 32) as host, trio.open_nursery() as nursery:
        host.set_handler(_ECHO, BENCH, _echo)
        host.set_handler(_SINK, BENCH, _sink)
        listeners = await nursery.start(trio.serve_tcp, _raw_serve, 0)
        port = listeners[0].socket.getsockname()[1]
        print(json.dumps({"address": host.addresses()[0], "raw_port": port}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)  # the parent closes it when it is done
        nursery.cancel_scope.cancel()


@contextmanager
def _server() -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.streams", "--serve"]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.communicate("", timeout=20)


# -- this process


async def _median_ms(call: Callable[[], Awaitable[None]], repeats: int) -> float:
    times_ms = []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        await call()
        times_ms.append((time.perf_counter_ns() - began) / 1e6)
    return statistics.median(times_ms)


class _Ours:
    name = "ours"

    def __init__(self, echo: FrameStream, sink: FrameStream) -> None:
        self._echo, self._sink = echo, sink

    async def echo(self, payload: bytes) -> None:
        await self._echo.send(Blob(1, payload))
        answer = await self._echo.receive()
        assert len(answer.data) == len(payload)

    async def flow(self) -> None:
        blob = Blob(1, bytes(SIZES_BYTES["4 MiB"]))
        for _ in range(_FLOW_MESSAGES):
            await self._sink.send(blob)
        await self._sink.receive()


class _Raw:
    name = "raw"

    def __init__(self, echo: trio.SocketStream, sink: trio.SocketStream) -> None:
        self._echo, self._sink = echo, sink

    async def echo(self, payload: bytes) -> None:
        async with trio.open_nursery() as nursery:
            if len(payload) > _READ_BYTES:  # both socket buffers would fill up
                nursery.start_soon(self._echo.send_all, payload)
            else:
                await self._echo.send_all(payload)
            assert await _raw_take(self._echo, len(payload))

    async def flow(self) -> None:
        payload = bytes(SIZES_BYTES["4 MiB"])
        for _ in range(_FLOW_MESSAGES):
            await self._sink.send_all(payload)
        assert await _raw_take(self._sink, 1)


async def _measure(server: dict[str, Any], quick: bool) -> dict[str, Any]:
    rounds, budget_bytes = (3, 16 * 1024 * 1024) if quick else (7, 64 * 1024 * 1024)
    async with open_host(bytes([1]) * 32) as host:
        peer = await host.connect(server["address"])
        ours = _Ours(await host.open(peer, _ECHO, BENCH), await host.open(peer, _SINK, BENCH))
        streams = [await trio.open_tcp_stream("127.0.0.1", server["raw_port"]) for _ in range(2)]
        raw = _Raw(*streams)
        for stream, mode in zip(streams, (b"E", b"S"), strict=True):
            await stream.send_all(mode)
        result = await _rounds((ours, raw), rounds, budget_bytes)
        for stream in streams:
            await stream.aclose()
    return result


async def _rounds(sides: tuple[_Ours, _Raw], rounds: int, budget_bytes: int) -> dict[str, Any]:
    echo_ms: dict[str, dict[str, list[float]]] = {size: {"ours": [], "raw": []} for size in SIZES_BYTES}
    flow_mb_s: dict[str, list[float]] = {"ours": [], "raw": []}
    for side in sides:
        await side.flow()  # warm up
    for _ in range(rounds):
        for name, size in SIZES_BYTES.items():
            repeats = max(5, min(200, budget_bytes // size // 4))
            for side in sides:
                payload = bytes(size)
                echo_ms[name][side.name].append(await _median_ms(lambda s=side, p=payload: s.echo(p), repeats))  # type: ignore[misc]
        for side in sides:
            began = time.perf_counter()
            await side.flow()
            flow_mb_s[side.name].append(_FLOW_MESSAGES * SIZES_BYTES["4 MiB"] / 1e6 / (time.perf_counter() - began))
    return {
        "echo_ms_p50": {
            size: {k: round(statistics.median(v), 4) for k, v in of.items()} for size, of in echo_ms.items()
        },
        "one_way_mb_s": {k: round(statistics.median(v), 1) for k, v in flow_mb_s.items()},
        "one_way_mb_s_range": {k: [round(min(v), 1), round(max(v), 1)] for k, v in flow_mb_s.items()},
        "rounds": rounds,
    }


def run(quick: bool = False) -> dict[str, Any]:
    """Measures everything; the dict is fit for JSON. Bars: 64 B at most 0.5 ms, at least 400 MB/s one way."""
    with _server() as server:
        measured = trio.run(_measure, server, quick)
    ours_ms, ours_mb_s = measured["echo_ms_p50"]["64 B"]["ours"], measured["one_way_mb_s"]["ours"]
    bars = [
        at_most("peer stream, 64 B round trip, ms p50", ours_ms, 0.5),
        at_least("peer stream, one way, MB/s", ours_mb_s, 400),
    ]
    return {
        "bench": "streams",
        "python": platform.python_version(),
        "load_average_1min": round(
            os.getloadavg()[0], 2
        ),  # both ends want a core each: on a busy machine look at the ratio
        **measured,
        "bars": bars,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'peer streams, p50':<22}{'ours':>12}{'raw TCP':>12}{'ratio':>8}"]
    for size, of in result["echo_ms_p50"].items():
        lines.append(f"{'echo ' + size:<22}{of['ours']:>9.3f} ms{of['raw']:>9.3f} ms{of['ours'] / of['raw']:>8.1f}")
    flow = result["one_way_mb_s"]
    lines.append(
        f"{'one way, 4 MiB':<22}{flow['ours']:>7.0f} MB/s{flow['raw']:>7.0f} MB/s{flow['ours'] / flow['raw']:>8.2f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Echo and throughput of peer streams beside raw TCP")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(_serve)
        return
    result = run(arguments.quick)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
