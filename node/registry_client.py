"""A Coordinator's registry of Cargos, as the commands ask it over HTTP. No redirect is followed: an API key is for one Coordinator."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.parse import quote, urlencode, urlsplit

from protocol.errors import ConfigError

TIMEOUT_S = 30.0
PAGE = 200
_ANSWER_BYTES_MAX = 16 * 1024 * 1024
_PATH = "/api/v1/cargos"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, request: urllib.request.Request, file: IO[bytes], code: int, message: str, headers: HTTPMessage, url: str
    ) -> None:
        """Raises HTTPError in whoever opened the request."""


def opener_of(url: str, ca_file: str | None) -> urllib.request.OpenerDirector:
    """What asks a Coordinator at this address, and follows no redirect. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--coordinator takes the Coordinator's URL here, such as http://127.0.0.1:8080, not {url[:100]!r}")
    try:
        context = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
    except OSError as error:
        raise ConfigError(f"--ca-file {ca_file} cannot be read: {error.strerror}") from error
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if context is not None:
        handlers.append(urllib.request.HTTPSHandler(context=context))
    return urllib.request.build_opener(*handlers)


class RegistryClient:
    """Every method raises ConfigError that says what to do."""

    def __init__(self, url: str, api_key: str = "", ca_file: str | None = None) -> None:
        self._url, self._api_key = url.rstrip("/"), api_key
        self._opener = opener_of(url, ca_file)

    def __repr__(self) -> str:
        return f"<RegistryClient {self._url}>"

    def publish(self, envelope: bytes) -> dict[str, Any]:
        """What the registry says of the Cargo now."""
        return self._json("POST", _PATH, envelope)

    def revoke(self, envelope: bytes) -> dict[str, Any]:
        return self._json("POST", f"{_PATH}/revoke", envelope)

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
                raise ConfigError(f"{self._url} does not answer like a Coordinator; check the address")
            found += page
            if len(page) < PAGE:
                return found

    def _json(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self._url + path, data=body, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                return object_of(answer.read(_ANSWER_BYTES_MAX))
        except urllib.error.HTTPError as error:
            raise ConfigError(f"{self._url} refuses: {_message(error)}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ConfigError(f"{self._url} cannot be reached ({reason}); is the Coordinator running?") from None
        except ValueError:
            raise ConfigError(f"{self._url} does not answer like a Coordinator; check the address") from None


def object_of(data: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no JSON object."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _message(error: urllib.error.HTTPError) -> str:
    """What the API says, in its own words where it has any."""
    try:
        said = object_of(error.read(_ANSWER_BYTES_MAX))["error"]
        text = f"{said['message']} ({said['code']})"
    except (ValueError, KeyError, TypeError, OSError):
        text = f"status {error.code}"
    advice = {401: "; name a key with --api-key", 403: "; the key needs the scope write: archipelag-node keys create"}
    return text + advice.get(error.code, "")
