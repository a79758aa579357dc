"""The demo of A/B tests with real processes: it ends with a promotion by itself, and the Island that serves the name follows."""

from __future__ import annotations

import hashlib
import io
import json
import re
from http.client import HTTPConnection
from typing import cast

import pytest

from node import demo_ab
from node.cli import main
from node.demo_ab import NEW, OLD, Users, primes_below, run_ab_demo
from node.demo_ab_programs import ABOUT, BELOW_MAX, module
from node.demo_client import DemoFailed
from runtimes.wasm.engine import RunResult, WasmEngine

BELOWS = (0, 1, 2, 3, 4, 10, 97, 98, 1000, 20_011)


def ran(release: str, below: int) -> tuple[RunResult, str]:
    engine, wasm, pieces = WasmEngine(), module(release), list[bytes]()
    compiled = engine.compile(wasm, hashlib.sha256(wasm).hexdigest())
    return engine.run(compiled, json.dumps({"below": below}).encode(), pieces.append), b"".join(pieces).decode()


@pytest.mark.parametrize("release", ABOUT)
def test_programs_count_primes(release: str) -> None:
    right = primes_below(max(BELOWS))
    for below in BELOWS:
        result, said = ran(release, below)
        assert result.is_good and json.loads(said) == {"type": "done", "primes": right[below]}
    assert not ran(release, BELOW_MAX + 1)[0].is_good, "it does not reach out of its memory"


def test_the_new_program_does_less() -> None:
    """Ten times, counted in steps, so the test of them cannot come out the other way round."""
    old, new = (ran(release, demo_ab.FIRST_BELOW)[0].fuel_used for release in (OLD, NEW))
    assert new * 10 < old


def test_primes_by_python() -> None:
    assert primes_below(12) == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 4, 4, 5]
    assert primes_below(1) == [0, 0] and primes_below(0) == [0]


class Connection:
    """One that a Coordinator answers with the same job each time; ``header``: of its answers, one after the other."""

    def __init__(self, primes: int, *variants: str) -> None:
        done = {"type": "output", "result": {"primes": primes}}
        self._events = "".join(f"data: {json.dumps(one)}\n\n" for one in (done, {"type": "complete", "state": "succeeded"}))
        self._variants, self.asked, self.status = list(variants), list[dict[str, object]](), 200

    def request(self, method: str, path: str, body: str, headers: dict[str, str]) -> None:
        self.asked.append(json.loads(body))

    def getresponse(self) -> Connection:
        return self

    def read(self) -> bytes:
        return self._events.encode()

    def getheader(self, name: str, default: str = "") -> str:
        return self._variants.pop(0) if name == "x-archipelag-ab-variant" else "hit" if len(self.asked) > 1 else default


def ask(users: Users, connection: Connection) -> None:
    users.ask_one(cast(HTTPConnection, connection))


def test_a_wrong_answer_ends_the_demo() -> None:
    right = primes_below(demo_ab.FIRST_BELOW + 1)[-1]
    ask(Users("http://127.0.0.1:1", "ak_x"), Connection(right, "old"))
    with pytest.raises(DemoFailed, match=f"there are {right} primes"):
        ask(Users("http://127.0.0.1:1", "ak_x"), Connection(right + 1, "old"))


def test_a_user_of_two_variants_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_ab, "_AGAIN_EVERY", 1)
    right = primes_below(demo_ab.FIRST_BELOW + 1)[-1]
    users, connection = Users("http://127.0.0.1:1", "ak_x"), Connection(right, "old", "old")
    ask(users, connection)
    assert (users.asked, users.cached) == (2, 1) and connection.asked[0] == connection.asked[1]
    assert connection.asked[0]["user"] == "user-1"
    with pytest.raises(DemoFailed, match="asked twice, and got old and new"):
        ask(Users("http://127.0.0.1:1", "ak_x"), Connection(right, "old", "new"))


def test_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 0 is for a demo that went to its end."""

    def fail(out: object) -> None:
        raise DemoFailed("the test has promoted nothing")

    monkeypatch.setattr(demo_ab, "run_ab_demo", lambda out: None)
    assert main(["demo", "--ab"]) == 0
    monkeypatch.setattr(demo_ab, "run_ab_demo", fail)
    assert main(["demo", "--ab"]) == 1


def test_from_two_releases_to_a_promotion() -> None:
    """About 30 s: five nodes start with their workers, ten commands run, and a Coordinator looks at a test every 10 s."""
    out = io.StringIO()
    run_ab_demo(out)
    said = out.getvalue()
    assert "promoted: primes stands for primes@2.0.0 now, the variant new" in said
    assert re.search(r"promoted +by the test itself  variant: new; .*is conclusive: yes", said), said[-3000:]
    table = said[said.index(", promoted, ran for") :]
    for variant in ("old \\(control\\)  primes@1.0.0", "new            primes@2.0.0"):
        units, jobs, cached = map(int, re.search(rf"{variant} +50 % +(\d+) +(\d+) +(\d+) ", table).groups())  # type: ignore[union-attr]
        assert units >= 100 and jobs >= 100 and cached > 0
    assert re.search(r"latency -[\d.]+ ms \[-[\d.]+ to -[\d.]+ at 95 %\]", table), "the interval leaves zero out"
    before, after = (float(one) for one in re.findall(r"a request for primes takes ([\d.]+) ms", said))
    assert after < before
    assert "island-1, which was started with --cargo primes, has followed" in said
    assert "rolled back: primes stands again for what it was before the test" in said
    assert re.search(r"island-1 has gone back to [0-9a-f]{16}, primes 1.0.0\nstopping …\n\Z", said)
