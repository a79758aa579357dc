"""Manifests of Cargos: one encoding, one address; altered in any field, or signed by anybody else, they are refused."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest

from protocol import limits
from protocol.cargos import (
    CachePolicy,
    CargoFile,
    CargoManifest,
    Needs,
    Revocation,
    Runtime,
    address_of,
    canonical_json,
    canonical_manifest,
    read_cargo,
    read_revocation,
    release_of,
    sign_cargo,
    sign_revocation,
    unexpired,
)
from protocol.envelope import Label, seal
from protocol.errors import LocalProtocolError, RemoteProtocolError, SignatureError
from protocol.prices import Ask
from tests.protocol.samples import COORDINATOR, NOW_MS, OTHER
from tests.protocol.samples import ISLAND as PUBLISHER

MODULE = CargoFile("module.wasm", "ab" * 32, 1000, ("https://example.org/module.wasm",))


def manifest(**changes: Any) -> CargoManifest:
    plain: dict[str, Any] = {
        "version": 1,
        "name": "text-stats",
        "release": "1.2.3",
        "publisher": PUBLISHER.peer_id,
        "runtime": Runtime.WASM,
        "entry": "module.wasm",
        "files": (MODULE,),
        "needs": Needs(memory_bytes=2**28, time_s=60),
        "ask": Ask(1000, 0, 0),
        "trust_level": 0,
        "licence": "Apache-2.0",
        "description": "counts words and sentences",
        "options": "{}",
        "input_schema": canonical_json({"type": "object", "required": ["text"]}),
        "output_schema": "{}",
        "cache": CachePolicy(),
        "published_at_ms": NOW_MS,
        "expires_at_ms": NOW_MS + 1_000_000,
    }
    return CargoManifest(**(plain | changes))


def file(**changes: Any) -> CargoFile:
    return replace(MODULE, **changes)


CHANGED: dict[str, Any] = {
    "name": "text-statistics",
    "release": "1.2.4",
    "publisher": OTHER.peer_id,
    "runtime": Runtime.ONNX,
    "entry": "other.wasm",
    "files": (file(sha256="cd" * 32),),
    "needs": Needs(memory_bytes=2**29, time_s=60),
    "ask": Ask(1001, 0, 0),
    "trust_level": 1,
    "licence": "MIT",
    "description": "counts words",
    "options": '{"a":1}',
    "input_schema": "{}",
    "output_schema": '{"type":"object"}',
    "cache": CachePolicy(public=True),
    "published_at_ms": NOW_MS + 1,
    "expires_at_ms": 0,
}


def test_a_cargo_comes_back_as_it_was_signed() -> None:
    data = sign_cargo(manifest(), PUBLISHER)
    cargo = read_cargo(data)
    assert (cargo.manifest, cargo.envelope, cargo.address) == (manifest(), data, address_of(manifest()))
    assert sign_cargo(manifest(), PUBLISHER) == data, "Ed25519 is deterministic, and there is one encoding"
    assert cargo.manifest.size_bytes == 1000


def test_the_table_names_every_field() -> None:
    assert ["version", *CHANGED] == [field.name for field in fields(CargoManifest)]


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_is_signed_and_in_the_address(name: str) -> None:
    more = (MODULE, file(path="other.wasm")) if name == "entry" else (MODULE,)
    before, after = manifest(files=more), manifest(**({"files": more} | {name: CHANGED[name]}))
    assert address_of(before) != address_of(after)
    good, other = msgpack.unpackb(sign_cargo(before, PUBLISHER)), canonical_manifest(after)
    with pytest.raises(SignatureError):
        read_cargo(msgpack.packb([*good[:2], other, *good[3:]]))


def test_only_its_publisher_signs_a_cargo() -> None:
    with pytest.raises(SignatureError, match="to sign"):
        sign_cargo(manifest(), OTHER)
    with pytest.raises(SignatureError, match="was signed by"):
        read_cargo(seal(Label.CARGO, canonical_manifest(manifest()), OTHER))
    with pytest.raises(SignatureError):
        read_cargo(seal(Label.TICKET, canonical_manifest(manifest()), PUBLISHER))


WRONG: list[tuple[str, Any, str]] = [
    ("version", 2, "version"),
    *(
        ("name", name, "name")
        for name in ("", "Text", "a b", "-a", "a-", "a--b", "a/b", "../a", "a_b", "é", "a" * 65, "a\n", "a.")
    ),
    *(
        ("release", text, "release")
        for text in ("", "1", "1.0", "1.0.0.0", "v1.0.0", "1.0.0-rc1", "01.0.0", "1.0.-1", "٣.0.0", "1000000.0.0")
    ),
    ("publisher", "nobody", "publisher"),
    ("entry", "", "entry"),
    ("entry", "other.wasm", "entry"),
    ("entry", "Module.wasm", "entry"),
    ("files", (), "entry"),
    ("files", (MODULE, file(sha256="cd" * 32)), "twice"),
    ("files", (MODULE, file(path="MODULE.wasm")), "twice"),
    ("files", (MODULE, file(path="module.wasm/x")), "folder"),
    ("files", tuple(file(path=f"f{n}") for n in range(limits.CARGO_FILES_MAX + 1)), "files"),
    ("files", tuple(file(path=f"f{n}", size_bytes=2**38, root="ef" * 32) for n in range(17)), "together"),
    ("trust_level", 4, "trust_level"),
    ("trust_level", -1, "trust_level"),
    ("licence", "", "licence"),
    ("licence", "MIT\n", "licence"),
    ("description", "two\nlines", "description"),
    ("description", "x" * 1025, "description"),
    *(
        ("options", text, "options")
        for text in ("", "null", "[]", '{"b":1,"a":2}', '{"a": 1}', '{"a":NaN}', '{"a":1e999}', '{"é":1}', "[" * 5000)
    ),
    ("input_schema", canonical_json({"x": "y" * 12_289}), "input_schema"),
    ("output_schema", "{", "output_schema"),
    ("published_at_ms", 0, "published_at_ms"),
    ("expires_at_ms", NOW_MS, "expires"),
    ("expires_at_ms", -1, "expires"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=lambda value: repr(value)[:40])
def test_a_manifest_that_is_none(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        manifest(**{name: value})


PATHS = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../a",
    "a/../b",
    "a//b",
    "a/",
    "./a",
    "a/./b",
    ".hidden",
    "a/.ssh/b",
    "-rf",
    "C:/a",
    "a\\b",
    "a b",
    "a\0",
    "~",
]
PATHS += ["é", "nul", "a/CON", "com1.txt", "a.", "a" * 201, "/".join("abcdefghi"), "%2e%2e/a", "a\n"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_leads_nowhere_else(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        file(path=path)


@pytest.mark.parametrize("path", ["model.pkl", "a/B.PT", "x.ckpt", "weights.joblib", "a.npz", "m.h5"])
def test_what_may_run_when_it_is_loaded_is_no_model(path: str) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        file(path=path)


SOURCES = [
    "file:/etc/passwd",
    "http://example.org/a",
    "ftp://a/b",
    "a",
    "",
    "https:",
    "https://a b",
    "https://a\n",
    "HTTPS://a",
    "https://" + "a" * 1024,
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_public_manifest_names_public_sources(source: str) -> None:
    with pytest.raises(ValueError, match="source"):
        file(sources=(source,))


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "AB" * 32},
        {"sha256": ""},
        {"size_bytes": -1},
        {"size_bytes": limits.BLOB_BYTES_MAX + 1},
        {"sources": ("peer:a",) * 257},
        {"root": "EF" * 32},
        {"root": "ef"},
    ],
)
def test_a_file_that_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        file(**changes)


def test_who_needs_a_root() -> None:
    """A peer's first bad chunk has to show; of a file of one chunk the hash shows it as soon."""
    root, nothing = "ef" * 32, hashlib.sha256().hexdigest()
    one_chunk = limits.BLOB_CHUNK_BYTES
    assert file(size_bytes=one_chunk).root == "" and file(size_bytes=one_chunk + 1, root=root).root == root
    assert file(size_bytes=0, sha256=nothing).root == ""
    with pytest.raises(ValueError, match="needs the root"):
        file(size_bytes=one_chunk + 1)
    for changes in ({"sha256": nothing, "root": root}, {"sha256": "ab" * 32}):
        with pytest.raises(ValueError, match="no bytes"):
            file(size_bytes=0, **changes)


IMAGE = "docker.io/library/debian@sha256:" + "ab" * 32
BAD_IMAGES = [
    "debian",
    "debian:12",
    "debian@sha256:ab",
    "debian@md5:" + "ab" * 32,
    "--privileged@sha256:" + "ab" * 32,
    "a b@sha256:" + "ab" * 32,
    IMAGE + "\n",
]


def test_a_container_is_named_by_digest() -> None:
    assert manifest(runtime=Runtime.CONTAINER, entry=IMAGE, files=()).entry == IMAGE
    for entry in BAD_IMAGES:
        with pytest.raises(ValueError, match="digest"):
            manifest(runtime=Runtime.CONTAINER, entry=entry, files=())


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_bytes": 0},
        {"time_s": 0},
        {"time_s": 601},
        {"cpu_threads": 0},
        {"cpu_threads": 65},
        {"disk_bytes": -1},
        {"gpu_memory_bytes": -1},
        {"output_bytes": 0},
        {"output_bytes": limits.CARGO_OUTPUT_BYTES_MAX + 1},
    ],
)
def test_needs_have_bounds(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Needs(**({"memory_bytes": 1, "time_s": 1} | changes))


@pytest.mark.parametrize(
    "changes",
    [{"ttl_s": 0}, {"ttl_s": limits.CARGO_CACHE_TTL_S_MAX + 1}, {"similarity_milli": 0}, {"similarity_milli": 1001}],
)
def test_cache_policies_have_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        CachePolicy(**changes)


def test_a_manifest_that_is_too_large_is_not_signed() -> None:
    long = tuple(file(path=f"{n}/" + "a" * 150, sources=("https://example.org/" + "b" * 300,)) for n in range(200))
    with pytest.raises(LocalProtocolError, match="over"):
        sign_cargo(manifest(files=(MODULE, *long)), PUBLISHER)


@pytest.mark.parametrize(
    "data", [b"", b"\x90", b"\xc1", msgpack.packb([1] * 18), msgpack.packb(["x"] * 17), b"\xff" * 100_000]
)
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises((RemoteProtocolError, LocalProtocolError)):
        read_cargo(seal(Label.CARGO, data, PUBLISHER))


def test_releases_are_ordered_as_numbers() -> None:
    texts = ["0.0.0", "0.0.10", "0.2.0", "0.10.0", "1.0.0", "10.0.0", "999999.0.0"]
    assert sorted(texts, key=release_of) == texts


@pytest.mark.parametrize(
    ("now_ms", "said"),
    [
        (NOW_MS, ""),
        (NOW_MS + 1_000_000, ""),
        (NOW_MS + 1_000_001, "expired"),
        (NOW_MS - 61_000, "future"),
        (NOW_MS - 59_000, ""),
    ],
)
def test_a_cargo_has_its_time(now_ms: int, said: str) -> None:
    if said:
        with pytest.raises(RemoteProtocolError, match=said):
            unexpired(manifest(), now_ms)
    else:
        unexpired(manifest(), now_ms)
    unexpired(manifest(expires_at_ms=0), 2**52)


@pytest.mark.parametrize("value", [None, [], "x", 1, {"a": float("nan")}, {1: {2}}])
def test_canonical_json_is_an_object(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical_json(value)


# Revocations


def revocation(**changes: Any) -> Revocation:
    plain: dict[str, Any] = {
        "version": 1,
        "publisher": PUBLISHER.peer_id,
        "cargo": "ab" * 32,
        "network": "",
        "reason": "it leaks",
        "at_ms": NOW_MS,
    }
    return Revocation(**(plain | changes))


def test_a_publisher_revokes_and_a_coordinator_does() -> None:
    own = read_revocation(sign_revocation(revocation(), PUBLISHER))
    assert (own.revocation, own.signer) == (revocation(), PUBLISHER.peer_id)
    killed = revocation(network="net", cargo="")
    assert read_revocation(sign_revocation(killed, COORDINATOR)).signer == COORDINATOR.peer_id


def test_nobody_else_revokes_in_a_publisher_s_name() -> None:
    with pytest.raises(SignatureError):
        sign_revocation(revocation(), OTHER)
    forged = msgpack.packb([1, PUBLISHER.peer_id, "ab" * 32, "", "it leaks", NOW_MS])
    assert read_revocation(seal(Label.REVOCATION, forged, PUBLISHER)).revocation == revocation()
    with pytest.raises(SignatureError, match="was signed by"):
        read_revocation(seal(Label.REVOCATION, forged, OTHER))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"publisher": "x"},
        {"cargo": "AB"},
        {"network": "a b"},
        {"reason": "a\nb"},
        {"reason": "x" * 1025},
        {"at_ms": 0},
    ],
)
def test_a_revocation_that_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        revocation(**changes)
