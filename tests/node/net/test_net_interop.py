"""Our connections against py-libp2p as it ships, in another process, both ways; and a frozen process, for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from node.net.fast_stream import FastStream
from node.net.host import PeerLost, split_address
from protocol import limits
from protocol.errors import LinkLost
from tests.node.net.netlab import TESTS, lab_host

STOCK = Path(__file__).with_name("stock_peer.py")
SIZES = [1, 64, 65_507, 65_536, 300_000, 3_000_000]
RAW = "/test/raw/1"


@contextmanager
def stock_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, str(STOCK), "serve"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["address"]
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


async def _echo_raw(stream: FastStream, size: int) -> None:
    payload = bytes(range(251)) * (size // 251 + 1)
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, memoryview(payload)[:size])
        while len(got) < size:
            got += await stream.read(65_536)
    assert got == payload[:size]


async def test_ours_dials_stock() -> None:
    with stock_server() as (_, address):
        async with lab_host(1) as host:
            with trio.fail_after(40):
                peer = await host.connect(address)
                stream = (await host.open(peer, RAW, TESTS))._stream
                for size in SIZES:
                    await _echo_raw(stream, size)
                several = [(await host.open(peer, RAW, TESTS))._stream for _ in range(20)]
                async with trio.open_nursery() as nursery:
                    for one in several:
                        nursery.start_soon(_echo_raw, one, 100_000)
            assert host.counters.connections_broken == 0


async def test_stock_dials_ours() -> None:
    async with lab_host(1) as host:

        async def echo(frames: Any) -> None:
            try:
                while True:
                    await frames._stream.write(await frames._stream.read(65_536))
            except Exception as error:
                raise LinkLost("the stock peer is done") from error

        host.set_handler(RAW, TESTS, echo)
        command = [sys.executable, str(STOCK), "dial", host.addresses()[0], *map(str, SIZES)]
        with trio.fail_after(40):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
        assert json.loads(done.stdout) == [{"size": size, "same": True} for size in SIZES]
        assert host.counters.connections_broken == 0
        assert host.counters.handler_errors == 0


async def test_a_killed_peer_is_noticed_at_once() -> None:
    with stock_server() as (process, address):
        async with lab_host(1) as host:
            peer = await host.connect(address)
            stream = await host.open(peer, RAW, TESTS)
            process.kill()
            with trio.fail_after(2), pytest.raises(LinkLost):
                await stream.receive()
            assert not host.connected_peers()


@pytest.mark.soak
async def test_a_stopped_process_is_noticed_within_20_s() -> None:
    with stock_server() as (process, address):
        async with lab_host(1) as host:
            peer = await host.connect(address)
            events = host.peer_events()
            await events.receive()
            os.kill(process.pid, signal.SIGSTOP)
            began_s = trio.current_time()
            with trio.fail_after(20):
                assert isinstance(await events.receive(), PeerLost)
            noticed_s = trio.current_time() - began_s
            assert noticed_s <= limits.KEEPALIVE_INTERVAL_S + limits.KEEPALIVE_TIMEOUT_S + 1.5
            os.kill(process.pid, signal.SIGCONT)
            with trio.fail_after(2):
                await host.connect(f"{split_address(address)[0]}/p2p/{peer}")
