"""The tree of a blob, and what its messages refuse."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from protocol import blobs, limits
from protocol.blobs import (
    BlobCode,
    BlobKey,
    BlobTree,
    Chunk,
    ChunksWanted,
    Have,
    Held,
    Tree,
    TreeWanted,
    pack_held,
    tree_of,
    unpack_held,
)
from protocol.errors import RemoteProtocolError

CHUNK = limits.BLOB_CHUNK_BYTES


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def rfc_top(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1, as it stands there: the left side is the largest power of two that is smaller."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return sha(b"\x01" + rfc_top(leaves[:k]) + rfc_top(leaves[k:]))


def fake_tree(chunks: int, seed: int = 1) -> BlobTree:
    return BlobTree(chunks * CHUNK, random.Random(seed).randbytes(32 * chunks))


@pytest.mark.parametrize("chunks", [*range(1, 20), 100, 1023])
def test_the_root_is_that_of_rfc_6962_bound_to_the_size(chunks: int) -> None:
    tree = fake_tree(chunks)
    leaves = [tree.leaves[at : at + 32] for at in range(0, len(tree.leaves), 32)]
    bound = b"\x02" + struct.pack(">QI", chunks * CHUNK, CHUNK)
    assert tree.root() == sha(bound + rfc_top(leaves)).hex()


def test_sizes_that_differ_have_roots_that_differ() -> None:
    leaves = fake_tree(2).leaves
    assert len({BlobTree(size, leaves).root() for size in (CHUNK + 1, CHUNK + 2, 2 * CHUNK)}) == 3


def test_a_chunk_is_checked_alone() -> None:
    chunks = [random.Random(seed).randbytes(CHUNK) for seed in range(3)] + [b"end"]
    tree = tree_of(chunks)
    assert tree.size == 3 * CHUNK + 3 and tree.chunks == 4
    for index, chunk in enumerate(chunks):
        assert tree.fits(index, chunk) and tree.fits(index, memoryview(chunk))
        assert not tree.fits(index, chunk[:-1]) and not tree.fits(index, chunk + b"\x00")
        assert not tree.fits(index, chunk[:-1] + bytes([chunk[-1] ^ 1]))
        assert not any(tree.fits(other, chunk) for other in range(-2, 6) if other != index)


def test_a_leaf_is_no_node() -> None:
    """Who passes two leaves off as a chunk needs another root."""
    tree = fake_tree(2)
    node = sha(b"\x01" + tree.leaves)
    assert blobs.leaf_hash(tree.leaves) != node
    assert BlobTree(64, node).root() != tree.root()


@pytest.mark.parametrize("size, leaves", [(0, 0), (-1, 1), (1, 0), (1, 2), (CHUNK, 2), (CHUNK + 1, 1), (limits.BLOB_BYTES_MAX + 1, 1)])
def test_trees_that_do_not_fit_their_size(size: int, leaves: int) -> None:
    with pytest.raises(ValueError):
        BlobTree(size, bytes(32 * leaves))
    with pytest.raises(ValueError):
        Tree(1, "0" * 64, size, bytes(32 * leaves))


def test_half_a_leaf() -> None:
    with pytest.raises(ValueError):
        BlobTree(CHUNK, bytes(31))


@pytest.mark.parametrize("chunks", [1, 7, 8, 9, 24, 1000])
def test_what_is_held_in_bits(chunks: int) -> None:
    held = [random.Random(chunks).random() < 0.5 for _ in range(chunks)]
    packed = pack_held(held)
    assert unpack_held(packed, chunks) == held
    for wrong in (packed + b"\x00", packed[:-1]):
        with pytest.raises(RemoteProtocolError):
            unpack_held(wrong, chunks)
    if chunks % 8:
        with pytest.raises(RemoteProtocolError):
            unpack_held(packed[:-1] + bytes([packed[-1] | 1]), chunks)


def test_the_first_chunk_is_the_highest_bit() -> None:
    assert pack_held([True] + [False] * 8) == b"\x80\x00"


@pytest.mark.parametrize(
    "make",
    [
        lambda: TreeWanted(0, BlobKey.ROOT, "0" * 64),
        lambda: TreeWanted(1, BlobKey.ROOT, "0" * 63),
        lambda: TreeWanted(1, BlobKey.ROOT, "A" * 64),
        lambda: ChunksWanted(1, "0" * 64, -1, 1),
        lambda: ChunksWanted(1, "0" * 64, 0, 0),
        lambda: ChunksWanted(1, "0" * 64, 0, limits.BLOB_REQUEST_CHUNKS_MAX + 1),
        lambda: ChunksWanted(1, "0" * 64, blobs.CHUNKS_MAX, 1),
        lambda: Chunk(1, 0, b""),
        lambda: Chunk(1, 0, bytes(CHUNK + 1)),
        lambda: Chunk(1, -1, b"x"),
        lambda: Have(1, Held.SOME),
        lambda: Have(1, Held.ALL, b"\x80"),
        lambda: Have(1, Held.NONE, b"\x80"),
        lambda: blobs.BlobRefused(1, BlobCode.BUSY, "line\nbreak"),
    ],
)
def test_messages_that_cannot_be_said(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        make()


def test_the_largest_tree_and_the_largest_bits_fit_into_a_frame() -> None:
    assert blobs.CHUNKS_MAX * 32 <= limits.FRAME_BODY_BYTES_MAX
    tree = BlobTree(limits.BLOB_BYTES_MAX, bytes(32 * blobs.CHUNKS_MAX))
    assert len(tree.root()) == 64
    assert Have(1, Held.SOME, pack_held([True] * blobs.CHUNKS_MAX)).held is Held.SOME
