"""Jobs of lines at one Island, from ticket to receipt, over libp2p between two processes: what a Cargo's job costs without books and HTTP.

    python -m bench.island_lines --serve NAME     the Island: the job protocol's server, and the Cargo inside its sandbox
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

from node.bookkeeper import now_ms
from node.cargo_runtimes import Grants, find_runtimes, open_cargo
from node.holder import Links
from node.jobs_served import JobServer, Terms, island_hello
from node.local_cargos import bring_files, find_local
from node.net.host import open_host
from node.shipped import PUBLISHER, shipped
from privacy.keys import NodeKey
from protocol.cargo_io import encode_input
from protocol.cargo_jobs import CargoInput
from protocol.messages import JOB, JOB_PROTOCOL, JobDone
from protocol.prices import Ask
from protocol.tickets import TICKET_VERSION, Delegation, Ticket, TicketGuard, network_id_of, sign_ticket
from runtimes.store import ModelStore

_HOLDER, _ISLAND = NodeKey(b"h" * 32), NodeKey(b"i" * 32)
_NETWORK = network_id_of(b"n" * 32)
_BOOT = 1
_LANES = 2


async def _serve(name: str) -> None:
    cargo = find_local(name, PUBLISHER)
    assert cargo is not None
    guard = TicketGuard(_ISLAND.peer_id, _BOOT, _NETWORK)
    guard.trust(Delegation(_NETWORK, _HOLDER.peer_id, now_ms() + 86_400_000))
    with ExitStack() as held:
        files = await bring_files(cargo, ModelStore(), held)
        runtimes = await find_runtimes("bench", with_containers=False)
        async with (
            open_cargo(cargo.manifest, cargo.address, files, runtimes, Grants(lanes=_LANES)) as loaded,
            open_host(_ISLAND.seed) as host,
        ):
            terms = {name: Terms(loaded, Ask(per_job=1))}
            server = JobServer(_ISLAND, guard, _NETWORK, terms, lambda: island_hello(_NETWORK, "bench"))
            host.set_handler(JOB_PROTOCOL, JOB, server.serve)
            print(json.dumps({"address": host.addresses()[0], "content_hash": cargo.address}), flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)  # the parent closes it when it is done


class _Asker:
    """A holder of tickets, as a Coordinator is one."""

    def __init__(self, links: Links, name: str, content_hash: str, given: CargoInput) -> None:
        self._links, self._name, self._content_hash, self._given = links, name, content_hash, given
        self._numbers = itertools.count()

    def _ticket(self) -> bytes:
        number, now = next(self._numbers), now_ms()
        ticket = Ticket(
            version=TICKET_VERSION,
            network=_NETWORK,
            issuer=_HOLDER.peer_id,
            holder=_HOLDER.peer_id,
            job_id=f"job{number}",
            route=(_ISLAND.peer_id,),
            boots=(_BOOT,),
            cargo=self._name,
            content_hash=self._content_hash,
            token_limit=4096,
            price_limit_micros=10**6,
            cache_salt=bytes(32),
            nonce=number.to_bytes(16, "big"),
            issued_at_ms=now,
            expires_at_ms=now + 60_000,
        )
        return sign_ticket(ticket, _HOLDER)

    async def ask(self) -> float:
        """Seconds of one job, its ticket's signature and its receipt's check among them."""
        since_s = time.perf_counter()
        async with self._links.run_job(_ISLAND.peer_id, self._ticket(), self._given) as job:
            events = [event async for event in job]
        assert isinstance(events[-1], JobDone)
        return time.perf_counter() - since_s

    async def many(self, count: int, clients: int) -> tuple[list[float], float]:
        """Times of ``count`` jobs, and jobs per second."""
        times: list[float] = []

        async def one() -> None:
            for _ in range(count // clients):
                times.append(await self.ask())

        since_s = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(one)
        return times, len(times) / (time.perf_counter() - since_s)


async def _measure(name: str, count: int, told: dict[str, str]) -> dict[str, Any]:
    found = shipped(name)
    assert found is not None and found.example is not None
    given = CargoInput(encode_input(found.example.input), bytes(16))
    alone_ms, rates = [], []
    async with open_host(_HOLDER.seed) as host:
        await host.connect(told["address"])
        async with trio.open_nursery() as nursery:
            links = Links(host, nursery, lambda: island_hello(_NETWORK, "bench"), _HOLDER)
            asker = _Asker(links, name, told["content_hash"], given)
            await asker.many(count // 4, 1)
            for _ in range(5):
                alone_ms.append(1000 * statistics.median((await asker.many(count, 1))[0]))
                rates.append((await asker.many(count, 16))[1])
            nursery.cancel_scope.cancel()
    return {"p50_ms": round(statistics.median(alone_ms), 3), "jobs_per_s": round(statistics.median(rates), 1), "rounds_ms": alone_ms}


def measure(name: str, count: int) -> dict[str, Any]:
    """Median milliseconds of a job at one client, and jobs per second of 16, of a warm Cargo that ships."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "bench.island_lines", "--serve", name]
    island = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert island.stdout is not None
        return trio.run(_measure, name, count, json.loads(island.stdout.readline()))
    finally:
        island.kill()
        island.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)
    name = parser.parse_args().serve
    if name:
        trio.run(_serve, name)
    else:
        print(json.dumps(measure("text-stats", 500)))


if __name__ == "__main__":
    main()
