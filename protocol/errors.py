"""The tree of errors.

Two kinds matter at a border: ``LocalProtocolError`` is our own bug, ``RemoteProtocolError`` is the peer's doing. ``Refused`` is
neither: a well-formed request that was turned down, with a code that travels on the wire.

    ArchipelagError
    ├── ConfigError             the user can repair it; the text says how
    ├── LocalProtocolError
    ├── RemoteProtocolError
    │   └── SignatureError      forged, unsigned, or signed for another purpose
    ├── LinkLost                the connection ended before the peer said that it was done
    └── Refused(code, message, retryable)
"""

from __future__ import annotations

from enum import StrEnum


class ArchipelagError(Exception):
    """Root of all errors that this project raises on purpose."""


class ConfigError(ArchipelagError):
    """A setting, file or environment is wrong; the message says what to do next."""


class LocalProtocolError(ArchipelagError):
    """We tried to say something that the protocol forbids: a bug on this side."""


class RemoteProtocolError(ArchipelagError):
    """The peer said something that the protocol forbids."""


class SignatureError(RemoteProtocolError):
    """A signature is missing, wrong, or made for another purpose."""


class LinkLost(ArchipelagError):
    """The connection to a peer ended while something was still under way."""


class Code(StrEnum):
    """Why a job was refused or failed, as it stands on the wire."""

    BAD_INPUT = "bad_input"
    NO_TOOLS = "tools_not_supported"
    BAD_TICKET = "bad_ticket"
    UNKNOWN_CARGO = "unknown_cargo"
    CONTEXT_LENGTH = "context_length_exceeded"
    NO_CAPACITY = "no_capacity"
    NO_ISLAND = "no_island"
    DRAINING = "draining"
    CANCELLED = "cancelled"
    WORKER_DIED = "worker_died"
    LINK_LOST = "link_lost"
    LEASE_LOST = "lease_lost"
    UNSIGNED = "unsigned"
    TIMEOUT = "timeout"
    CARGO_FAILED = "cargo_failed"  # the Cargo itself is at fault: it would do the same elsewhere
    INTERNAL = "internal"


RETRYABLE: frozenset[Code] = frozenset(
    {
        Code.NO_CAPACITY,
        Code.DRAINING,
        Code.WORKER_DIED,
        Code.LINK_LOST,
        Code.LEASE_LOST,
        Code.TIMEOUT,
        Code.CANCELLED,  # by somebody else than the holder: the Island is going down
        Code.UNKNOWN_CARGO,  # its ad was older than its memory
        Code.BAD_TICKET,  # it has restarted, and the ticket names its earlier run; the next try has a ticket of its own
        Code.CONTEXT_LENGTH,  # one with a larger context
    }
)
"""Codes after which another Island may take the job; the others would fail there too."""


class Refused(ArchipelagError):
    """A job was turned down or failed. ``retryable`` says whether another Island may be asked."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE

    def __repr__(self) -> str:
        return f"<Refused {self.code}: {self.message}>"
