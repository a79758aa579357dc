"""What the books say no with, and what can go wrong with the database under them."""

from __future__ import annotations

from enum import StrEnum

from protocol.errors import ArchipelagError


class Why(StrEnum):
    """Why the books refuse a change."""

    NO_CREDIT = "insufficient_credits"
    NO_ACCOUNT = "unknown_account"
    NO_HOLD = "unknown_hold"
    RESOLVED = "hold_resolved"  # a hold resolves once
    OVER_HOLD = "over_hold"
    DIFFERS = "id_reused"  # the same id with other contents
    BAD_AMOUNT = "bad_amount"
    NOT_OWNER = "not_owner"
    STATE = "wrong_state"
    NO_JOB = "unknown_job"
    NO_ISLAND = "unknown_island"
    REUSED = "idempotency_key_reused"
    RUNNING = "idempotency_key_in_use"


class BooksRefused(ArchipelagError):
    """The books do not allow a change; nothing has changed."""

    def __init__(self, why: Why, message: str) -> None:
        super().__init__(message)
        self.why, self.message = why, message


class BooksUnavailable(ArchipelagError):
    """The database is full, locked, read-only or gone. What was asked for has not happened, as far as we know; asking again with the
    same ids is safe."""
