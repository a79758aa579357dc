"""The Coordinator put together: one call opens it, leaving the context closes it and everything that belongs to it."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import fields
from typing import Any

import trio

from coordinator.affinity import Affinity
from coordinator.config import CoordinatorConfig
from coordinator.dispatch import Dispatcher
from coordinator.http.app import Api, Services
from coordinator.http.auth import Gate
from coordinator.http.bridge import Bridge
from coordinator.http.metrics import Metrics
from coordinator.http.thread import HttpThread, tls_context
from coordinator.keys import KeyStore
from coordinator.pipelines import Pipelines
from coordinator.placement import Placer
from coordinator.ports import IslandPort
from coordinator.statistics import Statistics
from coordinator.tickets import TicketIssuer
from protocol import limits
from protocol.identity import Signer
from protocol.shards import ShardManifest

_DRAIN_POLL_S = 0.02


class CoordinatorServer:
    """A Coordinator that serves. ``url`` is where."""

    def __init__(
        self,
        http: HttpThread,
        dispatcher: Dispatcher,
        placer: Placer,
        bridge: Bridge,
        services: Services,
        pipelines: Pipelines,
    ) -> None:
        self._http, self._dispatcher, self._placer, self._bridge = http, dispatcher, placer, bridge
        self.pipelines = pipelines
        self._services = services

    def __repr__(self) -> str:
        return f"<CoordinatorServer {self.url}: {self._dispatcher.running} running, {self._placer.waiting} waiting>"

    @property
    def url(self) -> str:
        """``http://127.0.0.1:8080``, without a slash at its end."""
        return self._http.url

    async def drain(self, timeout_s: float = limits.DRAIN_S) -> bool:
        """Takes no new requests and waits for the running ones; False when some still run after ``timeout_s`` seconds."""
        self._services.draining.set()
        await self._http.stop_listening()
        with trio.move_on_after(timeout_s):
            while self._bridge.tasks:
                await trio.sleep(_DRAIN_POLL_S)
        return not self._bridge.tasks

    def statistics(self) -> dict[str, Any]:
        """Counts since the start and what goes on now; no secrets, no prompts."""
        counts = self._dispatcher.statistics
        return {
            **{item.name: getattr(counts, item.name) for item in fields(counts)},
            "jobs_failed": dict(counts.jobs_failed),
            "refusals": dict(counts.refusals),
            "running": self._dispatcher.running,
            "waiting": self._placer.waiting,
            "open_jobs": self._placer.open_jobs,
            "bridge_tasks": self._bridge.tasks,
        }


@asynccontextmanager
async def open_coordinator(
    config: CoordinatorConfig,
    port: IslandPort,
    key: Signer,
    network: str,
    salt_secret: bytes,
    well_known: Callable[[], dict[str, Any]],
    manifests: Mapping[str, ShardManifest] | None = None,
) -> AsyncIterator[CoordinatorServer]:
    """A serving Coordinator, ready when this is entered.

    ``manifests``: of models that may be cut and run on several Islands, by name. ``key`` signs tickets; ``salt_secret`` keeps the prefix
    caches of accounts apart; ``well_known`` gives what ``/.well-known/archipelag.json`` says and is called in trio. Raises ConfigError
    when the database, the TLS files or the address cannot be used.
    """
    tls = tls_context(config.tls_cert, config.tls_key) if config.tls_cert else None
    with closing(KeyStore(config.database_url)) as store:
        gate = Gate(store, config.login_tries_per_minute, config.trusted_proxies, time.monotonic)
        with closing(gate):
            async with trio.open_nursery() as nursery:
                pipelines = Pipelines(manifests or {}, port, time.time)
                placer = Placer(port.book, random.Random(secrets.randbits(64)), pipelines=pipelines)
                pipelines.on_change = placer.book_changed
                await nursery.start(pipelines.run)
                dispatcher = _dispatcher(config, port, placer, key, network, pipelines)
                bridge = Bridge(nursery)
                services = _services(config, bridge, dispatcher, placer, gate, well_known, salt_secret)
                http = HttpThread(Api(services).application, config.http_host, config.http_port, tls)
                nursery.start_soon(http.run)
                try:
                    await http.wait_ended_or_started()
                    if http.error is None:
                        nursery.start_soon(_watch_book, port, placer)
                        yield CoordinatorServer(http, dispatcher, placer, bridge, services, pipelines)
                finally:
                    http.stop()
                    nursery.cancel_scope.cancel()
    # raised out here, where no nursery wraps it into a group
    if http.error is not None:
        raise http.error


def _dispatcher(
    config: CoordinatorConfig, port: IslandPort, placer: Placer, key: Signer, network: str, pipelines: Pipelines
) -> Dispatcher:
    return Dispatcher(
        port,
        placer,
        TicketIssuer(key, network, config.job_timeout_s, time.time, secrets.token_bytes, config.activations),
        Affinity(secrets.token_bytes(32)),
        Statistics(),
        config.job_timeout_s,
        config.capacity_wait_s,
        config.island_wait_s,
        pipelines,
    )


def _services(
    config: CoordinatorConfig,
    bridge: Bridge,
    dispatcher: Dispatcher,
    placer: Placer,
    gate: Gate,
    well_known: Callable[[], dict[str, Any]],
    salt_secret: bytes,
) -> Services:
    def gauges() -> dict[str, float]:
        return {
            "islands": placer.islands_seen,
            "jobs_running": dispatcher.running,
            "jobs_waiting": placer.waiting,
        }

    return Services(
        bridge=bridge,
        dispatcher=dispatcher,
        placer=placer,
        gate=gate,
        metrics=Metrics(dispatcher.statistics, gauges),
        well_known=well_known,
        salt_secret=salt_secret,
        version=config.version,
        body_bytes_max=config.body_bytes_max,
        keep_alive_comment_s=config.keep_alive_comment_s,
    )


async def _watch_book(port: IslandPort, placer: Placer) -> None:
    """Jobs that wait for room look again at each change of the book."""
    while True:
        await port.wait_book_changed()
        placer.book_changed()
