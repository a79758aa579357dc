"""The table of answers: bounds, ages, deletion, and random operations against a plain model of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from coordinator.cache.candidates import CANDIDATES_MAX
from coordinator.cache.guards import read
from coordinator.cache.table import ENTRY_BYTES, OVERSIZE_SHARE, READING_BYTES, AnswerTable, Entry, Vector

ROOM = 1_000_000_000
TTL_S = 100.0


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def entry(number: int, account: str = "ann", kept_s: float = 0.0, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "scope": account,
        "key": key(number),
        "account": account,
        "cargo": "echo",
        "content_hash": "aa",
        "job_id": f"job-{number}",
        "packed": b"x" * 10,
        "kept_at_s": kept_s,
        "expires_at_s": kept_s + TTL_S,
    }
    return Entry(**(fields | changes))


def slots(table: AnswerTable) -> list[int]:
    """Numbers of the keys, the one that was not used for longest first."""
    return [int.from_bytes(slot[1], "big") for slot in table._entries]


def test_what_was_not_used_for_longest_goes_first() -> None:
    table = AnswerTable(3, ROOM)
    for number in (1, 2, 3):
        assert table.put(entry(number), 0.0)
    assert table.get(("ann", key(1)), 1.0) is not None
    assert table.peek(("ann", key(2)), 1.0) is not None  # which is no use of it
    table.put(entry(4), 1.0)
    assert slots(table) == [3, 1, 4] and table.evicted == 1


def test_age() -> None:
    table = AnswerTable(10, ROOM)
    table.put(entry(1, kept_s=0.0), 0.0)
    table.put(entry(2, kept_s=50.0), 50.0)
    assert table.get(("ann", key(1)), 99.9) is not None
    assert table.get(("ann", key(1)), 100.0) is None
    assert table.expire(100.0) == 1 and slots(table) == [2] and table.expired == 1
    table.put(entry(2, kept_s=140.0), 140.0)  # anew, with a new age
    assert table.expire(151.0) == 0 and len(table) == 1


def test_bytes_are_bounded_and_what_is_too_large_is_not_kept() -> None:
    table = AnswerTable(1000, OVERSIZE_SHARE * 3 * ENTRY_BYTES)
    assert not table.put(entry(0, packed=b"x" * 2 * ENTRY_BYTES + b"y"), 0.0) and len(table) == 0
    for number in range(100):
        assert table.put(entry(number, packed=b"x" * ENTRY_BYTES), 0.0)
        assert table.size_bytes == sum(held.size_bytes for held in table._entries.values()) <= table.bytes_max
    assert len(table) == 24 and slots(table)[-1] == 99


def test_what_is_known_of_a_question_weighs_and_belongs_to_it() -> None:
    table, vector = AnswerTable(10, ROOM), np.ones(8, np.float32)
    old, new = entry(1, context=b"c"), entry(1, context=b"c")
    table.put(old, 0.0)
    assert table.candidates("ann", b"c", ("one",), 0.0) == []
    table.put(new, 0.0)
    before = table.size_bytes
    table.describe(old, "one", ("one",), read("one"))  # it was replaced meanwhile
    table.set_vector(old, vector)
    assert table.size_bytes == before and old.words == ()
    table.describe(new, "one", ("one",), read("one"))
    table.set_vector(new, vector)
    assert table.size_bytes == before + READING_BYTES + 4 * len("one") + vector.nbytes == new.size_bytes
    assert table.candidates("ann", b"c", ("one",), 0.0) == [new]
    table.drop(("ann", key(1)))
    assert table.size_bytes == 0 and table.per_cargo() == {} and table.candidates("ann", b"c", ("one",), 0.0) == []


def test_an_account_that_asks_much_pushes_out_its_own() -> None:
    table = AnswerTable(10, ROOM)
    table.put(entry(1, "ann"), 0.0)
    table.put(entry(2, "bob"), 0.0)
    for number in range(100, 200):
        table.put(entry(number, "eve"), 0.0)
    assert table.held_by("ann") == table.held_by("bob") == 1 and table.held_by("eve") == 8
    assert table.peek(("ann", key(1)), 0.0) is not None
    for number in range(300, 310):  # who has less than a share takes room from those who were quiet longest
        table.put(entry(number, "bob"), 0.0)
    assert len(table) == 10 and table.held_by("bob") > 1


def test_an_account_with_large_answers_pushes_out_its_own() -> None:
    table = AnswerTable(1000, 100 * ENTRY_BYTES)
    for number in range(10):
        table.put(entry(number, "ann"), 0.0)
    for number in range(100, 300):
        table.put(entry(number, "eve", packed=b"x" * 5 * ENTRY_BYTES), 0.0)
    assert table.held_by("ann") == 10 and 0 < table.held_by("eve") < 20


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ({"account": "ann"}, [3, 4]),
        ({"cargo": "other"}, [1, 3]),
        ({"account": "ann", "cargo": "other"}, [1, 3, 4]),
        ({"key": key(3)}, [1, 2, 4]),
        ({"account": "ann", "key": key(3)}, [1, 2, 3, 4]),
        ({}, []),
    ],
)
def test_deleting(wanted: dict[str, Any], left: list[int]) -> None:
    table = AnswerTable(10, ROOM)
    table.put(entry(1, "ann"), 0.0)
    table.put(entry(2, "ann", cargo="other"), 0.0)
    table.put(entry(3, "bob"), 0.0)
    table.put(entry(4, "bob", cargo="other", scope=""), 0.0)
    assert table.delete(**wanted) == 4 - len(left)
    assert slots(table) == left


def test_candidates_of_one_scope_and_context_only() -> None:
    table = AnswerTable(10, ROOM)
    words = ("reset", "password")
    table.put(entry(1, context=b"c", words=words), 0.0)
    table.put(entry(2, context=b"d", words=words), 0.0)
    table.put(entry(3, "bob", context=b"c", words=words), 0.0)
    table.put(entry(4, context=b"c", words=("dark", "mode")), 0.0)
    table.put(entry(5, context=b"c", words=words, kept_s=-99.5), 0.0)
    assert [found.job_id for found in table.candidates("ann", b"c", words, 0.6)] == ["job-1"]
    table.blind(("ann", key(1)))
    assert table.candidates("ann", b"c", words, 0.0) == table.candidates("ann", b"c", words, 0.0)
    assert [found.job_id for found in table.candidates("ann", b"c", words, 0.0)] == ["job-5"]
    assert table.get(("ann", key(1)), 0.0) is not None  # for the very same question
    table.drop(("ann", key(1)))
    table.drop(("ann", key(5)))
    table.drop(("ann", key(4)))
    assert table.candidates("ann", b"c", words, 0.0) == []


@dataclass
class Model:
    """The same by lists: slow, and plain to see."""

    entries_max: int
    bytes_max: int
    held: list[Entry] = field(default_factory=list)  # the one that was not used for longest first

    def find(self, slot: tuple[str, bytes], now_s: float) -> Entry | None:
        return next((one for one in self.held if one.slot == slot and now_s < one.expires_at_s), None)

    def get(self, slot: tuple[str, bytes], now_s: float) -> Entry | None:
        found = self.find(slot, now_s)
        if found is not None:
            self.held.remove(found)
            self.held.append(found)
        return found

    def drop(self, slot: tuple[str, bytes]) -> None:
        self.held = [one for one in self.held if one.slot != slot]

    def expire(self, now_s: float) -> None:
        self.held = [one for one in self.held if now_s < one.expires_at_s]

    def put(self, new: Entry, now_s: float) -> bool:
        self.expire(now_s)
        self.drop(new.slot)
        if new.size_bytes > self.bytes_max // OVERSIZE_SHARE:
            return False
        self.held.append(new)
        self.make_room(new.account)
        return True

    def make_room(self, account: str) -> None:
        while len(self.held) > self.entries_max or sum(one.size_bytes for one in self.held) > self.bytes_max:
            own = [one for one in self.held if one.account == account]
            accounts = len({one.account for one in self.held})
            if len(self.held) > self.entries_max:
                has_more = len(own) > self.entries_max / accounts
            else:
                has_more = sum(one.size_bytes for one in own) > self.bytes_max / accounts
            self.held.remove(own[0] if own and has_more else self.held[0])

    def set_vector(self, slot: tuple[str, bytes], vector: Vector) -> None:
        for one in self.held:
            if one.slot == slot and one.vector is None:
                one.vector = vector
                self.make_room(one.account)
                return

    def delete(self, account: str, cargo: str) -> int:
        before = len(self.held)
        self.held = [one for one in self.held if not (account in ("", one.account) and cargo in ("", one.cargo))]
        return before - len(self.held)


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_against_the_model(seed: int) -> None:
    rng = random.Random(seed)
    entries_max, bytes_max = rng.choice([(5, ROOM), (20, ROOM), (1000, 40 * ENTRY_BYTES), (12, 30 * ENTRY_BYTES)])
    table, model, now_s = AnswerTable(entries_max, bytes_max), Model(entries_max, bytes_max), 0.0
    for _ in range(1500):
        now_s += rng.choice([0.0, 0.1, 3.0])
        account, number = rng.choice("abc"), rng.randrange(30)
        slot = (account, key(number))
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                fields = {
                    "cargo": rng.choice(["x", "y"]),
                    "packed": b"z" * rng.randrange(2 * ENTRY_BYTES),
                    **rng.choice([{}, {"context": b"c", "words": tuple(rng.sample(["one", "two", "three", "four"], 2))}]),
                    "expires_at_s": now_s + rng.choice([1.0, 50.0, 500.0]),
                }
                pair = [entry(number, account, now_s, **fields) for _ in range(2)]
                assert table.put(pair[0], now_s) == model.put(pair[1], now_s)
            case 4 | 5 | 6:
                found, wanted = table.get(slot, now_s), model.get(slot, now_s)
                assert (found is None) == (wanted is None)
                assert found is None or wanted is None or found.packed == wanted.packed
            case 7:
                vector, held = np.ones(rng.randrange(1, 300), np.float32), table.peek(slot, now_s)
                if held is not None:
                    table.set_vector(held, vector)
                    model.set_vector(slot, vector)
            case 8:
                table.expire(now_s)
                model.expire(now_s)
                compare(table, model)
            case _ if rng.random() < 0.2:
                wanted_account, wanted_cargo = rng.choice(["", "a", "b"]), rng.choice(["x", "y"])
                assert table.delete(wanted_account, wanted_cargo) == model.delete(wanted_account, wanted_cargo)
        assert table.size_bytes == sum(one.size_bytes for one in model.held)
    table.expire(now_s)
    model.expire(now_s)
    compare(table, model)


def compare(table: AnswerTable, model: Model) -> None:
    assert [one.slot for one in table._entries.values()] == [one.slot for one in model.held]
    assert table.size_bytes == sum(one.size_bytes for one in model.held)
    for account in "abc":
        assert table.held_by(account) == sum(one.account == account for one in model.held)
        found = {one.slot for one in table.candidates(account, b"c", ("one",), 0.0)}
        sharing = {one.slot for one in model.held if one.scope == account and one.context and "one" in one.words}
        assert found <= sharing and (len(found) == len(sharing) or len(sharing) > CANDIDATES_MAX)
    by_cargo = {cargo: sum(one.cargo == cargo for one in model.held) for cargo in "xy"}
    assert {cargo: count for cargo, (count, _) in table.per_cargo().items()} == {name: many for name, many in by_cargo.items() if many}
