"""Drives soak_child.py and keeps the shadow of its books: kills it, starts it again, has it say again what it never heard an answer to.

Whatever happens, the database is either what the shadow says with the group that was being committed, or without it; and what was told to
anybody, or committed before that, is there for good.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url

from coordinator.books.database import Database
from tests.coordinator.books.live_books import complaints, tables_of
from tests.coordinator.books.shadow import Answer, Shadow, Tables, with_balances
from tests.coordinator.books.soak_child import Order
from tests.coordinator.books.torn import tear
from tests.coordinator.books.workload import Scale, make_units
from tests.postgres import PostgresServer

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one child: it dies at a write point, or is killed after so many answers, or the server is, or neither."""

    units: int
    die_after_commits: int = 0
    die_at_point: int = 0
    die_where: str = ""
    kill_after: int | None = None
    kill_server_after: int | None = None


class Difference(AssertionError):
    """The books are not what their shadow says."""


class Soak:
    """One database and one shadow. ``folder``: for copies of the SQLite file."""

    def __init__(self, url: str, folder: Path, seed: int, scale: Scale, threads: int, server: PostgresServer | None = None) -> None:
        self._url, self._folder, self._scale, self._threads, self._server = url, folder, scale, threads, server
        self._is_sqlite = make_url(url).get_backend_name() == "sqlite"
        self._rng = random.Random(f"soak {seed}")
        self._units = make_units(seed, scale)
        self._shadow = Shadow()
        self._answers: dict[int, tuple[int, Answer]] = {}  # of units that nobody was told of yet: their group, and what it will be
        self._mark: int | None = None  # where the shadow was before that group; None when it is there for good
        self._heard: set[int] = set()
        self._next = 0  # no unit from here on was ever applied
        self._runs = 0
        command = [sys.executable, "-m", "tests.coordinator.books.soak_child", str(seed), str(scale.accounts), str(scale.units)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.counts: Counter[str] = Counter()
        self.points: Counter[str] = Counter()

    def __enter__(self) -> Soak:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    @property
    def is_done(self) -> bool:
        return len(self._heard) == self._scale.units

    # One child

    def run(self, plan: Plan) -> bool:
        """One child, to its end. Whether it was killed. Raises Difference when it ends in another way, or says what it should not."""
        self._runs += 1
        order = Order(
            self._url,
            [number for number in range(self._next) if number not in self._heard],
            self._next,
            min(self._next + plan.units, self._scale.units),
            self._threads,
            self._runs,
            plan.die_after_commits,
            plan.die_at_point,
            plan.die_where,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        self._process.stdin.flush()
        status = self._listen(plan)
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not was_killed and status != 0:
            raise Difference(f"the child ended with {status}")
        self.counts["killed" if was_killed else "ended"] += 1
        return was_killed

    def _listen(self, plan: Plan) -> int:
        pid, told, kill_after, server_after = 0, 0, plan.kill_after, plan.kill_server_after
        for word, *rest in self._lines():
            match word:
                case "pid":
                    pid = rest[0]
                case "ended":
                    return int(rest[0])
                case "dies":
                    self.points[rest[0]] += 1
                case "group":
                    self._group(*rest)
                case "away":
                    self.counts["away"] += 1
                case "told":
                    told += 1
                    self._told(*rest)
            if pid and kill_after is not None and told >= kill_after:
                kill_after = None
                os.kill(pid, signal.SIGKILL)
            if self._server is not None and server_after is not None and told >= server_after:
                server_after = None
                self.counts["server killed"] += 1
                self._server.kill()
                self._server.restart()
        raise Difference("the soak's process ended")

    def _lines(self) -> Iterator[list[Any]]:
        """A child that is killed may leave half a line, to which the next one is joined."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            start = max(0, line.rfind(b'["ended"'))
            try:
                yield json.loads(line[start:])
            except ValueError:
                raise Difference(f"the child said {line[:200]!r}") from None

    def _group(self, now_ms: int, fate: str | None, answers: list[tuple[int, Answer]]) -> None:
        """A group is about to be committed; ``fate``: of the one before, in the same child."""
        if fate not in ("committed", "aborted", None):
            raise Difference(f"nobody can say what became of a group: it is {fate}")
        if fate == "aborted" and self._mark is not None:
            self._shadow.undo(self._mark)
            self.counts["aborted"] += 1
        self._is_there()
        self._mark = self._shadow.mark
        self.counts["groups"] += 1
        for number, answer in answers:
            expected = self._shadow.apply(self._units[number], now_ms)
            if answer != expected:
                raise Difference(f"unit {number}, {self._units[number]}: {answer}, the shadow says {expected}")
            self._answers[number] = self.counts["groups"], answer
            self._next = max(self._next, number + 1)
        self.counts["units"] += len(answers)
        self.counts["largest group"] = max(self.counts["largest group"], len(answers))

    def _told(self, number: int, answer: Answer) -> None:
        group, expected = self._answers.pop(number, (0, None))
        if answer != expected:
            raise Difference(f"unit {number} was told {answer} and not {expected}")
        if group == self.counts["groups"]:
            self._is_there()
        self._heard.add(number)
        self.counts["refused" if answer[0] == "no" else "done"] += 1

    def _is_there(self) -> None:
        self._mark = None
        self._shadow.forget()

    # Looking at the books

    def compare(self, torn: int = 0) -> None:
        """Raises Difference. Of a SQLite database copies are looked at, so that the next child finds what the last one left; ``torn`` of
        them have lost what a power cut may take."""
        after = with_balances(self._shadow.tables)
        before = after if self._mark is None else with_balances(self._shadow.before(self._mark))
        found = self._look(self._copy() if self._is_sqlite else None)
        if found not in (after, before):
            raise Difference(_differing(found, after))
        for _ in range(torn if self._is_sqlite else 0):
            self._compare_torn(found, before)
        if self._mark is not None:
            self.counts["not told, and there" if found == after else "not told, and not there"] += after != before
            if found != after:
                self._shadow.undo(self._mark)
            self._is_there()

    def _compare_torn(self, found: Tables, before: Tables) -> None:
        """A commit that was told survives whatever comes after it; one that was not is there as a whole or not at all."""
        copy = self._copy()
        what = tear(copy, self._rng, may_lose_last=found != before)
        torn = self._look(copy)
        if torn not in (found, before):
            raise Difference(f"{what}: {_differing(torn, found)}")
        self.counts[f"{what}: {'lost' if torn != found else 'kept'}"] += 1

    def _look(self, copy: Path | None) -> Tables:
        """Opens the database as a Coordinator does. Raises Difference when the books do not add up."""
        database = Database(self._url if copy is None else f"sqlite:///{copy}")
        try:
            found, complaining = tables_of(database), complaints(database)
        finally:
            database.close()
        if complaining:
            raise Difference("; ".join(complaining))
        return found

    def _copy(self) -> Path:
        """Of the file and its write-ahead log, as the dead child left them."""
        file = Path(str(make_url(self._url).database))
        target = self._folder / "copy.db"
        for end in ("", "-wal", "-shm"):
            Path(f"{target}{end}").unlink(missing_ok=True)
        for end in ("", "-wal"):
            if Path(f"{file}{end}").exists():
                shutil.copy(f"{file}{end}", f"{target}{end}")
        return target


def _differing(found: Tables, expected: Tables) -> str:
    """The first rows that differ, of each table."""
    lines = []
    for name, rows in expected.items():
        keys = [key for key in found[name].keys() | rows.keys() if found[name].get(key) != rows.get(key)]
        lines += [f"{name}: {found[name].get(key)} instead of {rows.get(key)}" for key in sorted(keys)[:3]]
    return "\n".join(lines)
