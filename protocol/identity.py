"""Peer ids: libp2p's name for an Ed25519 public key (specs/peer-ids of libp2p: identity multihash of the key's protobuf).

A peer id *is* its public key, so whoever holds the id can check the peer's signatures without asking anybody.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import base58

# multihash "identity", 36 bytes; protobuf: field 1 = key type 1 (Ed25519), field 2 = 32 bytes
_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
PUBLIC_KEY_BYTES = 32
_PEER_ID_CHARS_MAX = 64
_REMEMBERED_MAX = 4096  # a name costs 13 us to make, and the same peers sign again and again


class Signer(Protocol):
    """Something that holds an Ed25519 private key and does not show it."""

    @property
    def public_key(self) -> bytes: ...

    @property
    def peer_id(self) -> str: ...

    def sign(self, message: bytes) -> bytes: ...


@lru_cache(_REMEMBERED_MAX)
def peer_id_of(public_key: bytes) -> str:
    """Peer id of an Ed25519 public key of 32 bytes, such as ``12D3KooW…``. Raises ValueError for another length."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return base58.b58encode(_PREFIX + public_key).decode()


def public_key_of(peer_id: str) -> bytes:
    """The Ed25519 public key inside a peer id. Raises ValueError when there is none."""
    if len(peer_id) > _PEER_ID_CHARS_MAX or not peer_id.isalnum():  # base58 takes quadratic time and drops white space
        raise ValueError(f"{peer_id[:80]!r} is not a peer id")
    raw = base58.b58decode(peer_id)
    if len(raw) != len(_PREFIX) + PUBLIC_KEY_BYTES or not raw.startswith(_PREFIX):
        raise ValueError(f"{peer_id[:80]!r} is not the peer id of an Ed25519 key")
    return raw[len(_PREFIX) :]
