"""An Island's side of counts: a job whose holder has to sign for what it gets (protocol/counts.py), as the job's task waits for it."""

from __future__ import annotations

import trio

from protocol import limits
from protocol.counts import CountGuard
from protocol.errors import Code, Refused
from protocol.tickets import Ticket


class JobMeter:
    """Of one job. ``hear`` is called by the reader of the stream, all else by the job's task."""

    def __init__(self, ticket: Ticket, envelope: bytes) -> None:
        self.guard = CountGuard(ticket, envelope)
        self.waited_s = 0.0  # for signatures, altogether: the holder does not pay for that
        self._heard = trio.Event()

    def __repr__(self) -> str:
        return f"<JobMeter {self.guard!r}>"

    def hear(self, count: bytes) -> None:
        """Raises RemoteProtocolError: the holder has broken the protocol."""
        self.guard.hear(count)
        self._heard.set()
        self._heard = trio.Event()

    async def wait_room(self) -> int:
        """How many tokens may leave now, at least one. Raises Refused(UNSIGNED) when the holder does not sign in time."""
        if self.guard.room <= 0:
            await self._wait_signed()
        return self.guard.room

    async def _wait_signed(self) -> None:
        since_s = trio.current_time()
        try:
            with trio.fail_after(limits.COUNT_WAIT_S):
                while self.guard.room <= 0:
                    await self._heard.wait()
        except trio.TooSlowError:
            guard = self.guard
            text = f"the holder has signed for {max(0, guard.signed_tokens)} of {guard.sent_tokens} tokens, and no more comes without"
            raise Refused(Code.UNSIGNED, text) from None
        finally:
            self.waited_s += trio.current_time() - since_s

    async def wait_settled(self) -> bool:
        """Whether the holder has signed for everything, at the latest COUNT_FINAL_S from now."""
        with trio.move_on_after(limits.COUNT_FINAL_S):
            while not self.guard.is_settled:
                await self._heard.wait()
        return self.guard.is_settled
