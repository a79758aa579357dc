"""What an Island is owed for jobs that Consumers had done here directly, until a Coordinator has settled it.

Each claim is a file of its own in the data folder, ``HASH.claim``, named by its ticket's hash, written beside and renamed: neither a kill
nor a Coordinator that is away loses one. A claim comes twice: open when the job has ended, final once the holder's last count is there or
will not come any more. Only final ones are handed in; at a start, all that lie there are.

Files are not flushed to the disk: a claim is worth a fraction of a credit, a flush costs as much time as the job's books. What a power cut
takes is said by the Consumer's own report in most cases, and so is what is handed in: for HAND_IN_AFTER_S a claim waits for that report to
come first, and then all that have waited go together.

Rules. At most CLAIMS_KEPT_MAX are kept; past that the oldest goes. One that is CLAIM_LIFETIME_S old is dropped: nobody pays it any more.
A Coordinator that cannot say now is asked again, at growing intervals. Files are written in a thread, the newest version only.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from node.datadir import write_atomically
from node.greeting import exchange_hello
from node.net.frames import FrameStream
from node.net.host import Host
from protocol import limits
from protocol.direct import CLAIM, SETTLE, SETTLE_PROTOCOL, Claim, ClaimAnswer, Verdict
from protocol.errors import ArchipelagError, RemoteProtocolError
from protocol.messages import Hello
from protocol.receipts import peek_receipt
from protocol.tickets import ticket_hash

log = logging.getLogger(__name__)

CLAIMS_FOLDER = "claims"
ANSWER_TIMEOUT_S = 30.0
HAND_IN_AFTER_S = 1.0
_SUFFIX = ".claim"
_RETRY_MIN_S = 0.2
_RETRY_MAX_S = 30.0
_AWAY_S = 1.0  # how often to look whether a Coordinator is back


class ClaimDesk(Protocol):
    """Where claims are handed in."""

    async def claim(self, claim: Claim) -> ClaimAnswer:
        """Raises ArchipelagError, OSError or TooSlowError when nobody answers."""
        ...


@dataclass(slots=True)
class _Kept:
    claim: Claim
    final: bool
    expires_at_ms: int


@dataclass(slots=True)
class ClaimCounts:
    """Since the node started."""

    made: int = 0
    settled: int = 0
    paid_micros: int = 0
    refused: int = 0
    expired: int = 0
    dropped: int = 0


class Claims:
    """Keeps claims. While ``run`` runs ``put_nowait`` never blocks; when it has ended, as jobs end with their node, it writes at once."""

    def __init__(
        self, folder: Path, clock_ms: Callable[[], int], rng: random.Random, hand_in_after_s: float = HAND_IN_AFTER_S
    ) -> None:
        """Reads what lies in ``folder``. Raises OSError."""
        self._folder, self._clock_ms, self._rng, self._hand_in_after_s = folder, clock_ms, rng, hand_in_after_s
        self._kept: dict[bytes, _Kept] = {}
        self._dirty: dict[bytes, None] = {}
        self._changed, self._news = trio.Event(), trio.Event()
        self._running = False
        self.counts = ClaimCounts()
        self._load()

    def __repr__(self) -> str:
        return f"<Claims {len(self._kept)} waiting, {self.counts.settled} settled>"

    def __len__(self) -> int:
        return len(self._kept)

    def put_nowait(self, claim: Claim, final: bool) -> None:
        """Keeps a claim, or a newer version of one."""
        key = ticket_hash(claim.ticket)
        if key not in self._kept:
            self.counts.made += 1
        self._keep(key, claim, final)
        self._dirty[key] = None
        if self._running:
            self._tell()
        else:
            self._write(self._take_dirty())

    def _keep(self, key: bytes, claim: Claim, final: bool) -> None:
        expires_at_ms = peek_receipt(claim.receipt).finished_at_ms + int(limits.CLAIM_LIFETIME_S * 1000)
        self._kept[key] = _Kept(claim, final, expires_at_ms)
        while len(self._kept) > limits.CLAIMS_KEPT_MAX:
            self._forget(next(iter(self._kept)))
            self.counts.dropped += 1
            log.warning("more than %d claims wait for a Coordinator; the oldest is dropped", limits.CLAIMS_KEPT_MAX)

    def _forget(self, key: bytes) -> None:
        if self._kept.pop(key, None) is not None:
            self._dirty[key] = None
            self._tell()

    def _tell(self) -> None:
        for event in (self._changed, self._news):
            event.set()

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}{_SUFFIX}"

    def _load(self) -> None:
        """Oldest first. What cannot be read is put aside, not deleted: it may be worth something to somebody who looks."""
        files = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        for file in files:
            try:
                claim = CLAIM.decode(file.read_bytes())
                self._keep(ticket_hash(claim.ticket), claim, final=True)
            except RemoteProtocolError as error:
                log.warning("the claim %s is damaged (%s) and is put aside", file.name, error)
                file.rename(file.with_suffix(".damaged"))
        if self._kept:
            log.info("%d claims of earlier jobs wait for a Coordinator", len(self._kept))

    # -- files

    async def run(self, desk: ClaimDesk) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_files)
            nursery.start_soon(self._hand_in, desk)

    async def _write_files(self) -> None:
        self._running = True
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                with trio.CancelScope(shield=True):  # or what was taken would be written by nobody
                    await trio.to_thread.run_sync(self._write, self._take_dirty())
        finally:
            self._running = False
            self._write(self._take_dirty())  # a moment's work, and the last chance for it

    def _take_dirty(self) -> dict[bytes, Claim | None]:
        """What has to be written, or with None, deleted."""
        dirty, self._dirty = self._dirty, {}
        return {key: kept.claim if (kept := self._kept.get(key)) is not None else None for key in dirty}

    def _write(self, changes: dict[bytes, Claim | None]) -> None:
        """In any thread. What cannot be written is kept in memory only, and said."""
        for key, claim in changes.items():
            try:
                if claim is None:
                    self._path(key).unlink(missing_ok=True)
                else:
                    write_atomically(self._path(key), CLAIM.encode(claim), flush=False)
            except OSError as error:
                log.error("the claim %s cannot be kept on disk: %s", key.hex()[:16], error.strerror)

    # -- handing in

    async def _hand_in(self, desk: ClaimDesk) -> None:
        failures = 0
        while True:
            await self._wait_final()
            await trio.sleep(self._hand_in_after_s)
            try:
                all_answered = await self._hand_in_all(desk)
            except (ArchipelagError, OSError, trio.TooSlowError) as error:
                log.debug("claims wait: %s", str(error) or type(error).__name__)
                all_answered = False
            failures = 0 if all_answered else failures + 1
            if failures:
                await trio.sleep(min(_RETRY_MAX_S, _RETRY_MIN_S * 2 ** min(failures, 10)) * self._rng.uniform(0.5, 1.0))

    async def _wait_final(self) -> None:
        while True:
            self._expire()
            if any(kept.final for kept in self._kept.values()):
                return
            self._news = trio.Event()
            await self._news.wait()

    def _expire(self) -> None:
        now_ms = self._clock_ms()
        for key in [key for key, kept in self._kept.items() if kept.expires_at_ms < now_ms]:
            self._forget(key)
            self.counts.expired += 1
            log.warning("a claim that no Coordinator settled in time has expired")

    async def _hand_in_all(self, desk: ClaimDesk) -> bool:
        """Each final one once; whether all of them are settled now."""
        all_answered = True
        for key, kept in list(self._kept.items()):
            if not kept.final or self._kept.get(key) is not kept:
                continue
            answer = await desk.claim(kept.claim)
            if answer.ticket_hash != key:
                raise RemoteProtocolError("the Coordinator answered another claim")
            all_answered = self._take_answer(key, kept, answer) and all_answered
        return all_answered

    def _take_answer(self, key: bytes, kept: _Kept, answer: ClaimAnswer) -> bool:
        if answer.verdict is Verdict.LATER:
            log.debug("the Coordinator cannot settle now: %s", answer.reason)
            return False
        if self._kept.get(key) is kept:
            self._forget(key)
        if answer.verdict is Verdict.SETTLED:
            self.counts.settled += 1
            self.counts.paid_micros += answer.paid_micros
        else:
            self.counts.refused += 1
            log.warning("a Coordinator refuses a claim: %s", answer.reason)
        return True


class SettleClient:
    """A ClaimDesk over libp2p: one stream to the Coordinator, opened when there is something to say and kept while it lasts."""

    def __init__(
        self, host: Host, coordinator: Callable[[], str], hello: Callable[[], Hello], check: Callable[[Hello, str], object]
    ) -> None:
        """``coordinator``: peer id of the one that this node is joined to, empty while there is none. ``check`` raises unless a Hello comes
        from a Coordinator of our network."""
        self._host, self._coordinator, self._hello, self._check = host, coordinator, hello, check
        self._stream: FrameStream | None = None
        self.sessions_total = 0

    def __repr__(self) -> str:
        return f"<SettleClient {'open' if self._stream is not None else 'closed'}, {self.sessions_total} sessions>"

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[SettleClient]:
        """Leaving ends the stream."""
        try:
            yield self
        finally:
            self._drop()

    async def claim(self, claim: Claim) -> ClaimAnswer:
        stream = self._stream
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                if stream is None or stream.remote_peer != self._coordinator():
                    stream = await self._open()
                await stream.send(claim)
                answer = await stream.receive()
            if not isinstance(answer, ClaimAnswer):
                raise RemoteProtocolError(f"{type(answer).__name__} is no answer to a claim")
        except BaseException:
            self._drop()
            raise
        return answer

    async def _open(self) -> FrameStream:
        self._drop()
        while not self._coordinator():
            await trio.sleep(_AWAY_S)
        peer = self._coordinator()
        self._stream = stream = await self._host.open(peer, SETTLE_PROTOCOL, SETTLE)
        self._check(await exchange_hello(stream, self._hello()), peer)
        self.sessions_total += 1
        return stream

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.abort()
            self._stream = None


