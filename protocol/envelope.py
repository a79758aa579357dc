"""Signed envelopes: who says what, and as what.

The signature (Ed25519, RFC 8032) covers a versioned label and the payload: ``archipelag-envelope/1 NUL label NUL payload``. The label
keeps a signature that was made for one purpose from being used for another; a label has no NUL, so the parts cannot be shifted.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from protocol import checks, limits
from protocol.errors import RemoteProtocolError, SignatureError
from protocol.identity import PUBLIC_KEY_BYTES, Signer, peer_id_of
from protocol.registry import Struct

_DOMAIN = b"archipelag-envelope/1\0"
SIGNATURE_BYTES = 64


class Label(StrEnum):
    """What an envelope may be; a new version of a payload gets a new label."""

    AD = "archipelag/ad/1"
    LOST = "archipelag/lost/1"
    TICKET = "archipelag/ticket/1"
    RECEIPT = "archipelag/receipt/1"
    COUNT = "archipelag/count/1"
    DELEGATION = "archipelag/delegation/1"
    CARGO = "archipelag/cargo/1"
    REVOCATION = "archipelag/cargo-revoked/1"
    LISTING = "archipelag/cargo-listed/1"
    PROMOTION = "archipelag/cargo-promoted/1"
    WORKFLOW = "archipelag/workflow/1"


@dataclass(frozen=True, slots=True)
class Envelope:
    label: Label
    public_key: bytes
    payload: bytes
    signature: bytes

    def __post_init__(self) -> None:
        checks.exactly("public_key", self.public_key, PUBLIC_KEY_BYTES)
        checks.exactly("signature", self.signature, SIGNATURE_BYTES)

    @property
    def signer(self) -> str:
        """Peer id of the signer."""
        return peer_id_of(self.public_key)


_ENVELOPE: Struct[Envelope] = Struct(Envelope, limits.ENVELOPE_BYTES_MAX)


def _signed_bytes(label: Label, payload: bytes) -> bytes:
    return _DOMAIN + label.encode() + b"\0" + payload


def seal(label: Label, payload: bytes, signer: Signer) -> bytes:
    """An envelope's bytes, ready to be sent."""
    return _ENVELOPE.encode(Envelope(label, signer.public_key, payload, signer.sign(_signed_bytes(label, payload))))


def peek(data: bytes) -> Envelope:
    """An envelope that we have made or opened ourselves: its signature is not looked at again. Raises RemoteProtocolError."""
    return _ENVELOPE.decode(data)


def open_envelope(label: Label, data: bytes) -> Envelope:
    """The checked envelope.

    Raises RemoteProtocolError when the bytes are no envelope, SignatureError when it has another label or the signature is wrong.
    """
    try:
        envelope = _ENVELOPE.decode(data)
    except SignatureError:
        raise
    except RemoteProtocolError as error:
        raise SignatureError(f"no signed envelope: {error}") from error
    if envelope.label is not label:
        raise SignatureError(f"expected {label}, got an envelope for {envelope.label}")
    try:
        VerifyKey(envelope.public_key).verify(_signed_bytes(label, envelope.payload), envelope.signature)
    except (BadSignatureError, ValueError) as error:
        raise SignatureError(f"the signature under {label} is wrong") from error
    return envelope
