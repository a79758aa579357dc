"""The Coordinator put together: one call opens it, leaving the context closes it and everything that belongs to it."""

from __future__ import annotations

import functools
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import fields
from typing import Any

import trio

from coordinator.affinity import Affinity
from coordinator.batches.board import BatchBoard
from coordinator.batches.file_batch import FileBatches, LineTerms
from coordinator.batches.runner import BatchRunner
from coordinator.books.books import Books, open_books
from coordinator.books.jobs import Job
from coordinator.books.runs import RunKind
from coordinator.cache.service import AnswerCache, Cargos, Embedding
from coordinator.config import CoordinatorConfig
from coordinator.desk import Desk
from coordinator.direct import DirectBooks
from coordinator.direct_keys import DirectKeys
from coordinator.dispatch import Dispatcher
from coordinator.files import Files
from coordinator.http.account_routes import AccountRoutes
from coordinator.http.app import Admit, Api, Routes, Services, Worker
from coordinator.http.auth import Gate
from coordinator.http.batch_routes import BatchRoutes
from coordinator.http.bridge import Bridge
from coordinator.http.cache_routes import CacheRoutes
from coordinator.http.cargo_routes import CargoRoutes
from coordinator.http.child_orders import ChildOrders
from coordinator.http.file_routes import FileRoutes
from coordinator.http.job_input import job_order, unpack_asked
from coordinator.http.job_routes import JobRoutes
from coordinator.http.market_routes import MarketRoutes
from coordinator.http.metrics import Metrics
from coordinator.http.openai_batch_routes import OpenaiBatchRoutes
from coordinator.http.terms import Terms
from coordinator.http.thread import HttpThread, tls_context
from coordinator.http.workflow_routes import WorkflowRoutes
from coordinator.job_board import JobBoard
from coordinator.keys import KeyStore
from coordinator.market import MarketShell
from coordinator.matching import Refusal, Wish
from coordinator.orders import Identity, Order
from coordinator.pipelines import Pipelines
from coordinator.placement import Placer
from coordinator.ports import IslandPort
from coordinator.regions import parse_policy
from coordinator.registry import Registry
from coordinator.runs.board import RunBoard
from coordinator.standing import Standing
from coordinator.statistics import Statistics
from coordinator.tickets import TicketIssuer
from coordinator.upkeep import Upkeep, begin_run
from coordinator.workflows.flows import Flows
from coordinator.workflows.live import Tools
from coordinator.workflows.quoting import Quoter
from coordinator.workflows.runner import WorkflowRunner
from coordinator.workflows.store import FlowStore
from coordinator.workflows.templates import Templates
from privacy.keys import cache_salt
from privacy.sealed_rows import RowSealer
from protocol import limits
from protocol.errors import Code
from protocol.identity import Signer
from protocol.shards import ShardManifest

_DRAIN_POLL_S = 0.02
_ACCOUNTS_REMEMBERED = 1024
_BUILT_IN = "echo"  # its name is nobody's to publish under


class CoordinatorServer:
    """A Coordinator that serves. ``url`` is where."""

    def __init__(self, http: HttpThread, api: Api, parts: _Parts, services: Services) -> None:
        self._http, self._api, self._parts, self._services = http, api, parts, services
        self._dispatcher, self._placer, self.pipelines = parts.dispatcher, parts.placer, parts.pipelines
        self.desk, self.books, self.direct, self.registry = parts.desk, parts.books, parts.direct, parts.registry
        self.cache = parts.cache
        self.cache = parts.cache

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
) -> AsyncIterator[CoordinatorServer]:
    """A serving Coordinator, ready when this is entered.

    ``manifests``: of models that may be cut and run on several Islands, by name. ``key`` signs tickets; ``salt_secret`` keeps the prefix
    caches of accounts apart and seals what is kept of answers; ``well_known`` gives what ``/.well-known/archipelag.json`` says and is
    called in trio; ``round_trips_s`` those to Islands, by peer id; ``reserved``: names of Cargos that
    nobody may publish under -> the content address that runs under each; ``embedding`` says which questions are alike, None: only equal
    ones get an answer that is kept.

    Raises ConfigError when the database, the TLS files or the address
    cannot be used, or the database holds another network's books.
    """
    tls = tls_context(config.tls_cert, config.tls_key) if config.tls_cert else None
    async with open_books(config.database_url) as books:
        gate = Gate(KeyStore(books.database), config, time.monotonic)
        with closing(gate):
            boot = await begin_run(books, network, salt_secret, key.peer_id)
            parts = _Parts(config, books, boot, port, key, network, salt_secret, manifests or {}, round_trips_s, reserved or {}, embedding)
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


class _Parts:
    """The inner parts, made in the order in which they need one another."""

    def __init__(
        self,
        config: CoordinatorConfig,
        books: Books,
        boot: int,
        port: IslandPort,
        key: Signer,
        network: str,
        salt_secret: bytes,
        manifests: Mapping[str, ShardManifest],
        round_trips_s: Callable[[], Mapping[str, float]],
        reserved: Mapping[str, str],
        embedding: Embedding | None,
    ) -> None:
        self.books = books
        self.account_routes: AccountRoutes | None = None
        self.url = ""
        self.pipelines = Pipelines(manifests, port, time.time)
        rng = random.Random(secrets.randbits(64))
        standing = Standing(config.require_approval)
        self.placer = Placer(port.book, rng, pipelines=self.pipelines, standing=standing, round_trips_s=round_trips_s)
        self.pipelines.on_change = self.placer.book_changed
        issuer = TicketIssuer(key, network, config.job_timeout_s, time.time, secrets.token_bytes, config.activations)
        self.dispatcher = Dispatcher(
            port,
            self.placer,
            issuer,
            Affinity(secrets.token_bytes(32)),
            Statistics(),
            config.job_timeout_s,
            config.capacity_wait_s,
            config.island_wait_s,
            self.pipelines,
        )
        self.registry = Registry(books, _now_ms, config.auto_approve_cargos, (_BUILT_IN, *manifests, *reserved))
        self.placer.releases = lambda cargo: (reserved[cargo],) if cargo in reserved else self.registry.releases(cargo)
        me, sealer = Identity(key.peer_id, boot), RowSealer(salt_secret)
        self.market = MarketShell(books, self.placer, port, me.owner, _now_ms, config.job_timeout_s)
        self.desk = Desk(
            books,
            self.dispatcher,
            self.market,
            sealer,
            me,
            _now_ms,
            secrets.token_bytes,
            config.job_timeout_s,
            config.retry_window_s,
        )
        self.direct_keys = DirectKeys(KeyStore(books.database), time.monotonic, _now_ms)
        self.direct = DirectBooks(
            books,
            self.placer,
            self.market,
            issuer,
            self.direct_keys,
            me,
            salt_secret,
            _now_ms,
            self.placer.addresses_of,
            port.book,
            self.pipelines,
        )
        self.cache = self._cache(config, salt_secret, embedding)
        has_cache = config.cache.enabled
        self.board = JobBoard(self.desk, _restorer(salt_secret, config, self.placer), self.cache if has_cache else None)
        self.worker: Worker = self.cache if has_cache else self.desk
        self.runs = RunBoard(
            books, self.worker, self.desk.kept, sealer, me, _now_ms, secrets.token_bytes, config.run_retention_s, config.retry_window_s
        )
        salt = functools.lru_cache(_ACCOUNTS_REMEMBERED)(functools.partial(cache_salt, salt_secret))
        self.orders = ChildOrders(salt, self.placer.writes_text, config.run_retention_s, config.job_timeout_s)
        batches = BatchRunner(
            self.orders,
            lambda cargo, policy: self.placer.slots(cargo, policy) - self.placer.queued(cargo),  # a batch never lengthens a queue
            lambda cargo: self.placer.remember_offered((cargo,)),
            lambda island: self.placer.newest_sequence(island) > 0,
            self.runs.is_live,
            _now_ms,
        )
        self.runs.runners[RunKind.BATCH] = batches
        self.batches = BatchBoard(self.runs, batches, self.market, _now_ms, config.retry_window_s)
        self.files = Files(books, sealer, _now_ms, secrets.token_bytes, config.files)
        self.file_batches = self._file_batches(config)
        self.templates = Templates()
        self.flows = self._flows(config, sealer)
        self.upkeep = Upkeep(self.desk, self.board, standing, self.market, lambda: self.url, self.runs)
        self.upkeep.forgetting.append(self.files.forget)

    def _cache(self, config: CoordinatorConfig, salt_secret: bytes, embedding: Embedding | None) -> AnswerCache:
        """Of answers, in front of the desk."""
        cache = AnswerCache(
            config.cache,
            self.desk,
            self.books,
            Cargos(self.registry.manifest, self.placer.releases, self.placer.content_hashes),
            embedding,
            functools.partial(cache_salt, salt_secret),
            time.monotonic,
            random.Random(secrets.randbits(64)),
            lambda: secrets.token_hex(12),
        )
        if config.cache.enabled:
            self.desk.answers = cache
        return cache

    def _flows(self, config: CoordinatorConfig, sealer: RowSealer) -> Flows:
        """Workflows."""
        tools = Tools(
            self.orders, self.templates, self.market.bid, lambda cargo: self.placer.remember_offered((cargo,)), _now_ms
        )
        runner = self.runs.runners[RunKind.WORKFLOW] = WorkflowRunner(tools)
        store = FlowStore(self.books, sealer, _now_ms, secrets.token_bytes)
        quoter = Quoter(self.market.bid, self.placer.writes_text, config.job_timeout_s)
        return Flows(self.runs, runner, store, quoter, _now_ms, config.retry_window_s)

    def _file_batches(self, config: CoordinatorConfig) -> FileBatches:
        """What a line has said has to last to the end of its batch, and beyond."""
        keep_s = limits.FILE_BATCH_WINDOW_S + max(config.run_retention_s, limits.RUN_RETENTION_S)
        placer = self.placer
        terms = LineTerms(
            self.orders,
            lambda cargo: placer.slots(cargo) - placer.queued(cargo),
            placer.remember_offered,
            lambda island: placer.newest_sequence(island) > 0,
            keep_s,
            config.job_timeout_s,
        )
        runner = self.runs.runners[RunKind.FILE_BATCH] = FileBatches(self.books, self.files, terms, _now_ms)
        return runner

    async def start(self, nursery: trio.Nursery) -> None:
        """Each is ready before the next one begins."""
        await nursery.start(self.registry.run)
        await nursery.start(self.cache.serve)
        await nursery.start(self.pipelines.run)
        await nursery.start(self.desk.openings.run)
        await nursery.start(self.board.run)
        await nursery.start(self.runs.run)
        await nursery.start(self.market.run)
        await nursery.start(self.upkeep.run)
        nursery.start_soon(self.direct_keys.run)
        nursery.start_soon(self.direct.run)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _restorer(salt_secret: bytes, config: CoordinatorConfig, placer: Placer) -> Callable[[Job, bytes], Order]:
    """Makes the order of a job again that an earlier run, or another Coordinator, had accepted."""

    def restore(job: Job, given: bytes) -> Order:
        placer.remember_offered((job.cargo,))  # or it would be unknown to one that has just started and waits for its Islands
        policy = parse_policy(json.loads(job.policy)) if job.policy else None
        terms = Terms(priority=job.priority, policy=policy, policy_text=job.policy, fingerprint=job.fingerprint)
        salt = cache_salt(salt_secret, job.account)
        return job_order(
            job.id, job.cargo, unpack_asked(given), terms, job.account, salt, config.result_retention_s, config.job_timeout_s
        )

    return restore


def _services(
    config: CoordinatorConfig,
    bridge: Bridge,
    parts: _Parts,
    gate: Gate,
    well_known: Callable[[], dict[str, Any]],
    salt_secret: bytes,
) -> Services:
    def gauges() -> dict[str, float]:
        return {
            "islands": parts.placer.islands_seen,
            "jobs_running": parts.dispatcher.running,
            "jobs_waiting": parts.placer.waiting,
            "books_groups": parts.books.writer.statistics.groups,
            "books_changes": parts.books.writer.statistics.units,
            "books_refusals": parts.books.writer.statistics.refused,
            "books_failures": parts.books.writer.statistics.failed,
            "answers_replayed": parts.desk.replayed,
            "jobs_adopted": parts.upkeep.adopted,
            **parts.cache.gauges(),
        }

    async def cargos() -> dict[str, int]:
        return parts.placer.cargos()

    def more(admit: Admit) -> Sequence[Routes]:
        parts.account_routes = AccountRoutes(admit, parts.books.database, parts.books.writer, gate)
        batches = BatchRoutes(
            admit, bridge, parts.batches, _looker(parts.placer), salt_secret, config.keep_alive_comment_s, services.draining.is_set
        )
        jobs = JobRoutes(
            admit,
            bridge,
            parts.board,
            functools.partial(cache_salt, salt_secret),
            parts.placer.writes_text,
            salt_secret,
            config.result_retention_s,
            config.job_timeout_s,
            config.keep_alive_comment_s,
            services.draining.is_set,
            parts.placer.why_waiting,
            batches,
            config.cache.enabled,
        )
        cargo_routes = CargoRoutes(admit, bridge, parts.registry)
        return (
            parts.account_routes,
            batches,
            jobs,
            MarketRoutes(admit, bridge, parts.market, config.job_timeout_s),
            cargo_routes,
            WorkflowRoutes(
                admit, bridge, parts.flows, salt_secret, config.keep_alive_comment_s, services.draining.is_set
            ),
            CacheRoutes(admit, bridge, parts.cache),
            FileRoutes(admit, bridge, parts.files, services.draining.is_set),
            OpenaiBatchRoutes(
                admit,
                bridge,
                parts.books,
                parts.runs,
                parts.file_batches,
                salt_secret,
                config.files.retention_s,
                services.draining.is_set,
            ),
        )

    services = Services(
        bridge=bridge,
        worker=parts.worker,
        islands=parts.placer.islands,
        cargos=cargos,
        gate=gate,
        metrics=Metrics(parts.dispatcher.statistics, gauges),
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
        more=more,
        has_books=lambda: parts.upkeep.healthy,
    )
    return services


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
