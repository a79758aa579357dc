"""One job on a pipeline, as the node of its driver keeps it: the ticket that opens its sequences, and what each stage spent on it."""

from __future__ import annotations

from collections.abc import Callable

from protocol import limits
from protocol.errors import Code, Refused
from protocol.messages import StageUse
from protocol.stage_messages import StageTime
from protocol.tickets import peek_ticket


class PipelineJob:
    """One job on a route; the JobRoute that the engine is given. ``broken(index, boot, code, message)`` tells its holder, ``fail`` ends
    it."""

    def __init__(
        self, ticket: bytes, broken: Callable[[int, int, Code, str], None], fail: Callable[[Refused], None]
    ) -> None:
        self.data, self.ticket = ticket, peek_ticket(ticket)
        self.broken, self.fail = broken, fail
        self.wire_us = 0
        self._uses: dict[str, tuple[int, int]] = {}

    def __repr__(self) -> str:
        return f"<PipelineJob {self.ticket.job_id} over {len(self.ticket.route)} stages>"

    @property
    def stages(self) -> int:
        return len(self.ticket.route)

    def mend(self, ticket: bytes) -> None:
        """Raises Refused(BAD_TICKET) for a ticket that is for another job, Cargo or driver."""
        newer = peek_ticket(ticket)
        for name in ("job_id", "cargo", "content_hash", "driver", "holder", "activations"):
            if getattr(newer, name) != getattr(self.ticket, name):
                raise Refused(Code.BAD_TICKET, f"a mended route's ticket names another {name}")
        self.data, self.ticket = ticket, newer

    def note(self, times: tuple[StageTime, ...], lap_us: int) -> None:
        for peer, time in zip(self.ticket.route, times, strict=False):
            compute, held = self._uses.get(peer, (0, 0))
            self._uses[peer] = compute + time.compute_us, held + time.held_us
        self.wire_us += max(0, lap_us - sum(time.held_us for time in times))

    def uses(self, own_compute_us: int) -> tuple[StageUse, ...]:
        """What each stage of the route has spent on the job, first stage first; stages that were replaced stand before theirs."""
        found = [StageUse(peer, compute, held) for peer, (compute, held) in self._uses.items() if peer not in self.ticket.route]
        for peer in self.ticket.route[:-1]:
            compute, held = self._uses.get(peer, (0, 0))
            found.append(StageUse(peer, compute, held))
        found.append(StageUse(self.ticket.driver, own_compute_us, own_compute_us))
        return tuple(found[-limits.ROUTE_STAGES_MAX :])
