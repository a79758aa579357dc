"""Files by their content, a chunk at a time: the tree of a blob, and ``/archipelag/blob/1``, by which peers hand chunks to one another.

Theory of operation. A blob is cut into chunks of BLOB_CHUNK_BYTES, the last one shorter. The SHA-256 of each chunk is a leaf; above them
stands a binary tree as in RFC 6962, so that every leaf has one place. The root binds the top of the tree and the size:

    leaf = SHA-256(00 | chunk)        node = SHA-256(01 | left | right)        root = SHA-256(02 | size u64 | chunk size u32 | top)

Leaf, node and root begin with different bytes, so none can be passed off as another. The compact form of a tree is its size and its
leaves; who knows the root checks them against it once, and then each chunk alone, as it comes, from whomever it comes.

A blob may also be asked for by the SHA-256 of the whole file, which says nothing of its chunks: the tree that a peer answers is then only
that peer's word, until the last byte has come and the whole is hashed.

On a stream the fetcher asks, the server answers in the order of the requests; a range is answered by its chunks in rising order, or broken
off by one BlobRefused.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from protocol import checks, limits
from protocol.errors import RemoteProtocolError
from protocol.messages import PROTOCOL_VERSION, Hello
from protocol.registry import Registry, body

BLOB_PROTOCOL = f"/archipelag/blob/{PROTOCOL_VERSION}"
BLOB = Registry("blob")
HASH_BYTES = 32
CHUNKS_MAX = -(-limits.BLOB_BYTES_MAX // limits.BLOB_CHUNK_BYTES)
_LEAF, _NODE, _ROOT = b"\x00", b"\x01", b"\x02"
_SIZES = struct.Struct(">QI")
_REQUEST_MAX = 2**53


def chunk_count(size: int) -> int:
    """How many chunks a blob of ``size`` bytes has."""
    return -(-size // limits.BLOB_CHUNK_BYTES)


def leaf_hash(chunk: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(_LEAF)
    digest.update(chunk)
    return digest.digest()


def _top(hashes: Sequence[bytes]) -> bytes:
    """Level by level; the odd one at the end goes up as it is, which is RFC 6962's tree."""
    level = list(hashes)
    while len(level) > 1:
        pairs = [hashlib.sha256(_NODE + level[at] + level[at + 1]).digest() for at in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


@dataclass(frozen=True, slots=True)
class BlobTree:
    """The compact form: ``size`` in bytes, ``leaves`` of HASH_BYTES each, joined. Raises ValueError where the two do not fit together."""

    size: int
    leaves: bytes

    def __post_init__(self) -> None:
        checks.in_range("size", self.size, 1, limits.BLOB_BYTES_MAX)
        checks.exactly("leaves", self.leaves, chunk_count(self.size) * HASH_BYTES)

    def __repr__(self) -> str:
        return f"<BlobTree of {self.size} bytes, {self.chunks} chunks>"

    @property
    def chunks(self) -> int:
        return chunk_count(self.size)

    def root(self) -> str:
        """In hex. Hashes the leaves each time: 0.2 s where a blob is as large as may be."""
        leaves = [self.leaves[at : at + HASH_BYTES] for at in range(0, len(self.leaves), HASH_BYTES)]
        return hashlib.sha256(_ROOT + _SIZES.pack(self.size, limits.BLOB_CHUNK_BYTES) + _top(leaves)).hexdigest()

    def offset(self, index: int) -> int:
        return index * limits.BLOB_CHUNK_BYTES

    def chunk_bytes(self, index: int) -> int:
        """Length of one chunk; only the last one is shorter than BLOB_CHUNK_BYTES."""
        return min(limits.BLOB_CHUNK_BYTES, self.size - self.offset(index))

    def fits(self, index: int, chunk: bytes | memoryview) -> bool:
        """Whether these bytes are the chunk ``index``, of which nothing else need be known."""
        if not 0 <= index < self.chunks or len(chunk) != self.chunk_bytes(index):
            return False
        return leaf_hash(chunk) == self.leaves[index * HASH_BYTES : (index + 1) * HASH_BYTES]


def tree_of(chunks: Sequence[bytes]) -> BlobTree:
    """The tree of a blob that is in memory, cut into its chunks."""
    return BlobTree(sum(map(len, chunks)), b"".join(map(leaf_hash, chunks)))


def pack_held(held: Sequence[bool]) -> bytes:
    """One bit a chunk, the first one in the highest bit of the first byte; bits behind the last chunk are 0."""
    packed = bytearray(-(-len(held) // 8))
    for index, there in enumerate(held):
        packed[index // 8] |= there << (7 - index % 8)
    return bytes(packed)


def unpack_held(packed: bytes, chunks: int) -> list[bool]:
    """Raises RemoteProtocolError where it is of another number of chunks."""
    if len(packed) != -(-chunks // 8) or (chunks % 8 and packed[-1] & (0xFF >> chunks % 8)):
        raise RemoteProtocolError(f"what is held of {chunks} chunks does not fit into {len(packed)} bytes")
    return [bool(packed[index // 8] & (0x80 >> index % 8)) for index in range(chunks)]


class BlobKey(StrEnum):
    """What a blob is asked for by."""

    ROOT = "root"
    SHA256 = "sha256"


class BlobCode(StrEnum):
    """Why a request is refused. ``unknown_blob``: not here, or not for everybody. ``out_of_range``: the blob has no such chunks.
    ``not_held``: of this blob these chunks are not here. ``busy``: ask again later, or somebody else. ``unreadable``: the disk failed, or
    the file has changed."""

    UNKNOWN_BLOB = "unknown_blob"
    OUT_OF_RANGE = "out_of_range"
    NOT_HELD = "not_held"
    BUSY = "busy"
    UNREADABLE = "unreadable"


def _request(number: int) -> None:
    checks.in_range("request", number, 1, _REQUEST_MAX)


BLOB.message(1)(Hello)


@BLOB.message(2)
@dataclass(frozen=True, slots=True)
class TreeWanted:
    """Fetcher: the tree of this blob, please. Answered by Tree or BlobRefused."""

    request: int
    key: BlobKey
    digest: str

    def __post_init__(self) -> None:
        _request(self.request)
        checks.content_hash("digest", self.digest)


@BLOB.message(3)
@dataclass(frozen=True, slots=True)
class Tree:
    """Server: the blob is here, with this size; ``sha256`` is that of the whole file. Whoever knows the root compares it."""

    request: int
    sha256: str
    size: int
    leaves: bytes = body()

    def __post_init__(self) -> None:
        _request(self.request)
        checks.content_hash("sha256", self.sha256)
        BlobTree(self.size, self.leaves)

    def tree(self) -> BlobTree:
        return BlobTree(self.size, bytes(self.leaves))


@BLOB.message(4)
@dataclass(frozen=True, slots=True)
class HaveWanted:
    """Fetcher: which chunks of this blob are with you? Answered by Have; never refused."""

    request: int
    root: str

    def __post_init__(self) -> None:
        _request(self.request)
        checks.content_hash("root", self.root)


class Held(StrEnum):
    NONE = "none"
    SOME = "some"
    ALL = "all"


@BLOB.message(5)
@dataclass(frozen=True, slots=True)
class Have:
    """Server: all of it, nothing, or the chunks of ``bits`` (see pack_held)."""

    request: int
    held: Held
    bits: bytes = body()

    def __post_init__(self) -> None:
        _request(self.request)
        checks.at_most("bits", self.bits, -(-CHUNKS_MAX // 8))
        if bool(self.bits) != (self.held is Held.SOME):
            raise ValueError("bits stand where some of the chunks are held, and nowhere else")


@BLOB.message(6)
@dataclass(frozen=True, slots=True)
class ChunksWanted:
    """Fetcher: the chunks ``first`` to ``first + count - 1``. Answered by as many Chunks in that order, or, at any point, BlobRefused."""

    request: int
    root: str
    first: int
    count: int

    def __post_init__(self) -> None:
        _request(self.request)
        checks.content_hash("root", self.root)
        checks.in_range("first", self.first, 0, CHUNKS_MAX - 1)
        checks.in_range("count", self.count, 1, limits.BLOB_REQUEST_CHUNKS_MAX)


@BLOB.message(7)
@dataclass(frozen=True, slots=True)
class Chunk:
    """Server: one chunk of a request."""

    request: int
    index: int
    data: bytes = body()

    def __post_init__(self) -> None:
        _request(self.request)
        checks.in_range("index", self.index, 0, CHUNKS_MAX - 1)
        checks.in_range("bytes of a chunk", len(self.data), 1, limits.BLOB_CHUNK_BYTES)


@BLOB.message(8)
@dataclass(frozen=True, slots=True)
class BlobRefused:
    """Server: no, or no more of this request."""

    request: int
    code: BlobCode
    message: str

    def __post_init__(self) -> None:
        _request(self.request)
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)


BLOB.seal()
