"""A py-libp2p host as it ships, in a process of its own: no line of ours is imported here.

``serve`` echoes raw bytes on /test/raw/1, prints its address and lives until stdin ends. ``dial ADDRESS SIZE…`` echoes that many
bytes against ADDRESS and prints what came back. Both print JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys

import trio
from libp2p import new_host
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

RAW = TProtocol("/test/raw/1")
LISTEN = [Multiaddr("/ip4/127.0.0.1/tcp/0")]


async def echo(stream) -> None:  # type: ignore[no-untyped-def]
    try:
        while True:
            await stream.write(await stream.read(65_536))
    except StreamError:
        await stream.close()


async def serve() -> None:
    host = new_host(listen_addrs=LISTEN, muxer_preference="YAMUX")
    host.set_stream_handler(RAW, echo)
    async with host.run(listen_addrs=LISTEN):
        print(json.dumps({"address": str(host.get_addrs()[0])}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


async def dial(address: str, sizes: list[int]) -> None:
    host = new_host(listen_addrs=LISTEN, muxer_preference="YAMUX")
    async with host.run(listen_addrs=LISTEN):
        info = info_from_p2p_addr(Multiaddr(address))
        await host.connect(info)
        stream = await host.new_stream(info.peer_id, [RAW])
        result = []
        for size in sizes:
            payload = bytes(range(251)) * (size // 251 + 1)
            digest, left = hashlib.sha256(), size
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, payload[:size])
                while left:
                    data = await stream.read(left)
                    digest.update(data)
                    left -= len(data)
            result.append({"size": size, "same": digest.hexdigest() == hashlib.sha256(payload[:size]).hexdigest()})
        await stream.close()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        trio.run(serve)
    else:
        trio.run(dial, sys.argv[2], [int(size) for size in sys.argv[3:]])
