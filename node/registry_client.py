"""A Coordinator's registry of Cargos, as the commands ask it over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import quote, urlencode

from node.http_client import HttpClient

PAGE = 200
_PATH = "/api/v1/cargos"
_SIGNED = {"Content-Type": "application/octet-stream"}


class RegistryClient(HttpClient):
    """Every method raises ConfigError that says what to do."""

    timeout_s = 30.0
    names_param = False  # it is always the Cargo
    advice: ClassVar[Mapping[int, str]] = {
        401: "; name a key with --api-key",
        403: "; the key needs the scope write: archipelag-node keys create",
    }

    def publish(self, envelope: bytes, is_candidate: bool = False) -> dict[str, Any]:
        """What the registry says of the Cargo now. ``is_candidate``: its name goes on to stand for what it stands for."""
        return self._answer("POST", f"{_PATH}?candidate=true" if is_candidate else _PATH, envelope, _SIGNED)

    def revoke(self, envelope: bytes) -> dict[str, Any]:
        return self._answer("POST", f"{_PATH}/revoke", envelope, _SIGNED)

    def show(self, reference: str) -> dict[str, Any]:
        """By name, ``NAME@RELEASE`` or address."""
        return self._json("GET", f"{_PATH}/{quote(reference, safe='@')}")

    def list(self, runtime: str = "", name: str = "") -> list[dict[str, Any]]:
        """All that is listed, page after page."""
        found: list[dict[str, Any]] = []
        while True:
            query = urlencode({"runtime": runtime, "name": name, "limit": PAGE, "offset": len(found)})
            page = self._json("GET", f"{_PATH}?{query}").get("data")
            if not isinstance(page, list):
                raise self.odd_answer()
            found += page
            if len(page) < PAGE:
                return found
