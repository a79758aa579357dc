"""The account's side of the API in front of real books, with nothing behind it that could compute."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any, cast

import httpx
import trio

from coordinator.books.accounts import DAY_MS
from coordinator.books.database import Database
from coordinator.books.jobs import Earned, Job, JobState, OpenJob, Outcome, SettleJob
from coordinator.books.rows import Operation
from coordinator.books.stored import apply_together
from coordinator.books.writer import Writer
from coordinator.config import CoordinatorConfig
from coordinator.http.account_routes import AccountRoutes
from coordinator.http.app import Api, Services
from coordinator.http.auth import Gate
from coordinator.http.bridge import Bridge
from coordinator.http.metrics import Metrics
from coordinator.http.thread import HttpThread
from coordinator.keys import ApiKey, KeyStore
from coordinator.statistics import Statistics
from privacy.keys import NodeKey

BOTH = frozenset({"read", "write"})
TODAY_MS = 20_000 * DAY_MS + 3_600_000


class Clock:
    """Unix milliseconds, by hand."""

    def __init__(self, ms: int = TODAY_MS) -> None:
        self.ms = ms

    def __call__(self) -> int:
        return self.ms

    def seconds(self) -> float:
        return self.ms / 1000


def peer(number: int) -> str:
    return NodeKey(bytes([number]) * 32).peer_id


def do(database: Database, *operations: Operation[Any], now_ms: int = TODAY_MS) -> list[Any]:
    """Changes of the books, one transaction each."""
    results = []
    for operation in operations:
        with database.writing() as connection:
            results += apply_together(connection, [operation], now_ms)
    return results


def run_job(
    database: Database,
    id: str,
    account: str,
    *earned: tuple[str, int],
    cargo: str = "echo",
    compute_ms: int = 60_000,
    now_ms: int = TODAY_MS,
    bid_micros: int = 1_000_000,
) -> Job:
    """A job from beginning to end: ``earned`` names the Islands and their micro-credits."""
    job = Job(id, account, cargo, "chat", JobState.SUBMITTED, 0, bid_micros, "explicit", "coordinator", 1, now_ms)
    paid = tuple(Earned(island, amount, compute_ms) for island, amount in earned)
    outcome = Outcome(JobState.SUCCEEDED, completion_tokens=3, compute_ms=compute_ms)
    settle = SettleJob(id, account, cargo, "coordinator", 1, outcome, paid)
    return do(database, OpenJob(job, now_ms + 600_000), settle, now_ms=now_ms)[1]  # type: ignore[no-any-return]


@dataclass
class Served:
    """``clock`` is everybody's: of the books, of limits, of keys."""

    url: str
    database: Database
    gate: Gate
    keys: KeyStore
    clock: Clock

    def key(self, account: str = "ann", scopes: frozenset[str] = BOTH, limit: int = 0) -> str:
        return self.keys.create(ApiKey(0, account, scopes, limit)).key

    def client(self, key: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=f"{self.url}/api/v1", headers=headers, timeout=60)


@asynccontextmanager
async def serving(database_url: str, **settings: Any) -> AsyncIterator[Served]:
    """The API's own application, with accounts and without anything that computes."""
    clock = Clock()
    config = CoordinatorConfig(database_url, **settings)
    with closing(Database(database_url)) as database, closing(Writer(database, clock)) as writer:
        keys = KeyStore(database, clock)
        gate = Gate(keys, config, clock.seconds, clock)
        with closing(gate):
            async with trio.open_nursery() as nursery:
                made: list[AccountRoutes] = []

                def more(admit: Any) -> list[AccountRoutes]:
                    made.append(AccountRoutes(admit, database, writer, gate, clock))
                    return made

                nobody = cast("Any", None)
                services = Services(
                    bridge=Bridge(nursery),
                    worker=nobody,
                    islands=nobody,
                    cargos=nobody,
                    gate=gate,
                    metrics=Metrics(Statistics(), dict),
                    well_known=dict,
                    salt_secret=bytes(32),
                    version="test",
                    body_bytes_max=config.body_bytes_max,
                    keep_alive_comment_s=10.0,
                    more=more,
                )
                http = HttpThread(Api(services).application, "127.0.0.1", 0, None)
                nursery.start_soon(http.run)
                await http.wait_ended_or_started()
                try:
                    yield Served(http.url, database, gate, keys, clock)
                finally:
                    http.stop()
                    for routes in made:
                        routes.close()
