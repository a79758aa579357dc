"""A Coordinator's files and batches, as the commands ask it over HTTP. No redirect is followed: an API key is for one Coordinator."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import httpx

from protocol.errors import ConfigError

TIMEOUT_S = 60.0
_FILES, _BATCHES = "/v1/files", "/v1/batches"
_ADVICE = {
    401: "; name a key with --api-key, or in ARCHIPELAG_API_KEY",
    403: "; the key needs the scope write: archipelag-node keys create",
    404: "; see archipelag-node batch list",
}


class Unreachable(ConfigError):
    """Nobody answers at the moment."""


class BatchClient:
    """Every method raises ConfigError that says what to do; Unreachable where trying again may help."""

    def __init__(self, url: str, api_key: str, ca_file: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--coordinator takes the Coordinator's URL here, such as http://127.0.0.1:8080, not {url[:100]!r}")
        try:
            verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else False
        except OSError as error:
            raise ConfigError(f"--ca-file {ca_file} cannot be read: {error.strerror}") from error
        headers = {"Authorization": f"Bearer {api_key}"}
        self._url = url.rstrip("/")
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=TIMEOUT_S, verify=verify)

    def __repr__(self) -> str:
        return f"<BatchClient {self._url}>"

    def close(self) -> None:
        self._http.close()

    def send(self, name: str, file: IO[bytes]) -> dict[str, Any]:
        """The file, sent as it is read."""
        return self._json("POST", _FILES, data={"purpose": "batch"}, files={"file": (name, file, "application/jsonl")})

    def begin(self, body: Mapping[str, Any], key: str) -> dict[str, Any]:
        return self._json("POST", _BATCHES, json=body, headers={"Idempotency-Key": key})

    def show(self, batch_id: str) -> dict[str, Any]:
        return self._json("GET", f"{_BATCHES}/{quote(batch_id, safe='')}")

    def list(self, limit: int) -> list[dict[str, Any]]:
        return list(self._json("GET", f"{_BATCHES}?limit={limit}")["data"])

    def cancel(self, batch_id: str) -> dict[str, Any]:
        return self._json("POST", f"{_BATCHES}/{quote(batch_id, safe='')}/cancel")

    def fetch(self, file_id: str, write: Callable[[bytes], object]) -> None:
        """Hands a file's bytes over as they come."""
        try:
            with self._http.stream("GET", f"{_FILES}/{quote(file_id, safe='')}/content") as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise self._refused(answer)
                for data in answer.iter_bytes():
                    write(data)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def save(self, file_id: str, to: Path) -> None:
        """As a file, which is there whole or not at all."""
        part = to.with_name(f"{to.name}.part")
        try:
            with open(part, "wb") as file:
                self.fetch(file_id, file.write)
            os.replace(part, to)
        except OSError as error:
            raise ConfigError(f"cannot write {to}: {error.strerror}; name another file with --output") from error
        finally:
            part.unlink(missing_ok=True)

    def _json(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if answer.status_code not in (200, 201):
            raise self._refused(answer)
        try:
            value = answer.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ConfigError(f"{self._url} does not answer like a Coordinator; check the address")
        return value

    def _unreachable(self, error: httpx.HTTPError) -> Unreachable:
        return Unreachable(f"{self._url} cannot be reached ({error or type(error).__name__}); is the Coordinator running?")

    def _refused(self, answer: httpx.Response) -> ConfigError:
        """What the API says, in its own words where it has any."""
        try:
            said = answer.json()["error"]
            text = f"{said['message']} ({said['code']})"
        except (ValueError, KeyError, TypeError):
            text = f"status {answer.status_code}"
        kind = Unreachable if answer.status_code in (429, 502, 503, 504) else ConfigError
        return kind(f"{self._url} refuses: {text}{_ADVICE.get(answer.status_code, '')}")
