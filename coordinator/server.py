"""The Coordinator put together: one call opens it, leaving the context closes it and everything that belongs to it."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import fields
from typing import Any

import trio

from coordinator.books.books import open_books
from coordinator.cache.service import Embedding
from coordinator.config import CoordinatorConfig
from coordinator.http.ab_routes import AbRoutes
from coordinator.http.account_routes import AccountRoutes
from coordinator.http.app import Admit, Api, Routes, Services
from coordinator.http.auth import Gate
from coordinator.http.batch_routes import BatchRoutes
from coordinator.http.bridge import Bridge
from coordinator.http.cache_routes import CacheRoutes
from coordinator.http.cargo_routes import CargoRoutes
from coordinator.http.file_routes import FileRoutes
from coordinator.http.job_routes import JobRoutes
from coordinator.http.market_routes import MarketRoutes
from coordinator.http.metrics import Metrics
from coordinator.http.openai_batch_routes import OpenaiBatchRoutes
from coordinator.http.thread import HttpThread, tls_context
from coordinator.http.workflow_routes import WorkflowRoutes
from coordinator.keys import KeyStore
from coordinator.matching import Refusal, Wish
from coordinator.parts import Outside, Parts
from coordinator.placement import Placer
from coordinator.ports import IslandPort
from coordinator.upkeep import begin_run
from privacy.keys import cache_salt
from protocol import limits
from protocol.errors import Code
from protocol.identity import Signer
from protocol.shards import ShardManifest

_DRAIN_POLL_S = 0.02


class CoordinatorServer:
    """A Coordinator that serves. ``url`` is where."""

    def __init__(self, http: HttpThread, api: Api, parts: Parts, services: Services) -> None:
        self._http, self._api, self._parts, self._services = http, api, parts, services
        self._dispatcher, self._placer, self.pipelines = parts.dispatcher, parts.placer, parts.pipelines
        self.desk, self.books, self.direct, self.registry = parts.desk, parts.books, parts.direct, parts.registry
        self.cache, self.ab_tests, self.ab_decisions = parts.cache, parts.ab_tests, parts.ab_decisions

    def __repr__(self) -> str:
        return f"<CoordinatorServer {self.url}: {self._dispatcher.running} running, {self._placer.waiting} waiting>"

    @property
    def url(self) -> str:
        """``http://127.0.0.1:8080``, without a slash at its end."""
        return self._http.url

    async def drain(self, timeout_s: float = limits.DRAIN_S) -> bool:
        """Takes no new work and waits for what runs; False when some of it still runs after ``timeout_s`` seconds.

        It listens until then, so that whoever distributes requests sees the health say "draining", and clients hear where to go.
        """
        self._services.draining.set()
        self._parts.upkeep.draining = self._parts.runs.draining = True
        with trio.move_on_after(timeout_s):
            while self._api.answering or self.desk.is_busy:
                await trio.sleep(_DRAIN_POLL_S)
        is_done = not (self._api.answering or self.desk.is_busy)
        await self._http.stop_listening()
        return is_done

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
            "bridge_tasks": self._services.bridge.tasks,
            "answers_replayed": self.desk.replayed,
            "jobs_adopted": self._parts.upkeep.adopted,
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
    round_trips_s: Callable[[], Mapping[str, float]] = dict,
    reserved: Mapping[str, str] | None = None,
    embedding: Embedding | None = None,
    delegation: Callable[[], bytes] = bytes,
) -> AsyncIterator[CoordinatorServer]:
    """A serving Coordinator, ready when this is entered.

    ``manifests``: of models that may be cut and run on several Islands, by name. ``key`` signs tickets; ``salt_secret`` keeps the prefix
    caches of accounts apart and seals what is kept of answers; ``well_known`` gives what ``/.well-known/archipelag.json`` says and is
    called in trio; ``round_trips_s`` those to Islands, by peer id; ``reserved``: names of Cargos that
    nobody may publish under -> the content address that runs under each; ``embedding`` says which questions are alike, None: only equal
    ones get an answer that is kept; ``delegation()``: of ``key`` by the network's, fresh, which goes with what the registry signs.

    Raises ConfigError when the database, the TLS files or the address
    cannot be used, or the database holds another network's books.
    """
    tls = tls_context(config.tls_cert, config.tls_key) if config.tls_cert else None
    async with open_books(config.database_url) as books:
        gate = Gate(KeyStore(books.database), config, time.monotonic)
        with closing(gate):
            boot = await begin_run(books, network, salt_secret, key.peer_id)
            known = manifests or {}, round_trips_s, reserved or {}
            outside = Outside(books, boot, port, key, network, salt_secret, *known, embedding, delegation)
            parts = Parts(config, outside)
            try:
                async with parts.templates, trio.open_nursery() as nursery:
                    await parts.start(nursery)
                    bridge = Bridge(nursery)
                    gate.on_forget = lambda key_id: bridge.to_trio(functools.partial(parts.direct_keys.forget, key_id))
                    services = _services(config, bridge, parts, gate, well_known, salt_secret)
                    api = Api(services)
                    http = HttpThread(api.application, config.http_host, config.http_port, tls)
                    nursery.start_soon(http.run)
                    try:
                        await http.wait_ended_or_started()
                        if http.error is None:
                            parts.url = http.url
                            nursery.start_soon(_watch_book, port, parts.placer)
                            yield CoordinatorServer(http, api, parts, services)
                    finally:
                        parts.desk.is_leaving = True
                        http.stop()
                        nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await parts.upkeep.leave()
                    if parts.account_routes is not None:
                        await trio.to_thread.run_sync(parts.account_routes.close)
    # raised out here, where no nursery wraps it into a group
    if http.error is not None:
        raise http.error


def _services(
    config: CoordinatorConfig,
    bridge: Bridge,
    parts: Parts,
    gate: Gate,
    well_known: Callable[[], dict[str, Any]],
    salt_secret: bytes,
) -> Services:
    async def cargos() -> dict[str, int]:
        return parts.placer.cargos()

    services = Services(
        bridge=bridge,
        worker=parts.worker,
        islands=parts.placer.islands,
        cargos=cargos,
        gate=gate,
        metrics=Metrics(parts.dispatcher.statistics, functools.partial(_gauges, parts)),
        well_known=well_known,
        salt_secret=salt_secret,
        version=config.version,
        body_bytes_max=config.body_bytes_max,
        keep_alive_comment_s=config.keep_alive_comment_s,
        keep_s=config.retry_window_s,
        keep_images_s=config.result_retention_s,
        lines=parts.board,
        cache=parts.cache.state_json if config.cache.enabled else None,
        job_timeout_s=config.job_timeout_s,
        more=lambda admit: _more_routes(config, services, parts, admit),
        has_books=lambda: parts.upkeep.healthy,
    )
    return services


def _gauges(parts: Parts) -> dict[str, float]:
    books = parts.books.writer.statistics
    return {
        "islands": parts.placer.islands_seen,
        "jobs_running": parts.dispatcher.running,
        "jobs_waiting": parts.placer.waiting,
        "books_groups": books.groups,
        "books_changes": books.units,
        "books_refusals": books.refused,
        "books_failures": books.failed,
        "answers_replayed": parts.desk.replayed,
        "jobs_adopted": parts.upkeep.adopted,
        **parts.cache.gauges(),
        **parts.ab_tests.gauges(),
        "ab_looks": parts.ab_decisions.looks,
    }


def _more_routes(config: CoordinatorConfig, services: Services, parts: Parts, admit: Admit) -> Sequence[Routes]:
    """Addresses under /api/v1 beside OpenAI's."""
    bridge, secret, draining = services.bridge, services.salt_secret, services.draining.is_set
    keep_alive_s = config.keep_alive_comment_s
    parts.account_routes = AccountRoutes(admit, parts.books.database, parts.books.writer, services.gate)
    batches = BatchRoutes(admit, bridge, parts.batches, _looker(parts.placer), secret, keep_alive_s, draining)
    jobs = JobRoutes(
        admit,
        bridge,
        parts.board,
        functools.partial(cache_salt, secret),
        parts.placer.writes_text,
        secret,
        config.result_retention_s,
        config.job_timeout_s,
        keep_alive_s,
        draining,
        parts.placer.why_waiting,
        batches,
        config.cache.enabled,
    )
    return (
        parts.account_routes,
        batches,
        jobs,
        MarketRoutes(admit, bridge, parts.market, config.job_timeout_s),
        CargoRoutes(admit, bridge, parts.registry),
        WorkflowRoutes(admit, bridge, parts.flows, secret, keep_alive_s, draining),
        CacheRoutes(admit, bridge, parts.cache),
        AbRoutes(admit, bridge, parts.ab_decisions),
        FileRoutes(admit, bridge, parts.files, draining),
        OpenaiBatchRoutes(
            admit, bridge, parts.books, parts.runs, parts.file_batches, secret, config.files.retention_s, draining
        ),
    )


def _looker(placer: Placer) -> Callable[[str], tuple[bool, bool | None]]:
    """Of a Cargo: whether somebody offers it or did a moment ago, and whether it writes texts."""

    def look(cargo: str) -> tuple[bool, bool | None]:
        writes_text = placer.writes_text(cargo)
        outcome = placer.preview(Wish(cargo, 0), None) if writes_text is None else None
        return not (isinstance(outcome, Refusal) and outcome.code is Code.UNKNOWN_CARGO), writes_text

    return look


async def _watch_book(port: IslandPort, placer: Placer) -> None:
    """Jobs that wait for room look again at each change of the book."""
    while True:
        await port.wait_book_changed()
        placer.book_changed()
