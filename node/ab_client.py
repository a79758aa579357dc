"""A Coordinator's A/B tests, as the commands ask it over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import quote, urlencode

from node.http_client import HttpClient

_TESTS, _JOBS = "/api/v1/ab-tests", "/api/v1/jobs"


class AbClient(HttpClient):
    """Every method raises ConfigError that says what to do; Unreachable where asking again may help."""

    advice: ClassVar[Mapping[int, str]] = {
        401: "; name a key with --api-key, or in ARCHIPELAG_API_KEY",
        403: "; the key needs the scope write: archipelag-node keys create",
    }

    def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("POST", _TESTS, body)

    def tests(self, limit: int) -> list[dict[str, Any]]:
        """The newest first."""
        return self._rows(self._json("GET", f"{_TESTS}?{urlencode({'limit': limit})}"))

    def show(self, test_id: str) -> dict[str, Any]:
        return self._json("GET", _one(test_id))

    def events(self, test_id: str) -> list[dict[str, Any]]:
        """Its audit log, the oldest first."""
        return self._rows(self._json("GET", f"{_one(test_id)}/events"))

    def results(self, test_id: str) -> dict[str, Any]:
        """As they are now; they may be asked for as often as one likes."""
        found = self._json("GET", f"{_one(test_id)}/results")
        if not isinstance(found.get("test"), dict) or not isinstance(found.get("variants"), list):
            raise self.odd_answer()
        return found

    def activate(self, test_id: str) -> dict[str, Any]:
        return self._json("POST", f"{_one(test_id)}/activate", {})

    def pause(self, test_id: str) -> dict[str, Any]:
        return self._json("POST", f"{_one(test_id)}/pause", {})

    def promote(self, test_id: str, variant: str | None, force: bool) -> dict[str, Any]:
        """``variant`` None: whichever has won."""
        body = ({"variant": variant} if variant is not None else {}) | ({"force": True} if force else {})
        return self._json("POST", f"{_one(test_id)}/promote", body)

    def rollback(self, test_id: str) -> dict[str, Any]:
        return self._json("POST", f"{_one(test_id)}/rollback", {})

    def rate(self, job_id: str, rating: str | None) -> dict[str, Any]:
        """``rating``: "up", "down", or None to take it back."""
        return self._json("POST", f"{_JOBS}/{quote(job_id, safe='')}/feedback", {"rating": rating})

    def _rows(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        rows = answer.get("data")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self.odd_answer()
        return rows


def _one(test_id: str) -> str:
    return f"{_TESTS}/{quote(test_id, safe='')}"
