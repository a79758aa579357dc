"""The inner parts of a Coordinator, put together."""

from __future__ import annotations

import functools
import json
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import trio

from coordinator.abtests.deciding import AbDecisions
from coordinator.abtests.plan import Arm
from coordinator.abtests.router import AbRouter
from coordinator.abtests.service import AbTests
from coordinator.affinity import Affinity
from coordinator.batches.board import BatchBoard
from coordinator.batches.file_batch import FileBatches, LineTerms
from coordinator.batches.runner import BatchRunner
from coordinator.books.books import Books
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
from coordinator.http.child_orders import ChildOrders
from coordinator.http.job_input import job_order, unpack_asked
from coordinator.http.terms import Terms
from coordinator.job_board import JobBoard
from coordinator.keys import KeyStore
from coordinator.market import MarketShell
from coordinator.matching import Refusal, declared_tokens
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
from coordinator.upkeep import Upkeep
from coordinator.workflows.flows import Flows
from coordinator.workflows.live import Tools
from coordinator.workflows.quoting import Quoter
from coordinator.workflows.runner import WorkflowRunner
from coordinator.workflows.store import FlowStore
from coordinator.workflows.templates import Templates
from privacy.keys import cache_salt
from privacy.sealed_rows import RowSealer
from protocol import limits
from protocol.cargo_promotions import sign_promotion
from protocol.errors import Code
from protocol.generation import GenerationRequest
from protocol.identity import Signer
from protocol.shards import ShardManifest

_ACCOUNTS_REMEMBERED = 1024
USUAL_JOB = (1_000, 500, 10.0)  # tokens in and out, and seconds: by which versions on trial are compared
_BUILT_IN = "echo"  # its name is nobody's to publish under


@dataclass(frozen=True, slots=True)
class Outside:
    """What the parts are given. ``boot``: which run of this Coordinator it is; the rest as ``open_coordinator`` says."""

    books: Books
    boot: int
    port: IslandPort
    key: Signer
    network: str
    salt_secret: bytes
    manifests: Mapping[str, ShardManifest]
    round_trips_s: Callable[[], Mapping[str, float]]
    reserved: Mapping[str, str]
    embedding: Embedding | None
    delegation: Callable[[], bytes]


class Parts:
    """The inner parts, made in the order in which they need one another."""

    def __init__(self, config: CoordinatorConfig, outside: Outside) -> None:
        self.account_routes: AccountRoutes | None = None
        self.url = ""
        self.books = outside.books
        self._sealer, self._me = RowSealer(outside.salt_secret), Identity(outside.key.peer_id, outside.boot)
        self._standing = Standing(config.require_approval)
        self._issuer = TicketIssuer(
            outside.key, outside.network, config.job_timeout_s, time.time, secrets.token_bytes, config.activations
        )
        self._place(config, outside)
        self._keep_books(config, outside)
        self._answer(config, outside)
        self._run_runs(config, outside)
        self.upkeep = Upkeep(self.desk, self.board, self._standing, self.market, lambda: self.url, self.runs)
        self.upkeep.forgetting.append(self.files.forget)

    def _place(self, config: CoordinatorConfig, outside: Outside) -> None:
        """Which Islands and which versions there are, and what runs jobs on them."""
        port, manifests, reserved = outside.port, outside.manifests, outside.reserved
        self.pipelines = Pipelines(manifests, port, time.time)
        rng = random.Random(secrets.randbits(64))
        self.placer = Placer(
            port.book, rng, pipelines=self.pipelines, standing=self._standing, round_trips_s=outside.round_trips_s
        )
        self.pipelines.on_change = self.placer.book_changed
        self.dispatcher = Dispatcher(
            port,
            self.placer,
            self._issuer,
            Affinity(secrets.token_bytes(32)),
            Statistics(),
            config.job_timeout_s,
            config.capacity_wait_s,
            config.island_wait_s,
            self.pipelines,
        )
        self.registry = Registry(
            self.books,
            _now_ms,
            config.auto_approve_cargos,
            (_BUILT_IN, *manifests, *reserved),
            lambda promotion: sign_promotion(promotion, outside.key),
            outside.delegation,
            outside.network,
        )
        offered, registry = self.placer.offered, self.registry
        offered.releases = lambda cargo: (reserved[cargo],) if cargo in reserved else registry.releases(cargo)
        offered.alias = lambda cargo: cargo if cargo in reserved else registry.name_behind(cargo)
        offered.aliases = registry.aliases

    def _keep_books(self, config: CoordinatorConfig, outside: Outside) -> None:
        """Who pays whom, for jobs that go through here and for those that do not."""
        port, me = outside.port, self._me
        self.market = MarketShell(self.books, self.placer, port, me.owner, _now_ms, config.job_timeout_s)
        self.desk = Desk(
            self.books,
            self.dispatcher,
            self.market,
            self._sealer,
            me,
            _now_ms,
            secrets.token_bytes,
            config.job_timeout_s,
            config.retry_window_s,
        )
        self.direct_keys = DirectKeys(KeyStore(self.books.database), time.monotonic, _now_ms)
        self.direct = DirectBooks(
            self.books,
            self.placer,
            self.market,
            self._issuer,
            self.direct_keys,
            me,
            outside.salt_secret,
            _now_ms,
            self.placer.addresses_of,
            port.book,
            self.pipelines,
        )

    def _answer(self, config: CoordinatorConfig, outside: Outside) -> None:
        """What stands before the desk: A/B tests, then the cache."""
        salt_secret = outside.salt_secret
        self.cache = self._cache(config, salt_secret, outside.embedding)
        has_cache = config.cache.enabled
        self.ab_tests = AbTests(
            self.books,
            self.registry.may_run,
            self.placer.content_hashes,
            salt_secret,
            time.monotonic,
            functools.partial(_fits, self.placer, self.dispatcher),
            lambda arm: self.placer.price_range(arm.cargo, *USUAL_JOB, arm.address).cheapest,
            self.market.saved_bid,
        )
        self.ab_decisions = AbDecisions(
            self.books, self.registry, self.ab_tests, time.monotonic, self.books.now_ms, lambda: secrets.token_hex(8)
        )
        self.worker = AbRouter(self.ab_tests, self.cache if has_cache else self.desk)
        restore = _restorer(salt_secret, config, self.placer, self.ab_tests)
        self.board = JobBoard(self.desk, restore, self.cache if has_cache else None, self.worker)

    def _run_runs(self, config: CoordinatorConfig, outside: Outside) -> None:
        """Batches and workflows."""
        self.runs = RunBoard(
            self.books,
            self.worker,
            self.desk.kept,
            self._sealer,
            self._me,
            _now_ms,
            secrets.token_bytes,
            config.run_retention_s,
            config.retry_window_s,
        )
        salt = functools.lru_cache(_ACCOUNTS_REMEMBERED)(functools.partial(cache_salt, outside.salt_secret))
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
        self.files = Files(self.books, self._sealer, _now_ms, secrets.token_bytes, config.files)
        self.file_batches = self._file_batches(config)
        self.templates = Templates()
        self.flows = self._flows(config, self._sealer)

    def _cache(self, config: CoordinatorConfig, salt_secret: bytes, embedding: Embedding | None) -> AnswerCache:
        """Of answers, in front of the desk."""
        cache = AnswerCache(
            config.cache,
            self.desk,
            self.books,
            Cargos(self.registry.manifest, self.placer.offered.releases, self.placer.content_hashes),
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
        await nursery.start(self.ab_tests.run)
        await nursery.start(self.cache.serve)
        await nursery.start(self.pipelines.run)
        await nursery.start(self.desk.openings.run)
        await nursery.start(self.board.run)
        await nursery.start(self.runs.run)
        await nursery.start(self.market.run)
        await nursery.start(self.upkeep.run)
        nursery.start_soon(self.ab_decisions.run)
        nursery.start_soon(self.direct_keys.run)
        nursery.start_soon(self.direct.run)


def _fits(placer: Placer, dispatcher: Dispatcher, order: Order, arm: Arm, bid_micros: int | None) -> bool:
    """Whether an Island could run an order in an arm of an A/B test, now or once one has room."""
    spec = replace(order.spec, cargo=arm.cargo, content_hash=arm.address)
    request = max(spec.choices, key=lambda choice: declared_tokens(choice.input_chars, choice.max_tokens))
    wish = dispatcher.wish_of(spec, request)
    if isinstance(request, GenerationRequest) and wish.tokens > placer.largest_context(arm.cargo, arm.address):
        return False
    outcome = placer.preview(wish, None if bid_micros is None else bid_micros // len(spec.choices))
    if not isinstance(outcome, Refusal):
        return True
    return outcome.code is Code.NO_CAPACITY and not (outcome.is_lasting or outcome.by_price)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _restorer(salt_secret: bytes, config: CoordinatorConfig, placer: Placer, ab_tests: AbTests) -> Callable[[Job, bytes], Order]:
    """Makes the order of a job again that an earlier run, or another Coordinator, had accepted."""

    def restore(job: Job, given: bytes) -> Order:
        placer.remember_offered((job.cargo,))  # or it would be unknown to one that has just started and waits for its Islands
        policy = parse_policy(json.loads(job.policy)) if job.policy else None
        terms = Terms(priority=job.priority, policy=policy, policy_text=job.policy, fingerprint=job.fingerprint)
        salt = cache_salt(salt_secret, job.account)
        order = job_order(
            job.id, job.cargo, unpack_asked(given), terms, job.account, salt, config.result_retention_s, config.job_timeout_s
        )
        return ab_tests.restored(order, job)

    return restore
