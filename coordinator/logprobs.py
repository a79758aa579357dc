"""Log probabilities as Islands send them: a JSON array of OpenAI's ``content`` entries. Islands are strangers, so each field is checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from protocol import limits
from protocol.errors import RemoteProtocolError


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token: its text, its raw bytes, its logprob, and the likeliest ones in its place."""

    token: str
    logprob: float
    raw: tuple[int, ...]
    top: tuple[TokenLogprob, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """OpenAI's entry, without ``top_logprobs``."""
        return {"token": self.token, "logprob": self.logprob, "bytes": list(self.raw)}


def read_logprobs(data: bytes) -> tuple[TokenLogprob, ...]:
    """Raises RemoteProtocolError for anything that is not such an array."""
    if not data:
        return ()
    try:
        entries = json.loads(data)
        if type(entries) is not list:
            raise ValueError("not an array")
        return tuple(_entry(entry, True) for entry in entries)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RemoteProtocolError("malformed logprobs") from error


def _entry(value: Any, with_top: bool) -> TokenLogprob:
    token, logprob, raw = value["token"], value["logprob"], value.get("bytes")
    if type(token) is not str or type(logprob) not in (int, float) or not math.isfinite(logprob):
        raise ValueError("a token is text, a logprob a finite number")
    token.encode()
    raw = list(token.encode()) if raw is None else raw
    if type(raw) is not list or not all(type(byte) is int and 0 <= byte <= 255 for byte in raw):
        raise ValueError("bytes are numbers up to 255")
    top = value.get("top_logprobs") if with_top else None
    if top is not None and (type(top) is not list or len(top) > limits.TOP_LOGPROBS_MAX + 1):
        raise ValueError("top_logprobs is an array, and not a long one")
    return TokenLogprob(token, float(logprob), tuple(raw), tuple(_entry(entry, False) for entry in top or ()))
