"""Ads and notices of loss: who may say what about whom, and when."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest

from protocol import limits
from protocol.ads import (
    AD_VERSION,
    CargoLoading,
    CargoOffer,
    Gpu,
    Hardware,
    PathMeasure,
    read_ad,
    read_lost,
    sign_ad,
    sign_lost,
)
from protocol.envelope import Label, seal
from protocol.errors import LocalProtocolError, RemoteProtocolError, SignatureError
from protocol.prices import Ask
from tests.protocol import samples
from tests.protocol.samples import NOW_MS

SKEW_MS = int(limits.CLOCK_SKEW_S * 1000)
LIFETIME_MS = int(limits.AD_LIFETIME_S * 1000)


def test_an_ad_round_trip() -> None:
    ad = samples.ad()
    assert read_ad(sign_ad(ad, samples.ISLAND), NOW_MS) == ad
    assert ad.offer("smollm2-135m") == ad.offers[0] and ad.offer("other") is None


def test_only_the_peer_itself_may_sign_its_ad() -> None:
    with pytest.raises(SignatureError, match="was signed by"):
        read_ad(sign_ad(samples.ad(), samples.OTHER), NOW_MS)


def test_a_notice_of_loss_is_no_ad_and_the_other_way_round() -> None:
    with pytest.raises(SignatureError):
        read_ad(sign_lost(samples.lost(), samples.COORDINATOR), NOW_MS)
    with pytest.raises(SignatureError):
        read_lost(sign_ad(samples.ad(), samples.ISLAND), NOW_MS)


@pytest.mark.parametrize(("ahead_ms", "taken"), [(0, True), (SKEW_MS, True), (SKEW_MS + 1, False), (10**12, False)])
def test_a_sequence_from_the_future_is_refused(ahead_ms: int, taken: bool) -> None:
    data = sign_ad(samples.ad(sequence=NOW_MS + ahead_ms), samples.ISLAND)
    if taken:
        assert read_ad(data, NOW_MS).sequence == NOW_MS + ahead_ms
    else:
        with pytest.raises(RemoteProtocolError, match="future"):
            read_ad(data, NOW_MS)


@pytest.mark.parametrize(("late_ms", "taken"), [(0, True), (SKEW_MS, True), (SKEW_MS + 1, False), (10**12, False)])
def test_an_expired_ad_is_refused(late_ms: int, taken: bool) -> None:
    ad = samples.ad()
    now_ms = ad.expires_at_ms + late_ms
    if taken:
        read_ad(sign_ad(ad, samples.ISLAND), now_ms)
    else:
        with pytest.raises(RemoteProtocolError, match="expired"):
            read_ad(sign_ad(ad, samples.ISLAND), now_ms)


BAD_AD: list[dict[str, Any]] = [
    {"version": AD_VERSION + 1},
    {"network": ""},
    {"network": "a b"},
    {"peer": "nobody"},
    {"boot": 0},
    {"boot": NOW_MS + 1},
    {"expires_at_ms": NOW_MS - 1},
    {"expires_at_ms": NOW_MS + LIFETIME_MS + 1},
    {"agent": "a\nb"},
    {"agent": "\x1b[2J"},
    {"region": "E\u202eU"},
    {"region": "x" * 129},
    {"addresses": ("/ip4/192.0.2.1\n",)},
    {"addresses": ("/ip4/192.0.2.1/tcp/4001",) * 17},
    {"addresses": ("x" * 1025,)},
    {"runtimes": ("not a name",)},
    {"memory_offered_bytes": -1},
    {"memory_offered_bytes": 2**60},
    {"offers": (samples.offer(), samples.offer(ask=Ask(per_job=1)))},
    {"offers": tuple(samples.offer(name=f"c{n}") for n in range(65))},
    {"paths": (PathMeasure(samples.OTHER.peer_id, 1),) * 65},
]


@pytest.mark.parametrize("change", BAD_AD, ids=lambda change: next(iter(change)))
def test_an_ad_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        samples.ad(**change)


LOADING = CargoLoading("text-stats", "ee" * 32, 5, 10)
BAD_LOADING: list[dict[str, Any]] = [
    {"name": "two words"},
    {"address": "ee"},
    {"done_bytes": -1},
    {"done_bytes": 11},
    {"total_bytes": -1},
    {"total_bytes": 2**50 + 1},
]


@pytest.mark.parametrize("change", BAD_LOADING, ids=lambda change: next(iter(change)))
def test_what_is_loading_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(LOADING, **change)


def test_of_a_download_whose_size_nobody_knows_only_what_came_is_said() -> None:
    assert replace(LOADING, total_bytes=0).done_bytes == 5


def test_an_ad_names_a_few_downloads_each_once() -> None:
    many = tuple(replace(LOADING, address=f"{number:064x}") for number in range(limits.AD_LOADING_MAX + 1))
    assert samples.ad(loading=many[:-1]).loading == many[:-1]
    for loading in (many, (LOADING, LOADING)):
        with pytest.raises(ValueError, match="loading"):
            samples.ad(loading=loading)


BAD_OFFER: list[dict[str, Any]] = [
    {"tokens_per_s": math.nan},
    {"tokens_per_s": math.inf},
    {"tokens_per_s": -1.0},
    {"tokens_per_s": 1e8},
    {"kv_tokens_free": 32_769},
    {"slots_free": 17},
    {"slots_free": -1},
    {"context_tokens": 0},
    {"weights_bytes": -1},
    {"kv_bytes_per_token": 2**51},
    {"content_hash": "AB" * 32},
    {"content_hash": "ab" * 31},
    {"name": "no spaces"},
    {"name": "n" * 129},
    {"name": ""},
    {"engine": "a\x00b"},
]


@pytest.mark.parametrize("change", BAD_OFFER, ids=lambda change: next(iter(change)))
def test_an_offer_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        samples.offer(**change)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf, -1.0])
def test_absurd_figures_on_the_wire_are_refused_though_signed(figure: float) -> None:
    """The encoder would not write them, so the payload is put together by hand and signed with the right key."""
    ad = samples.ad()
    payload = msgpack.unpackb(_payload(sign_ad(ad, samples.ISLAND)))
    place = [field.name for field in fields(type(ad))].index("offers")
    speed = [field.name for field in fields(CargoOffer)].index("tokens_per_s")
    assert payload[place][0][speed] == 140.5
    payload[place][0][speed] = figure
    with pytest.raises(RemoteProtocolError):
        read_ad(seal(Label.AD, msgpack.packb(payload), samples.ISLAND), NOW_MS)


def _payload(envelope: bytes) -> bytes:
    payload = msgpack.unpackb(envelope)[2]
    assert isinstance(payload, bytes)
    return payload


def test_hardware_checks_itself() -> None:
    for bad in ({"cpus": 0}, {"ram_bytes": -1}, {"disk_free_bytes": 2**51}, {"gpus": (Gpu("g", "cuda", 1),) * 33}):
        with pytest.raises(ValueError):
            Hardware(**{"cpus": 1, "ram_bytes": 1, "disk_free_bytes": 1, **bad})  # type: ignore[arg-type]
    for name, backend, vram in (("g\n", "cuda", 1), ("g", "cu da", 1), ("g", "cuda", -1)):
        with pytest.raises(ValueError):
            Gpu(name, backend, vram)


def test_an_ad_that_is_too_large_is_not_signed() -> None:
    offers = tuple(samples.offer(name=f"c{n}-" + "n" * 100, engine="e" * 128, runtime="r" * 128) for n in range(64))
    runtimes = tuple(f"r{n}" + "r" * 120 for n in range(64))
    ad = samples.ad(offers=offers, addresses=("a" * 1024,) * 16, runtimes=runtimes)
    with pytest.raises(LocalProtocolError, match="over"):
        sign_ad(ad, samples.ISLAND)


def test_a_notice_of_loss_round_trip() -> None:
    lost = samples.lost()
    assert read_lost(sign_lost(lost, samples.COORDINATOR), NOW_MS) == (samples.COORDINATOR.peer_id, lost)


@pytest.mark.parametrize(
    ("age_ms", "taken"),
    [
        (0, True),
        (-SKEW_MS, True),
        (-SKEW_MS - 1, False),
        (LIFETIME_MS + SKEW_MS, True),
        (LIFETIME_MS + SKEW_MS + 1, False),
    ],
)
def test_the_age_of_a_notice(age_ms: int, taken: bool) -> None:
    data = sign_lost(samples.lost(), samples.COORDINATOR)
    if taken:
        read_lost(data, NOW_MS + age_ms)
    else:
        with pytest.raises(RemoteProtocolError, match="notice"):
            read_lost(data, NOW_MS + age_ms)


def test_a_notice_cannot_bar_a_peer_for_good() -> None:
    """Its sequence is that of an ad that the witness had read, so it cannot lie further ahead than an ad may."""
    samples.lost(sequence=NOW_MS + SKEW_MS, seen_at_ms=NOW_MS)
    for sequence in (NOW_MS + SKEW_MS + 1, 2**53):
        with pytest.raises(ValueError, match="sequence"):
            samples.lost(sequence=sequence, seen_at_ms=NOW_MS)
