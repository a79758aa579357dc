"""Cargos: signed units of computation. The manifest says what to run, what it needs and what it costs; whoever has it need not trust
whoever passed it on.

A manifest is signed by its publisher's Ed25519 key (RFC 8032). It has one encoding (registry.Struct), and the SHA-256 of that is the
Cargo's *content address*: the same address is the same Cargo everywhere, byte for byte, since the manifest names every file by its own
hash. A ``Revocation`` takes one Cargo, or all of a key, off the network for good; publishers sign those of their own Cargos, Coordinators
the network's kill switch.

What a manifest says is its publisher's word. What an Island grants (cargo_shelf.py, the sandbox's tiers) is the Island's.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from enum import StrEnum

from protocol import checks, limits
from protocol.envelope import Label, open_envelope, peek, seal
from protocol.errors import RemoteProtocolError, SignatureError
from protocol.identity import Signer
from protocol.prices import Ask
from protocol.registry import Struct

CARGO_VERSION = 1
REVOCATION_VERSION = 1
TRUST_LEVEL_MAX = 3

_EMPTY_SHA256 = hashlib.sha256().hexdigest()
_NAME = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*\Z")
_RELEASE = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})\Z")
_PIECE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*\Z")  # of a path: none begins with a dot or a dash
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}\Z")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+() -]*\Z")
_SOURCE = re.compile(r"(https|hf|pypi|peer):[!-~]+\Z")
# Formats that can run code of their own when they are loaded.
_UNSAFE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".npy", ".npz", ".mar", ".h5", ".keras")


class Runtime(StrEnum):
    """What can run a Cargo."""

    GGUF = "gguf"
    ONNX = "onnx"
    WASM = "wasm"
    CONTAINER = "container"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True, slots=True)
class CargoFile:
    """One file of a Cargo, under the path at which its runtime looks for it.

    ``sources``: where its parts come from, joined in order; none for a file that only peers have. A public manifest has no ``file:``.
    ``root``: of its tree (blobs.py), by which the first bad chunk from a peer is found. A file of one chunk may do without, since its hash
    says the same; one of no bytes has no tree.
    """

    path: str
    sha256: str
    size_bytes: int
    sources: tuple[str, ...] = ()
    root: str = ""

    def __post_init__(self) -> None:
        check_path("path", self.path)
        if self.path.lower().endswith(_UNSAFE_SUFFIXES):
            raise ValueError(f"{self.path} may hold code that runs when it is loaded; only safetensors, GGUF and ONNX are taken")
        checks.content_hash("sha256", self.sha256)
        checks.in_range("size_bytes", self.size_bytes, 0, limits.BLOB_BYTES_MAX)
        checks.at_most("sources", self.sources, limits.MODEL_PARTS_MAX)
        for source in self.sources:
            if len(source) > limits.TEXT_CHARS_MAX or not _SOURCE.match(source):
                raise ValueError(f"a source is https:, hf:, pypi: or peer:, without spaces, not {source[:80]!r}")
            if source.startswith("https:") and "@" in source.removeprefix("https://").partition("/")[0]:
                raise ValueError("a source names no user and no password: everybody reads a manifest")
        self._check_root()

    def _check_root(self) -> None:
        if self.root:
            checks.content_hash("root", self.root)
        if not self.size_bytes and (self.root or self.sha256 != _EMPTY_SHA256):
            raise ValueError(f"{self.path[:80]} has no bytes: then it has no root, and the sha256 of nothing")
        if not self.root and self.size_bytes > limits.BLOB_CHUNK_BYTES:
            raise ValueError(f"{self.path[:80]} has more than one chunk and needs the root of its tree; cargo build finds it out")


@dataclass(frozen=True, slots=True)
class Needs:
    """The most that one job may use. The sandbox's tier bounds it once more."""

    memory_bytes: int
    time_s: int
    cpu_threads: int = 1
    disk_bytes: int = 0
    gpu_memory_bytes: int = 0
    output_bytes: int = limits.CARGO_OUTPUT_BYTES_DEFAULT

    def __post_init__(self) -> None:
        checks.in_range("memory_bytes", self.memory_bytes, 1, limits.CARGO_FILE_BYTES_MAX)
        checks.in_range("time_s", self.time_s, 1, limits.CARGO_TIME_S_MAX)
        checks.in_range("cpu_threads", self.cpu_threads, 1, limits.CARGO_THREADS_MAX)
        checks.in_range("disk_bytes", self.disk_bytes, 0, limits.CARGO_FILE_BYTES_MAX)
        checks.in_range("gpu_memory_bytes", self.gpu_memory_bytes, 0, limits.CARGO_FILE_BYTES_MAX)
        checks.in_range("output_bytes", self.output_bytes, 1, limits.CARGO_OUTPUT_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """Whether answers may be kept for the same input, for how long, and how alike inputs have to be, in thousandths (1,000: equal).

    ``public``: whether an account may be given what another one's job has answered. A publisher says so where an input tells nothing of
    who sent it, or where nothing is ever learnt from a quick answer; by default nobody is told what anybody else has asked."""

    enabled: bool = True
    ttl_s: int = limits.CARGO_CACHE_TTL_S_DEFAULT
    similarity_milli: int = limits.CARGO_CACHE_SIMILARITY_MILLI_DEFAULT
    public: bool = False

    def __post_init__(self) -> None:
        checks.in_range("ttl_s", self.ttl_s, 1, limits.CARGO_CACHE_TTL_S_MAX)
        checks.in_range("similarity_milli", self.similarity_milli, 1, 1000)


@dataclass(frozen=True, slots=True)
class CargoManifest:
    """All that is to be known of one release of a Cargo.

    ``entry``: the file that the runtime begins with, one of ``files``; for containers the image by its digest. ``options``: what the
    runtime wants to know besides, canonical JSON of an object (``canonical_json``). ``input_schema`` and ``output_schema``: JSON schemas
    likewise; ``{}`` takes anything. ``trust_level``: what the Cargo asks for, 0 to 3 (mission.md). ``expires_at_ms``: 0 never.
    """

    version: int
    name: str
    release: str
    publisher: str
    runtime: Runtime
    entry: str
    files: tuple[CargoFile, ...]
    needs: Needs
    ask: Ask
    trust_level: int
    licence: str
    description: str
    options: str
    input_schema: str
    output_schema: str
    cache: CachePolicy
    published_at_ms: int
    expires_at_ms: int = 0

    def __post_init__(self) -> None:
        if self.version != CARGO_VERSION:
            raise ValueError(f"manifest version {self.version} is not {CARGO_VERSION}")
        check_name(self.name)
        release_of(self.release)
        checks.peer_id("publisher", self.publisher)
        self._check_files()
        checks.in_range("trust_level", self.trust_level, 0, TRUST_LEVEL_MAX)
        if len(self.licence) > limits.NAME_CHARS_MAX or not _LICENCE.match(self.licence):
            raise ValueError(f"licence is an SPDX expression such as Apache-2.0, not {self.licence[:80]!r}")
        checks.printable("description", self.description, limits.TEXT_CHARS_MAX)
        for name in ("options", "input_schema", "output_schema"):
            _check_json(name, getattr(self, name))
        checks.in_range("published_at_ms", self.published_at_ms, 1, 2**53)
        if self.expires_at_ms and self.expires_at_ms <= self.published_at_ms:
            raise ValueError("a Cargo expires after it is published")
        checks.in_range("expires_at_ms", self.expires_at_ms, 0, 2**53)

    def _check_files(self) -> None:
        checks.at_most("files", self.files, limits.CARGO_FILES_MAX)
        paths = [file.path.lower() for file in self.files]
        checks.unique("files", paths)  # on file systems that tell no case apart too
        folders = {path[:end] for path in paths for end in range(len(path)) if path[end] == "/"}
        if folders & set(paths):
            raise ValueError("files: a path is a file and a folder at once")
        if sum(file.size_bytes for file in self.files) > limits.CARGO_FILE_BYTES_MAX:
            raise ValueError(f"files have more than {limits.CARGO_FILE_BYTES_MAX} bytes together")
        if self.runtime is Runtime.CONTAINER:
            if len(self.entry) > limits.TEXT_CHARS_MAX or not _IMAGE.match(self.entry):
                raise ValueError(f"the entry of a container is its image by digest, NAME@sha256:…, not {self.entry[:80]!r}")
        elif self.entry not in {file.path for file in self.files}:
            raise ValueError(f"the entry {self.entry[:80]!r} is none of the files")

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Revocation:
    """Nobody may run this Cargo any more; with an empty ``cargo`` none that ``publisher`` has ever signed. There is no way back: what was
    mended is a new release, a key that was lost a new key.

    ``network``: of the Coordinator that signs it as a kill switch; empty where the publisher signs.
    """

    version: int
    publisher: str
    cargo: str
    network: str
    reason: str
    at_ms: int

    def __post_init__(self) -> None:
        if self.version != REVOCATION_VERSION:
            raise ValueError(f"revocation version {self.version} is not {REVOCATION_VERSION}")
        checks.peer_id("publisher", self.publisher)
        if self.cargo:
            checks.content_hash("cargo", self.cargo)
        if self.network:
            checks.label("network", self.network, limits.NAME_CHARS_MAX)
        checks.printable("reason", self.reason, limits.TEXT_CHARS_MAX)
        checks.in_range("at_ms", self.at_ms, 1, 2**53)


@dataclass(frozen=True, slots=True)
class SignedCargo:
    """A manifest whose signature was checked: ``address`` is its content address, ``envelope`` the bytes to pass on."""

    manifest: CargoManifest
    address: str
    envelope: bytes


@dataclass(frozen=True, slots=True)
class SignedRevocation:
    """A revocation whose signature was checked. ``signer``: the publisher, or a Coordinator, which has still to be one of our network."""

    revocation: Revocation
    signer: str
    envelope: bytes


_MANIFEST: Struct[CargoManifest] = Struct(CargoManifest, limits.CARGO_MANIFEST_BYTES_MAX)
_REVOCATION: Struct[Revocation] = Struct(Revocation)


def canonical_manifest(manifest: CargoManifest) -> bytes:
    """The one encoding that is signed and hashed. Raises LocalProtocolError for one that is too large."""
    return _MANIFEST.encode(manifest)


def address_of(manifest: CargoManifest) -> str:
    """The content address: SHA-256 of the canonical bytes, in hex."""
    return hashlib.sha256(canonical_manifest(manifest)).hexdigest()


def read_manifest(data: bytes) -> CargoManifest:
    """One that is not signed yet. Raises RemoteProtocolError."""
    return _MANIFEST.decode(data)


def sign_cargo(manifest: CargoManifest, publisher: Signer) -> bytes:
    """The envelope of a Cargo. Raises SignatureError for another publisher's."""
    if manifest.publisher != publisher.peer_id:
        raise SignatureError(f"the Cargo is {manifest.publisher}'s to sign, not {publisher.peer_id}'s")
    return seal(Label.CARGO, canonical_manifest(manifest), publisher)


def read_cargo(data: bytes) -> SignedCargo:
    """Raises SignatureError where it is not its publisher's, RemoteProtocolError where it is no valid manifest."""
    envelope = open_envelope(Label.CARGO, data)
    manifest = _MANIFEST.decode(envelope.payload)
    if envelope.signer != manifest.publisher:
        raise SignatureError(f"a Cargo of {manifest.publisher} was signed by {envelope.signer}")
    return SignedCargo(manifest, hashlib.sha256(envelope.payload).hexdigest(), data)


def sign_revocation(revocation: Revocation, signer: Signer) -> bytes:
    """Raises SignatureError where a publisher's word is signed by somebody else."""
    if not revocation.network and revocation.publisher != signer.peer_id:
        raise SignatureError(f"only {revocation.publisher} revokes its own Cargos without a network's word")
    return seal(Label.REVOCATION, _REVOCATION.encode(revocation), signer)


def read_revocation(data: bytes) -> SignedRevocation:
    """Raises SignatureError, RemoteProtocolError. Whether a Coordinator's word counts is for whoever knows the network's Coordinators."""
    envelope = open_envelope(Label.REVOCATION, data)
    revocation = _REVOCATION.decode(envelope.payload)
    if not revocation.network and envelope.signer != revocation.publisher:
        raise SignatureError(f"a revocation by {revocation.publisher} was signed by {envelope.signer}")
    return SignedRevocation(revocation, envelope.signer, data)


def peek_cargo(data: bytes) -> SignedCargo:
    """One whose signature was checked before. Raises RemoteProtocolError."""
    envelope = peek(data)
    return SignedCargo(_MANIFEST.decode(envelope.payload), hashlib.sha256(envelope.payload).hexdigest(), data)


def peek_revocation(data: bytes) -> SignedRevocation:
    """One whose signature was checked before, or does not matter yet. Raises RemoteProtocolError."""
    envelope = peek(data)
    return SignedRevocation(_REVOCATION.decode(envelope.payload), envelope.signer, data)


def check_name(name: str) -> None:
    """Lower-case words, joined by dots and dashes. Raises ValueError."""
    if len(name) > limits.CARGO_NAME_CHARS_MAX or not _NAME.match(name):
        raise ValueError(f"a Cargo's name has lower-case letters, digits, single dots and dashes, such as text-stats, not {name[:80]!r}")


def release_of(text: str) -> tuple[int, int, int]:
    """Major, minor and patch of a release, by which releases are ordered (semver.org, without labels). Raises ValueError."""
    found = _RELEASE.match(text)
    if found is None:
        raise ValueError(f"a release is three numbers such as 1.0.0, not {text[:80]!r}")
    major, minor, patch = (int(part) for part in found.groups())
    return major, minor, patch


def check_path(name: str, path: str) -> None:
    """A relative path of plain names: it leads nowhere else, on any system. Raises ValueError."""
    pieces = path.split("/")
    if len(path) > limits.CARGO_PATH_CHARS_MAX or len(pieces) > limits.CARGO_PATH_DEPTH_MAX or not all(map(_is_plain, pieces)):
        raise ValueError(f"{name} is a relative path of plain names such as model/weights.onnx, not {path[:80]!r}")


_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))})


def _is_plain(piece: str) -> bool:
    return bool(_PIECE.match(piece)) and not piece.endswith(".") and piece.lower().partition(".")[0] not in _DEVICES


def canonical_json(value: object) -> str:
    """An object of JSON in one form: sorted keys, no spaces, no characters beyond ASCII, no NaN. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("it has to be a JSON object")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check_json(name: str, text: str) -> None:
    if len(text) > limits.CARGO_JSON_BYTES_MAX:
        raise ValueError(f"{name} has {len(text)} characters; at most {limits.CARGO_JSON_BYTES_MAX} are allowed")
    try:
        if canonical_json(json.loads(text)) != text:
            raise ValueError("it is not in its canonical form")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no canonical JSON object: {error}") from None


def unexpired(cargo: CargoManifest, now_ms: int) -> None:
    """Raises RemoteProtocolError for a Cargo whose time is over, or that comes from the future."""
    if cargo.expires_at_ms and cargo.expires_at_ms < now_ms:
        raise RemoteProtocolError(f"{cargo.name} {cargo.release} has expired; its publisher has to sign a new release")
    if cargo.published_at_ms > now_ms + limits.CLOCK_SKEW_S * 1000:
        raise RemoteProtocolError(f"{cargo.name} {cargo.release} was published in the future; check the clocks")
