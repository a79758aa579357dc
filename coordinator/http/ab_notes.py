"""What answers and jobs say of the A/B test that they count for, and how a rating is written."""

from __future__ import annotations

from coordinator.jobs import Assigned

TEST_HEADER, VARIANT_HEADER = "x-archipelag-ab-test", "x-archipelag-ab-variant"
RATINGS: dict[str, int] = {"up": 1, "down": -1}


def ab_headers(assigned: Assigned | None) -> dict[str, str]:
    """Nothing for a request that is in no test."""
    return {} if assigned is None else {TEST_HEADER: assigned.test, VARIANT_HEADER: assigned.variant}


def ab_metadata(assigned: Assigned | None) -> dict[str, str]:
    """Nothing for a request that is in no test."""
    return {} if assigned is None else {"ab_test_id": assigned.test, "ab_variant_name": assigned.variant}


def assigned_of(test: str, variant: str) -> Assigned | None:
    """Of a job's row, which has empty texts where it is in no test."""
    return Assigned(test, variant) if test else None


def rating_text(rating: int) -> str | None:
    return next((text for text, value in RATINGS.items() if value == rating), None)
