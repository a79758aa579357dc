"""What the cache has to know of a request: under which key its answer stands, and whether it may be read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protocol.cargo_jobs import CargoInput
from protocol.generation import GenerationRequest


@dataclass(frozen=True, slots=True)
class CacheAsk:
    """``key``: 32 bytes, of everything that can change the answer, but for who asks; ``context``: 32 bytes, of the same without the last
    question, which is ``question``; empty where only an equal request will do. ``account``: whose answers may be used where the Cargo's
    are not public, and always where ``is_private``. ``reads``, ``writes``: whether the client allows an answer that is kept, and that this
    one is kept."""

    cargo: str
    account: str
    key: bytes
    context: bytes = b""
    question: str = ""
    reads: bool = True
    writes: bool = True
    is_private: bool = False


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What a client says about the cache (RFC 9111, ``Cache-Control``): ``reads`` is off for ``no-cache``, both are for ``no-store``;
    ``is_private``: only its own account's answers, and its answer only for its own account."""

    reads: bool = True
    writes: bool = True
    is_private: bool = False


def ask_of(
    cargo: str, asked: GenerationRequest | CargoInput, given: Mapping[str, Any], account: str, policy_text: str, use: CacheUse
) -> CacheAsk | None:
    """How the cache is to be asked for a job's answer; None where it is not deterministic enough to be kept. ``given``: the input as the
    client wrote it, which says what it left open; ``policy_text``: where the answer may be computed, canonical."""
    return None
