"""A fake Island's Cargo that gives lines: what of them comes before it fails, hangs or ends."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from protocol.cargo_io import TokenLine, decode_line
from protocol.cargo_jobs import CargoInput, counted_tokens
from protocol.errors import Code, Refused
from protocol.generation import FinishReason
from protocol.messages import JobAccepted, JobDone, JobLines

ENGINE = "lines-engine/1"
DONE = b'{"type":"done","answer":42}\n'


@dataclass
class LineScript:
    """``lines``: as they go out, each with its line break. ``fail_after``: lines sent before ``failure`` is raised, ``fails`` times.
    ``hang_after``: lines sent before it waits for ``until``. ``miscount``: added to what an Island counts."""

    lines: tuple[bytes, ...] = (DONE,)
    fail_after: int | None = None
    failure: Code = Code.LINK_LOST
    fails: int = 1
    hang_after: int | None = None
    until: trio.Event = field(default_factory=trio.Event)
    miscount: int = 0
    taken: int = 0  # lines that were read


@dataclass
class FakeLines:
    """The jobs of one Island; its scripts are used one after the other, the last one for all further jobs."""

    scripts: list[LineScript]
    requests: list[CargoInput] = field(default_factory=list)

    def next(self, request: CargoInput) -> LineScript:
        self.requests.append(request)
        return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]


class LinesRun:
    """Implements coordinator.ports.JobRun. ``receipt(tokens, output_hash)`` signs."""

    def __init__(self, script: LineScript, receipt: Callable[[int, bytes], bytes]) -> None:
        self._script, self._receipt = script, receipt

    def mend(self, ticket: bytes) -> None:
        raise AssertionError("jobs of lines have no route")

    async def __aiter__(self) -> AsyncIterator[Any]:
        script = self._script
        yield JobAccepted(1, ENGINE, 0, 0)
        sent = tokens = 0
        digest = hashlib.sha256()
        for at, line in enumerate(script.lines):
            if at == script.fail_after and script.fails:
                script.fails -= 1
                raise Refused(script.failure, "as the script says")
            if at == script.hang_after:
                await script.until.wait()
            count = int(isinstance(decode_line(line.rstrip(b"\n")), TokenLine)) if line.startswith(b"{") else 0
            yield JobLines(1, sent, count + script.miscount, line)
            script.taken += 1
            sent, tokens = sent + len(line), tokens + count
            digest.update(line)
            await trio.lowlevel.checkpoint()
        tokens = counted_tokens(tokens)
        yield JobDone(1, FinishReason.STOP, "", 0, 0, tokens, 0, 1000, self._receipt(tokens, digest.digest()))
