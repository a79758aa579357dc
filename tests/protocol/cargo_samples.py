"""Cargos, their listings and revocations, and the notices that they travel in; keys and times never change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from privacy.keys import NodeKey
from protocol import tickets
from protocol.cargo_news import LISTING_VERSION, About, Listing, Notice, sign_listing
from protocol.cargo_promotions import PROMOTION_VERSION, Promotion, SignedPromotion, read_promotion, sign_promotion
from protocol.cargos import (
    CARGO_VERSION,
    REVOCATION_VERSION,
    CachePolicy,
    CargoFile,
    CargoManifest,
    Needs,
    Revocation,
    Runtime,
    SignedCargo,
    read_cargo,
    sign_cargo,
    sign_revocation,
)
from protocol.prices import Ask
from tests.protocol.samples import COORDINATOR, HOLDER, NETWORK, NETWORK_KEY, NOW_MS, delegation

PUBLISHER = HOLDER
MODULE = CargoFile("module.wasm", "ab" * 32, 1000, ("https://example.org/module.wasm",))


def cargo(name: str = "text-stats", release: str = "1.0.0", publisher: NodeKey = PUBLISHER, **changes: Any) -> SignedCargo:
    fields = CargoManifest(
        version=CARGO_VERSION,
        name=name,
        release=release,
        publisher=publisher.peer_id,
        runtime=Runtime.WASM,
        entry="module.wasm",
        files=(MODULE,),
        needs=Needs(memory_bytes=2**28, time_s=60),
        ask=Ask(1000, 0, 0),
        trust_level=0,
        licence="Apache-2.0",
        description="counts words",
        options="{}",
        input_schema="{}",
        output_schema="{}",
        cache=CachePolicy(),
        published_at_ms=NOW_MS,
    )
    return read_cargo(sign_cargo(replace(fields, **changes), publisher))


def signed_delegation(coordinator: NodeKey = COORDINATOR, network_key: NodeKey = NETWORK_KEY, **changes: Any) -> bytes:
    return tickets.sign_delegation(delegation(coordinator.peer_id, **changes), network_key)


def listing(address: str, coordinator: NodeKey = COORDINATOR, **changes: Any) -> bytes:
    return sign_listing(replace(Listing(LISTING_VERSION, NETWORK, address, NOW_MS), **changes), coordinator)


def listed(one: SignedCargo | None = None, coordinator: NodeKey = COORDINATOR) -> Notice:
    """A Cargo as a Coordinator of the network tells it."""
    one = one or cargo()
    return Notice(About.CARGO, one.envelope, listing(one.address, coordinator), signed_delegation(coordinator))


def revocation(one: SignedCargo | None = None, signer: NodeKey = PUBLISHER, whole_key: bool = False, **changes: Any) -> bytes:
    """A publisher's own word."""
    one = one or cargo()
    fields = Revocation(REVOCATION_VERSION, one.manifest.publisher, "" if whole_key else one.address, "", "it leaks", NOW_MS)
    return sign_revocation(replace(fields, **changes), signer)


def revoked(one: SignedCargo | None = None, signer: NodeKey = PUBLISHER, **changes: Any) -> Notice:
    return Notice(About.REVOCATION, revocation(one, signer, **changes))


def killed(one: SignedCargo | None = None, coordinator: NodeKey = COORDINATOR, **changes: Any) -> Notice:
    """A Coordinator's kill switch."""
    said = revocation(one, coordinator, **({"network": NETWORK} | changes))
    return Notice(About.REVOCATION, said, b"", signed_delegation(coordinator))


def promotion(one: SignedCargo | None = None, coordinator: NodeKey = COORDINATOR, **changes: Any) -> SignedPromotion:
    """A Coordinator says that the name of a Cargo stands for it."""
    one = one or cargo()
    manifest = one.manifest
    fields = Promotion(PROMOTION_VERSION, NETWORK, manifest.name, one.address, manifest.release, NOW_MS, NOW_MS, "publish")
    return read_promotion(sign_promotion(replace(fields, **changes), coordinator))


def promoted(one: SignedCargo | None = None, coordinator: NodeKey = COORDINATOR, **changes: Any) -> Notice:
    """As a Coordinator of the network tells it."""
    said = promotion(one, coordinator, **changes)
    return Notice(About.PROMOTION, said.envelope, b"", signed_delegation(coordinator))
