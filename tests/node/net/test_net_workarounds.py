"""Each workaround is still needed, and works.

When a test of the first kind fails, py-libp2p has repaired the fault: take the workaround out of node/net and the probe out of
stock_faults.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from libp2p.exceptions import ParseError
from libp2p.io.abc import Reader
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.swarm import Swarm, _NegativePeerCache
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.utils.varint import encode_uvarint

from node.net import workarounds
from node.net.fast_yamux import FastYamux
from protocol.errors import ConfigError, RemoteProtocolError
from tests.node.net.netlab import TESTS, lab_host, pair

PATCHED = [workaround.name for workaround in workarounds.WORKAROUNDS]
AVOIDED = {  # faults that our own code goes round without a patch, and where
    "handler-kills-host": "host.py",
    "cancelled-write": "fast_yamux.py",
    "one-address": "host.py",
    "shared-port": "host.py",
    "gossip-heartbeat": "gossip.py",
    "gossip-spam-limit": "gossip.py",
    "gossip-seqno": "gossip.py",
    "gossip-push-raises": "gossip.py",
}


@pytest.fixture(scope="module")
def faults() -> dict[str, bool]:
    script = Path(__file__).with_name("stock_faults.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", [*PATCHED, *AVOIDED])
def test_stock_libp2p_still_has_the_fault(name: str, faults: dict[str, bool]) -> None:
    assert faults[name], f"{name} is repaired upstream: remove what goes round it ({AVOIDED.get(name, 'workarounds.py')})"


def test_every_probe_belongs_to_something(faults: dict[str, bool]) -> None:
    assert set(faults) == {*PATCHED, *AVOIDED}


def test_each_workaround_names_version_and_reason() -> None:
    assert len(set(PATCHED)) == len(PATCHED)
    for workaround in workarounds.WORKAROUNDS:
        assert workaround.version == importlib.metadata.version("libp2p")
        assert len(workaround.why) > 20


def test_installing_twice_changes_nothing() -> None:
    workarounds.install()
    before = Swarm._do_handle_inbound_connection, AutoConnector.maybe_connect, RpcQueue.__init__.__defaults__
    workarounds.install()
    assert before == (Swarm._do_handle_inbound_connection, AutoConnector.maybe_connect, RpcQueue.__init__.__defaults__)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.0")
    with pytest.raises(ConfigError, match=r"0\.9\.0.*make setup"):
        workarounds.install()


def test_short_negative_cache_and_long_queue() -> None:
    workarounds.install()
    assert _NegativePeerCache()._ttl == workarounds.NEGATIVE_CACHE_S
    queue = RpcQueue()
    assert queue._queue.max_size == workarounds.GOSSIP_QUEUE_MESSAGES


async def test_our_connections_are_our_own_and_made_without_delay() -> None:
    async with lab_host(1) as client, lab_host(2) as server:
        began_s = trio.current_time()
        await client.connect(server.addresses()[0])
        assert trio.current_time() - began_s < 0.2
        connections = client.libp2p.get_network().get_connections()  # type: ignore[no-untyped-call,unused-ignore]
        assert [type(connection.muxed_conn) for connection in connections] == [FastYamux]


class _Line(Reader):
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self, n: int | None = None) -> bytes:
        taken, self.data = self.data[:n], self.data[n:]
        return taken


@pytest.mark.parametrize(
    "data", [encode_uvarint(1 << 30), encode_uvarint(1 << 62), b"\xff" * 20, b"\x03ab", b"\x03abc", b"\x02\xff\n", b""]
)
async def test_bad_negotiation_lines_are_refused(data: bytes) -> None:
    with pytest.raises(ParseError):
        await workarounds.read_short_line(_Line(data))


async def test_good_negotiation_lines_are_read() -> None:
    assert await workarounds.read_short_line(_Line(b"\x03ab\n")) == b"ab"


async def test_libp2p_neither_logs_expected_events_nor_touches_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = list(root.handlers)
    with caplog.at_level(logging.WARNING):
        async with pair() as (client, server):
            with pytest.raises(RemoteProtocolError):
                await client.open(server.peer_id, "/nobody/serves/this", TESTS)
    assert root.handlers == before
    assert not [record for record in caplog.records if record.name.startswith("libp2p")]
