"""Why something cannot be done with an A/B test."""

from __future__ import annotations

from enum import StrEnum

from protocol.errors import ArchipelagError


class AbFault(StrEnum):
    """In the API these are the error's ``code``."""

    INVALID = "invalid_ab_test"
    SHARES = "shares_do_not_add_up"
    VARIANTS = "too_few_variants"
    KIND = "variant_of_another_kind"
    UNKNOWN_CARGO = "unknown_cargo"
    NOT_YOURS = "not_your_cargo"
    UNKNOWN = "unknown_ab_test"
    STATE = "wrong_state"
    BUSY = "cargo_has_active_test"
    NOT_OFFERED = "variant_not_offered"
    NOT_STARTED = "ab_test_not_started"
    BLOCKED = "ab_test_blocked"
    NO_WINNER = "ab_test_has_no_winner"
    TOO_MANY = "too_many_ab_tests"


class AbRefused(ArchipelagError):
    """Nothing has changed; the message says why, and what to do. ``param``: the part of the request that it is about."""

    def __init__(self, fault: AbFault, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.fault, self.message, self.param = fault, message, param
