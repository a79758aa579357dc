"""A Coordinator's workflows, as the commands ask it over HTTP. No redirect is followed: an API key is for one Coordinator."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlencode

from node.registry_client import object_of, opener_of
from protocol.errors import ConfigError

TIMEOUT_S = 60.0
_ANSWER_BYTES_MAX = 64 * 1024 * 1024
_RUNS, _SAVED = "/api/v1/workflows", "/api/v1/workflow-definitions"
_ADVICE = {
    401: "; name a key with --api-key, or in ARCHIPELAG_API_KEY",
    402: "; raise --max-price or --bid-price, or see archipelag-node accounts show",
    403: "; the key needs the scope write: archipelag-node keys create",
}


class StreamLost(Exception):
    """A stream broke off before its end; it may be opened again."""


class WorkflowClient:
    """Every method raises ConfigError that says what to do."""

    def __init__(self, url: str, api_key: str, ca_file: str | None = None) -> None:
        self._url, self._api_key = url.rstrip("/"), api_key
        self._opener = opener_of(url, ca_file)

    def __repr__(self) -> str:
        return f"<WorkflowClient {self._url}>"

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

    def _open(self, method: str, path: str, body: object = None, more: Mapping[str, str] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self._api_key}", **(more or {})}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)
        try:
            return self._opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise ConfigError(f"{self._url} refuses: {_message(error)}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ConfigError(f"{self._url} cannot be reached ({reason}); is the Coordinator running?") from None

    def _json(self, method: str, path: str, body: object = None, more: Mapping[str, str] | None = None) -> dict[str, Any]:
        try:
            with self._open(method, path, body, more) as answer:
                return object_of(answer.read(_ANSWER_BYTES_MAX))
        except (OSError, HTTPException) as error:
            raise ConfigError(f"{self._url} broke the connection off ({error}); ask again") from None
        except ValueError:
            raise ConfigError(f"{self._url} does not answer like a Coordinator; check the address") from None


def _message(error: urllib.error.HTTPError) -> str:
    """What the API says, in its own words where it has any."""
    try:
        said = object_of(error.read(_ANSWER_BYTES_MAX))["error"]
        where = f" at {said['param']}" if said.get("param") and said["param"] not in said["message"] else ""
        text = f"{said['message']}{where} ({said['code']})"
    except (ValueError, KeyError, TypeError, OSError):
        text = f"status {error.code}"
    return text + _ADVICE.get(error.code, "")
