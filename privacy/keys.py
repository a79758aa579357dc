"""Keys of a node and secrets of the API, as values; reading and writing them is the shell's business.

A node's identity is an Ed25519 key (RFC 8032) kept as its 32-byte seed. An API key is 256 random bits, so one fast hash is as good as a
slow one: nobody can try 2^256 keys, and each request pays the hash.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from nacl.signing import SigningKey

from protocol.identity import peer_id_of

SEED_BYTES = 32
API_KEY_PREFIX = "ak_"
API_KEY_ENTROPY_BYTES = 32
_API_KEY_CHARS = 43  # 32 bytes in unpadded URL-safe base64


class NodeKey:
    """An Ed25519 key that signs for a node or a network. Its repr shows the peer id, never the seed."""

    def __init__(self, seed: bytes) -> None:
        """Raises ValueError unless the seed has 32 bytes."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a key seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._key = SigningKey(seed)
        self.public_key = bytes(self._key.verify_key)
        self.peer_id = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"<NodeKey {self.peer_id}>"

    @property
    def seed(self) -> bytes:
        """The secret itself, for the host that needs it for its handshake."""
        return bytes(self._key)

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message).signature


def api_key(entropy: bytes) -> str:
    """``ak_…`` of 32 random bytes. Raises ValueError for fewer."""
    if len(entropy) != API_KEY_ENTROPY_BYTES:
        raise ValueError(f"an API key needs {API_KEY_ENTROPY_BYTES} random bytes")
    return API_KEY_PREFIX + base64.urlsafe_b64encode(entropy).rstrip(b"=").decode()


def looks_like_api_key(text: str) -> bool:
    return text.startswith(API_KEY_PREFIX) and len(text) == len(API_KEY_PREFIX) + _API_KEY_CHARS and text.isascii()


def api_key_hash(key: str) -> str:
    """What is stored of a key: SHA-256 under a label, hex."""
    return hashlib.sha256(b"archipelag/api-key/1\0" + key.encode()).hexdigest()


def same(left: str, right: str) -> bool:
    """Constant-time comparison of two hashes."""
    return hmac.compare_digest(left.encode(), right.encode())


def cache_salt(secret: bytes, account: str) -> bytes:
    """32 bytes that are the same for all jobs of one account and tell nothing about it (HMAC-SHA-256 under the Coordinator's secret)."""
    return hmac.digest(secret, b"archipelag/cache-salt/1\0" + account.encode(), "sha256")
