"""What the cache has to know of a request: under which key its answer stands, and whether it may be read and written."""

from __future__ import annotations

from dataclasses import dataclass


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
