"""The shelf: in whatever order it hears of Cargos and revocations, it says the same; nobody's word counts for another's Cargo."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from privacy.keys import NodeKey
from protocol import limits
from protocol.cargo_shelf import CargoRefused, CargoShelf, Why
from protocol.cargos import (
    Revocation,
    SignedCargo,
    SignedRevocation,
    read_cargo,
    read_revocation,
    sign_cargo,
    sign_revocation,
)
from protocol.errors import SignatureError
from tests.protocol.samples import COORDINATOR, NOW_MS, OTHER
from tests.protocol.samples import ISLAND as PUBLISHER
from tests.protocol.test_protocol_cargos import manifest

NETWORK = "net"
Word = SignedCargo | SignedRevocation


def cargo(release: str = "1.0.0", by: NodeKey = PUBLISHER, **changes: Any) -> SignedCargo:
    return read_cargo(sign_cargo(manifest(release=release, publisher=by.peer_id, **changes), by))


def gone(what: SignedCargo | None, by: NodeKey = PUBLISHER, network: str = "", publisher: str = "") -> SignedRevocation:
    whose = publisher or (what.manifest.publisher if what is not None and network else by.peer_id)
    return read_revocation(sign_revocation(Revocation(1, whose, what.address if what else "", network, "a leak", NOW_MS), by))


def shelf() -> CargoShelf:
    return CargoShelf(NETWORK, lambda peer: peer == COORDINATOR.peer_id)


def tell(shelf: CargoShelf, words: Sequence[Word]) -> None:
    for word in words:
        try:
            shelf.add(word) if isinstance(word, SignedCargo) else shelf.revoke(word)
        except CargoRefused as refused:
            assert refused.why is Why.REVOKED
        except SignatureError:
            pass


def why(call: Callable[[], object]) -> Why:
    with pytest.raises(CargoRefused) as refused:
        call()
    return refused.value.why


ONE, TWO, OLD = cargo("1.0.0"), cargo("1.10.0"), cargo("0.9.0")


def test_a_name_stands_for_its_newest_release() -> None:
    known = shelf()
    assert known.newest(PUBLISHER.peer_id, "text-stats", NOW_MS) is None
    for one in (TWO, OLD, ONE):
        assert known.add(one) and not known.add(one)
    assert known.newest(PUBLISHER.peer_id, "text-stats", NOW_MS) == TWO
    assert known.newest(OTHER.peer_id, "text-stats", NOW_MS) is None
    for one in (ONE, TWO, OLD):
        assert known.may_run(one.address, NOW_MS) == one
    assert len(known.all()) == 3
    assert why(lambda: known.may_run("cd" * 32, NOW_MS)) is Why.UNKNOWN


def test_a_step_back_is_refused_and_the_same_again_is_not() -> None:
    known = shelf()
    known.check_new(ONE, NOW_MS)
    known.add(ONE)
    known.check_new(ONE, NOW_MS)
    known.check_new(TWO, NOW_MS)
    known.add(TWO)
    assert why(lambda: known.check_new(ONE, NOW_MS)) is Why.ROLLBACK
    assert why(lambda: known.check_new(cargo("1.10.0", description="other"), NOW_MS)) is Why.CONFLICT
    known.check_new(cargo("0.0.1", by=OTHER), NOW_MS)  # another publisher's name is another name
    assert why(lambda: known.check_new(cargo("2.0.0", expires_at_ms=NOW_MS + 1), NOW_MS + 2)) is Why.EXPIRED


def test_a_release_means_one_cargo() -> None:
    first, second = cargo(), cargo(description="other", published_at_ms=NOW_MS + 1)
    for order in itertools.permutations((first, second)):
        known = shelf()
        tell(known, order)
        assert known.newest(PUBLISHER.peer_id, "text-stats", NOW_MS + 1) == first
        assert why(lambda: known.may_run(second.address, NOW_MS + 1)) is Why.CONFLICT  # noqa: B023
    same_time = cargo(description="other")
    known = shelf()
    tell(known, (first, same_time))
    assert known.newest(PUBLISHER.peer_id, "text-stats", NOW_MS) == min(first, same_time, key=lambda one: one.address)


def test_what_has_expired_does_not_run_and_its_name_stands_for_the_one_before() -> None:
    short = cargo("2.0.0", expires_at_ms=NOW_MS + 10)
    known = shelf()
    tell(known, (ONE, short))
    assert known.newest(PUBLISHER.peer_id, "text-stats", NOW_MS) == short
    assert known.newest(PUBLISHER.peer_id, "text-stats", NOW_MS + 11) == ONE
    assert why(lambda: known.may_run(short.address, NOW_MS + 11)) is Why.EXPIRED


@pytest.mark.parametrize("word", [gone(TWO), gone(TWO, COORDINATOR, NETWORK)])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_revoked_cargo_never_runs_again(word: SignedRevocation, is_first: bool) -> None:
    known = shelf()
    known.add(ONE)
    tell(known, (word, TWO) if is_first else (TWO, word))
    assert why(lambda: known.may_run(TWO.address, NOW_MS)) is Why.UNKNOWN
    assert why(lambda: known.add(TWO)) is Why.REVOKED
    assert why(lambda: known.check_new(TWO, NOW_MS)) is Why.REVOKED
    assert known.newest(PUBLISHER.peer_id, "text-stats", NOW_MS) == ONE
    assert known.revocations() == [word] and not known.revoke(word)


@pytest.mark.parametrize("word", [gone(None), gone(None, COORDINATOR, NETWORK, PUBLISHER.peer_id)])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_revoked_key_has_signed_nothing(word: SignedRevocation, is_first: bool) -> None:
    known, others = shelf(), cargo(by=OTHER)
    tell(known, (word, ONE, TWO, others) if is_first else (ONE, TWO, others, word))
    assert known.all() == [others]
    assert why(lambda: known.add(OLD)) is Why.REVOKED


def test_nobody_revokes_what_is_another_s() -> None:
    foreign = gone(ONE, OTHER)  # Other signs, as a publisher, that this address is revoked
    for order in ((foreign, ONE), (ONE, foreign)):
        known = shelf()
        tell(known, order)
        assert known.may_run(ONE.address, NOW_MS) == ONE
    known.revoke(gone(ONE))
    assert why(lambda: known.add(ONE)) is Why.REVOKED, "nor does it take the place of its publisher's own word"
    for stranger in (gone(ONE, OTHER, NETWORK), gone(ONE, COORDINATOR, "another-net")):
        with pytest.raises(SignatureError):
            known.revoke(stranger)


def test_strangers_words_are_bounded_and_push_no_real_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHELF_EARLY_MAX", 10)
    monkeypatch.setattr(limits, "SHELF_REVOCATIONS_MAX", 3)
    known = shelf()
    known.add(ONE)
    known.revoke(gone(ONE))
    known.revoke(gone(TWO, COORDINATOR, NETWORK))
    for number in range(50):
        stranger = NodeKey(bytes([number]) * 32)
        known.revoke(gone(OLD, stranger))
    assert len(known._early) == 10
    assert {why(lambda: known.add(one)) for one in (ONE, TWO)} == {Why.REVOKED}  # noqa: B023
    known.revoke(gone(None, COORDINATOR, NETWORK, OTHER.peer_id))
    assert why(lambda: known.revoke(gone(OLD, COORDINATOR, NETWORK))) is Why.FULL


def test_a_shelf_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHELF_CARGOS_MAX", 2)
    known = shelf()
    tell(known, (ONE, TWO))
    assert why(lambda: known.add(OLD)) is Why.FULL
    known.revoke(gone(ONE))
    assert known.add(OLD)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_words_does_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    cargos = [cargo(f"1.{n}.0", by=by, description=text) for n in range(3) for by in (PUBLISHER, OTHER) for text in ("a", "b")]
    words: list[Word] = [*rng.sample(cargos, 8)]
    words += [gone(rng.choice(cargos), COORDINATOR, NETWORK) for _ in range(2)]
    words += [gone(one, PUBLISHER if rng.random() < 0.7 else OTHER) for one in rng.sample(cargos, 3)]
    words += [gone(None, OTHER)] if rng.random() < 0.3 else []
    found = set()
    for _ in range(6):
        rng.shuffle(words)
        known = shelf()
        tell(known, words)
        newest = tuple(known.newest(by.peer_id, "text-stats", NOW_MS) for by in (PUBLISHER, OTHER))
        found.add((tuple(one.address for one in known.all()), tuple(one.address if one else "" for one in newest)))
    assert len(found) == 1
