"""What the cache has to know of a request: under which key its answer stands, and whether it may be read and written. Pure.

The key is the SHA-256 of the Cargo's name, of where it may be computed and of the whole request as it would be sent to an Island, so that a
new parameter is part of it without anybody's doing. Two things are not in it: a seed that we drew, and how the last question is spaced and
cased (normal.py). The context is the same without the question: only within one context do two questions have the same answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.cache.normal import is_exact, normalise
from protocol.cargo_jobs import CargoInput
from protocol.cargos import canonical_json
from protocol.generation import GENERATION, ChatMessage, GenerationRequest, Role

# OpenAI's default, as mission.md has it: who asks for more wants another answer each time
SAMPLED_TEMPERATURE_MAX = 0.7
# of a question that another one may stand in for: the guards read some 100 characters in 0.5 ms, and MiniLM no more than 256 word pieces
QUESTION_CHARS_MAX = 400
# longer ones count as they are written: reading them takes milliseconds, and nobody types them a second time with another spacing
NORMALISED_CHARS_MAX = 2_000
_TEXT_LABEL = b"archipelag/cache-text/1\0"
_VERSION_LABEL = b"archipelag/cache-version/1\0"
_UNIT_LABEL = b"archipelag/cache-unit/1\0"
_LINES_LABEL = b"archipelag/cache-lines/1\0"


@dataclass(frozen=True, slots=True)
class CacheAsk:
    """``key``: 32 bytes, of everything that can change the answer, but for who asks; ``context``: 32 bytes, of the same without the last
    question, which is ``question``; empty where only an equal request will do. ``account``: whose answers may be used where the Cargo's
    are not public, and always where ``is_private``. ``reads``, ``writes``: whether the client allows an answer that is kept, and that this
    one is kept. ``by_default``: whether the answer is kept where nobody has said anything of the Cargo's. ``content_hash``: only answers of
    this version count; empty for those that the Cargo's name stands for."""

    cargo: str
    account: str
    key: bytes
    context: bytes = b""
    question: str = ""
    reads: bool = True
    writes: bool = True
    is_private: bool = False
    by_default: bool = True
    content_hash: str = ""

    def pinned(self, cargo: str, content_hash: str, unit: str = "") -> CacheAsk:
        """The same question to one version of a Cargo: its answers stand under keys of their own.

        ``unit``: of an A/B test, with the test's name before it; its answers are its own too. Or the larger arm would have more of what is
        asked often in the cache, and other questions among its jobs than the smaller one.
        """
        prefix = _VERSION_LABEL + f"{cargo}\0{content_hash}\0".encode()
        if unit:
            prefix = _UNIT_LABEL + f"{unit}\0".encode() + prefix
        context = hashlib.sha256(prefix + self.context).digest() if self.context else b""
        key = hashlib.sha256(prefix + self.key).digest()
        return replace(self, cargo=cargo, content_hash=content_hash, key=key, context=context)


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What a client says about the cache (RFC 9111, ``Cache-Control``): ``reads`` is off for ``no-cache``, both are for ``no-store``;
    ``is_private``: only its own account's answers, and its answer only for its own account. ``is_exact``: only answers to the same question
    (ours: ``x-archipelag-cache: exact``, and always for batches and workflows, whose inputs are data)."""

    reads: bool = True
    writes: bool = True
    is_private: bool = False
    is_exact: bool = False


def cache_use(headers: Sequence[str], wanted: str = "") -> CacheUse:
    """Of all ``Cache-Control`` headers of a request, and its ``x-archipelag-cache``. Unknown directives change nothing (RFC 9111)."""
    said = {part.partition("=")[0].strip().lower() for header in headers for part in header.split(",")}
    stores = "no-store" not in said
    return CacheUse(stores and "no-cache" not in said, stores, "private" in said, wanted.strip().lower() == "exact")


def ask_of(
    cargo: str,
    asked: GenerationRequest | CargoInput,
    given: Mapping[str, Any],
    account: str,
    policy_text: str,
    use: CacheUse,
    lines_by_default: bool = False,
) -> CacheAsk | None:
    """How the cache is to be asked for a job's answer; None where it is not deterministic enough to be kept. ``given``: the input as the
    client wrote it, which says what it left open; ``policy_text``: where the answer may be computed, canonical. ``lines_by_default``:
    whether lines are kept of a Cargo of which nobody has said whether they may be."""
    where = (cargo, policy_text)
    if isinstance(asked, CargoInput):
        key = _digest(_LINES_LABEL, where, canonical_json(json.loads(asked.data)).encode())
        return CacheAsk(cargo, account, key, b"", "", use.reads, use.writes, use.is_private, lines_by_default)
    if asked.tools or not _is_steady(asked, given):
        return None
    question = question_of(asked)
    seed = asked.sampling.seed if given.get("seed") is not None else 0
    has_seed = b"\1" if given.get("seed") is not None else b"\0"
    rest = with_question(replace(asked, sampling=replace(asked.sampling, seed=seed)), "")
    context = _digest(_TEXT_LABEL, where, has_seed + GENERATION.encode(rest))
    written = normalise(question) if len(question) <= NORMALISED_CHARS_MAX else question
    key = hashlib.sha256(context + written.encode()).digest()
    has_wordings = 0 < len(question) <= QUESTION_CHARS_MAX and not use.is_exact and not is_exact(question)
    return CacheAsk(cargo, account, key, context if has_wordings else b"", question, use.reads, use.writes, use.is_private)


def _is_steady(asked: GenerationRequest, given: Mapping[str, Any]) -> bool:
    return given.get("seed") is not None or asked.sampling.temperature <= SAMPLED_TEMPERATURE_MAX


def question_of(asked: GenerationRequest) -> str:
    """The last question of a chat; empty where it does not end with one. A prompt is none: the model goes on from its last sign."""
    return asked.messages[-1].content if asked.messages and asked.messages[-1].role is Role.USER else ""


def with_question(asked: GenerationRequest, question: str) -> GenerationRequest:
    """The same request with another question, where it has one. Raises ValueError for one that is too long."""
    if not asked.messages:
        return asked
    last: ChatMessage = asked.messages[-1]
    if last.role is not Role.USER:
        return asked
    return replace(asked, messages=(*asked.messages[:-1], replace(last, content=question)))


def _digest(label: bytes, where: tuple[str, ...], request: bytes) -> bytes:
    """Of parts that cannot run into one another."""
    return hashlib.sha256(label + json.dumps(where).encode() + b"\0" + request).digest()
