"""A Coordinator's workflows, as the commands ask it over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import Any, ClassVar
from urllib.parse import quote, urlencode

from node.http_client import HttpClient, object_of

_RUNS, _SAVED = "/api/v1/workflows", "/api/v1/workflow-definitions"


class StreamLost(Exception):
    """A stream broke off before its end; it may be opened again."""


class WorkflowClient(HttpClient):
    """Every method raises ConfigError that says what to do."""

    answer_bytes_max = 64 * 1024 * 1024
    advice: ClassVar[Mapping[int, str]] = {
        401: "; name a key with --api-key, or in ARCHIPELAG_API_KEY",
        402: "; raise --max-price or --bid-price, or see archipelag-node accounts show",
        403: "; the key needs the scope write: archipelag-node keys create",
    }

    def start(self, body: Mapping[str, Any], idempotency_key: str) -> dict[str, Any]:
        return self._json("POST", _RUNS, body, {"Idempotency-Key": idempotency_key})

    def quote(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("POST", f"{_RUNS}/quote", body)

    def show(self, run_id: str) -> dict[str, Any]:
        return self._json("GET", f"{_RUNS}/{quote(run_id, safe='')}")

    def timeline(self, run_id: str) -> dict[str, Any]:
        return self._json("GET", f"{_RUNS}/{quote(run_id, safe='')}/timeline")

    def list(self, limit: int) -> dict[str, Any]:
        return self._json("GET", f"{_RUNS}?{urlencode({'limit': limit})}")

    def cancel(self, run_id: str) -> dict[str, Any]:
        return self._json("DELETE", f"{_RUNS}/{quote(run_id, safe='')}")

    def rerun(self, run_id: str, step: str, idempotency_key: str) -> dict[str, Any]:
        return self._json("POST", f"{_RUNS}/{quote(run_id, safe='')}/rerun", {"from": step}, {"Idempotency-Key": idempotency_key})

    def save(self, name: str, definition: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("PUT", f"{_SAVED}/{quote(name, safe='')}", {"definition": definition})

    def publish(self, name: str, version: int, envelope: bytes) -> dict[str, Any]:
        body = {"version": version, "envelope": envelope.hex()}
        return self._json("POST", f"{_SAVED}/{quote(name, safe='')}/publish", body)

    def events(self, run_id: str) -> Iterator[dict[str, Any]]:
        """What its stream says, to its end. Raises StreamLost."""
        with self._open("GET", f"{_RUNS}/{quote(run_id, safe='')}/stream") as answer:
            ended = False
            try:
                for line in answer:
                    if line.startswith(b"data: "):
                        event = object_of(line[len(b"data: ") :])
                        ended = event.get("type") == "complete"
                        yield event
            except (OSError, HTTPException, ValueError) as error:
                raise StreamLost from error
            if not ended:
                raise StreamLost
