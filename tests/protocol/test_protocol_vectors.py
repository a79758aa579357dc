"""Walks specs/vectors: whoever implements the protocol anew can do the same with the same files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from privacy.keys import NodeKey
from protocol import ads, blobs, cargo_news, counts, limits, messages, receipts, shards, tickets
from protocol.book import AdHeard, Book, LostHeard, apply
from protocol.envelope import Label, open_envelope
from protocol.errors import Code, ConfigError, LocalProtocolError, Refused, RemoteProtocolError, SignatureError
from protocol.framing import FrameDecoder, encode_frame
from protocol.generation import GENERATION, FinishReason, pack_tokens
from protocol.jobs import SENT_BY, JobStreams, Side
from protocol.prices import Ask, format_credits, parse_credits
from tests.protocol import make_vectors, samples
from tests.protocol.make_vectors import plain

Vector = dict[str, Any]
FILES = sorted(make_vectors.FOLDER.glob("*.json"))


def walk() -> list[Any]:
    out = []
    for path in FILES:
        content = json.loads(path.read_text())
        names = [vector["name"] for vector in content["vectors"]]
        assert len(set(names)) == len(names), f"{path.name} has a name twice"
        out += [pytest.param(path.stem, vector, id=f"{path.stem}: {vector['name']}") for vector in content["vectors"]]
    return out


@pytest.mark.parametrize(("kind", "vector"), walk())
def test_vector(kind: str, vector: Vector) -> None:
    CHECKS[kind](vector)


def test_no_file_is_left_out() -> None:
    assert {path.stem for path in FILES} == CHECKS.keys() == make_vectors.ABOUT.keys()
    for path in FILES:
        expected = {vector.get("expect", "ok") for vector in json.loads(path.read_text())["vectors"]}
        assert path.stem in ("keys", "books", "tickets", "stages", "counts") or expected >= {"ok", "refused"}, "good ones and bad ones"


@pytest.mark.parametrize("name", make_vectors.ABOUT)
def test_the_files_are_what_the_generator_writes(name: str) -> None:
    """If this fails the protocol has changed: a new version of it, or a mistake."""
    assert (make_vectors.FOLDER / f"{name}.json").read_text() == make_vectors.render(name)


def read(vector: Vector, reader: Callable[[bytes], Any], key: str = "envelope") -> Any:
    """What ``reader`` makes of the bytes; None where it refuses them, as the vector must say."""
    data = bytes.fromhex(vector[key])
    if vector["expect"] == "refused":
        with pytest.raises(RemoteProtocolError):
            reader(data)
        return None
    return reader(data)


def check_key(vector: Vector) -> None:
    key = NodeKey(bytes.fromhex(vector["seed"]))
    assert key.public_key.hex() == vector["public_key"] and key.peer_id == vector["peer_id"]
    assert tickets.network_id_of(key.public_key) == vector["network_id"]
    named = hashlib.sha256(b"archipelag-network/1\0" + bytes.fromhex(vector["public_key"])).hexdigest()
    assert named.startswith(vector["network_id"])


def check_frame(vector: Vector) -> None:
    registry = {registry.name: registry for registry, _ in samples.REGISTRIES}[vector["registry"]]
    decoder = FrameDecoder(registry)

    def decode(data: bytes) -> list[Any]:
        return list(decoder.feed(data))

    heard = read(vector, decode, "frame")
    if vector["expect"] == "incomplete":
        assert heard == [] and decoder.pending_bytes == len(vector["frame"]) // 2
    elif heard is not None:
        assert [type(m).__name__ for m in heard] == [vector["message"]]
        assert plain(heard[0]) == vector["fields"]
        assert encode_frame(registry, heard[0]).hex() == vector["frame"]


def check_envelope(vector: Vector) -> None:
    envelope = read(vector, lambda data: open_envelope(Label(vector["label"]), data))
    if envelope is not None:
        assert (envelope.signer, envelope.payload.hex()) == (vector["signer"], vector["payload"])


def check_ad(vector: Vector) -> None:
    ad = read(vector, lambda data: ads.read_ad(data, vector["now_ms"]))
    if ad is not None:
        assert plain(ad) == vector["fields"]


def check_loss(vector: Vector) -> None:
    heard = read(vector, lambda data: ads.read_lost(data, vector["now_ms"]))
    if heard is not None:
        assert (heard[0], plain(heard[1])) == (vector["witness"], vector["fields"])


def check_book(vector: Vector) -> None:
    book, now_ms = Book(vector["network"], coordinators=frozenset(vector["coordinators"])), vector["now_ms"]
    for said in vector["events"]:
        envelope = bytes.fromhex(said["envelope"])
        event: AdHeard | LostHeard
        try:
            event = AdHeard(ads.read_ad(envelope, now_ms), envelope)
        except SignatureError:
            event = LostHeard(*ads.read_lost(envelope, now_ms), envelope)
        book, outcome = apply(event, book, now_ms)
        assert outcome.name.lower() == said["outcome"]
    assert {peer: entry.ad.sequence for peer, entry in book.entries.items()} == vector["known"]
    assert {peer: stone.sequence for peer, stone in book.tombstones.items()} == vector["lost"]


def check_delegation(vector: Vector) -> None:
    read(vector, lambda data: tickets.read_delegation(data, vector["now_ms"]))


def check_ticket(vector: Vector) -> None:
    island = vector["island"]
    guard = tickets.TicketGuard(island["peer"], island["boot"], island["network"])
    guard.trust(tickets.read_delegation(bytes.fromhex(island["delegation"]), island["now_ms"]))
    for handed in vector["handed"]:
        try:
            ticket = guard.admit(bytes.fromhex(handed["ticket"]), handed["sender"], handed["now_ms"])
        except Refused as refused:
            assert str(refused.code) == handed["expect"], refused
        else:
            assert handed["expect"] == "ok"
            assert plain(ticket) == vector.get("fields", plain(ticket))


def check_stage(vector: Vector) -> None:
    island = vector["island"]
    guard = tickets.TicketGuard(island["peer"], island["boot"], island["network"])
    guard.trust(tickets.read_delegation(bytes.fromhex(island["delegation"]), island["now_ms"]))
    for handed in vector["handed"]:
        data, use = bytes.fromhex(handed["ticket"]), bytes.fromhex(handed["use"])
        where = (handed["index"], handed["sender"])
        try:
            if use:
                ticket = guard.use_stage(data, *where, use, handed["now_ms"])
            else:
                ticket = guard.check_stage(data, *where, handed["now_ms"])
        except Refused as refused:
            assert str(refused.code) == handed["expect"], refused
        else:
            assert handed["expect"] == "ok"
            assert plain(ticket) == vector.get("fields", plain(ticket))


def check_manifest(vector: Vector) -> None:
    if vector["expect"] == "refused":
        with pytest.raises(ConfigError):
            shards.manifest_from_json(vector["text"])
        return
    manifest = shards.manifest_from_json(vector["text"])
    assert shards.manifest_to_json(manifest) == vector["text"]
    for weighed in vector["ranges"]:
        layers = shards.LayerRange(*weighed["layers"])
        assert manifest.weights_bytes(layers) == weighed["weights_bytes"]
        assert manifest.kv_bytes_per_token(layers) == weighed["kv_bytes_per_token"]
        assert manifest.measured_compute_bytes(layers) == weighed["compute_bytes"]
        assert manifest.shard_hash(layers) == weighed["shard_hash"]


def check_receipt(vector: Vector) -> None:
    sent = bytes.fromhex(vector["ticket"])
    ticket = tickets._TICKET.decode(open_envelope(Label.TICKET, sent).payload)

    def accept(data: bytes) -> receipts.Receipt:
        receipt = receipts.read_receipt(data)
        receipts.check_receipt(
            receipt,
            island=vector["island"],
            ticket_hash=tickets.ticket_hash(sent),
            sent_tokens=vector["sent_tokens"],
            output_hash=bytes.fromhex(vector["output_hash"]),
            price_max_micros=ticket.price_limit_micros,
        )
        receipts.check_receipt_of_ticket(receipt, ticket)
        return receipt

    receipt = read(vector, accept, "receipt")
    if receipt is not None:
        assert plain(receipt) == vector["fields"]


def check_count(vector: Vector) -> None:
    sent = bytes.fromhex(vector["ticket"])
    guard = counts.CountGuard(tickets.read_ticket(sent), sent)
    ends = iter(vector["ends"])
    for number, handed in enumerate(vector["handed"]):
        while guard.sent_tokens < handed["sent"]:
            tokens = next(ends)
            guard.sent(tokens, hashlib.sha256(pack_tokens(list(range(tokens)))).digest())
        data, before = bytes.fromhex(handed["count"]), guard.count
        read(handed, guard.hear, "count")
        assert guard.count == (data if handed["expect"] == "ok" else before)
        if not number and "fields" in vector:
            assert plain(counts.read_count(data)) == vector["fields"]


def check_job(vector: Vector) -> None:
    """Every message but the wrong one passes both ends; the wrong one is refused by the end that says it and the one that hears it."""
    ends = {side: JobStreams(side) for side in Side}
    *before, last = [(_job_message(said), said) for said in vector["said"]]
    for message, _ in before:
        _pass(ends, message)
    if vector["expect"] == "ok":
        _pass(ends, last[0])
        return
    speaker = SENT_BY[type(last[0])]
    with pytest.raises(LocalProtocolError):
        ends[speaker].send(last[0])
    with pytest.raises(RemoteProtocolError):
        ends[_other(speaker)].receive(last[0])


def _other(side: Side) -> Side:
    return Side.ISLAND if side is Side.HOLDER else Side.HOLDER


def _pass(ends: dict[Side, JobStreams], message: Any) -> None:
    speaker = SENT_BY[type(message)]
    ends[speaker].send(message)
    ends[_other(speaker)].receive(message)


def _job_message(said: Vector) -> Any:
    job = said["job"]
    match said["message"]:
        case "JobOpen":
            return messages.JobOpen(job, b"ticket", input=b"input")
        case "JobOpenLines":
            return messages.JobOpen(job, b"ticket", bytes(16), b"{}")
        case "JobLines":
            return messages.JobLines(job, said["step"], 0, b" " * (said["tokens"] - 1) + b"\n")
        case "JobMore":
            return messages.JobMore(job, said["tokens"])
        case "JobAccepted":
            return messages.JobAccepted(job, "echo/1", 0, 0)
        case "JobChunk":
            return messages.JobChunk(job, said["step"], "", b"", pack_tokens([0] * said["tokens"]))
        case "JobDone":
            return messages.JobDone(job, FinishReason.STOP, "", 0, 0, 0, 0, 0, b"")
        case "JobFailed":
            return messages.JobFailed(job, Code.INTERNAL, "")
        case "JobCancel":
            return messages.JobCancel(job)
        case "RouteBroken":
            return messages.RouteBroken(job, 0, 1, Code.LINK_LOST, "")
        case "RouteMended":
            return messages.RouteMended(job, b"ticket")
        case "JobCount":
            return messages.JobCount(job, b"count")
        case "JobAlive":
            return messages.JobAlive(job)
    raise AssertionError(said)


def check_price(vector: Vector) -> None:
    if "parse" in vector and vector.get("expect") == "refused":
        with pytest.raises(ValueError):
            parse_credits(vector["parse"])
    elif "parse" in vector:
        assert parse_credits(vector["parse"]) == vector["micros"]
    elif "format" in vector:
        assert format_credits(vector["format"]) == vector["text"]
    else:
        assert Ask(**vector["ask"]).price(vector["output_tokens"], vector["milliseconds"]) == vector["micros"]


def check_generation(vector: Vector) -> None:
    request = read(vector, GENERATION.decode, "bytes")
    if request is not None:
        assert plain(request) == vector["fields"] and GENERATION.encode(request).hex() == vector["bytes"]


def check_blob(vector: Vector) -> None:
    leaves = bytes.fromhex(vector["leaves"])
    if vector["expect"] == "refused":
        with pytest.raises(ValueError):
            blobs.BlobTree(vector["size"], leaves)
        return
    tree = blobs.BlobTree(vector["size"], leaves)
    assert tree.root() == vector["root"]
    if "content_bytes" in vector:
        content = make_vectors.blob_content(vector["content_bytes"])
        for index in range(tree.chunks):
            assert tree.fits(index, content[tree.offset(index) : tree.offset(index) + limits.BLOB_CHUNK_BYTES])


def check_notice(vector: Vector) -> None:
    def parse(data: bytes) -> cargo_news.Told:
        return cargo_news.read_notice(cargo_news.NOTICE.decode(data), samples.NETWORK, vector["now_ms"])

    told = read(vector, parse, "notice")
    if told is not None:
        assert (told.key.hex(), told.coordinator) == (vector["key"], vector["coordinator"])
        assert cargo_news.key_of(told.notice) == told.key


CHECKS: dict[str, Callable[[Vector], None]] = {
    "keys": check_key,
    "frames": check_frame,
    "envelopes": check_envelope,
    "ads": check_ad,
    "losses": check_loss,
    "books": check_book,
    "delegations": check_delegation,
    "tickets": check_ticket,
    "stages": check_stage,
    "manifests": check_manifest,
    "receipts": check_receipt,
    "counts": check_count,
    "jobs": check_job,
    "prices": check_price,
    "generations": check_generation,
    "notices": check_notice,
    "blobs": check_blob,
}
