"""Several Coordinators over one PostgreSQL as real processes: clients that never give up, somebody who kills, and what the books must say.

A client sends each request under an idempotency key of its own, to whichever Coordinator comes next, and again to the other one on any
error, until it has an answer. So in the end every request has one answer, and its account was charged for exactly the jobs that were
told to it.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import sqlalchemy as sql

from coordinator.books.audit import audit
from coordinator.books.database import Database
from node.control import ask_node
from node.localnet import LocalNetwork, LocalNode
from protocol.prices import parse_credits

ACCOUNT = "load"
ASK = "echo=0.001+0.5"  # a job, and 1,000 tokens: prices differ
ECHO = ("--cargo", "echo", "--echo-delay", "0.04", "--ask", ASK)
ANSWER_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 60.0
_KINDS = ("chat", "stream", "job")
_OPEN = "state IN ('submitted', 'assigned', 'running')"
_AGAIN = frozenset({409, 429})  # and everything from 500 on


class Unanswered(Exception):
    """A request came to nothing, or to something wrong."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a client learnt of one request. ``price``: micro-credits."""

    key: str
    kind: str
    job_id: str
    price: int
    tries: int
    seconds: float


class Client:
    """One thread's. ``urls``: of the Coordinators; ``turn``: which of them was asked last, by chance where it is not told."""

    def __init__(self, urls: Sequence[str], api_key: str, name: str, seed: int, turn: int | None = None) -> None:
        self._urls, self._name, self._rng = list(urls), name, random.Random(f"{seed}/{name}")
        self._http = httpx.Client(headers={"Authorization": f"Bearer {api_key}"}, timeout=30.0)
        self._turn = self._rng.randrange(len(self._urls)) if turn is None else turn
        self._count = 0

    def close(self) -> None:
        self._http.close()

    def ask(self, kind: str = "", words: int = 0) -> Told:
        """One request to its end. Raises Unanswered."""
        self._count += 1
        key = f"{self._name}-{self._count}"
        kind = kind or self._rng.choice(_KINDS)
        text = " ".join([key, *(f"w{self._rng.randrange(1000)}" for _ in range(words or self._rng.randint(5, 50)))])
        started_s = time.monotonic()
        tries, (job_id, price, said) = self._insist(getattr(self, f"_{kind}"), key, text)
        if said != text:
            raise Unanswered(f"{key}: {said!r} instead of {text!r}")
        return Told(key, kind, job_id, price, tries, time.monotonic() - started_s)

    def _insist(self, send: Callable[[str, str, str], tuple[str, int, str]], key: str, text: str) -> tuple[int, tuple[str, int, str]]:
        deadline_s, tries, last = time.monotonic() + ANSWER_TIMEOUT_S, 0, ""
        while time.monotonic() < deadline_s:
            tries += 1
            self._turn += 1
            try:
                return tries, send(self._urls[self._turn % len(self._urls)], key, text)
            except (httpx.HTTPError, _Again) as error:
                last = f"{type(error).__name__}: {error}"
            time.sleep(self._rng.uniform(0.1, 0.4))
        raise Unanswered(f"{key}: no answer in {tries} tries; the last one: {last}")

    def _chat(self, url: str, key: str, text: str) -> tuple[str, int, str]:
        body = _good(self._http.post(f"{url}/v1/chat/completions", json=_chat(text), headers={"Idempotency-Key": key})).json()
        return *_billed(body["metadata"]), body["choices"][0]["message"]["content"]

    def _stream(self, url: str, key: str, text: str) -> tuple[str, int, str]:
        said = ""
        metadata: dict[str, Any] = {}
        asked = _chat(text) | {"stream": True, "stream_options": {"include_usage": True}}
        with self._http.stream("POST", f"{url}/v1/chat/completions", json=asked, headers={"Idempotency-Key": key}) as answer:
            if answer.status_code != 200:
                answer.read()
            _good(answer)
            done = False
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                done = line == "data: [DONE]"
                chunk = {} if done else json.loads(line[6:])
                if "error" in chunk:
                    raise _Again(str(chunk["error"]["message"]))
                said += "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", []))
                metadata = chunk.get("metadata") or metadata
        if not done:
            raise _Again("the stream was cut off")
        return *_billed(metadata), said

    def _job(self, url: str, key: str, text: str) -> tuple[str, int, str]:
        body = {"cargo": "echo", "input": {"prompt": text, "max_tokens": 200}}
        job_id = str(_good(self._http.post(f"{url}/api/v1/jobs", json=body, headers={"Idempotency-Key": key})).json()["id"])
        _, told = self._insist(self._look, job_id, text)
        return told

    def _look(self, url: str, job_id: str, text: str) -> tuple[str, int, str]:
        """The answer of a job that was accepted, from whichever Coordinator; what was accepted must not come to another end."""
        job = _good(self._http.get(f"{url}/api/v1/jobs/{job_id}")).json()
        if job["state"] in ("failed", "cancelled"):
            raise Unanswered(f"job {job_id} has {job['state']}: {job['error']}")
        if job["state"] != "succeeded":
            raise _Again(f"it is {job['state']}")
        output = _good(self._http.get(f"{url}/api/v1/jobs/{job_id}/output")).json()["output"]
        return job_id, parse_credits(job["price"]), output["text"]


class _Again(Exception):
    """Ask again."""


def _chat(text: str) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], "max_tokens": 200}


def _good(answer: httpx.Response) -> httpx.Response:
    if answer.status_code in _AGAIN or answer.status_code >= 500:
        raise _Again(f"{answer.status_code} {answer.text[:200]}")
    if answer.status_code not in (200, 201):
        raise Unanswered(f"{answer.request.url}: {answer.status_code} {answer.text[:300]}")
    return answer


def _billed(metadata: dict[str, Any]) -> tuple[str, int]:
    return str(metadata["job_id"]), parse_credits(metadata["price"])


@dataclass
class Load:
    """Clients in threads, until ``stop``."""

    urls: Sequence[str]
    api_key: str
    seed: int
    clients: int
    told: list[Told] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(f"c{number}",)) for number in range(self.clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Every request that was begun is answered first."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, name: str) -> None:
        client = Client(self.urls, self.api_key, name, self.seed)
        try:
            while not self._over.is_set():
                self.told.append(client.ask())
        except Unanswered as error:
            self.problems.append(str(error))
        finally:
            client.close()


@dataclass(frozen=True, slots=True)
class Kill:
    """``left``: open jobs of the one that was killed, id -> whether it can be run again."""

    name: str
    at_ms: int
    left: dict[str, bool]


class Ledgers:
    """Looks into the database from outside."""

    def __init__(self, database_url: str) -> None:
        self._database = Database(database_url)

    def close(self) -> None:
        self._database.close()

    def rows(self, statement: str, **values: object) -> list[dict[str, Any]]:
        with self._database.snapshot() as connection:
            return [dict(row) for row in connection.execute(sql.text(statement), values).mappings()]

    def complaints(self) -> list[str]:
        with self._database.snapshot() as connection:
            return audit(connection)

    def kill(self, node: LocalNode, peer_id: str) -> Kill:
        """As a power cut would; what it leaves open."""
        node.kill()
        return self._left(node, peer_id)

    def freeze(self, node: LocalNode, peer_id: str) -> Kill:
        """Until it gets SIGCONT; what it has open."""
        node.signal(signal.SIGSTOP)
        return self._left(node, peer_id)

    def _left(self, node: LocalNode, peer_id: str) -> Kill:
        at_ms = time.time_ns() // 1_000_000
        left = self.rows(f"SELECT id, can_rerun FROM jobs WHERE owner = :peer AND {_OPEN}", peer=peer_id)
        return Kill(node.name, at_ms, {row["id"]: bool(row["can_rerun"]) for row in left})

    def wait_settled(self, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Until no job is open and no hold pending. Raises AssertionError."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            jobs = self.rows(f"SELECT id, state, owner, kind FROM jobs WHERE {_OPEN}")
            holds = self.rows("SELECT id FROM holds WHERE state = 'pending'")
            if not jobs and not holds:
                return
            assert time.monotonic() < deadline_s, f"not settled: {jobs[:5]}, {len(holds)} holds"
            time.sleep(0.2)

    def charges(self, account: str) -> dict[str, int]:
        """Job -> micro-credits that the account was charged."""
        query = "SELECT reference, SUM(amount) AS amount FROM transfers WHERE kind = 'charge' AND debit = :user GROUP BY reference"
        return {row["reference"]: int(row["amount"]) for row in self.rows(query, user=f"user:{account}")}

    def takeovers_s(self, kills: Sequence[Kill]) -> tuple[list[float], list[float]]:
        """From the kill to the end of what was left open: of jobs that were run again, and of chats, whose holds were released."""
        spans: dict[bool, list[float]] = {True: [], False: []}
        for kill in kills:
            for job_id, can_rerun in kill.left.items():
                (row,) = self.rows("SELECT finished_at_ms FROM jobs WHERE id = :id", id=job_id)
                spans[can_rerun].append((row["finished_at_ms"] - kill.at_ms) / 1000)
        return sorted(spans[True]), sorted(spans[False])


def check_books(ledgers: Ledgers, told: Sequence[Told], account: str = ACCOUNT) -> None:
    """Nothing lost, nothing billed twice, and everything adds up."""
    ledgers.wait_settled()
    assert ledgers.complaints() == []
    charges, prices = ledgers.charges(account), {each.job_id: each.price for each in told}
    assert len(prices) == len(told), "every request has a job of its own"
    assert charges == prices, "charged is what was told, job by job: nothing twice, and nothing that nobody was told of"
    assert all(price > 0 for price in prices.values())
    lost = ledgers.rows("SELECT id, state, error_code FROM jobs WHERE account = :a AND kind = 'job' AND state <> 'succeeded'", a=account)
    assert not lost, "what was accepted comes to its end"
    bills = [row["fingerprint"] for row in ledgers.rows("SELECT fingerprint FROM jobs WHERE account = :a AND price_micros > 0", a=account)]
    assert len(bills) == len(set(bills)) == len(told), "one request is one bill"
    (earned,) = ledgers.rows("SELECT SUM(posted) AS posted FROM balances WHERE account LIKE 'escrow:%'")
    assert int(earned["posted"]) == sum(prices.values()), "what was paid is what Islands have earned"


def statement_charges(url: str, api_key: str) -> dict[str, int]:
    """Job -> micro-credits, as the account's own statement says it."""
    answer = httpx.get(f"{url}/api/v1/account/statement", headers={"Authorization": f"Bearer {api_key}"}, timeout=30)
    charges: dict[str, int] = {}
    for line in answer.raise_for_status().json()["data"]:
        if line["kind"] == "charge":
            charges[line["job"]] = charges.get(line["job"], 0) + parse_credits(line["amount"].removeprefix("-"))
    return charges


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """Polls a fact of another process; there is no event to wait for across the border."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def wait_joined(island: LocalNode, peers: set[str]) -> None:
    """Until an Island has a stream to each of these Coordinators, and to no other."""

    def joined() -> set[str]:
        return set(ask_node(str(island.data_dir), "status")["coordinators"])

    wait_for(f"{island.name} has joined {len(peers)} Coordinators", lambda: joined() == peers)


def start_network(network: LocalNetwork, database_url: str, islands: int) -> dict[str, str]:
    """Coordinators ``coordinator`` and ``second``, Islands that have joined both; name -> peer id of the Coordinators."""
    peers = {}
    for name in ("coordinator", "second"):
        peers[name] = str(network.start_coordinator(name=name, database_url=database_url)["peer_id"])
    nodes = [network.start_island(f"island{number}", *ECHO) for number in range(islands)]
    for node in nodes:
        node.wait_ready()
    for node in nodes:
        wait_joined(node, set(peers.values()))
    return peers
