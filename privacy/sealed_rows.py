"""What the Coordinator keeps of prompts and answers for a while is sealed, so that its database and every backup of it hold none.

XChaCha20-Poly1305 (RFC 8439 with the 24-byte nonce of draft-irtf-cfrg-xchacha) under a key derived by HKDF-SHA-256 (RFC 5869) from the
Coordinator's secret; the row's id is authenticated with it, so a sealed value opens in its own row only.
"""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nacl.exceptions import CryptoError
from nacl.secret import Aead

from protocol.errors import ArchipelagError

NONCE_BYTES = Aead.NONCE_SIZE
_KEY_LABEL = b"archipelag/sealed-rows/1"


class SealBroken(ArchipelagError):
    """A sealed value was altered, moved to another row, or sealed under another secret."""


class RowSealer:
    """Seals and opens values of rows."""

    def __init__(self, secret: bytes) -> None:
        """``secret``: 32 bytes that all Coordinators of one database share."""
        key = HKDF(hashes.SHA256(), 32, None, _KEY_LABEL).derive(secret)
        self._box = Aead(key)

    def __repr__(self) -> str:
        return "<RowSealer>"

    def seal(self, value: bytes, row_id: str, nonce: bytes) -> bytes:
        """``nonce``: 24 random bytes, never used before."""
        return bytes(self._box.encrypt(value, row_id.encode(), nonce))

    def open(self, sealed: bytes, row_id: str) -> bytes:
        """Raises SealBroken."""
        try:
            return self._box.decrypt(sealed, row_id.encode())
        except (CryptoError, ValueError, TypeError) as error:
            raise SealBroken("a kept answer cannot be opened: it was altered, or salt.key is another one") from error
