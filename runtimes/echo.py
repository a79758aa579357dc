"""The built-in Cargo ``echo``: answers with the last user message or the prompt, one token a word, without a model.

It measures what everything around a model costs, and carries tests that need an answer but no weights. A token's id is its index in
the answer, so a resumed answer goes on where the first Island stopped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from protocol.errors import Code, Refused
from protocol.generation import FinishReason, GenerationRequest, OutputFormat, Role, pack_tokens, unpack_tokens
from runtimes.base import CargoFacts, Chunk, Finished, RunRequest

ENGINE = "echo/1"
_WORD = re.compile(r"\S+\s*|\s+")
_SLOTS = 4096
_CONTEXT_TOKENS = 2**22
_CHUNKS_MAX = 64  # long texts come a few words at a time: nobody reads 4,096 words one by one


class EchoRun:
    """One echo: a chunk a word while there are few, with a pause of ``delay_s`` before each (0 outside of tests)."""

    def __init__(self, generation: GenerationRequest, delay_s: float) -> None:
        self._words, self.prompt_tokens = _answer(generation)
        self.cached_tokens = 0
        self._limit = min(len(self._words), generation.max_tokens)
        self._start = _resumed(generation, self._limit)
        self._delay_s = delay_s

    async def __aiter__(self) -> AsyncIterator[Chunk | Finished]:
        width = 1 if self._delay_s else max(1, (self._limit - self._start) // _CHUNKS_MAX)
        for first in range(self._start, self._limit, width):
            end = min(first + width, self._limit)
            if self._delay_s:
                await trio.sleep(self._delay_s)
            yield Chunk(pack_tokens(list(range(first, end))), "".join(self._words[first:end]))
        reason = FinishReason.LENGTH if self._limit < len(self._words) else FinishReason.STOP
        yield Finished(reason, self.prompt_tokens, self._limit, 0)


def _answer(generation: GenerationRequest) -> tuple[list[str], int]:
    """The words of the answer, and the count of words of the whole prompt."""
    users = [m.content for m in generation.messages if m.role is Role.USER]
    text = users[-1] if users else generation.prompt
    prompt_tokens = sum(len(_WORD.findall(m.content)) for m in generation.messages) or len(
        _WORD.findall(generation.prompt)
    )
    return _WORD.findall(text), prompt_tokens


def _resumed(generation: GenerationRequest, limit: int) -> int:
    resumed = unpack_tokens(generation.resume)
    if len(resumed) > limit or resumed != list(range(len(resumed))):
        raise Refused(Code.BAD_INPUT, "the resumed tokens are not the beginning of this answer")
    return len(resumed)


class EchoCargo:
    """Implements runtimes.base.LoadedCargo."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s
        self._running = 0
        self.runs_total = 0

    def facts(self) -> CargoFacts:
        return CargoFacts(
            name="echo",
            content_hash=hashlib.sha256(ENGINE.encode()).hexdigest(),
            runtime="echo",
            engine=ENGINE,
            context_tokens=_CONTEXT_TOKENS,
            kv_tokens_total=0,
            kv_tokens_free=0,
            slots_total=_SLOTS,
            slots_free=_SLOTS - self._running,
            weights_bytes=0,
            kv_bytes_per_token=0,
            compute_bytes=0,
            tokens_per_s=0.0,
        )

    @asynccontextmanager
    async def run(self, request: RunRequest) -> AsyncIterator[EchoRun]:
        if self._running >= _SLOTS:
            raise Refused(Code.NO_CAPACITY, f"all {_SLOTS} places of the echo Cargo are taken")
        if request.generation.output_format is not OutputFormat.TEXT:
            raise Refused(Code.BAD_INPUT, "the echo Cargo answers with plain text only, not with JSON")
        if request.generation.tools:
            raise Refused(Code.NO_TOOLS, "the echo Cargo has no tools")
        self._running += 1
        self.runs_total += 1
        try:
            yield EchoRun(request.generation, self._delay_s)
        finally:
            self._running -= 1

    async def wait_changed(self) -> None:
        await trio.sleep_forever()  # rooms of a Cargo that costs nothing are not worth an ad

    @property
    def alive(self) -> bool:
        return True

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
