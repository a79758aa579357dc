"""How long placement takes: ten thousand Islands scored with reasons, beside a plain Python loop of the same formula; a place taken and
given back as the Coordinator does it; one ad of many that changes.

The rounds of both systems alternate. Every round has a wish of its own; what is timed is the choice and the JSON of its reasons.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import trio

from bench.bars import at_most
from coordinator.matching import Choice, Wish, choose, explanation
from coordinator.placement import Placer
from coordinator.regions import EU
from privacy.keys import NodeKey
from protocol import limits
from protocol.ads import AD_VERSION, Ad, Hardware
from protocol.book import Book, Entry
from protocol.prices import Ask
from tests.coordinator.plain_matching import Pool, judge, pool

ISLANDS = 10_000
LIMIT_MS = 3.0
NOW_S = 100.0
NETWORK = "0123456789abcdef0123456789abcdef"


def run(quick: bool = False) -> dict[str, Any]:
    """All figures; about 15 s, or 5 s when quick."""
    rounds, plain_rounds = (60, 3) if quick else (300, 15)
    scored = _scored(pool(ISLANDS, random.Random(1)), rounds, plain_rounds)
    placed = {str(count): trio.run(_placed, count, 300 if quick else 2000) for count in (3, 100, 1000)}
    changed_ms = trio.run(_changed_ms, 20 if quick else 100)
    bars = [at_most(f"placement, {ISLANDS:,} Islands scored with reasons, ms, median", scored["columns_ms"], LIMIT_MS)]
    return {
        "bench": "placement",
        "islands": ISLANDS,
        "scored": scored,
        "place_and_release_us": placed,
        "ad_changed_ms": changed_ms,
        "bars": bars,
    }


# -- scoring


def _wish(rng: random.Random) -> Wish:
    """With all that a job may ask for."""
    return Wish(
        "m",
        tokens=rng.randrange(100, 3000),
        affinity=f"island-{rng.randrange(ISLANDS)}",
        prompt_tokens=rng.randrange(2000),
        output_tokens=rng.randrange(2000),
        price_max_micros=10**6,
        policy=EU,
        region="de",
        excluded={f"island-{rng.randrange(ISLANDS)}": 10},
    )


def _scored(islands: Pool, rounds: int, plain_rounds: int) -> dict[str, Any]:
    rng, facts = random.Random(2), islands.columns()
    columns_ms: list[float] = []
    plain_ms: list[float] = []
    reasons = 0
    for number in range(rounds):
        wish = _wish(rng)

        def by_columns(wish: Wish = wish) -> int:
            choice = choose(facts, wish, NOW_S, rng)
            if not isinstance(choice, Choice):
                raise AssertionError(f"no Island out of {ISLANDS} takes the job: {choice.message}")
            return len(json.dumps(explanation(choice)))

        took_ms, length = _timed_ms(by_columns)
        columns_ms.append(took_ms)
        reasons = max(reasons, length)
        if number % (rounds // plain_rounds) == 0:
            took_ms, _ = _timed_ms(lambda wish=wish: len(judge(islands, wish, NOW_S).considered))  # type: ignore[misc]
            plain_ms.append(took_ms)
    return {
        "rounds": rounds,
        "columns_ms": round(statistics.median(columns_ms), 3),
        "columns_p99_ms": round(sorted(columns_ms)[int(0.99 * rounds)], 3),
        "plain_ms": round(statistics.median(plain_ms), 1),
        "reasons_bytes": reasons,
    }


def _timed_ms(call: Callable[[], int]) -> tuple[float, int]:
    started_s = time.perf_counter()
    result = call()
    return (time.perf_counter() - started_s) * 1000, result


# -- the shell around it


def _book(count: int) -> Book:
    candidates = pool(count, random.Random(3), full=0.0).candidates
    ads = (_ad(NodeKey(number.to_bytes(32, "big")).peer_id, it.offer) for number, it in enumerate(candidates, 1))
    return Book(NETWORK, {ad.peer: Entry(ad, b"") for ad in ads})


def _ad(peer: str, offer: Any) -> Ad:
    return Ad(
        version=AD_VERSION,
        network=NETWORK,
        peer=peer,
        boot=1000,
        sequence=1000,
        expires_at_ms=1000 + int(limits.AD_LIFETIME_S * 1000),
        agent="bench",
        addresses=(),
        region="de",
        hardware=Hardware(8, 2**34, 2**38),
        runtimes=(offer.runtime,),
        memory_offered_bytes=2**33,
        default_ask=Ask(),
        offers=(offer,),
    )


async def _placed(count: int, rounds: int) -> dict[str, float]:
    """Microseconds for a place that is taken and given back, and for the part of it that is the choice."""
    book = _book(count)
    placer = Placer(lambda: book, random.Random(4))
    wish = Wish("m", 100, prompt_tokens=50, output_tokens=50, price_max_micros=10**9)
    both: list[float] = []
    choice: list[float] = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        placer.release(await placer.place(wish, 0, 0))
        both.append((time.perf_counter() - started_s) * 1e6)
        started_s = time.perf_counter()
        placer.preview(wish, wish.price_max_micros)
        choice.append((time.perf_counter() - started_s) * 1e6)
    return {"all": round(statistics.median(both), 1), "choice": round(statistics.median(choice), 1)}


async def _changed_ms(rounds: int) -> float:
    """Milliseconds until one changed ad of many is in the columns."""
    book = _book(ISLANDS)
    placer = Placer(lambda: book, random.Random(5))
    placer.book_changed()
    peers, took_ms = list(book.entries), []
    for number in range(rounds):
        peer = peers[number]
        changed = replace(book.entries[peer].ad, sequence=2000)
        book = replace(book, entries={**book.entries, peer: Entry(changed, b"")})
        started_s = time.perf_counter()
        placer.book_changed()
        took_ms.append((time.perf_counter() - started_s) * 1000)
    return round(statistics.median(took_ms), 3)


def table(result: dict[str, Any]) -> str:
    scored = result["scored"]
    lines = [
        f"{result['islands']:,} Islands scored with reasons: columns {scored['columns_ms']:.2f} ms "
        f"(p99 {scored['columns_p99_ms']:.2f}), plain Python loop {scored['plain_ms']:.0f} ms",
        f"one changed ad of {result['islands']:,} is taken in within {result['ad_changed_ms']:.2f} ms",
        f"{'a place taken and given back, µs':<36}{'all':>8}{'choice':>8}",
    ]
    for count, took in result["place_and_release_us"].items():
        lines.append(f"{'  of ' + count + ' Islands':<36}{took['all']:>8.0f}{took['choice']:>8.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))
