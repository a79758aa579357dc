"""What commands ask a Coordinator over HTTP with. No redirect is followed: an API key is for one Coordinator."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead
from typing import IO, Any, ClassVar
from urllib.parse import urlsplit

from protocol import checks
from protocol.errors import ConfigError

_MESSAGE_CHARS_MAX = 4000  # of what a Coordinator says
_PASSING = frozenset({429, 502, 503, 504})  # statuses of what may be over soon


class Unreachable(ConfigError):
    """Nobody answers at the moment; asking again may help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, request: urllib.request.Request, file: IO[bytes], code: int, message: str, headers: HTTPMessage, url: str
    ) -> None:
        """Raises HTTPError in whoever opened the request."""


class HttpClient:
    """Every method raises ConfigError that says what to do, Unreachable where asking again may help.

    ``advice``: what to do about a status, behind what the Coordinator says; ``names_param``: an error says which part of the request it is
    about.
    """

    timeout_s: ClassVar[float] = 60.0
    answer_bytes_max: ClassVar[int] = 16 * 1024 * 1024
    advice: ClassVar[Mapping[int, str]] = {}
    names_param: ClassVar[bool] = True

    def __init__(self, url: str, api_key: str = "", ca_file: str | None = None) -> None:
        self._url, self._api_key = url.rstrip("/"), api_key
        self._opener = _opener(url, ca_file)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._url}>"

    def _json(self, method: str, path: str, body: object = None, more: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The object that answers ``body``, which goes as JSON; None: nothing goes. ``more``: headers."""
        if body is None:
            return self._answer(method, path, None, more)
        return self._answer(method, path, json.dumps(body).encode(), {"Content-Type": "application/json", **(more or {})})

    def _answer(self, method: str, path: str, data: bytes | None = None, more: Mapping[str, str] | None = None) -> dict[str, Any]:
        try:
            with self._open(method, path, data, more) as answer:
                return object_of(_whole(answer, self.answer_bytes_max))
        except (OSError, HTTPException) as error:
            raise Unreachable(f"{self._url} broke the connection off ({error}); ask again") from None
        except ValueError:
            raise self.odd_answer() from None

    def _open(self, method: str, path: str, data: bytes | None = None, more: Mapping[str, str] | None = None) -> Any:
        """The answer, to be read and closed."""
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        request = urllib.request.Request(self._url + path, data=data, headers={**headers, **(more or {})}, method=method)
        try:
            return self._opener.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(f"{self._url} cannot be reached ({reason}); is the Coordinator running?") from None

    def odd_answer(self) -> ConfigError:
        """For what no Coordinator answers."""
        return ConfigError(f"{self._url} does not answer like a Coordinator; check the address")

    def _refusal(self, error: urllib.error.HTTPError) -> ConfigError:
        """What the API says, in its own words where it has any, and what to do."""
        try:
            said = object_of(error.read(self.answer_bytes_max))["error"]
            message, code, param = str(said["message"]), str(said["code"]), said.get("param")
            where = f", {param}" if self.names_param and param and str(param) not in message else ""
            text = checks.made_printable(f"{message} ({code}{where})", _MESSAGE_CHARS_MAX)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, HTTPException):
            text = f"status {error.code}"
        kind = Unreachable if error.code in _PASSING else ConfigError
        return kind(f"{self._url} refuses: {text}{self.advice.get(error.code, '')}")


def _whole(answer: HTTPResponse, bytes_max: int) -> bytes:
    """Raises HTTPException for an answer that ends before its end, of which ``read`` with a limit says nothing."""
    data = answer.read(bytes_max)
    if len(data) < bytes_max and answer.length:
        raise IncompleteRead(data, answer.length)
    return data


def object_of(data: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no JSON object."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _opener(url: str, ca_file: str | None) -> urllib.request.OpenerDirector:
    """What asks a Coordinator at this address. Raises ConfigError."""
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
