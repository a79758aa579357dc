"""What a name stands for follows from what was heard, whatever the order; what was replaced never comes back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from protocol import limits
from protocol.cargo_news import About, Notice, key_of, read_notice
from protocol.cargo_promotions import (
    PROMOTION_VERSION,
    Promotion,
    SignedPromotion,
    next_serial,
    peek_promotion,
    read_promotion,
    sign_promotion,
)
from protocol.cargo_shelf import CargoRefused, CargoShelf, Why
from protocol.cargos import SignedCargo, read_revocation
from protocol.errors import RemoteProtocolError, SignatureError
from tests.protocol.cargo_samples import cargo, promoted, promotion, revocation, signed_delegation
from tests.protocol.samples import COORDINATOR, FIRST, HOLDER, NETWORK, NOW_MS, OTHER

ONE, TWO, THREE = (cargo(release=f"{number}.0.0") for number in (1, 2, 3))
ALIAS = cargo("another")
NAME = ONE.manifest.name


def shelf(*cargos: SignedCargo, promotions: Sequence[SignedPromotion] = ()) -> CargoShelf:
    made = CargoShelf(NETWORK, {COORDINATOR.peer_id}.__contains__)
    for one in cargos:
        made.add(one)
    for signed in promotions:
        if made.is_newer(signed):
            made.promote(signed)
    return made


def stands_for(made: CargoShelf, now_ms: int = NOW_MS) -> SignedCargo | None:
    return made.stands_for(NAME, now_ms)


def test_signed_and_read_again() -> None:
    signed = promotion(TWO, origin="ab:12")
    assert read_promotion(signed.envelope) == peek_promotion(signed.envelope) == signed
    assert signed.signer == COORDINATOR.peer_id
    assert (signed.promotion.name, signed.promotion.cargo, signed.promotion.release) == (NAME, TWO.address, "2.0.0")
    told = read_notice(promoted(TWO, origin="ab:12"), NETWORK, NOW_MS)
    assert told.promotion == signed and told.key == signed.key == key_of(told.notice) and told.coordinator == COORDINATOR.peer_id
    assert promotion(TWO, FIRST, origin="ab:12").key == signed.key, "whoever signs it, it says the same"
    assert promotion(TWO, origin="ab:13").key != signed.key
    broken = bytearray(signed.envelope)
    broken[-1] ^= 1
    with pytest.raises(SignatureError):
        read_promotion(bytes(broken))


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": PROMOTION_VERSION + 1},
        {"network": ""},
        {"name": "Not A Name"},
        {"cargo": "xyz"},
        {"cargo": ""},
        {"release": "1.0"},
        {"release": ""},
        {"serial": 0},
        {"serial": limits.PROMOTION_SERIAL_MAX + 1},
        {"at_ms": 0},
        {"origin": "x" * (limits.PROMOTION_ORIGIN_CHARS_MAX + 1)},
        {"origin": "two\nlines"},
    ],
)
def test_what_makes_no_sense_cannot_be_said(wrong: dict[str, Any]) -> None:
    fields = promotion().promotion
    with pytest.raises(ValueError):
        replace(fields, **wrong)


@pytest.mark.parametrize(
    "notice",
    [
        Notice(About.PROMOTION, promotion(None, OTHER).envelope, b"", signed_delegation(COORDINATOR)),
        Notice(About.PROMOTION, promotion(None, HOLDER).envelope, b"", signed_delegation(HOLDER, OTHER)),
        Notice(About.PROMOTION, promotion().envelope),
        promoted(network="f" * 32),
    ],
    ids=["not the delegate", "a delegation by a stranger", "no delegation", "another network"],
)
def test_only_a_coordinator_of_the_network_says_it(notice: Notice) -> None:
    with pytest.raises(SignatureError):
        read_notice(notice, NETWORK, NOW_MS)


def test_not_from_the_future() -> None:
    late_ms = NOW_MS + int(limits.CLOCK_SKEW_S * 1000)
    assert read_notice(promoted(at_ms=late_ms), NETWORK, NOW_MS).promotion is not None
    with pytest.raises(RemoteProtocolError, match="future"):
        read_notice(promoted(at_ms=late_ms + 1), NETWORK, NOW_MS)


def test_the_highest_serial_counts_in_whatever_order_they_come() -> None:
    said = [promotion(ONE, serial=5), promotion(TWO, serial=7), promotion(ONE, serial=6), promotion(THREE, serial=1)]
    for order in itertools.permutations(said):
        assert stands_for(shelf(ONE, TWO, THREE, promotions=order)) == TWO


def test_one_that_was_replaced_is_refused() -> None:
    made = shelf(ONE, TWO, promotions=[promotion(ONE, serial=5)])
    assert made.promote(promotion(TWO, serial=6)) == promotion(ONE, serial=5), "whose place it takes"
    for old in (promotion(ONE, serial=5), promotion(TWO, serial=6)):
        assert not made.is_newer(old)
        with pytest.raises(CargoRefused) as refused:
            made.promote(old)
        assert refused.value.why is Why.ROLLBACK
    assert stands_for(made) == TWO


def test_of_the_same_serial_all_nodes_choose_the_same() -> None:
    said = [promotion(one, signer, serial=5) for one, signer in ((ONE, COORDINATOR), (TWO, FIRST), (THREE, OTHER))]
    chosen = {stands_for(shelf(ONE, TWO, THREE, promotions=order)) for order in itertools.permutations(said)}
    assert len(chosen) == 1


def test_without_a_promotion_the_newest_release_counts() -> None:
    assert stands_for(shelf(ONE, THREE, TWO)) == THREE
    assert stands_for(shelf()) is None
    assert shelf(cargo("b", "1.9.0"), cargo("b", "1.10.0")).stands_for("b", NOW_MS) == cargo("b", "1.10.0"), "as numbers"


def test_candidates_get_nothing_and_older_ones_stand_in() -> None:
    made = shelf(ONE, TWO, THREE, promotions=[promotion(TWO, release="1.0.0")])
    assert stands_for(made) == TWO
    made.revoke(read_revocation(revocation(TWO)))
    assert stands_for(made) == ONE, "not the candidate, which is newer"
    made.revoke(read_revocation(revocation(ONE)))
    assert stands_for(made) is None


def test_one_that_has_expired_does_not_count() -> None:
    two = cargo(release="2.0.0", expires_at_ms=NOW_MS + 5)
    made = shelf(ONE, two, promotions=[promotion(two)])
    assert (stands_for(made), stands_for(made, NOW_MS + 6)) == (two, ONE)


def test_a_name_may_stand_for_a_cargo_of_another_name() -> None:
    made = shelf(ONE, TWO, ALIAS, promotions=[promotion(ALIAS, name=NAME, release="1.0.0")])
    assert stands_for(made) == ALIAS and made.stands_for("another", NOW_MS) == ALIAS
    made.revoke(read_revocation(revocation(ALIAS)))
    assert stands_for(made) == ONE


def test_whether_a_promoted_cargo_has_been_heard_of() -> None:
    made = shelf(ONE, promotions=[promotion(TWO, release="1.0.0")])
    assert made.awaits(NAME) and not made.awaits("another")
    made.add(TWO)
    assert not made.awaits(NAME)
    made.revoke(read_revocation(revocation(TWO)))
    assert not made.awaits(NAME), "it will never run, so nobody waits for it"


def test_a_shelf_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHELF_PROMOTIONS_MAX", 1)
    made = shelf(ONE, promotions=[promotion(ONE, serial=1)])
    with pytest.raises(CargoRefused) as refused:
        made.promote(promotion(ALIAS))
    assert refused.value.why is Why.FULL
    assert made.promote(promotion(TWO, serial=2)) is not None, "of a name that is known there is room"


@pytest.mark.parametrize(
    ("last", "now_ms", "serial"),
    [(0, NOW_MS, NOW_MS), (NOW_MS, NOW_MS, NOW_MS + 1), (NOW_MS, NOW_MS - 86_400_000, NOW_MS + 1), (7, NOW_MS + 5, NOW_MS + 5)],
    ids=["the first", "in the same millisecond", "the clock went back", "a database from an old copy"],
)
def test_serials_only_go_up(last: int, now_ms: int, serial: int) -> None:
    assert next_serial(last, now_ms) == serial > last


def test_a_promotion_has_one_encoding() -> None:
    fields = Promotion(PROMOTION_VERSION, NETWORK, NAME, ONE.address, "1.0.0", 3, NOW_MS, "publish")
    assert sign_promotion(fields, COORDINATOR) == sign_promotion(replace(fields), COORDINATOR)
