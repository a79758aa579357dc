"""Writes specs/vectors/*.json anew: ``python -m tests.protocol.make_vectors``.

Keys come from fixed seeds, Ed25519 has no randomness and times are constants, so the files never change unless the protocol does; a
test says when they are not what this program would write. Bytes stand in them as lower-case hex.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from enum import Enum
from pathlib import Path
from typing import Any

import msgpack

from protocol import ads, blobs, cargo_news, counts, limits, messages, receipts, shards, tickets
from protocol.blobs import BlobTree
from protocol.envelope import Label, seal
from protocol.framing import encode_frame
from protocol.generation import GENERATION, pack_tokens
from protocol.prices import Ask
from protocol.shards import LayerRange
from tests.protocol import cargo_samples, samples
from tests.protocol.samples import (
    BOOT_MS,
    COORDINATOR,
    FIRST,
    HOLDER,
    ISLAND,
    MIDDLE,
    NETWORK,
    NETWORK_KEY,
    NOW_MS,
    OTHER,
)

FOLDER = Path(__file__).parents[2] / "specs" / "vectors"
SKEW_MS = int(limits.CLOCK_SKEW_S * 1000)
LIFETIME_MS = int(limits.AD_LIFETIME_S * 1000)
Vector = dict[str, Any]


def plain(value: Any) -> Any:
    """A message as JSON: dataclasses by field name, bytes as hex."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Enum) else value


def repacked(envelope: bytes, place: int, value: object) -> bytes:
    """The envelope with one of its four parts replaced and the signature left as it was."""
    parts = msgpack.unpackb(envelope)
    parts[place] = value
    packed = msgpack.packb(parts)
    assert isinstance(packed, bytes)
    return packed


def keys() -> list[Vector]:
    out = []
    for name, key in (
        ("network", NETWORK_KEY),
        ("coordinator", COORDINATOR),
        ("island", ISLAND),
        ("holder", HOLDER),
        ("other", OTHER),
        ("first", FIRST),
        ("middle", MIDDLE),
    ):
        public = key.public_key
        ids = {"peer_id": key.peer_id, "network_id": tickets.network_id_of(public)}
        out.append({"name": name, "seed": key.seed.hex(), "public_key": public.hex(), **ids})
    return out


def frames() -> list[Vector]:
    out: list[Vector] = []
    for registry, said in samples.REGISTRIES:
        for message in said:
            kind = type(message).__name__
            data = encode_frame(registry, message).hex()
            out.append(
                {
                    "name": f"{registry.name} {kind}",
                    "registry": registry.name,
                    "frame": data,
                    "expect": "ok",
                    "message": kind,
                }
                | {"fields": plain(message)}
            )
    good = encode_frame(messages.JOB, messages.JobCancel(1))
    out.append({"name": "cut in the prefix", "registry": "job", "frame": good[:7].hex(), "expect": "incomplete"})
    out.append({"name": "cut in the header", "registry": "job", "frame": good[:-1].hex(), "expect": "incomplete"})
    whole = _frame(b"\x93\x02\x01\xc4\x01t", b"xy")
    out.append({"name": "cut in the body", "registry": "job", "frame": whole[:-1].hex(), "expect": "incomplete"})
    bad = {
        "empty header": struct.pack(">II", 0, 0),
        "header over the limit": struct.pack(">II", limits.FRAME_HEADER_BYTES_MAX + 1, 0),
        "body over the limit": struct.pack(">II", 1, limits.FRAME_BODY_BYTES_MAX + 1),
        "header is no array": _frame(b"\x01"),
        "header is a map": _frame(b"\x81\x01\x02"),
        "header is an extension": _frame(b"\xd4\x05\x00"),
        "header is an empty array": _frame(b"\x90"),
        "trailing byte in the header": _frame(b"\x92\x07\x01\xc0"),
        "unknown number": _frame(msgpack.packb([12, 1])),
        "number zero": _frame(msgpack.packb([0, 1])),
        "number is a bool": _frame(msgpack.packb([True, 1])),
        "number is a float": _frame(msgpack.packb([7.0, 1])),
        "field missing": _frame(msgpack.packb([7])),
        "field too many": _frame(msgpack.packb([7, 1, 2])),
        "bool for int": _frame(msgpack.packb([7, True])),
        "float for int": _frame(msgpack.packb([7, 1.0])),
        "text for bytes": _frame(msgpack.packb([2, 1, "ticket"])),
        "bytes for text": _frame(msgpack.packb([6, 1, b"internal", ""])),
        "text is no UTF-8": _frame(b"\x94\x06\x01\xa8internal\xa1\xff"),
        "count that is no count": _frame(msgpack.packb([10, 1, b"x" * (limits.COUNT_BYTES_MAX + 1)])),
        "unknown code": _frame(msgpack.packb([6, 1, "out_of_luck", ""])),
        "job number zero": _frame(msgpack.packb([7, 0])),
        "job number negative": _frame(msgpack.packb([7, -1])),
        "body where none belongs": _frame(msgpack.packb([7, 1]), b"x"),
        "chunk without tokens": _frame(msgpack.packb([4, 1, 0, "", b""])),
        "chunk with half a token": _frame(msgpack.packb([4, 1, 0, "", b""]), b"123456"),
        "nested without end": _frame(b"\x91" * 5000),
        "array longer than its bytes": _frame(b"\xdd\xff\xff\xff\xff"),
        "text longer than its bytes": _frame(b"\x94\x06\x01\xa8internal\xdb\xff\xff\xff\xff"),
    }
    return out + [
        {"name": name, "registry": "job", "frame": data.hex(), "expect": "refused"} for name, data in bad.items()
    ]


def _frame(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">II", len(header), len(body)) + header + body


def envelopes() -> list[Vector]:
    payload = b"what is said"
    data = seal(Label.TICKET, payload, COORDINATOR)
    signature = msgpack.unpackb(data)[3]
    out: list[Vector] = [
        {"name": str(label), "label": str(label), "envelope": seal(label, payload, COORDINATOR).hex(), "expect": "ok"}
        | {"signer": COORDINATOR.peer_id, "payload": payload.hex()}
        for label in Label
    ]
    bad = {
        "for another purpose": seal(Label.AD, payload, COORDINATOR),
        "relabelled": repacked(seal(Label.AD, payload, COORDINATOR), 0, str(Label.TICKET)),
        "unknown label": repacked(data, 0, "archipelag/ticket/2"),
        "of another key": repacked(data, 1, OTHER.public_key),
        "another payload": repacked(data, 2, payload + b"!"),
        "no signature": repacked(data, 3, b""),
        "signature of zeros": repacked(data, 3, bytes(64)),
        "last bit of the signature": repacked(data, 3, signature[:-1] + bytes([signature[-1] ^ 1])),
        "signature cut": repacked(data, 3, signature[:-1]),
        "signature without its domain": repacked(data, 3, COORDINATOR.sign(payload)),
        "key of small order": repacked(repacked(data, 1, b"\x01" + bytes(31)), 3, b"\x01" + bytes(63)),
        "not the shortest encoding": data[:1] + b"\xda\x00\x13" + data[2:],
        "trailing byte": data + b"\x00",
        "cut": data[:-1],
        "empty": b"",
    }
    return out + [
        {"name": n, "label": str(Label.TICKET), "envelope": d.hex(), "expect": "refused"} for n, d in bad.items()
    ]


def ads_vectors() -> list[Vector]:
    ad = samples.ad()
    data = ads.sign_ad(ad, ISLAND)
    bare: dict[str, Any] = {"offers": (), "paths": (), "addresses": (), "runtimes": (), "shards": (), "loading": ()}
    plainest = samples.ad(**bare, draining=True, default_ask=Ask(), memory_free_bytes=0)
    nan = msgpack.unpackb(msgpack.unpackb(data)[2])
    nan[13][0][13] = float("nan")
    extra = msgpack.packb([*msgpack.unpackb(msgpack.unpackb(data)[2]), 1])
    future = samples.ad(sequence=NOW_MS + SKEW_MS + 1)
    good = [
        ("full", ad, NOW_MS),
        ("plain", plainest, NOW_MS),
        ("one skew ahead", samples.ad(sequence=NOW_MS + SKEW_MS), NOW_MS),
    ]
    good.append(("expired by one skew", ad, ad.expires_at_ms + SKEW_MS))
    out: list[Vector] = [
        {
            "name": name,
            "envelope": ads.sign_ad(one, ISLAND).hex(),
            "now_ms": now_ms,
            "expect": "ok",
            "fields": plain(one),
        }
        for name, one, now_ms in good
    ]
    bad = {
        "from the future": (ads.sign_ad(future, ISLAND), NOW_MS),
        "expired": (data, ad.expires_at_ms + SKEW_MS + 1),
        "signed by another": (ads.sign_ad(ad, OTHER), NOW_MS),
        "speed is NaN": (seal(Label.AD, msgpack.packb(nan), ISLAND), NOW_MS),
        "extra field": (seal(Label.AD, extra, ISLAND), NOW_MS),
        "a notice of loss": (ads.sign_lost(samples.lost(), ISLAND), NOW_MS),
        "payload of another key": (repacked(data, 1, OTHER.public_key), NOW_MS),
        "forged": (repacked(data, 3, bytes(64)), NOW_MS),
    }
    for name, place, value in (
        ("another version", 0, 2),
        ("boot after sequence", 3, NOW_MS + 1),
        ("lives too long", 5, NOW_MS + LIFETIME_MS + 1),
        ("control character in the agent", 6, "a\x1b[2J"),
        ("negative memory", 11, -1),
    ):
        fields = msgpack.unpackb(msgpack.unpackb(data)[2])
        fields[place] = value
        bad[name] = (seal(Label.AD, msgpack.packb(fields), ISLAND), NOW_MS)
    return out + [{"name": n, "envelope": d.hex(), "now_ms": t, "expect": "refused"} for n, (d, t) in bad.items()]


def losses() -> list[Vector]:
    lost = samples.lost()
    data = ads.sign_lost(lost, COORDINATOR)
    out: list[Vector] = [
        {
            "name": name,
            "envelope": data.hex(),
            "now_ms": NOW_MS + age_ms,
            "expect": "ok",
            "witness": COORDINATOR.peer_id,
        }
        | {"fields": plain(lost)}
        for name, age_ms in (("fresh", 0), ("one skew ahead", -SKEW_MS), ("as old as may be", LIFETIME_MS + SKEW_MS))
    ]
    ahead = msgpack.packb([NETWORK, ISLAND.peer_id, NOW_MS + SKEW_MS + 1, NOW_MS])
    bad = {
        "from the future": (data, NOW_MS - SKEW_MS - 1),
        "too old": (data, NOW_MS + LIFETIME_MS + SKEW_MS + 1),
        "bars an ad of the future": (seal(Label.LOST, ahead, COORDINATOR), NOW_MS),
        "an ad": (ads.sign_ad(samples.ad(), ISLAND), NOW_MS),
        "forged": (repacked(data, 3, bytes(64)), NOW_MS),
    }
    return out + [{"name": n, "envelope": d.hex(), "now_ms": t, "expect": "refused"} for n, (d, t) in bad.items()]


def books() -> list[Vector]:
    """Events in the order in which they come; ``known`` is sequence by peer at the end, ``lost`` likewise."""

    def ad(sequence: int) -> str:
        return ads.sign_ad(samples.ad(sequence=sequence), ISLAND).hex()

    def gone(sequence: int, signer: Any = COORDINATOR) -> str:
        return ads.sign_lost(samples.lost(sequence=sequence, seen_at_ms=NOW_MS), signer).hex()

    peer, at = ISLAND.peer_id, NOW_MS
    stories: dict[str, tuple[list[tuple[str, str]], dict[str, int], dict[str, int]]] = {
        "an ad": ([(ad(at), "changed")], {peer: at}, {}),
        "a newer ad": ([(ad(at), "changed"), (ad(at + 1), "changed")], {peer: at + 1}, {}),
        "an older ad": ([(ad(at), "changed"), (ad(at - 1), "stale")], {peer: at}, {}),
        "the same ad": ([(ad(at), "changed"), (ad(at), "stale")], {peer: at}, {}),
        "a loss": ([(ad(at), "changed"), (gone(at), "changed")], {}, {peer: at}),
        "a loss before its ad": ([(gone(at), "changed"), (ad(at), "stale")], {}, {peer: at}),
        "stale gossip": (
            [(ad(at), "changed"), (gone(at), "changed"), (ad(at), "stale"), (ad(at - 1), "stale")],
            {},
            {peer: at},
        ),
        "refuted": ([(ad(at), "changed"), (gone(at), "changed"), (ad(at + 1), "changed")], {peer: at + 1}, {}),
        "a loss that was refuted before it came": ([(ad(at + 1), "changed"), (gone(at), "stale")], {peer: at + 1}, {}),
        "the same loss twice": ([(gone(at), "changed"), (gone(at), "stale")], {}, {peer: at}),
        "a loss by somebody else": ([(ad(at), "changed"), (gone(at, OTHER), "refused")], {peer: at}, {}),
    }
    return [
        {"name": name, "network": NETWORK, "coordinators": [COORDINATOR.peer_id], "now_ms": at}
        | {"events": [{"envelope": e, "outcome": o} for e, o in events], "known": known, "lost": lost}
        for name, (events, known, lost) in stories.items()
    ]


def ticket_vectors() -> list[Vector]:
    """Each is a fresh Island that is handed tickets one after another."""
    good = tickets.sign_ticket(samples.ticket(), COORDINATOR)
    second = tickets.sign_ticket(samples.ticket(nonce=b"\x02" * 16), COORDINATOR)
    valid = tickets.sign_delegation(samples.delegation(), NETWORK_KEY)
    short = tickets.sign_delegation(samples.delegation(expires_at_ms=NOW_MS + 1000), NETWORK_KEY)
    end_ms = samples.ticket().expires_at_ms
    ahead_ms = NOW_MS + SKEW_MS + 1

    def case(name: str, *handed: tuple[bytes, str, int, str], delegation: bytes = valid) -> Vector:
        said = [
            {"ticket": data.hex(), "sender": sender, "now_ms": now_ms, "expect": expect}
            for data, sender, now_ms, expect in handed
        ]
        island = {
            "peer": ISLAND.peer_id,
            "boot": BOOT_MS,
            "network": NETWORK,
            "delegation": delegation.hex(),
            "now_ms": NOW_MS,
        }
        return {"name": name, "island": island, "handed": said}

    def refused(name: str, signer: Any = COORDINATOR, **changes: Any) -> Vector:
        data = tickets.sign_ticket(samples.ticket(**changes), signer)
        return case(name, (data, HOLDER.peer_id, NOW_MS, "bad_ticket"))

    def pipeline(**changes: Any) -> bytes:
        return tickets.sign_ticket(samples.pipeline_ticket(**changes), COORDINATOR)

    me = HOLDER.peer_id
    return [
        case("good", (good, me, NOW_MS, "ok")) | {"fields": plain(samples.ticket())},
        case("used twice", (good, me, NOW_MS, "ok"), (good, me, NOW_MS, "bad_ticket"), (second, me, NOW_MS, "ok")),
        case(
            "by another holder, then by its own", (good, OTHER.peer_id, NOW_MS, "bad_ticket"), (good, me, NOW_MS, "ok")
        ),
        case("at its last millisecond", (good, me, end_ms, "ok")),
        case("expired", (good, me, end_ms + 1, "bad_ticket")),
        case("after the delegation", (good, me, NOW_MS + 1001, "bad_ticket"), delegation=short),
        case("forged signature", (repacked(good, 3, bytes(64)), me, NOW_MS, "bad_ticket")),
        case("no envelope", (b"ticket", me, NOW_MS, "bad_ticket")),
        refused("issuer without delegation", OTHER, issuer=OTHER.peer_id),
        refused("signed by another than its issuer", OTHER),
        refused("another Island", route=(OTHER.peer_id,)),
        refused("an earlier run", boots=(BOOT_MS - 1,)),
        refused("another network", network=tickets.network_id_of(OTHER.public_key)),
        refused("from the future", issued_at_ms=ahead_ms, expires_at_ms=ahead_ms + 1000),
        case("a pipeline that this Island drives", (pipeline(), me, NOW_MS, "ok")),
        case(
            "a pipeline that another Island drives",
            (pipeline(route=(FIRST.peer_id, ISLAND.peer_id, MIDDLE.peer_id), boots=(1, BOOT_MS, 2)), me, NOW_MS, "bad_ticket"),
        ),
    ]


def stage_vectors() -> list[Vector]:
    """``index`` and ``sender`` as in a StageOpen; with ``use`` the ticket is used up for that, as a SequenceOpen does."""
    good = tickets.sign_ticket(samples.pipeline_ticket(), COORDINATOR)
    mended = tickets.sign_ticket(samples.pipeline_ticket(nonce=b"\x02" * 16), COORDINATOR)
    single = tickets.sign_ticket(samples.ticket(), COORDINATOR)
    first, middle, driver = FIRST.peer_id, MIDDLE.peer_id, ISLAND.peer_id
    boots = dict(zip((first, middle, driver), samples.pipeline_ticket().boots, strict=True))
    delegation = tickets.sign_delegation(samples.delegation(), NETWORK_KEY).hex()
    end_ms = samples.pipeline_ticket().expires_at_ms

    def case(name: str, peer: str, *handed: tuple[bytes, int, str, str, str], now_ms: int = NOW_MS) -> Vector:
        said = [
            {"ticket": data.hex(), "index": index, "sender": sender, "use": use, "now_ms": now_ms, "expect": expect}
            for data, index, sender, use, expect in handed
        ]
        island = {"peer": peer, "boot": boots[peer], "network": NETWORK, "delegation": delegation, "now_ms": NOW_MS}
        return {"name": name, "island": island, "handed": said}

    def refused(name: str, data: bytes = good, peer: str = first, index: int = 0, sender: str = driver, **at: int) -> Vector:
        return case(name, peer, (data, index, sender, "", "bad_ticket"), **at)

    def signed(**changes: Any) -> bytes:
        return tickets.sign_ticket(samples.pipeline_ticket(**changes), COORDINATOR)

    return [
        case("the driver opens the first stage", first, (good, 0, driver, "", "ok")) | {"fields": plain(samples.pipeline_ticket())},
        case("the first opens the second", middle, (good, 1, first, "", "ok")),
        case("the second opens the driver", driver, (good, 2, middle, "", "ok")),
        case("checked twice, used once", first, (good, 0, driver, "", "ok"), (good, 0, driver, "", "ok"), (good, 0, driver, "aa", "ok")),
        case("the same use again", first, (good, 0, driver, "aa", "ok"), (good, 0, driver, "aa", "ok")),
        case("another use", first, (good, 0, driver, "aa", "ok"), (good, 0, driver, "ab", "bad_ticket")),
        case("a mended route's ticket for the same use", first, (good, 0, driver, "aa", "ok"), (mended, 0, driver, "aa", "ok")),
        case("at its last millisecond", first, (good, 0, driver, "aa", "ok"), now_ms=end_ms),
        refused("expired", now_ms=end_ms + 1),
        refused("the wrong index", index=1, sender=first),
        refused("an index behind the last", index=7, sender=middle),
        refused("from the stage behind", sender=middle),
        refused("from the holder", sender=HOLDER.peer_id),
        refused("from a stranger", sender=OTHER.peer_id),
        refused("a middle stage from the driver", peer=middle, index=1),
        refused("of one Island", data=single, peer=driver, index=0, sender=HOLDER.peer_id),
        refused("an earlier run", data=signed(boots=(1, 2, 3))),
        refused("another network", data=signed(network=tickets.network_id_of(OTHER.public_key))),
        refused("forged", data=repacked(good, 3, bytes(64))),
    ]


def manifests() -> list[Vector]:
    """JSON text of manifests, and what ranges weigh by them."""
    made = samples.manifest()
    text = shards.manifest_to_json(made)
    ranges = [LayerRange(low, high) for low in range(made.total_layers) for high in range(low + 1, made.total_layers + 1)]
    weighed = [
        {
            "layers": [layers.low, layers.high],
            "weights_bytes": made.weights_bytes(layers),
            "kv_bytes_per_token": made.kv_bytes_per_token(layers),
            "compute_bytes": made.measured_compute_bytes(layers),
            "shard_hash": made.shard_hash(layers),
        }
        for layers in ranges
    ]
    out: list[Vector] = [{"name": "good", "text": text, "expect": "ok", "ranges": weighed}]
    whole = json.loads(text)
    bad: dict[str, dict[str, Any]] = {
        "another version": {"version": 2},
        "an unknown field": {"colour": "blue"},
        "a bool for a figure": {"width": True},
        "a float for a figure": {"width": 64.0},
        "a name with a space": {"name": "a b"},
        "a layer too few": {"layer_bytes": [1, 2, 3]},
        "a negative size": {"kv_bytes": [1, 2, 3, -1]},
        "two buffers": {"compute_bytes": [1, 2]},
        "a shard without layers": {"shard_layers": [[0, 0], [2, 4]]},
        "a shard of layers that are not there": {"shard_layers": [[0, 2], [2, 5]]},
        "a shard twice": {"shard_layers": [[0, 2], [0, 2]]},
        "a hash too few": {"shard_hashes": [samples.SHARD_HASH]},
        "a hash in capitals": {"model_sha256": "AB" * 32},
    }
    out += [{"name": name, "text": json.dumps(whole | change), "expect": "refused"} for name, change in bad.items()]
    out.append({"name": "a field missing", "text": json.dumps({k: v for k, v in whole.items() if k != "width"}), "expect": "refused"})
    return out


def delegations() -> list[Vector]:
    made = samples.delegation()
    data = tickets.sign_delegation(made, NETWORK_KEY)
    too_long = samples.delegation(expires_at_ms=NOW_MS + int(limits.DELEGATION_LIFETIME_S * 1000) + SKEW_MS + 1)
    cases = (
        ("good", data, NOW_MS, "ok"),
        ("at its end", data, made.expires_at_ms, "ok"),
        ("expired", data, made.expires_at_ms + 1, "refused"),
        ("for too long", tickets.sign_delegation(too_long, NETWORK_KEY), NOW_MS, "refused"),
        ("not by the network's key", tickets.sign_delegation(made, COORDINATOR), NOW_MS, "refused"),
    )
    return [{"name": n, "envelope": d.hex(), "now_ms": t, "expect": e} for n, d, t, e in cases]


def receipt_vectors() -> list[Vector]:
    ticket = tickets.sign_ticket(samples.ticket(), COORDINATOR)
    true = samples.receipt(ticket_hash=tickets.ticket_hash(ticket))
    seen = {
        "ticket": ticket.hex(),
        "island": ISLAND.peer_id,
        "sent_tokens": true.sent_tokens,
        "output_hash": true.output_hash.hex(),
    }
    signed = receipts.sign_receipt(true, ISLAND)
    out: list[Vector] = [{"name": "good", **seen, "receipt": signed.hex(), "expect": "ok", "fields": plain(true)}]
    changes: dict[str, Any] = {
        "network": "elsewhere",
        "job_id": "job-2",
        "ticket_hash": bytes(32),
        "content_hash": "cd" * 32,
        "sent_tokens": 9,
        "output_hash": bytes(32),
        "price_micros": samples.ticket().price_limit_micros + 1,
    }
    for name, value in changes.items():
        data = receipts.sign_receipt(dataclasses.replace(true, **{name: value}), ISLAND)
        out.append({"name": f"another {name}", **seen, "receipt": data.hex(), "expect": "refused"})
    bad = {
        "by another": receipts.sign_receipt(true, OTHER),
        "forged": repacked(signed, 3, bytes(64)),
        "a ticket": ticket,
    }
    return out + [{"name": n, **seen, "receipt": d.hex(), "expect": "refused"} for n, d in bad.items()]


def count_vectors() -> list[Vector]:
    """Each is an Island that has sent the ids 0, 1, 2, … of one job in chunks that end at ``ends``, and is handed counts one after another;
    before each, so many tokens have left."""
    ticket = tickets.sign_ticket(samples.ticket(), COORDINATOR)

    def count(tokens: int, signer: Any = HOLDER, **changes: Any) -> bytes:
        made = samples.count(**({"tokens": tokens, "output_hash": samples.output_hash(tokens)} | changes))
        return counts.sign_count(made, signer)

    def case(name: str, *handed: tuple[int, bytes, str], ends: tuple[int, ...] = (3, 5, 8)) -> Vector:
        said = [{"sent": sent, "count": data.hex(), "expect": expect} for sent, data, expect in handed]
        return {"name": name, "ticket": ticket.hex(), "ends": list(ends), "handed": said}

    def refused(name: str, data: bytes, sent: int = 5) -> Vector:
        return case(name, (sent, data, "refused"))

    good = count(5)
    elsewhere = tickets.network_id_of(OTHER.public_key)
    return [
        case("as it grows", (3, count(3), "ok"), (8, count(8), "ok"), (13, count(13), "ok"), ends=(3, 8, 13))
        | {"fields": plain(samples.count(tokens=3, output_hash=samples.output_hash(3)))},
        case("not the newest", (8, count(3), "ok"), (8, count(8), "ok")),
        case("of nothing", (0, count(0), "ok"), (3, count(3), "ok")),
        case("of nothing, of something that came", (3, count(0), "ok"), (3, count(3), "ok")),
        case("repeated", (5, good, "ok"), (5, good, "refused")),
        case("smaller than one before", (5, good, "ok"), (8, count(3), "refused")),
        case("refused, then a good one", (5, count(8), "refused"), (5, good, "ok")),
        refused("more than was sent", count(8)),
        refused("inside a chunk", count(4)),
        refused("of other tokens", count(5, output_hash=samples.output_hash(4))),
        refused("over the ticket's limit", count(samples.ticket().token_limit + 1), 8),
        refused("of another job", count(5, ticket_hash=bytes(32))),
        refused("of another network", count(5, network=elsewhere)),
        refused("by another than it names", count(5, OTHER)),
        refused("by another than the ticket's holder", count(5, OTHER, holder=OTHER.peer_id)),
        refused("by the Island itself", count(5, ISLAND, holder=ISLAND.peer_id)),
        refused("forged", repacked(good, 3, bytes(64))),
        refused("a receipt", receipts.sign_receipt(samples.receipt(), ISLAND)),
        refused("cut", good[:-1]),
    ]


def jobs() -> list[Vector]:
    """``by`` says a message; both ends agree to all but the last one of a refused story."""

    def said(text: str) -> list[dict[str, Any]]:
        out = []
        for word in text.split():
            name, _, rest = word.partition(":")
            job, _, more = rest.partition(",")
            step, _, count = more.partition("+")
            entry: dict[str, Any] = {"message": name, "job": int(job or 1)}
            if name in ("JobChunk", "JobLines", "JobMore"):  # of lines: bytes
                entry |= {"step": int(step or 0), "tokens": int(count or 1)}
            out.append(entry)
        return out

    ok = {
        "an answer": "JobOpen JobAccepted JobChunk:1,0+2 JobChunk:1,2 JobDone",
        "an empty answer": "JobOpen JobAccepted JobDone",
        "a refusal": "JobOpen JobFailed",
        "a failure": "JobOpen JobAccepted JobChunk JobFailed",
        "a cancel": "JobOpen JobAccepted JobCancel JobChunk JobFailed",
        "a cancel before it was accepted": "JobOpen JobCancel JobAccepted JobFailed",
        "a cancel that came too late": "JobOpen JobAccepted JobDone JobCancel JobCancel",
        "two at once": "JobOpen:1 JobOpen:2 JobAccepted:2 JobAccepted:1 JobChunk:2 JobDone:2 JobChunk:1 JobDone:1",
        "a route that breaks and is mended": "JobOpen JobAccepted JobChunk RouteBroken RouteMended JobChunk:1,1 JobDone",
        "a route that breaks while the job is opened": "JobOpen RouteBroken RouteMended JobAccepted JobDone",
        "a route that breaks twice before it is mended": "JobOpen JobAccepted RouteBroken RouteBroken RouteMended JobDone",
        "a broken route that is given up": "JobOpen JobAccepted RouteBroken JobCancel JobFailed",
        "a mended route that comes too late": "JobOpen JobAccepted RouteBroken JobFailed RouteMended",
        "counts as it grows": "JobOpen JobAccepted JobChunk JobCount JobChunk:1,1 JobCount JobDone",
        "a count that crosses the end": "JobOpen JobAccepted JobChunk JobDone JobCount",
        "a count that crosses a failure": "JobOpen JobAccepted JobChunk JobFailed JobCount",
        "a count before a cancel, and one behind it": "JobOpen JobAccepted JobChunk JobCount JobCancel JobCount JobFailed",
        "renewed": "JobOpen JobAccepted JobAlive JobChunk JobAlive JobAlive JobDone",
        "renewed after a cancel": "JobOpen JobAccepted JobCancel JobAlive JobFailed",
        "lines": "JobOpenLines JobAccepted JobLines:1,0+30 JobLines:1,30+2 JobDone",
        "lines as they are taken": "JobOpenLines JobAccepted JobLines:1,0+262144 JobMore:1,0+262144 JobLines:1,262144+1 JobDone",
        "lines in a frame that is larger than the room": "JobOpenLines JobAccepted JobLines:1,0+400000 JobMore:1,0+400000 JobDone",
        "lines of which one took after the end": "JobOpenLines JobAccepted JobLines:1,0+9 JobDone JobMore:1,0+9",
        "a cancel while lines come": "JobOpenLines JobAccepted JobLines:1,0+9 JobCancel JobLines:1,9+9 JobMore:1,0+18 JobFailed",
        "numbers may skip": "JobOpen:3 JobFailed:3 JobOpen:9 JobFailed:9",
    }
    refused = {
        "accepted before it was opened": "JobAccepted",
        "a cancel of nothing": "JobCancel",
        "opened twice": "JobOpen JobOpen",
        "a number used again": "JobOpen JobFailed JobOpen",
        "a smaller number": "JobOpen:5 JobOpen:4",
        "accepted twice": "JobOpen JobAccepted JobAccepted",
        "accepted twice around a cancel": "JobOpen JobAccepted JobCancel JobAccepted",
        "a chunk before it was accepted": "JobOpen JobChunk",
        "done before it was accepted": "JobOpen JobDone",
        "an answer to a cancelled job that was not accepted": "JobOpen JobCancel JobChunk",
        "cancelled twice": "JobOpen JobCancel JobCancel",
        "a chunk that is repeated": "JobOpen JobAccepted JobChunk JobChunk",
        "a chunk that was lost": "JobOpen JobAccepted JobChunk JobChunk:1,2",
        "chunks out of order": "JobOpen JobAccepted JobChunk:1,1",
        "a chunk after the end": "JobOpen JobAccepted JobDone JobChunk",
        "done twice": "JobOpen JobAccepted JobDone JobDone",
        "failed after it was done": "JobOpen JobAccepted JobDone JobFailed",
        "a message for another job": "JobOpen:1 JobAccepted:2",
        "a route that breaks after the end": "JobOpen JobAccepted JobDone RouteBroken",
        "a broken route of nothing": "RouteBroken",
        "a mended route of nothing": "RouteMended",
        "a count before it was accepted": "JobOpen JobCount",
        "a count of nothing": "JobCount",
        "a count of a withdrawn job": "JobOpen JobCancel JobCount",
        "renewed before it was accepted": "JobOpen JobAlive",
        "lines for a text": "JobOpen JobAccepted JobLines:1,0+9",
        "a text for lines": "JobOpenLines JobAccepted JobChunk",
        "lines before it was accepted": "JobOpenLines JobLines:1,0+9",
        "lines that were lost": "JobOpenLines JobAccepted JobLines:1,9+9",
        "lines that are repeated": "JobOpenLines JobAccepted JobLines:1,0+9 JobLines:1,0+9",
        "lines beyond the room": "JobOpenLines JobAccepted JobLines:1,0+262144 JobLines:1,262144+1",
        "more taken than was sent": "JobOpenLines JobAccepted JobLines:1,0+9 JobMore:1,0+10",
        "taken before it was accepted": "JobOpenLines JobMore:1,0+1",
        "renewed after the end": "JobOpen JobAccepted JobDone JobAlive",
    }
    out: list[Vector] = [{"name": name, "said": said(text), "expect": "ok"} for name, text in ok.items()]
    return out + [{"name": name, "said": said(text), "expect": "refused"} for name, text in refused.items()]


def prices() -> list[Vector]:
    out: list[Vector] = []
    for text, micros in (
        ("0", 0),
        ("1", 10**6),
        ("0.25", 250_000),
        ("0.000001", 1),
        ("007.50", 7_500_000),
        ("999999999.999999", 10**15 - 1),
    ):
        out.append({"name": f"parse {text}", "parse": text, "micros": micros})
    for text in ("", "-1", "+1", "1.", ".5", "1e3", "0.0000001", "1,5", "nan", "1000000000", "\u0663"):
        out.append({"name": f"parse {text!r}", "parse": text, "expect": "refused"})
    for micros, text in ((0, "0"), (1, "0.000001"), (250_000, "0.25"), (10**7, "10"), (-250_000, "-0.25")):
        out.append({"name": f"format {micros}", "format": micros, "text": text})
    for ask, tokens, ms, micros in (
        (Ask(5, 1, 0), 1, 0, 6),
        (Ask(0, 1, 1), 1, 1, 2),
        (Ask(0, 1, 1), 0, 0, 0),
        (Ask(0, 999, 0), 1001, 0, 1000),
        (Ask(1_000, 20_000, 500), 256, 1_834, 7_037),
    ):
        assert ask.price(tokens, ms) == micros, ask.price(tokens, ms)
        out.append(
            {
                "name": f"price {micros}",
                "ask": plain(ask),
                "output_tokens": tokens,
                "milliseconds": ms,
                "micros": micros,
            }
        )
    return out


def generations() -> list[Vector]:
    request = samples.generation()
    data = GENERATION.encode(request)
    out: list[Vector] = [{"name": "chat", "bytes": data.hex(), "expect": "ok", "fields": plain(request)}]
    bad = {
        "unknown role": data.replace(b"\xa4user", b"\xa4boss"),
        "unknown format": data.replace(b"\xa4text", b"\xa4yaml"),
        "resume with half a token": data.replace(
            b"\xc4\x0c" + pack_tokens([1, 2, 3]), b"\xc4\x0a" + pack_tokens([1, 2, 3])[:10]
        ),
        "cut": data[:-1],
    }
    tools = samples.generation_with_tools()
    data = GENERATION.encode(tools)
    out.append({"name": "chat with tools", "bytes": data.hex(), "expect": "ok", "fields": plain(tools)})
    bad["a tool chosen that is none"] = data.replace(b"\xa7weather\xc2", b"\xa7weathex\xc2")
    return out + [{"name": name, "bytes": wrong.hex(), "expect": "refused"} for name, wrong in bad.items()]


def blob_content(size: int) -> bytes:
    """The SHA-256 of the numbers 0, 1, 2, … as u32, joined, cut to ``size`` bytes."""
    return b"".join(hashlib.sha256(struct.pack(">I", n)).digest() for n in range(-(-size // 32)))[:size]


def blob_vectors() -> list[Vector]:
    chunk = limits.BLOB_CHUNK_BYTES
    ok = {"expect": "ok"}
    out: list[Vector] = []
    for size in (1, chunk - 1, chunk, chunk + 1, 3 * chunk, 4 * chunk + 77):
        content = blob_content(size)
        tree = blobs.tree_of([content[at : at + chunk] for at in range(0, size, chunk)])
        out.append({"name": f"{size} bytes", "content_bytes": size, "size": size, "leaves": tree.leaves.hex(), "root": tree.root()} | ok)
    for count in (6, 7, 11):
        leaves = blob_content(32 * count)
        tree = BlobTree(count * chunk, leaves)
        out.append({"name": f"{count} leaves", "size": tree.size, "leaves": leaves.hex(), "root": tree.root()} | ok)
    bad = {"empty": (0, 0), "a leaf too many": (chunk, 2), "a leaf too few": (chunk + 1, 1), "too large": (limits.BLOB_BYTES_MAX + 1, 1)}
    for name, (size, count) in bad.items():
        out.append({"name": name, "size": size, "leaves": (bytes(32) * count).hex(), "expect": "refused"})
    return [*out, {"name": "half a leaf", "size": 1, "leaves": bytes(16).hex(), "expect": "refused"}]


def notices() -> list[Vector]:
    """Each is read by a node of the network at a time."""
    year_ms = int(limits.DELEGATION_LIFETIME_S * 1000)
    one, end_ms = cargo_samples.cargo(), samples.delegation().expires_at_ms
    listed, killed, revoked = cargo_samples.listed(one), cargo_samples.killed(one), cargo_samples.revoked(one)
    promoted = cargo_samples.promoted(one)
    good = {
        "a Cargo": (listed, NOW_MS),
        "a Cargo whose Coordinator is one no longer": (listed, end_ms + 1),
        "a publisher's revocation": (revoked, NOW_MS),
        "a publisher's revocation of all": (cargo_samples.revoked(one, whole_key=True), NOW_MS),
        "a kill switch": (killed, NOW_MS),
        "a kill switch of long ago": (killed, end_ms + year_ms),
        "a promotion": (promoted, NOW_MS),
        "a promotion to a Cargo of another name": (cargo_samples.promoted(one, name="base", release="3.1.4", origin="ab:1"), NOW_MS),
        "a promotion whose Coordinator is one no longer": (promoted, end_ms + year_ms),
    }
    out: list[Vector] = []
    for name, (notice, now_ms) in good.items():
        told = cargo_news.read_notice(notice, NETWORK, now_ms)
        shown = {"notice": cargo_news.NOTICE.encode(notice).hex(), "now_ms": now_ms, "expect": "ok"}
        out.append({"name": name, **shown, "key": told.key.hex(), "coordinator": told.coordinator})
    foreign = cargo_samples.signed_delegation(COORDINATOR, OTHER, network=tickets.network_id_of(OTHER.public_key))
    other = cargo_samples.cargo(release="2.0.0")
    bad = {
        "no listing": dataclasses.replace(listed, listing=b""),
        "no delegation": dataclasses.replace(listed, delegation=b""),
        "the listing of another Cargo": dataclasses.replace(listed, listing=cargo_samples.listing(other.address)),
        "a listing by a stranger": dataclasses.replace(listed, listing=cargo_samples.listing(one.address, OTHER)),
        "a delegation of another network": dataclasses.replace(listed, delegation=foreign),
        "a listing from the future": dataclasses.replace(
            listed, listing=cargo_samples.listing(one.address, at_ms=NOW_MS + SKEW_MS + 1)
        ),
        "a Cargo that was altered": dataclasses.replace(listed, envelope=repacked(one.envelope, 3, bytes(64))),
        "a kill switch by a stranger": dataclasses.replace(cargo_samples.killed(one, OTHER), delegation=killed.delegation),
        "a kill switch without a delegation": dataclasses.replace(killed, delegation=b""),
        "a kill switch of another network": cargo_samples.killed(one, network="0" * 32),
        "a delegation that is not needed": dataclasses.replace(revoked, delegation=killed.delegation),
        "a promotion by a stranger": dataclasses.replace(cargo_samples.promoted(one, OTHER), delegation=promoted.delegation),
        "a promotion by the publisher": dataclasses.replace(cargo_samples.promoted(one, HOLDER), delegation=promoted.delegation),
        "a promotion without a delegation": dataclasses.replace(promoted, delegation=b""),
        "a promotion with a delegation of another network": dataclasses.replace(promoted, delegation=foreign),
        "a promotion of another network": cargo_samples.promoted(one, network="0" * 32),
        "a promotion from the future": cargo_samples.promoted(one, at_ms=NOW_MS + SKEW_MS + 1),
        "a promotion that was altered": dataclasses.replace(promoted, envelope=repacked(promoted.envelope, 3, bytes(64))),
        "a promotion as a Cargo": dataclasses.replace(listed, envelope=promoted.envelope),
        "a Cargo as a promotion": dataclasses.replace(promoted, envelope=one.envelope),
        "a Cargo as a revocation": dataclasses.replace(revoked, envelope=one.envelope),
    }
    return out + [
        {"name": name, "notice": cargo_news.NOTICE.encode(notice).hex(), "now_ms": NOW_MS, "expect": "refused"}
        for name, notice in bad.items()
    ]


ABOUT = {
    "keys": (keys, "Seeds, the Ed25519 public keys they give, and the names made of them."),
    "frames": (frames, "Frames of the eight stream protocols, bytes to message; an incomplete one has to wait for more."),
    "envelopes": (envelopes, "Envelopes opened under a label."),
    "ads": (ads_vectors, "Ads read at a time."),
    "losses": (losses, "Notices of loss read at a time."),
    "books": (books, "What a book holds after envelopes came in this order."),
    "delegations": (delegations, "Delegations read at a time."),
    "tickets": (ticket_vectors, "Tickets handed to a fresh Island one after another."),
    "stages": (stage_vectors, "Tickets of a pipeline handed to a stage of its route one after another."),
    "manifests": (manifests, "Shard manifests as JSON text, and what ranges of layers weigh by them."),
    "receipts": (receipt_vectors, "Receipts checked against the ticket and what the holder counted."),
    "counts": (count_vectors, "An Island that has sent so much of a job, and counts that are handed to it one after another."),
    "jobs": (jobs, "Conversations about jobs; in a refused one the last message is the wrong one."),
    "prices": (prices, "Text to micro-credits and back, and the price of a job."),
    "generations": (generations, "Inputs of text Cargos."),
    "notices": (notices, "What is told about Cargos, read by a node of the network at a time."),
    "blobs": (blob_vectors, "Trees of blobs and their roots; content is the SHA-256 of 0, 1, 2, … as u32, joined and cut."),
}


def render(name: str) -> str:
    make, about = ABOUT[name]
    return json.dumps({"about": about, "vectors": make()}, indent=1, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in ABOUT:
        (FOLDER / f"{file}.json").write_text(render(file))
        print(f"wrote {FOLDER / file}.json")
