"""What the cache of answers costs and saves over HTTP: exact hits at 100 and at 10,000 entries, misses, and hits of another wording.

Networks of one Coordinator and one Island that serves ``echo`` each run side by side and are asked in turns over one keep-alive connection.
A miss is asked with words that nobody has used, of a Coordinator that looks for other wordings, beside one without a cache; between two of
them there is a pause, in which the vector of the first one is made. A hit of another wording is set against one vector of the same model,
made by a worker of this process.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

from bench.bars import at_most
from bench.books_chat import _node as node
from bench.echo_http import Target

HIT_MS_MAX = 2.0  # the bars
SLOWER_MAX = 1.1  # "no slower": medians of two processes differ by some per cent
MISS_MS_MAX = 0.5
SEMANTIC_MS_MAX = 2.0
FEW, MANY = 100, 10_000
_FILLERS = 8
_PAUSE_S = 0.03
_MODEL_S = 300.0
_SYLLABLES = "ba ce di fo gu ka le mi no pu ra se ti vo zu".split()
_THINGS = "router printer account mailbox calendar phone tablet server scanner camera laptop folder".split()


class Asker:
    """One keep-alive connection; tells how long each answer took."""

    def __init__(self, target: Target) -> None:
        self._socket = socket.create_connection(("127.0.0.1", target.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {target.key}\r\n"

    def close(self) -> None:
        self._socket.close()

    def ask(self, question: str, wanted: str | None) -> float:
        """Seconds. Raises RuntimeError where the answer does not come from where it should: ``exact``, ``semantic`` or None."""
        body = json.dumps({"model": "echo", "temperature": 0, "messages": [{"role": "user", "content": question}]}).encode()
        request = f"{self._head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        started_s = time.perf_counter()
        self._socket.sendall(request)
        answer = b""
        while not _is_whole(answer):
            more = self._socket.recv(65536)
            if not more:
                raise RuntimeError("the Coordinator hung up")
            answer += more
        took_s = time.perf_counter() - started_s
        found = json.loads(answer.split(b"\r\n\r\n", 1)[1]).get("metadata", {}).get("cache_strategy", "no answer")
        if found != wanted:
            raise RuntimeError(f"{question!r} was answered by {found}, not {wanted}")
        return took_s


def _is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    (length,) = (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return len(body) >= length


@contextlib.contextmanager
def _network(name: str, folder: Path, *more: str) -> Iterator[Target]:
    from coordinator.keys import create_key, database_url_of

    folder.mkdir()
    with node(folder, "coordinator", ("node",), "coordinator", "--http", "127.0.0.1:0", *more) as facts:
        url = str(facts["http"])
        with node(folder, "island", ("node",), "start", "--coordinator", url, "--cargo", "echo"):
            key = create_key(database_url_of(folder / "coordinator"))
            yield Target(name, int(url.rsplit(":", 1)[1]), key)


def _question(number: int) -> str:
    return f"What does part {number} of the manual say?"


def _fill(target: Target, count: int) -> None:
    """So many answers, by several connections."""

    def work(first: int) -> None:
        with contextlib.closing(Asker(target)) as asker:
            for number in range(first, count, _FILLERS):
                asker.ask(_question(number), None)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(_FILLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _in_turns(
    targets: Sequence[Target], rounds: int, count: int, question: Callable[[Target], tuple[str, str | None]], pause_s: float = 0.0
) -> dict[str, dict[str, float]]:
    """Medians of the rounds' medians and 99th percentiles, ms."""
    found: dict[str, list[tuple[float, float]]] = {target.name: [] for target in targets}
    askers = {target.name: Asker(target) for target in targets}
    for _ in range(rounds):
        for target in targets:
            times = []
            for _ in range(count):
                text, wanted = question(target)
                times.append(askers[target.name].ask(text, wanted) * 1000)
                time.sleep(pause_s)
            found[target.name].append((statistics.median(times), sorted(times)[int(len(times) * 0.99)]))
    for asker in askers.values():
        asker.close()
    return {
        name: {"p50_ms": statistics.median(p50 for p50, _ in all_), "p99_ms": statistics.median(p99 for _, p99 in all_)}
        for name, all_ in found.items()
    }


def _exact(folder: Path, quick: bool) -> dict[str, dict[str, float]]:
    few, many = f"exact hit, {FEW:,} entries", f"exact hit, {MANY:,} entries"
    rng = random.Random(1)
    sizes = {few: FEW, many: MANY}
    with contextlib.ExitStack() as stack:
        more = ("--cache", "on", "--cache-model", "off", "--cache-entries", str(MANY))
        targets = [stack.enter_context(_network(name, folder / str(size), *more)) for name, size in sizes.items()]
        for target in targets:
            _fill(target, sizes[target.name])
        rounds, count = (4, 200) if quick else (9, 600)
        _in_turns(targets, 1, 200, lambda target: (_question(rng.randrange(sizes[target.name])), "exact"))  # warms up
        return _in_turns(targets, rounds, count, lambda target: (_question(rng.randrange(sizes[target.name])), "exact"))


def _wait_semantic(target: Target) -> None:
    """Until the model is there. Raises RuntimeError with the reason where it does not come."""
    deadline_s = time.monotonic() + _MODEL_S
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{target.port}/health") as answer:
            state = json.loads(answer.read())["cache"]["semantic"]
        if state == "on":
            return
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the semantic cache is not on: {state}")
        time.sleep(0.2)


def _kept_wording(number: int) -> str:
    return f"How do I connect my {_THINGS[number % len(_THINGS)]} to the {_word(random.Random(number))} network?"


def _other_wording(number: int) -> str:
    return f"Hello, could you please tell me {_kept_wording(number)[0].lower()}{_kept_wording(number)[1:].replace(' do I ', ' to ')}"


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(5))


def _semantic(folder: Path, quick: bool) -> dict[str, dict[str, float]]:
    on, off, hit = "miss without candidates", "no cache", "another wording"
    rng, kept = random.Random(2), 50
    with contextlib.ExitStack() as stack:
        without = stack.enter_context(_network(off, folder / "off", "--cache", "off"))
        target = stack.enter_context(_network(on, folder / "on", "--cache", "on"))
        _wait_semantic(target)
        rounds, count = (4, 50) if quick else (9, 100)
        words = lambda _target: (" ".join(_word(rng) for _ in range(8)).capitalize() + "?", None)  # noqa: E731
        _in_turns((without, target), 1, 30, words)  # warms up
        found = _in_turns((without, target), rounds, count, words, _PAUSE_S)
        with contextlib.closing(Asker(target)) as asker:
            for number in range(kept):
                asker.ask(_kept_wording(number), None)
                time.sleep(_PAUSE_S)
        again = Target(hit, target.port, target.key)
        found |= _in_turns((again,), rounds, 2 * count, lambda _target: (_other_wording(rng.randrange(kept)), "semantic"))
    return found


async def _one_vector(quick: bool) -> dict[str, float]:
    """Of a question, ms, by a worker like the Coordinator's."""
    from node.answer_embedder import ON, AnswerEmbedder

    embedder, times = AnswerEmbedder(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(embedder.run)
        with trio.fail_after(_MODEL_S):
            while embedder.state != ON:
                await trio.sleep(0.1)
        for number in range(200 if quick else 1000):
            started_s = time.perf_counter()
            await embedder.embed([_other_wording(number)])
            times.append((time.perf_counter() - started_s) * 1000)
        nursery.cancel_scope.cancel()
    return {"p50_ms": statistics.median(times), "p99_ms": sorted(times)[int(len(times) * 0.99)]}


def run(quick: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as folder:
        found = _exact(Path(folder), quick) | _semantic(Path(folder), quick)
    found["one vector, no HTTP"] = trio.run(_one_vector, quick)
    return _report([{"name": name, **figures} for name, figures in found.items()])


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    p50 = {row["name"]: row["p50_ms"] for row in rows}
    few, many = p50[f"exact hit, {FEW:,} entries"], p50[f"exact hit, {MANY:,} entries"]
    added = p50["miss without candidates"] - p50["no cache"]
    found = [
        at_most(f"an exact hit over HTTP at {MANY:,} entries, ms p50", many, HIT_MS_MAX),
        at_most(f"an exact hit at {MANY:,} entries, times one at {FEW:,}", many / few, SLOWER_MAX),
        at_most("a miss without candidates, added to a chat, ms p50", added, MISS_MS_MAX),
        at_most("a hit of another wording, over one vector, ms p50", p50["another wording"] - p50["one vector, no HTTP"], SEMANTIC_MS_MAX),
    ]
    return {"bench": "cache", "rows": rows, "bars": found}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'echo chat over HTTP, one client':<34}{'p50':>10}{'p99':>12}"]
    lines += [f"{row['name']:<34}{row['p50_ms']:>7.2f} ms{row['p99_ms']:>9.2f} ms" for row in result["rows"]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run(quick="--quick" in sys.argv)))
