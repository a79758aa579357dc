"""Coordinators over one database, as many as a test likes; what their books say; and how one of them dies."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx
import trio

from coordinator.books import job_queries
from coordinator.books.accounts import GrantCredits
from coordinator.books.audit import audit
from coordinator.books.books import Books
from coordinator.books.database import Database
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import Job
from coordinator.books.ledger import BALANCES, Move, TransferKind, user
from coordinator.books.stored import Loaded, Stored
from coordinator.books.writer import Pending
from coordinator.cache.service import Embedding
from coordinator.config import CoordinatorConfig
from coordinator.keys import ACCOUNT_DEFAULT, create_key
from coordinator.server import open_coordinator
from privacy.keys import NodeKey
from protocol import limits
from protocol.shards import ShardManifest
from tests.coordinator.clients import HELLO, http, lines_of
from tests.coordinator.fakes import COORDINATOR, NETWORK, NO_CACHE, FakeIsland, FakePort, Running

OTHER = NodeKey(bytes([8]) * 32)  # a second Coordinator
CREDIT = limits.CREDIT_MICROS
SALT = bytes(32)  # what the Coordinators of a database share
TEXT = "one two three four five"
CHAT, JOBS = "/v1/chat/completions", "/api/v1/jobs"
Headers = Mapping[str, str] | None
Event = tuple[str, dict[str, Any]]  # of a job's stream: name and data
A_JOB: dict[str, Any] = {"cargo": "echo", "input": {"prompt": TEXT}}
WHOLE = ["state submitted", "state assigned", "state running", f"chunk {TEXT}", "complete succeeded"]


@functools.cache
def _empty_books() -> bytes:
    """An SQLite database of this version, as its file: a copy costs nothing, migrating 0.1 s."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coordinator.db"
        Database(f"sqlite:///{file}").close()
        return file.read_bytes()


def url_of(folder: Path) -> str:
    """Of a new database in this folder."""
    file = folder / "coordinator.db"
    if not file.exists():
        file.write_bytes(_empty_books())
    return f"sqlite:///{file}"


@asynccontextmanager
async def opened(
    database_url: str,
    *islands: FakeIsland,
    key: NodeKey = COORDINATOR,
    api_key: str = "",
    manifests: dict[str, ShardManifest] | None = None,
    embedding: Embedding | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """A Coordinator of its own identity; with another one's ``api_key``, or a new one; without a cache of answers unless the settings have
    one. Its books have to add up at the end."""
    port = FakePort(*islands, key=key)
    api_key = api_key or create_key(database_url)
    config = CoordinatorConfig(database_url=database_url, **{"cache": NO_CACHE, **settings})
    async with open_coordinator(config, port, key, NETWORK, SALT, dict, manifests, embedding=embedding) as server:
        yield Running(server, port, api_key, database_url)
        assert await complaints(server.books) == []


@dataclass
class Mortal:
    """A Coordinator that may be killed: no instruction of it runs any more, so nothing of what it knows gets into the books."""

    running: Running
    _scope: trio.CancelScope
    _ended: trio.Event = field(default_factory=trio.Event)

    async def kill(self) -> None:
        silence(self.running.server.books)
        self._scope.cancel()
        await self._ended.wait()


@asynccontextmanager
async def mortal(database_url: str, *islands: FakeIsland, **more: Any) -> AsyncIterator[Mortal]:
    async with trio.open_nursery() as nursery:

        async def live(task_status: trio.TaskStatus[Mortal]) -> None:
            with trio.CancelScope() as scope:
                async with opened(database_url, *islands, **more) as running:
                    one = Mortal(running, scope)
                    task_status.started(one)
                    await trio.sleep_forever()
            one._ended.set()

        one: Mortal = await nursery.start(live)
        yield one
        nursery.cancel_scope.cancel()


def silence(books: Books) -> None:
    """Whatever is asked of these books or told them comes to nothing."""

    async def nothing(*_arguments: Any) -> NoReturn:
        raise BooksUnavailable("as the test wants it")

    def begin(*_operations: Any) -> Pending:
        pending = Pending()
        pending.settle([], BooksUnavailable("as the test wants it"))
        return pending

    for name in ("do", "do_all", "ask", "change"):
        setattr(books, name, nothing)
    books.begin = begin  # type: ignore[method-assign]


async def complaints(books: Books) -> list[str]:
    """What does not add up."""

    def ask() -> list[str]:
        with books.database.snapshot() as connection:
            return audit(connection)

    return await trio.to_thread.run_sync(ask)


async def funds(running: Running, account: str = ACCOUNT_DEFAULT) -> tuple[int, int]:
    """Posted and held, micro-credits."""
    return await balance(running, user(account))


async def balance(running: Running, ledger_account: str) -> tuple[int, int]:
    """Of any account of the ledger."""

    def ask(connection: Any) -> tuple[int, int]:
        rows = Loaded({})
        Stored(BALANCES).load(connection, [ledger_account], rows)
        found = rows.get(BALANCES, ledger_account)
        return (found.posted, found.held) if found is not None else (0, 0)

    return await running.server.books.ask(ask)


async def set_funds(running: Running, micros: int, account: str = ACCOUNT_DEFAULT) -> None:
    """An account with exactly so much, by a transfer or a grant."""
    posted, _ = await funds(running, account)
    books = running.server.books
    if micros < posted:
        away = Move(f"away:{posted}:{micros}", user(account), user("somebody"), posted - micros, TransferKind.TRANSFER)
        await books.do(away)
    elif micros > posted:
        await books.do(GrantCredits(account, micros - posted, f"more:{posted}:{micros}"))


async def row(running: Running, job_id: str, account: str = ACCOUNT_DEFAULT) -> Job:
    found = await running.server.books.ask(job_queries.job_of, job_id, account)
    assert found is not None, job_id
    return found


async def rows(running: Running, account: str = ACCOUNT_DEFAULT) -> list[Job]:
    """All jobs of an account, the newest first, without input and output."""
    return (await running.server.books.ask(job_queries.jobs_of, account, 10_000, 0))[0]


async def until(what: Callable[[], bool] | Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Returns once it is so."""
    with trio.fail_after(timeout_s):
        while True:
            found = what()
            if found if isinstance(found, bool) else await found:
                return
            await trio.sleep(0.005)


async def chat(running: Running, headers: Headers = None, **changes: Any) -> httpx.Response:
    async with http(running) as client:
        return await client.post(CHAT, json={**HELLO, **changes}, headers=headers)


async def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events, without [DONE]."""
    return [json.loads(line) async for line in lines_of(response) if line != "[DONE]"]


def text_of(chunks: list[dict[str, Any]], choice: int = 0) -> str:
    parts = [it["delta"].get("content", "") for chunk in chunks for it in chunk.get("choices", ()) if it["index"] == choice]
    return "".join(parts)


async def submit(running: Running, headers: Headers = None, **changes: Any) -> str:
    """A job's id."""
    async with http(running) as client:
        response = await client.post(JOBS, json={**A_JOB, **changes}, headers=headers)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


async def get(running: Running, path: str, key: str | None = None) -> httpx.Response:
    async with http(running, key) as client:
        return await client.get(path)


async def ended(running: Running, job_id: str) -> dict[str, Any]:
    """A job as its account sees it, once it has ended."""
    found: dict[str, Any] = {}

    async def look() -> bool:
        found.update((await get(running, f"{JOBS}/{job_id}")).json())
        return found["state"] in ("succeeded", "failed", "cancelled")

    await until(look)
    return found


def error_of(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The error in OpenAI's envelope, which has to be this one."""
    assert response.status_code == status, (response.status_code, response.text)
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"], error
    assert (error["code"], error["param"]) == (code, param), error
    assert response.headers["x-request-id"]
    return error


async def events_of(response: httpx.Response, found: list[Event]) -> None:
    """Name and data of each event of a stream, as they come."""
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line[len("event: ") :]
        elif line.startswith("data: "):
            data = json.loads(line[len("data: ") :])
            assert data["type"] == name
            found.append((name, data))
        else:
            assert not line or line.startswith(":"), line


async def watch(running: Running, job_id: str, found: list[Event] | None = None) -> list[Event]:
    """``found`` is what has been heard, meanwhile too."""
    found = [] if found is None else found
    async with http(running) as client, client.stream("GET", f"{JOBS}/{job_id}/stream") as response:
        assert response.status_code == 200 and response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-archipelag-job"] == job_id and response.headers["x-request-id"]
        await events_of(response, found)
    return found


def outline(events: list[Event]) -> list[str]:
    """Names of events, with states and words; words one after the other are one."""
    found: list[str] = []
    for name, data in events:
        if name != "chunk":
            found.append(f"{name} {data['state']}")
        elif found and found[-1].startswith("chunk "):
            found[-1] += data["content"]
        else:
            found.append(f"chunk {data['content']}")
    return found
